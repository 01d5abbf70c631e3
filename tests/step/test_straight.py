"""How a training step runs through the package: few files, one direction."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch

import sae_lens_auxk
from tests.helpers import TOPK_ARCHITECTURES, build_sae, build_trainer, kill_latents

PACKAGE = Path(sae_lens_auxk.__file__).parent
MAX_FILES = 10
MAX_LINES = 450


class Trace:
    """The files of the package that run, in their order, and which calls which."""

    def __init__(self) -> None:
        self.files: list[str] = []
        self.calls: set[tuple[str, str]] = set()
        self.n_calls = 0

    def note(self, frame: FrameType, event: str, arg: Any) -> None:
        file = _file_of(frame)
        if event != "call" or file is None:
            return
        self.n_calls += 1
        self.files.append(file)
        caller = frame.f_back
        while caller is not None and _file_of(caller) is None:
            caller = caller.f_back
        if caller is not None and _file_of(caller) != file:
            self.calls.add((str(_file_of(caller)), file))

    @property
    def n_moves(self) -> int:
        return sum(a != b for a, b in zip(self.files, self.files[1:], strict=False))


def _file_of(frame: FrameType) -> str | None:
    path = Path(frame.f_code.co_filename)
    return str(path.relative_to(PACKAGE)) if path.is_relative_to(PACKAGE) else None


@contextmanager
def traced() -> Iterator[Trace]:
    trace = Trace()
    sys.setprofile(trace.note)
    try:
        yield trace
    finally:
        sys.setprofile(None)


def trace_of_step(architecture: str, variant: str) -> Trace:
    """A step of SAELens's trainer in which latents are dead, the backward pass and Adam's with it.

    Not the first one, which looks up what stays the same in a run.
    """
    fields: dict[str, Any] = {"aux_variant": variant, "dead_threshold_tokens": 16}
    sae = build_sae(architecture, **fields)
    kill_latents(sae, 9)
    trainer = build_trainer(sae)
    for _ in range(2):
        output = trainer.step(torch.randn(16, 8))
    assert output.metrics["dead_latents"] >= 9
    with traced() as trace:
        trainer.step(torch.randn(16, 8))
    return trace


@pytest.mark.parametrize("variant", ["auxk", "pursuit", "none"])
def test_a_step_runs_through_at_most_ten_files(variant: str) -> None:
    trace = trace_of_step("auxk-topk", variant)
    files = {*trace.files}
    assert f"losses/{variant}.py" in files or variant == "none"
    assert len(files) <= MAX_FILES, sorted(files)
    lines = {name: len((PACKAGE / name).read_text().splitlines()) for name in files}
    assert max(lines.values()) <= MAX_LINES, lines


@pytest.mark.parametrize("variant", ["auxk", "pursuit", "none"])
@pytest.mark.parametrize("architecture", TOPK_ARCHITECTURES)
def test_calls_between_the_files_of_a_sparse_step_have_no_cycle(
    architecture: str, variant: str
) -> None:
    calls = trace_of_step(architecture, variant).calls
    assert ("step/training.py", "step/sparse.py") in calls, "the step was not a sparse one"
    while True:  # take off the files that call no other
        callers = {caller for caller, _ in calls}
        left = {(caller, called) for caller, called in calls if called in callers}
        if left == calls:
            break
        calls = left
    assert not calls, sorted(calls)


if __name__ == "__main__":  # python -m tests.step.test_straight: the figures, to read
    for name in ("auxk", "pursuit", "none"):
        trace = trace_of_step("auxk-topk", name)
        files = sorted({*trace.files})
        print(f"{name}: {len(files)} files, {trace.n_moves} moves, {trace.n_calls} calls: {files}")
