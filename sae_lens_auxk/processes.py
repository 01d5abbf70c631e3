"""The processes that torchrun starts: their group, what must be the same in all, and their end."""

import logging
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from functools import partialmethod
from importlib.metadata import version
from typing import Any

import torch
import torch.distributed as dist
from tqdm.std import tqdm

from sae_lens_auxk_cli import refuse

SECONDS_TO_SAVE = 25
"""torchrun kills a process 30 seconds after it told it to stop."""

PACKAGES = ("sae-lens-auxk", "sae-lens", "torch")


def n_processes() -> int:
    """How many processes torchrun has started on all nodes; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process's number among them; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def own_device(device: str) -> str:
    """This process's device, where ``device`` is that of all: of ``"cuda"`` one GPU for each.

    Raises:
        ValueError: the node has fewer GPUs than processes.
    """
    if torch.device(device).type != "cuda":
        return device
    local, n_gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if local >= n_gpus:
        raise ValueError(
            f"device={device!r}: this node has {n_gpus} GPUs, and --nproc-per-node must be at most "
            f"that, not {os.environ['LOCAL_WORLD_SIZE']}."
        )
    return f"cuda:{local}"


def prefer_own_gpu() -> None:
    """Make ``"cuda"`` mean this process's GPU, so that not all processes use the first one."""
    local = int(os.environ["LOCAL_RANK"])
    if local < torch.cuda.device_count():
        torch.cuda.set_device(local)


def see_own_gpu_only() -> None:
    """Hide the other processes' GPUs, so that ``"cuda"`` is this one's in every thread.

    Call it before the first use of CUDA.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    local = int(os.environ["LOCAL_RANK"])
    gpus = [str(local)] if visible is None else visible.split(",")[local : local + 1]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)


@contextmanager
def process_group() -> Generator[Any]:
    """The group of all processes: gloo, and NCCL for what is on GPUs."""
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield dist.group.WORLD
    finally:
        # After an error the others may be gone, and this would wait for them.
        if sys.exc_info()[0] is None:
            dist.destroy_process_group()


class Refused(ValueError):
    """An error that all processes have."""


def agree(error: Exception | None, group: Any) -> None:
    """Raise the same error in every process if one of them has one; it names the rank.

    Every process calls this with its own error, or None.
    """
    errors: list[str | None] = [None] * group.size()
    own = None if error is None else str(error) or repr(error)
    dist.all_gather_object(errors, own, group=group)
    for i, message in enumerate(errors):
        if message is not None:
            same = all(other == message for other in errors)
            raise Refused(message if same else f"rank {i}: {message}") from error


def require_same(own: Mapping[str, Any], group: Any) -> None:
    """Raise the same error in every process if their values differ.

    It names a rank, and each of its values that differs from rank 0's. The versions of torch,
    SAELens and this package are always compared.
    """
    own = {**{name: version(name) for name in PACKAGES}, **own}
    everywhere: list[Any] = [None] * group.size()
    dist.all_gather_object(everywhere, own, group=group)
    first = everywhere[0]
    for i, values in enumerate(everywhere):
        differing = [
            f"{name} is {first.get(name)!r} on rank 0 and {values.get(name)!r} on rank {i}"
            for name in {**first, **values}
            if first.get(name) != values.get(name)
        ]
        if differing:
            raise Refused(f"{'; '.join(differing)}: it must be the same everywhere.")


def be_quiet() -> None:
    """Silence this process's warnings, logs and progress bars, which repeat those of rank 0."""
    warnings.simplefilter("ignore")
    logging.disable()
    tqdm.__init__ = partialmethod(tqdm.__init__, disable=True)  # type: ignore[method-assign]


def end_with(how_to_go_on: Callable[[], str]) -> Callable[[], None]:
    """Print a message once and exit when torchrun stops this process, as where another one died.

    A Python signal handler would wait for the collective operation, which waits for the dead
    process.

    A training that has a handler of its own for that signal ends by itself: the signal may also be
    a person's. If it does not in time, that is said, and torchrun ends it.

    Args:
        how_to_go_on: makes the last sentence of the message.

    Returns:
        A function that does the same at once, for an error of such an operation.
    """
    read, write = os.pipe()
    os.set_blocking(write, False)
    lock, said = threading.Lock(), list[str]()

    def say(what: str) -> None:
        with lock:
            if not said:
                said.append(what)
                error = f"\nsae-lens-auxk: error: {what}. {how_to_go_on()}."
                print(error, file=sys.stderr, flush=True)

    def end() -> None:
        say(
            "another process of this run has died, or torchrun was told to stop: its report below "
            "says which"
        )
        os._exit(1)

    def watch() -> None:
        while os.read(read, 1)[0] != signal.SIGTERM:
            pass
        if signal.getsignal(signal.SIGTERM) is not ignored:
            time.sleep(SECONDS_TO_SAVE)
            # No exit: it may be in the middle of a checkpoint.
            say(
                f"told to stop {SECONDS_TO_SAVE} seconds ago, and not done: another process of "
                "this run has died, or a checkpoint takes longer"
            )
        else:
            end()

    def ignored(*_: Any) -> None:
        pass

    signal.signal(signal.SIGTERM, ignored)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    threading.Thread(target=watch, daemon=True).start()
    return end


def is_for_a_dead_process(error: BaseException) -> bool:
    """Whether a collective operation failed because another process is gone."""
    text = str(error)
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError)
        and any(word in text for word in ("gloo", "NCCL", "Connection closed by peer"))
    )


def refuse_once(message: str) -> int:
    """Print the error that all processes have, on rank 0; return the exit status for it."""
    return refuse(message) if rank() == 0 else 2
