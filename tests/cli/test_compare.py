"""The command: flags, files, refusals, Ctrl-C."""

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from sae_lens_auxk import cli, processes
from sae_lens_auxk.cli import compare as command
from sae_lens_auxk.compare import plan, run
from sae_lens_auxk.compare.checks import resolve
from sae_lens_auxk.compare.config import Comparison
from sae_lens_auxk.compare.files import read_results
from sae_lens_auxk.compare.locks import claim_if_free
from sae_lens_auxk.compare.report.summary import answer
from sae_lens_auxk.files import write_json
from sae_lens_auxk.losses.registry import AUX_LOSSES
from tests import fresh
from tests.compare.conftest import tiny
from tests.compare.fake_results import fake_results


@pytest.fixture
def asked_for(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the command would run: (comparison, folder, command line)."""
    calls: list[Any] = []

    def keep(comparison: Any, folder: Path, line: str, *_: Any) -> Path:
        calls.append((comparison, folder, line))
        return folder / "report.html"

    monkeypatch.setattr(command, "run_comparison", keep)
    monkeypatch.setattr(command, "read_results", lambda _: {"runs": [], "groups": []})
    return calls


def test_no_arguments(asked_for: list[Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compare"]) == 0
    assert asked_for == [(resolve(Comparison()), Path("comparison"), "sae-lens-auxk compare")]
    expected = "No answer yet: no run has finished.\nreport  comparison/report.html\n"
    assert capsys.readouterr().out == expected


@pytest.fixture
def two_seeds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The arguments of a comparison of two cases that takes seconds, without a report."""
    monkeypatch.setattr(run, "write_report", lambda _, folder: folder / "report.html")
    monkeypatch.setattr(command, "write_report", lambda _, folder: folder / "report.html")
    flags = (
        "--aux_variant none auxk --k 2 --seeds 0 1 --d_sae 24 --training_samples 1600 "
        "--batch_size 32 --dead_after 128 --eval_samples 256 --n_features 32 --d_in 12 --output"
    )
    return ["compare", *flags.split(), str(tmp_path / "out")]


def test_first_the_plan_is_on_the_terminal_then_the_answers(
    two_seeds: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "FIRST_SECONDS", 0)
    assert cli.main(two_seeds) == 0
    out = capsys.readouterr().out.splitlines()
    lines = [f"{question}: {text}" for question, text in answer(read_results(Path(two_seeds[-1])))]
    lines.append(f"report  {two_seeds[-1]}/report.html")
    assert len(lines) > 4
    assert out[-len(lines) :] == lines
    first, *_, place, estimate = out[: -len(lines)]
    assert first == "2 cases x 2 seeds x 1,600 samples, 24 latents each:"
    assert place == f"results  {two_seeds[-1]}, about 1 MB"
    assert "of training left at the pace of the first steps" in estimate


def test_a_dry_run_touches_nothing(
    two_seeds: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main([*two_seeds, "--dry_run"]) == 0
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out.startswith("2 cases x 2 seeds x 1,600 samples")

    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}

    cli.main([arg for arg in two_seeds if arg != "1"])
    before = files()
    capsys.readouterr()
    assert cli.main([*two_seeds, "--dry_run"]) == 0
    assert "; 1 of 2 seeds finished\n" in capsys.readouterr().out
    assert files() == before

    runs = tmp_path / "out" / "runs"
    (runs / "seed-0").rename(tmp_path / "seed-0")
    (runs / "seed-0.lock").touch()  # as a killed process leaves it
    without = files()
    assert cli.main([*two_seeds, "--dry_run"]) == 0
    assert files() == without
    (runs / "seed-0.lock").unlink()
    (tmp_path / "seed-0").rename(runs / "seed-0")

    assert cli.main([*two_seeds, "--dry_run", "--lr", "9"]) == 2
    assert "holds another comparison: lr is" in capsys.readouterr().err
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").touch()
    assert cli.main(["compare", "--dry_run", "--output", str(tmp_path / "thesis")]) == 2
    assert "does not hold a comparison" in capsys.readouterr().err
    assert files().keys() - before.keys() == {tmp_path / "thesis", tmp_path / "thesis/thesis.tex"}


def test_a_dry_run_loads_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--dry_run", "--model_name", "no/such", "--dataset_path", "no/text", "--output", "no"]
    assert cli.main(["compare", *args]) == 0
    assert "data     no/such, text no/text\n" in capsys.readouterr().out


def test_failed_cases_are_status_1_until_they_are_trained(
    two_seeds: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("my loss")

    folder = two_seeds[-1]
    with monkeypatch.context() as patch:
        patch.setitem(AUX_LOSSES, "auxk", replace(AUX_LOSSES["auxk"], function=broken))
        assert cli.main(two_seeds) == 1
    output = capsys.readouterr()
    assert output.err.count("Traceback") == 2
    last = "Failed: auxk, auxk-topk, k 2, seed 1: ZeroDivisionError: my loss\n"
    assert output.err.endswith(last)
    assert output.out.endswith(f"report  {folder}/report.html\n")
    assert cli.main(["compare", "--report_only", folder]) == 1
    output = capsys.readouterr()
    assert output.err.endswith(last)
    assert output.err.count("Traceback") == 0

    assert cli.main(two_seeds) == 0
    assert "ailed" not in capsys.readouterr().err
    assert cli.main(["compare", "--report_only", folder]) == 0


def test_only_rank_0_has_the_status_of_failed_cases(
    two_seeds: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """torchrun stops the other ranks when one has another status than 0."""

    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("my loss")

    monkeypatch.setitem(AUX_LOSSES, "auxk", replace(AUX_LOSSES["auxk"], function=broken))
    monkeypatch.setattr(processes, "be_quiet", lambda: None)
    monkeypatch.setattr(processes, "see_own_gpu_only", lambda: None)
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in (1, 0):
        monkeypatch.setenv("RANK", str(rank))
        assert cli.main(two_seeds) == (1 if rank == 0 else 0)


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
        (["--report_only", "nowhere", "--dry_run"], "not allowed with argument"),
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
        ('{"version": 1, "runs": []}', "damaged: results has no name"),
        ('{"runs": [5], "groups": {}}', "not the results of a comparison"),
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


def test_a_bug_is_a_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*args: Any) -> Path:
        return Path(None)  # type: ignore[arg-type]

    monkeypatch.setattr(command, "run_comparison", run)
    with pytest.raises(TypeError):
        cli.main(["compare"])


def test_a_report_alone_trains_nothing(
    asked_for: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = fake_results(cases=("auxk",), ks=(25,), seeds=(0,))
    write_json(tmp_path / "results.json", results)
    monkeypatch.setattr(command, "read_results", read_results)
    reported: list[Any] = []

    def write(results: Any, folder: Path) -> Path:
        with claim_if_free(folder / ".lock") as is_own:
            assert not is_own, "a running comparison could write meanwhile"
        reported.append((results, folder))
        return folder / "report.html"

    monkeypatch.setattr(command, "write_report", write)
    assert cli.main(["compare", "--report_only", str(tmp_path)]) == 0
    assert reported == [(results, tmp_path)]
    assert asked_for == []


def test_the_other_commands_do_not_import_it() -> None:
    fresh.run(
        "import sys; from sae_lens_auxk import cli; cli.main(['--help']); "
        "sys.exit('sae_lens_auxk.compare' in sys.modules)"
    )


def test_autocast_needs_no_value(asked_for: list[Any]) -> None:
    assert cli.main(["compare", "--autocast"]) == 0
    assert asked_for[0][0].autocast is True
