"""What a comparison writes stays in its folder, and a folder that is not its own stays as it is."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from sae_lens_auxk import cli
from sae_lens_auxk.compare import effect
from sae_lens_auxk.compare.run import run_comparison
from tests.compare.conftest import tiny
from tests.compare.test_run import fail_to_build

COMMAND = (
    "compare --effect --aux_variant none auxk --k 2 --seeds 0 1 --d_sae 24 --training_samples 320 "
    "--batch_size 32 --dead_after 128 --eval_samples 64 --n_features 32 --d_in 12"
)


def state(folder: Path) -> dict[str, Any]:
    """What there is, with its time and content."""
    return {
        str(path): (path.lstat().st_mtime_ns, path.read_bytes() if path.is_file() else None)
        for path in [folder, *folder.rglob("*")]
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, set[str]]:
    """A comparison with one seed, of which a case failed, and every name that one with two seeds
    opens or renames."""
    names: set[str] = set()
    folder = tmp_path_factory.mktemp("made") / "out"
    with pytest.MonkeyPatch.context() as patch:
        fail_to_build(patch, "auxk")
        run_comparison(tiny(training_samples=320, eval_samples=64), folder)
    both = folder.with_name("both")
    shutil.copytree(folder, both)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(effect, "MIN_PAIRS", 1)
        for name in ("open", "replace", "rename", "mkdir"):
            patch.setattr(os, name, _noted(getattr(os, name), both, names))
        assert cli.main([*COMMAND.split(), "--output", str(both)]) == 0
    names |= {str(path.relative_to(both)) for path in both.rglob("*")}
    random = re.compile(r"\.[0-9a-f]{16}\.partial$")
    names -= {".", *sorted(name for name in names if name.endswith(".png"))[1:]}
    return folder, {name for name in names if not random.search(name)}


def _noted(function: Any, folder: Path, names: set[str]) -> Any:
    def noted(*args: Any, **keywords: Any) -> Any:
        for path in args:
            if isinstance(path, str | Path) and Path(path).is_relative_to(folder):
                names.add(str(Path(path).relative_to(folder)))
        return function(*args, **keywords)

    return noted


def test_no_link_in_a_comparison_is_followed_out_of_it(
    made: tuple[Path, set[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(effect, "MIN_PAIRS", 1)
    folder, names = made
    known = {".lock", "results.json", "report.md", "report.html", "figures", "runs"}
    known |= {f"runs/seed-1{end}" for end in ("", ".lock", ".partial")}
    known |= {f"runs/seed-0/{case}-auxk-topk-k-2" for case in ("none", "auxk")}
    known |= {f"runs/seed-0/none-auxk-topk-k-2/{kind}.safetensors" for kind in ("lives", "effects")}
    assert known <= names
    assert any(name.startswith("figures/") for name in names)
    statuses: dict[str, list[int]] = {}
    for i, name in enumerate(sorted(names)):
        if not (folder / name).parent.is_dir():
            continue
        kinds = ("file", "folder", "nowhere", "hard")
        for j, kind in enumerate(kinds[: 1 if name.count("/") > 2 else None]):
            there, outside = tmp_path / f"{i} {j}", tmp_path / f"{i} {j} outside"
            shutil.copytree(folder, there)
            for inner in ("file", "folder/results.json", "folder/seed-0.lock", "folder/pareto.png"):
                (outside / inner).parent.mkdir(parents=True, exist_ok=True)
                (outside / inner).write_text("theirs")
            path = there / name
            if path.is_dir():  # the link leads to what was there
                shutil.copytree(path, outside / "folder", dirs_exist_ok=True)
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            if kind == "hard":
                path.hardlink_to(outside / "file")
            else:
                path.symlink_to(outside / kind)
            before = state(outside)
            for args in (["compare", "--report_only"], [*COMMAND.split(), "--output"]):
                statuses.setdefault(f"{name} {kind}", []).append(cli.main([*args, str(there)]))
                assert state(outside) == before, (name, kind, args)
                error = capsys.readouterr().err
                if statuses[f"{name} {kind}"][-1] == 2:
                    assert error.count("\n") == 1, error
    # The report of what is there says that a case failed.
    assert {status for pair in statuses.values() for status in pair} == {0, 1, 2}
    # A link under the name of a report is replaced, and one where a folder belongs is refused.
    assert statuses["report.md file"] == [1, 0]
    assert statuses["figures folder"] == statuses[".lock file"] == [2, 2]
    assert statuses["report.md hard"] == statuses[".lock hard"] == [1, 0]
    for name in ("runs", "runs/seed-0", "runs/seed-0/auxk-auxk-topk-k-2"):
        assert statuses[f"{name} folder"] == [1, 2]
    assert statuses["runs/seed-1.lock nowhere"] == [1, 2]


@pytest.mark.parametrize("option", ["--output", "--report_only"])
@pytest.mark.parametrize(
    "files",
    [
        {".lock": "theirs", "thesis.tex": ""},
        {".lock": "theirs"},
        {".lock": "", "thesis.tex": ""},
        {".lock": "", "results.json": "[]"},
        {".lock": "", "results.json": '{"version": 1, "runs": []}', "runs/seed-0.lock": ""},
        {"runs/seed-0.lock": "", ".results.json.mine.partial": "theirs"},
    ],
)
def test_a_foreign_folder_stays_as_it_is(
    option: str, files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    before = state(tmp_path)
    assert cli.main(["compare", option, str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert state(tmp_path) == before


@pytest.mark.parametrize(
    "forged",
    [
        {"folder": "../outside/sae"},
        {"folder": "{outside}/sae"},
        {"folder": "runs/seed-0/../../../outside/sae"},
        {"folder": "runs/seed-0/.."},
        {"folder": "runs/seed-1/none-auxk-topk-k-2"},
        {"folder": "runs/seed-0/link"},
        {"folder": "runs/seed-0"},
        {"folder": "runs/seed-0/of-no-case"},
        {"folder": ""},
        {"folder": None},
        {"folder": "runs/seed-1/none-auxk-topk-k-2", "seed": 1},
    ],
)
def test_a_pass_has_no_sae_elsewhere(
    forged: dict[str, Any],
    made: tuple[Path, set[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(effect, "MIN_PAIRS", 1)
    there, outside = tmp_path / "there", tmp_path / "outside"
    shutil.copytree(made[0].with_name("both"), there)
    shutil.copytree(there / "runs" / "seed-0" / "none-auxk-topk-k-2", outside / "sae")
    (outside / "sae" / "effects.safetensors").unlink()
    (there / "runs" / "seed-0" / "link").symlink_to(outside / "sae")
    path = there / "runs" / "seed-0" / "pass.json"
    runs = json.loads(path.read_text())
    runs[0] |= {
        key: value.format(outside=outside) if isinstance(value, str) else value
        for key, value in forged.items()
    }
    path.write_text(json.dumps(runs))
    before = state(outside), state(there)
    assert cli.main([*COMMAND.split(), "--output", str(there)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1, error
    assert "seed-0" in error
    assert state(outside) == before[0]
    assert {*state(there)} - {*before[1]} <= {str(there / ".lock")}
