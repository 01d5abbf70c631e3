"""A training run that is told to stop ends after its step, with a checkpoint that resumes.

SAELens's own handler stops it anywhere in a step, and writes neither weights nor the trainer's
state.
"""

import os
import shlex
import signal
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from sae_lens_auxk.processes import rank
from sae_lens_auxk.saelens.names import RUNNER_CFG_FILENAME, InterruptedException
from sae_lens_auxk_cli import printable

SIGNALS = (signal.SIGINT, signal.SIGTERM)
AGAIN = "the training ends after this step; press Ctrl-C again to end it at once"


@contextmanager
def noted_signals() -> Generator[list[int]]:
    """Note SIGINT and SIGTERM in a list; a second SIGINT raises KeyboardInterrupt at once.

    A second SIGTERM does nothing: where a scheduler sends one to torchrun and its processes, each
    process gets it twice. A signal that the process ignores, as one started with ``&`` in a script
    does SIGINT, is still ignored.
    """
    noted: list[int] = []
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    before = {n: handler for n, handler in handlers.items() if handler is not signal.SIG_IGN}

    def note(number: int, frame: Any) -> None:  # noqa: ARG001
        noted.append(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)
            if rank() == 0:
                # Not print, which may be what the signal interrupts.
                os.write(2, f"\n{AGAIN}\n".encode())

    for number in before:
        signal.signal(number, note)
    try:
        yield noted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def fit(trainer: Any, told_to_stop: Sequence[int]) -> Any:
    """Train; once ``told_to_stop`` has a signal, save a checkpoint after the step.

    Raises:
        InterruptedException: it was told to stop, by this signal.
    """
    step = trainer.step

    def step_then_stop(batch: Any) -> Any:
        output = step(batch)
        if told_to_stop:
            raise InterruptedException(told_to_stop[0])
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


def interrupted(raised: BaseException, then: str) -> int:
    """Say that a run was interrupted, and what then; return the exit status, as a shell gives it.

    Args:
        raised: a KeyboardInterrupt, or an InterruptedException with its signal.
        then: what a person should know.
    """
    if rank() == 0:
        # On a line of its own, below the progress bar.
        print(f"\ninterrupted. {then}.", file=sys.stderr)
    return 128 + next(iter(raised.args), signal.SIGINT)


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
