"""The command: flags, files, refusals, Ctrl-C."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from sae_lens_auxk import cli
from sae_lens_auxk.cli import compare as command
from sae_lens_auxk.compare.checks import resolve
from sae_lens_auxk.compare.config import Comparison
from tests.compare.conftest import tiny


@pytest.fixture
def asked_for(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the command would run: (comparison, folder, command line)."""
    calls: list[Any] = []

    def keep(comparison: Any, folder: Path, line: str, waits: bool) -> Path:  # noqa: ARG001
        calls.append((comparison, folder, line))
        return folder / "report.html"

    monkeypatch.setattr(command, "run_comparison", keep)
    return calls


def test_no_arguments(asked_for: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare"]) == 0
    assert asked_for == [(resolve(Comparison()), Path("comparison"), "sae-lens-auxk compare")]
    assert capsys.readouterr().out == "report  comparison/report.html\n"


def test_flags(asked_for: list[Any]) -> None:
    flags = (
        "--preset saelens biases --aux_variant auxk straight_through --aux_loss_coefficient 0.1 1 "
        "--architecture auxk-topk auxk-batchtopk --k 2 3 --seeds 4 5 --d_sae 24 "
        "--training_samples 1600 --batch_size 32 --lr 0.01 --dead_after 128 --eval_samples 256 "
        "--autocast true --n_features 32 --d_in 12 --output here"
    )
    assert cli.main(["compare", *flags.split()]) == 0
    expected = tiny(
        preset=["saelens", "biases"],
        aux_variant=["auxk", "straight_through"],
        aux_loss_coefficient=[0.1, 1.0],
        architecture=["auxk-topk", "auxk-batchtopk"],
        k=[2, 3],
        seeds=[4, 5],
        lr=0.01,
        autocast=True,
    )
    assert asked_for == [(expected, Path("here"), f"sae-lens-auxk compare {flags}")]


def test_flags_win_over_the_file(asked_for: list[Any], tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("k: [3]\nlr: 0.5\ncases: [{aux_variant: none}]\nsynthetic_model: {seed: 1}\n")
    assert cli.main(["compare", "--config", str(file), "--lr", "0.25"]) == 0
    comparison = asked_for[0][0]
    assert (comparison.k, comparison.lr) == ([3], 0.25)
    assert comparison.cases == [{"aux_variant": "none"}]
    assert comparison.synthetic_model == {"seed": 1}


def test_every_flag_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["compare", "--help"])
    assert exit_info.value.code == 0
    text = " ".join(capsys.readouterr().out.split("options:", 1)[1].split())
    for field in fields(Comparison):
        if field.name not in ("cases", "sae", "language_model"):
            description = text.split(f" --{field.name} ", 1)[1].split("(default", 1)[0]
            assert len(description) > 20, f"{field.name} has no help: {description!r}"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--sedes", "1"], "--sedes is not a field of compare. Did you mean --seeds?"),
        (["--presets", "x"], "Did you mean --preset?"),
        (["--k", "0"], "k=0 is not allowed"),
        (["--k", "x"], "invalid int value"),
        (["--config", "nowhere.yaml"], "there is no such file"),
        (["--device", "meta"], "device='meta' is not allowed: it must be cpu, cuda"),
        (["--report_only", "nowhere"], "nowhere holds no comparison"),
    ],
)
def test_refusals_are_one_line_and_status_2(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["compare", *args]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"version": 1, "runs": []}', "malformed: "),
        ('{"version": 1, "runs": [5], "groups": {}}', "not the results of a comparison"),
    ],
)
def test_results_that_cannot_be_reported(
    content: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.json").write_text(content)
    assert cli.main(["compare", "--report_only", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"{tmp_path / 'results.json'} is {message}" in error
    assert error.count("\n") == 1


def test_ctrl_c_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run_comparison", interrupted)
    assert cli.main(["compare", "--seeds", "7"]) == 130
    error = capsys.readouterr().err
    assert "sae-lens-auxk compare --seeds 7" in error
    # A second Ctrl-C stops the report as well.
    assert "report" not in error


def test_a_lack_of_memory_is_one_line_and_not_status_0(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> Path:
        raise MemoryError("seed 0: every case ran out of memory")

    monkeypatch.setattr(command, "run_comparison", full)
    assert cli.main(["compare"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_bug_is_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*args: Any) -> Path:
        return Path(None)  # type: ignore[arg-type]

    monkeypatch.setattr(command, "run_comparison", run)
    with pytest.raises(TypeError):
        cli.main(["compare"])


def test_a_report_alone_trains_nothing(
    asked_for: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "results.json").write_text('{"version": 1, "runs": []}')
    reported: list[Any] = []

    def write(results: Any, folder: Path) -> Path:
        reported.append((results, folder))
        return folder

    monkeypatch.setattr(command, "write_report", write)
    assert cli.main(["compare", "--report_only", str(tmp_path)]) == 0
    assert reported == [({"version": 1, "runs": []}, tmp_path)]
    assert asked_for == []


def test_the_other_commands_do_not_import_it() -> None:
    code = (
        "import sys; from sae_lens_auxk import cli; cli.main(['--help']); "
        "sys.exit('sae_lens_auxk.compare' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_autocast_needs_no_value(asked_for: list[Any]) -> None:
    assert cli.main(["compare", "--autocast"]) == 0
    assert asked_for[0][0].autocast is True
