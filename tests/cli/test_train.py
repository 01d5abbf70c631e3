"""``sae-lens-auxk train`` on a tiny model: its summary, and what a signal leaves."""

import os
import re
import resource
import signal
import time
from collections.abc import Callable
from math import gcd
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sae_lens import SAE, LanguageModelSAETrainingRunner, SAETrainer
from safetensors.torch import load_file

from sae_lens_auxk import cli
from sae_lens_auxk.saelens import evaluation, interruption
from tests import tiny_files
from tests.fuzz.test_shared import newest


def flags_in(folder: Path) -> list[str]:
    given = tiny_files.write(folder)
    return [*given, "--n_batches_in_buffer", "4", "--n_eval_batches", "1"]


def train(flags: list[str], **fields: Any) -> int:
    given = [str(part) for name, value in fields.items() for part in (f"--{name}", value)]
    torch.manual_seed(0)
    return cli.main(["train", *flags, *given])


@pytest.fixture
def at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], Any]], None]:
    """Do something in the middle of a trainer's n-th step."""

    def watch(n: int, do: Callable[[], Any]) -> None:
        own: Any = SAETrainer._train_step
        steps: list[int] = []

        def step(self: Any, *args: Any, **keywords: Any) -> Any:
            steps.append(self.n_training_steps)
            if len(steps) == n:
                do()
            return own(self, *args, **keywords)

        monkeypatch.setattr(SAETrainer, "_train_step", step)

    return watch


@pytest.mark.oldest
@pytest.mark.parametrize(
    "changed",
    [{}, {"feature_sampling_window": 7}, {"train_batch_size_tokens": 32}],
)
def test_the_silent_latents_are_of_as_many_samples_as_the_firing_rates(
    changed: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where a run resumes with another window or batch size.

    Every rate is a count divided by the number of samples.
    """
    flags = flags_in(tmp_path)
    first = {"feature_sampling_window": 30, "checkpoint_path": tmp_path / "checkpoints"}
    assert train(flags, **first, n_checkpoints=1) == 0
    fields = {**first, **changed, "resume_from_checkpoint": newest(tmp_path)}
    assert train(flags, **fields, output_path=tmp_path / "output") == 0
    said = re.findall(r", (\d+) in the last (\d+) of training", capsys.readouterr().out)
    n_silent, n_samples = map(int, said[-1])
    rates = 10 ** load_file(tmp_path / "output" / "sparsity.safetensors")["sparsity"].double()
    counts = rates * n_samples
    torch.testing.assert_close(counts, counts.round(), rtol=0, atol=1e-2)
    assert gcd(n_samples, *counts.round().int().tolist()) == 1
    assert n_silent == int((counts.round() == 0).sum()) > 0


@pytest.mark.parametrize("number", interruption.SIGNALS)
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(
    number: signal.Signals,
    at_step: Callable[[int, Callable[[], Any]], None],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """The run that resumes ends with the weights of one that was never interrupted."""
    flags = [*flags_in(tmp_path), "--store_batch_size_prompts", "4"]
    assert train(flags, checkpoint_path=tmp_path / "c", output_path=tmp_path / "whole") == 0
    before = {number: signal.getsignal(number) for number in interruption.SIGNALS}
    at_step(5, lambda: signal.raise_signal(number))
    fields = {"checkpoint_path": tmp_path / "checkpoints", "output_path": tmp_path / "output"}
    assert train(flags, **fields) == 128 + number
    assert {number: signal.getsignal(number) for number in interruption.SIGNALS} == before
    checkpoint = newest(tmp_path)
    assert checkpoint is not None
    assert checkpoint.name == str(5 * 64)
    error = capfd.readouterr().err
    assert error.count(interruption.AGAIN) == (number == signal.SIGINT)
    said = (
        f"\ninterrupted. Resume from its last checkpoint with --resume_from_checkpoint {checkpoint}"
    )
    assert error.endswith(f"{said}.\n")
    assert not (tmp_path / "output").exists()
    assert train(flags, **fields, resume_from_checkpoint=checkpoint) == 0
    weights = [
        load_file(tmp_path / name / "sae_weights.safetensors") for name in ("whole", "output")
    ]
    for name, value in weights[0].items():
        assert torch.equal(value, weights[1][name]), name


def test_a_second_signal_ends_it_at_once(
    at_step: Callable[[int, Callable[[], Any]], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    at_step(5, lambda: [signal.raise_signal(signal.SIGINT) for _ in range(2)])
    assert train(flags_in(tmp_path), checkpoint_path=tmp_path / "checkpoints") == 130
    assert capsys.readouterr().err.endswith(
        "interrupted. It had no checkpoint yet: start it again.\n"
    )


def test_a_scheduler_may_send_sigterm_twice(
    at_step: Callable[[int, Callable[[], Any]], None], tmp_path: Path
) -> None:
    """To torchrun, which passes it on, and to its processes: the second comes in a slow step."""

    def both() -> None:
        signal.raise_signal(signal.SIGTERM)
        time.sleep(0.2)
        signal.raise_signal(signal.SIGTERM)

    at_step(5, both)
    assert train(flags_in(tmp_path), checkpoint_path=tmp_path / "checkpoints") == 143
    assert newest(tmp_path).name == str(5 * 64)  # type: ignore[union-attr]


def test_an_ignored_signal_is_still_ignored(
    at_step: Callable[[int, Callable[[], Any]], None], tmp_path: Path
) -> None:
    """A shell starts what a script puts in the background with SIGINT ignored."""
    at_step(5, lambda: signal.raise_signal(signal.SIGINT))
    own = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert train(flags_in(tmp_path), checkpoint_path=tmp_path / "checkpoints") == 0
    finally:
        signal.signal(signal.SIGINT, own)


def test_a_signal_in_the_final_checkpoint_ends_it_unmeasured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own: Any = LanguageModelSAETrainingRunner.save_checkpoint

    def save(self: Any, checkpoint_path: Path) -> None:
        signal.raise_signal(signal.SIGTERM)
        own(self, checkpoint_path)

    monkeypatch.setattr(LanguageModelSAETrainingRunner, "save_checkpoint", save)
    output = tmp_path / "output"
    fields = {"checkpoint_path": tmp_path / "checkpoints", "save_final_checkpoint": "true"}
    assert train(flags_in(tmp_path), output_path=output, **fields) == 143
    said = f"\ninterrupted. The SAE is in {output}; it was not measured.\n"
    assert capsys.readouterr().err.endswith(said)
    assert {"sae_weights.safetensors"} <= {*os.listdir(output)}
    assert "evaluation.json" not in os.listdir(output)


def test_an_interruption_without_a_place_for_its_checkpoint_is_one_line(
    at_step: Callable[[int, Callable[[], Any]], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Such a run is not refused, as it plans no checkpoint."""
    (tmp_path / "file").write_text("mine")
    at_step(5, lambda: signal.raise_signal(signal.SIGTERM))
    assert train(flags_in(tmp_path), checkpoint_path=tmp_path / "file") == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert "Not a directory" in last
    assert last.endswith("It had no checkpoint yet: start it again.")


def test_a_signal_while_a_checkpoint_is_saved_waits_for_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    own: Any = LanguageModelSAETrainingRunner.save_checkpoint
    saved: list[str] = []

    def save(self: Any, checkpoint_path: Path) -> None:
        if not saved:
            signal.raise_signal(signal.SIGTERM)
        own(self, checkpoint_path)
        saved.append(checkpoint_path.name)

    monkeypatch.setattr(LanguageModelSAETrainingRunner, "save_checkpoint", save)
    fields = {"checkpoint_path": tmp_path / "checkpoints", "n_checkpoints": 3}
    assert train(flags_in(tmp_path), **fields) == 143
    assert [int(name) for name in saved] == [11 * 64, 12 * 64]
    assert newest(tmp_path).name == str(12 * 64)  # type: ignore[union-attr]


@pytest.mark.parametrize("stage", ["__init__", "run"])
def test_a_signal_before_the_first_step_is_one_line(
    stage: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(LanguageModelSAETrainingRunner, stage, interrupted)
    assert train(flags_in(tmp_path), checkpoint_path=tmp_path / "checkpoints") == 130
    assert capsys.readouterr().err.endswith(
        "interrupted. It had no checkpoint yet: start it again.\n"
    )


@pytest.mark.parametrize(
    ("error", "status"),
    [(KeyboardInterrupt(), 130), (OSError("full"), 2), (ValueError("no text"), 2)],
)
def test_what_ends_it_while_it_is_measured_is_no_reason_to_train_again(
    error: BaseException,
    status: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def measured(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr("sae_lens_auxk.saelens.evaluation.run_evals", measured)
    output = tmp_path / "output"
    assert train(flags_in(tmp_path), output_path=output) == status
    assert (output / "sae_weights.safetensors").is_file()
    said = capsys.readouterr().err
    assert said.endswith(f". The SAE is in {output}; it was not measured.\n")
    assert "checkpoint" not in said.splitlines()[-1]


def test_a_full_disk_keeps_the_sae_and_says_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own: Any = evaluation.write_json

    def write(path: Path, content: Any) -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
        try:
            own(path, content)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(evaluation, "write_json", write)
    output = tmp_path / "output"
    assert train(flags_in(tmp_path), output_path=output) == 2
    said = capsys.readouterr()
    assert "explained variance  0." in said.out
    *_, last = said.err.splitlines()
    assert f"'{output / 'evaluation.json'}'. The SAE is in {output}; what was measured" in last
    assert SAE.load_from_disk(output).cfg.architecture() == "topk"
    assert not [name for name in os.listdir(output) if "evaluation" in name]


@pytest.mark.parametrize("row", ["", None, 3, "w1 w2"])
def test_text_that_cannot_be_read_is_one_line(
    row: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """SAELens reads it when the training asks for it."""
    flags = flags_in(tmp_path)
    Dataset.from_list([{"text": row}] * 50).to_parquet(tmp_path / "data" / "train.parquet")
    assert train(flags, checkpoint_path=tmp_path / "checkpoints") == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("sae-lens-auxk: error: ")
    assert last.endswith(". It had no checkpoint yet: start it again.")
    assert ".. " not in last


@pytest.mark.parametrize("n_bytes", [0, 10_000])
def test_a_full_disk_is_one_line(
    n_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """At the weights, and at the trainer's state: an error of Rust's, and one of torch's."""
    own: Any = SAETrainer.save_checkpoint

    def save(self: Any, **keywords: Any) -> None:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, limits[1]))
        try:
            own(self, **keywords)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(SAETrainer, "save_checkpoint", save)
    fields = {"n_checkpoints": 1, "checkpoint_path": tmp_path / "checkpoints"}
    assert train(flags_in(tmp_path), **fields) == 2
    *_, last = capsys.readouterr().err.splitlines()
    assert last.startswith("sae-lens-auxk: error: ")
    assert last.endswith("It had no checkpoint yet: start it again.")
