"""A training run that is told to stop ends after its step, with a checkpoint that resumes.

SAELens's own handler stops it anywhere in a step, and writes neither weights nor the trainer's
state.
"""

import shlex
import signal
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sae_lens_auxk.saelens.names import RUNNER_CFG_FILENAME, InterruptedException
from sae_lens_auxk_cli import printable

SIGNALS = (signal.SIGINT, signal.SIGTERM)
INTERRUPTED = 130
"""The exit status of a command that was interrupted, as a shell gives it."""


@contextmanager
def noted_signals() -> Generator[list[int]]:
    """Note SIGINT and SIGTERM in a list. A second one ends the process as if nothing noted it."""
    noted: list[int] = []
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def note(number: int, frame: Any) -> None:  # noqa: ARG001
        noted.append(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    for number in SIGNALS:
        signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def fit(trainer: Any, told_to_stop: Sequence[Any]) -> Any:
    """Train; once ``told_to_stop`` is not empty, save a checkpoint after the step.

    Raises:
        InterruptedException: it was told to stop.
    """
    step = trainer.step

    def step_then_stop(batch: Any) -> Any:
        output = step(batch)
        if told_to_stop:
            raise InterruptedException
        return output

    trainer.step = step_then_stop
    try:
        return trainer.fit()
    except InterruptedException:
        if trainer.cfg.checkpoint_path is not None:
            trainer.save_checkpoint(str(trainer.n_training_samples))
        raise
    finally:
        del trainer.step


def is_for_a_file(error: Exception) -> bool:
    """Whether a file could not be read or written, as on a full disk: Python's, Rust's, torch's."""
    text = str(error)
    of_torch = "PytorchStreamWriter" in text or "inline_container" in text
    return isinstance(error, OSError | SafetensorError) or of_torch


def newest_checkpoint(folder: Path) -> Path | None:
    """The last complete checkpoint in a run's ``checkpoint_path``, or None."""
    found = [path.parent for path in folder.glob(f"*/{RUNNER_CFG_FILENAME}")]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def how_to_go_on(cfg: Any) -> str:
    """What to do after a run was interrupted."""
    path = None if cfg.checkpoint_path is None else newest_checkpoint(Path(cfg.checkpoint_path))
    if path is None:
        return "It had no checkpoint yet: start it again"
    given = printable(shlex.quote(str(path)))
    return f"Resume from its last checkpoint with --resume_from_checkpoint {given}"
