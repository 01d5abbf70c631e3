"""Whole comparisons: what is written, kept, gone on with, and refused."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.saes.sae import SAE

from sae_lens_auxk import files
from sae_lens_auxk.compare import run
from sae_lens_auxk.compare.files import read_results, write_results
from sae_lens_auxk.compare.locks import claim_if_free
from sae_lens_auxk.compare.run import run_comparison
from sae_lens_auxk.compare.seeds import groups_of
from sae_lens_auxk.compare.train import LockstepTrainer, build_sae
from sae_lens_auxk.losses.registry import AUX_LOSSES
from sae_lens_auxk_cli import printable
from tests.compare.conftest import tiny
from tests.compare.test_locks import held

RUN_KEYS = {
    "name",
    "case",
    "architecture",
    "k",
    "seed",
    "status",
    "error",
    "sae_config",
    "folder",
    "training_samples",
    "history",
    "metrics",
    "density",
    "silent_latents",
    "pairs",
    "peeking",
    "found_again_by_age",
}


@pytest.fixture(scope="module", autouse=True)
def _no_report() -> Iterator[None]:
    """The report has tests of its own, and takes longer than these comparisons."""

    def write(results: dict[str, Any], folder: Path) -> Path:
        (folder / "report.html").write_text(str(results["finished"]))
        return folder / "report.html"

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "write_report", write)
        yield


BOTH = tiny(seeds=[0, 1])


@pytest.fixture(scope="module")
def whole(_no_report: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BOTH that nothing has disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    run_comparison(BOTH, folder)
    return folder


def same_runs(*folders: Path) -> bool:
    """But for the time that they took."""
    first, second = (read_results(folder)["runs"] for folder in folders)
    for entry in first + second:
        del entry["metrics"]["ms_per_step"]
    return first == second


def count_passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of SAEs of each pass that is trained from now on."""
    passes: list[int] = []
    fit = LockstepTrainer.fit

    def counted(self: LockstepTrainer) -> Any:
        passes.append(len(self.saes))
        return fit(self)

    monkeypatch.setattr(LockstepTrainer, "fit", counted)
    return passes


@pytest.mark.oldest
def test_what_is_written(tmp_path: Path) -> None:
    comparison = tiny(preset=["saelens"], seeds=[0, 1])
    report = run_comparison(comparison, tmp_path, "the command")
    assert report.read_text() == "True"
    results = read_results(tmp_path)
    assert results["finished"]
    assert results["command"] == "the command"
    assert type(comparison)(**results["comparison"]) == comparison
    assert results["data"]["kind"] == "synthetic"
    assert [entry["seed"] for entry in results["runs"]] == [0, 0, 0, 1, 1, 1]
    for entry in results["runs"]:
        assert set(entry) == RUN_KEYS
        assert (entry["status"], entry["error"]) == ("finished", None)
        assert entry["training_samples"] == 1600
        assert {len(values) for values in entry["history"].values()} == {50}
        metrics = entry["metrics"]
        assert {"explained_variance", "l0", "mse", "dead_fraction", "dense_latents"} <= set(metrics)
        assert {"f1", "mcc", "precision", "recall", "uniqueness", "features_covered"} <= set(
            metrics
        )
        assert metrics["ms_per_step"] > 0
        assert "ce_loss_recovered" not in metrics
        assert sum(entry["density"]["counts"]) + entry["silent_latents"] == 24
        assert metrics["dead_fraction"] == entry["history"]["dead_fraction"][-1]
        assert {"revived", "never_died"} < set(entry["peeking"])
        sae = SAE.load_from_disk(tmp_path / entry["folder"])
        assert sae.cfg.architecture() == "topk"
        assert (tmp_path / entry["folder"] / "sparsity.safetensors").exists()
    assert [group["case"] for group in results["groups"]] == ["SAELens topk", "none", "auxk"]
    assert {group["n_seeds"] for group in results["groups"]} == {2}
    assert not list(tmp_path.rglob("*.partial*"))


def test_cases_see_the_same_weights_and_data_whatever_is_beside_them(tmp_path: Path) -> None:
    run_comparison(tiny(aux_variant=["auxk"]), tmp_path / "alone")
    run_comparison(tiny(preset=["saelens", "variants"]), tmp_path / "beside")
    alone, beside = (
        next(r for r in read_results(tmp_path / name)["runs"] if r["case"] == "auxk")
        for name in ("alone", "beside")
    )
    for entry in (alone, beside):
        del entry["metrics"]["ms_per_step"]
    assert alone == beside


def test_the_same_command_again_trains_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_comparison(tiny(), tmp_path)
    first = read_results(tmp_path)
    passes = count_passes(monkeypatch)
    run_comparison(tiny(), tmp_path)
    assert passes == []
    assert read_results(tmp_path) == first


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_interrupted_and_gone_on_with(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    """What was done before is kept and reported; what comes after is as if nothing happened."""
    folder = tmp_path / "interrupted"
    with monkeypatch.context() as patch:
        passes = count_passes(patch)
        fit = LockstepTrainer.fit

        def interrupted(self: LockstepTrainer) -> Any:
            saes = fit(self)
            if len(passes) == 2:
                raise error
            return saes

        patch.setattr(LockstepTrainer, "fit", interrupted)
        with pytest.raises(error):
            run_comparison(BOTH, folder)
    results = read_results(folder)
    assert not results["finished"]
    statuses = ["finished", "finished", "unfinished", "unfinished"]
    assert [entry["status"] for entry in results["runs"]] == statuses
    assert {group["n_seeds"] for group in results["groups"]} == {1}
    assert (folder / "report.html").read_text() == "False"

    passes = count_passes(monkeypatch)
    run_comparison(BOTH, folder)
    assert passes == [2]
    assert (folder / "report.html").read_text() == "True"
    assert same_runs(folder, whole)


def test_more_seeds_go_on_with_the_same_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_comparison(tiny(), tmp_path)
    passes = count_passes(monkeypatch)
    run_comparison(tiny(seeds=[0, 1]), tmp_path)
    assert passes == [2]
    assert {group["n_seeds"] for group in read_results(tmp_path)["groups"]} == {2}


def test_the_data_are_described_by_the_first_seed_not_by_who_was_last(tmp_path: Path) -> None:
    run_comparison(tiny(seeds=[0, 1], synthetic_model={"seed": None}), tmp_path)
    assert read_results(tmp_path)["data"]["synthetic_model"]["seed"] == 0


def test_fewer_seeds_drop_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_comparison(tiny(seeds=[0, 1]), tmp_path)
    first = read_results(tmp_path)
    passes = count_passes(monkeypatch)
    run_comparison(tiny(seeds=[1]), tmp_path)
    assert passes == []
    assert read_results(tmp_path) == first


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("[{", "cannot be read"),
        ("[]", "is damaged: it has no runs"),
        ("[1]", "is damaged: runs.0=1 is not allowed"),
        ('[{"case": "auxk"}]', "is damaged: runs.0 has no "),
    ],
)
def test_a_pass_that_cannot_be_read_is_named_before_anything_is_trained(
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    text: str | None,
    message: str,
) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    first = read_results(tmp_path)
    file = tmp_path / "runs" / "seed-0" / "pass.json"
    file.unlink() if text is None else file.write_text(text)
    passes = count_passes(monkeypatch)
    with pytest.raises(ValueError, match=f"{file} {message}.* Move .*seed-0 away"):
        run_comparison(BOTH, tmp_path)
    assert passes == []
    assert read_results(tmp_path) == first

    (tmp_path / "runs" / "seed-0").rename(tmp_path / "away")
    run_comparison(BOTH, tmp_path)
    assert passes == [2]


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        '{"version": 1, "runs": []}',
        '{"version": 1, "runs": [5]}',
        '{"version": 1, "runs": [], "comparison": {"seeds": [0]}}',
    ],
)
def test_results_of_something_else_are_left_alone(tmp_path: Path, text: str) -> None:
    (tmp_path / "figures").mkdir()
    for name in ("results.json", "report.md", "figures/mine.png"):
        (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r"results.json is .* Give another --output"):
        run_comparison(tiny(), tmp_path)
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.*")}
    assert files == {"results.json", "report.md", "figures/mine.png"}
    assert {(tmp_path / name).read_text() for name in files} == {text}


def test_results_without_their_saes_are_left_alone(tmp_path: Path) -> None:
    """As they are committed or merged: nothing in the folder could give them again."""
    run_comparison(tiny(), tmp_path)
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    before = (tmp_path / "results.json").read_bytes()
    for comparison in (tiny(), tiny(lr=0.1)):
        with pytest.raises(ValueError, match="whose SAEs are elsewhere"):
            run_comparison(comparison, tmp_path)
    assert (tmp_path / "results.json").read_bytes() == before


def test_another_configuration_is_refused(tmp_path: Path) -> None:
    run_comparison(tiny(), tmp_path)
    before = (tmp_path / "results.json").read_bytes()
    with pytest.raises(ValueError, match="another comparison: lr is 0.002 there and 0.1 now"):
        run_comparison(tiny(lr=0.1), tmp_path)
    assert (tmp_path / "results.json").read_bytes() == before


def test_a_comparison_that_came_to_nothing_may_be_corrected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise FileNotFoundError("no such data set")

    with monkeypatch.context() as patch:
        patch.setattr(run, "source_of", fail)
        with pytest.raises(FileNotFoundError):
            run_comparison(tiny(), tmp_path)
    run_comparison(tiny(lr=0.1), tmp_path)
    assert read_results(tmp_path)["comparison"]["lr"] == 0.1


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="does not hold a comparison"):
        run_comparison(tiny(), tmp_path)


def test_a_pass_that_another_process_is_at_work_on_is_left_to_it(tmp_path: Path) -> None:
    run_comparison(tiny(seeds=[1]), tmp_path)
    with claim_if_free(tmp_path / "runs" / "seed-0.lock"):
        run_comparison(tiny(seeds=[0, 1]), tmp_path)
        statuses = {run["seed"]: run["status"] for run in read_results(tmp_path)["runs"]}
        assert statuses == {0: "unfinished", 1: "finished"}
    run_comparison(tiny(seeds=[0, 1]), tmp_path)
    assert read_results(tmp_path)["finished"]


def test_whoever_is_at_work_keeps_its_configuration(tmp_path: Path) -> None:
    run_comparison(tiny(), tmp_path)
    for finished in tmp_path.glob("runs/seed-*"):
        shutil.rmtree(finished)
    with (
        claim_if_free(tmp_path / "runs" / "seed-0.lock"),
        pytest.raises(ValueError, match="holds another comparison"),
    ):
        run_comparison(tiny(lr=0.1), tmp_path)


def test_who_waits_takes_over_what_a_dead_process_was_at_work_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_comparison(tiny(seeds=[1]), tmp_path)
    ends: list[int | None] = []
    with held(tmp_path / "runs" / "seed-0.lock", seconds=3) as holder:

        def build(config: Any, seed: int) -> Any:
            holder.join(1)  # a process gives up its locks a moment before it has ended
            ends.append(holder.exitcode)
            return build_sae(config, seed)

        monkeypatch.setattr(run, "build_sae", build)
        run_comparison(tiny(seeds=[0, 1]), tmp_path, wait=True)
    assert ends
    assert {*ends} == {9}
    assert read_results(tmp_path)["finished"]


@pytest.mark.parametrize(
    ("left", "content"), [(".results.json.0123456789abcdef.partial", "{half of th"), (".lock", "")]
)
def test_a_kill_at_the_first_write_is_gone_on_from(left: str, content: str, tmp_path: Path) -> None:
    (tmp_path / left).write_text(content)
    run_comparison(tiny(), tmp_path)
    assert read_results(tmp_path)["finished"]
    assert not list(tmp_path.glob(".*"))


def test_a_full_disk_at_the_first_write_is_gone_on_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            run_comparison(tiny(), tmp_path)
    assert not list(tmp_path.iterdir())
    run_comparison(tiny(), tmp_path)
    assert read_results(tmp_path)["finished"]


CPU_FULL = RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")


def fail_to_build(monkeypatch: pytest.MonkeyPatch, *variants: str) -> None:
    """As without memory."""
    build = run.build_sae

    def failing(config: Any, seed: int) -> Any:
        if config.aux_variant in variants:
            raise CPU_FULL
        return build(config, seed)

    monkeypatch.setattr(run, "build_sae", failing)


def fail_in_the_loss(monkeypatch: pytest.MonkeyPatch, *_: str) -> None:
    def broken(*_: Any) -> Any:
        raise ZeroDivisionError("\x1b[2Jmy loss")

    auxk = AUX_LOSSES["auxk"]
    monkeypatch.setitem(AUX_LOSSES, "auxk", replace(auxk, function=broken))


def fail_to_be_finite(monkeypatch: pytest.MonkeyPatch, *_: str) -> None:
    build = run.build_sae

    def broken(config: Any, seed: int) -> Any:
        sae = build(config, seed)
        if config.aux_variant == "auxk":
            sae.b_dec.data.fill_(torch.nan)
        return sae

    monkeypatch.setattr(run, "build_sae", broken)


def fail_in_measuring(monkeypatch: pytest.MonkeyPatch, *_: str) -> None:
    measure = run.measure

    def broken(sae: Any, data: Any, x: Any, log: Any) -> Any:
        if sae.cfg.metadata.training_architecture_details["aux_variant"] == "auxk":
            raise KeyError("no such metric")
        return measure(sae, data, x, log)

    monkeypatch.setattr(run, "measure", broken)


@pytest.mark.parametrize(
    ("fail", "error", "frame"),
    [
        (fail_to_build, f"RuntimeError: {CPU_FULL}", "in failing"),
        (fail_in_the_loss, "ZeroDivisionError: \x1b[2Jmy loss", "in broken"),
        (fail_to_be_finite, "FloatingPointError: the loss is nan at sample 32", "in write_point"),
        (fail_in_measuring, "KeyError: 'no such metric'", "in broken"),
    ],
)
def test_a_failed_case_is_shown_and_kept_and_alone_trained_again(
    fail: Any,
    error: str,
    frame: str,
    whole: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "failed"
    with monkeypatch.context() as patch:
        fail(patch, "auxk")
        run_comparison(BOTH, folder)
    shown = capsys.readouterr().err
    assert "auxk, auxk-topk, k 2, seed 0, failed. Traceback" in shown
    assert "auxk, auxk-topk, k 2, seed 1, failed. Traceback" in shown
    assert "none, auxk-topk" not in shown
    assert "\x1b" not in shown
    results = read_results(folder)
    assert [entry["status"] for entry in results["runs"]] == ["finished", "failed"] * 2
    for entry in results["runs"][1::2]:
        assert entry["error"] == error
        assert frame in entry["traceback"]
        assert entry["traceback"].endswith(f"{error}\n")
        assert printable(entry["traceback"]) in shown
        assert entry["metrics"] == {}
    assert [group["case"] for group in results["groups"]] == ["none"]

    passes = count_passes(monkeypatch)
    run_comparison(BOTH, folder)
    assert passes == [1, 1]
    assert "failed" not in capsys.readouterr().err
    assert same_runs(folder, whole)
    for entry in read_results(folder)["runs"]:
        SAE.load_from_disk(folder / entry["folder"])
    assert not list(folder.rglob("*.partial*"))


def test_what_fails_again_is_kept_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fail_in_the_loss(monkeypatch)
    run_comparison(tiny(), tmp_path)
    passes = count_passes(monkeypatch)
    run_comparison(tiny(), tmp_path)
    assert passes == [1]
    assert [entry["status"] for entry in read_results(tmp_path)["runs"]] == ["finished", "failed"]


def test_an_interrupted_second_try_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fail_in_the_loss(patch)
        run_comparison(tiny(), tmp_path)
    before = read_results(tmp_path)["runs"]

    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(run, "write_pass", stopped)
        with pytest.raises(KeyboardInterrupt):
            run_comparison(tiny(), tmp_path)
    assert read_results(tmp_path)["runs"] == before
    SAE.load_from_disk(tmp_path / (before[0]["folder"] or ""))


def test_where_every_case_failed_the_configuration_may_be_corrected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        fail_to_build(patch, "none", "auxk")
        run_comparison(tiny(seeds=[0, 1]), tmp_path)
    assert {entry["status"] for entry in read_results(tmp_path)["runs"]} == {"failed"}
    run_comparison(tiny(aux_variant=["none"], lr=0.1), tmp_path)
    (entry,) = read_results(tmp_path)["runs"]
    assert entry["status"] == "finished"


def test_a_finished_pass_is_kept_though_the_results_do_not_have_it(tmp_path: Path) -> None:
    """As after a kill between the two."""
    run_comparison(tiny(), tmp_path)
    before = read_results(tmp_path)
    write_results(tmp_path, {**before, "runs": [], "groups": []})
    run_comparison(tiny(), tmp_path)
    assert read_results(tmp_path)["runs"] == before["runs"]


def test_what_another_process_failed_at_meanwhile_is_left_to_the_next_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_in_the_loss(monkeypatch)
    passes = count_passes(monkeypatch)
    source_of = run.source_of

    def other_process_first(comparison: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(run, "source_of", source_of)
            run_comparison(tiny(seeds=[1]), tmp_path / "other")
        (tmp_path / "other/runs/seed-1").rename(tmp_path / "here/runs/seed-1")
        return source_of(comparison)

    monkeypatch.setattr(run, "source_of", other_process_first)
    run_comparison(tiny(seeds=[0, 1]), tmp_path / "here")
    assert passes == [2, 2]  # of seed 1 in the other, of seed 0 here
    statuses = [entry["status"] for entry in read_results(tmp_path / "here")["runs"]]
    assert statuses == ["finished", "failed"] * 2


def test_groups_by_hand() -> None:
    def entry(seed: int, ev: float | None, status: str = "finished") -> dict[str, Any]:
        peeking = {name: {"n_latents": seed} for name in ("revived", "never_died")}
        return {
            "case": "a",
            "architecture": "topk",
            "k": 2,
            "status": status,
            "metrics": {"explained_variance": ev, "l0": 2.0},
            "peeking": peeking,
        }

    (group,) = groups_of([entry(0, 0.5), entry(1, 0.7), entry(2, None), entry(9, 9, "failed")])
    assert group["n_seeds"] == 3
    assert group["mean"] == {"explained_variance": pytest.approx(0.6), "l0": 2.0}
    assert group["std"] == {"explained_variance": pytest.approx(0.02**0.5), "l0": 0.0}
    assert group["peeking"]["revived"] == {"mean": {"n_latents": 1}, "std": {"n_latents": 1}}
    (single,) = groups_of([entry(0, 0.5)])
    assert single["std"]["explained_variance"] is None
