"""Memory that CUDA graphs share, and how one is captured into it.

Graphs of one :class:`Arena` never run at the same time, so each may use all of its memory. What a
graph leaves there is valid until the next one runs.
"""

import gc
import threading
import weakref
from collections.abc import Generator
from contextlib import contextmanager, suppress
from typing import Any

import torch

_INTEGERS = {1: "|u1", 2: "<i2", 4: "<i4", 8: "<i8"}


class Arena:
    """Memory that the graphs of one device, stream and thread share, one at a time.

    Attributes:
        pool: torch's handle of the memory.
        stream: to capture on.
        turn: how many forward and backward passes were run.
        n_forwards: how many of them were forward.
    """

    def __init__(self, device: torch.device):
        self.pool = torch.cuda.graph_pool_handle()
        self.stream = torch.cuda.Stream(device)
        self.turn = self.n_forwards = 0
        self._pending: weakref.ref[Any] | None = None
        self._inputs: dict[Any, torch.Tensor] = {}
        self._lent: list[tuple[weakref.ref[Any], weakref.ref[_Loan], int]] = []

    def input_like(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """A tensor that all graphs read as their input ``name``."""
        key = name, x.shape, x.dtype
        if key not in self._inputs:
            self._inputs[key] = torch.empty_like(x)
        return self._inputs[key]

    def lend(self, parameter: torch.Tensor, place: "Place", owner: Any) -> torch.Tensor:
        """What lies at a place, as the gradient of a parameter."""
        grad, loan = place.tensor(owner)
        self._lent.append((weakref.ref(parameter), weakref.ref(loan), grad.data_ptr()))
        return grad

    def forward_was_run(self, waits: Any) -> int:
        """Note a forward pass, which ``waits`` for its backward pass while it lives: the turn."""
        self.turn += 1
        self.n_forwards += 1
        self._pending = weakref.ref(waits)
        return self.turn

    def backward_was_run(self) -> None:
        self.turn += 1
        self._pending = None

    def take_back(self) -> bool:
        """Make the memory free for the next graph; False if somebody still needs what is there."""
        if self._pending is not None and self._pending() is not None:
            return False
        for parameter, loan, address in self._lent:
            holder = parameter()
            if loan() is None or holder is None or holder.grad is None:
                continue
            if holder.grad.data_ptr() == address:
                holder.grad = holder.grad.clone()
        self._lent = [entry for entry in self._lent if entry[1]() is not None]
        return not self._lent


_arenas = threading.local()
_FAILED: list[torch.cuda.CUDAGraph] = []


def forget_arenas() -> None:
    """Let this thread's next graphs have new memory."""
    vars(_arenas).pop("by_stream", None)


def arena_of(device: torch.device) -> Arena:
    """The arena of this thread for the current stream; it lives as long as a graph uses it."""
    known = vars(_arenas).setdefault("by_stream", weakref.WeakValueDictionary())
    key = device, torch.cuda.current_stream(device)
    arena = known.get(key)
    if arena is None:
        arena = known[key] = Arena(device)
    return arena


class Place:
    """Where in an arena a tensor lies. The memory is the next graph's as soon as that runs."""

    def __init__(self, x: torch.Tensor):
        size = x.element_size()
        self.dtype, self.device = x.dtype, x.device
        self.interface = {
            "shape": tuple(x.shape),
            "strides": tuple(stride * size for stride in x.stride()),
            "typestr": _INTEGERS[size],
            "data": (x.data_ptr(), False),
            "version": 3,
        }

    def tensor(self, owner: Any) -> tuple[torch.Tensor, "_Loan"]:
        """The tensor, and what lives as long as its memory is held; it keeps ``owner`` alive."""
        loan = _Loan(self.interface, owner)
        return torch.as_tensor(loan, device=self.device).view(self.dtype), loan


class _Loan:
    def __init__(self, interface: dict[str, Any], owner: Any):
        self.__cuda_array_interface__ = interface
        self.owner = owner  # whose memory it is


@contextmanager
def capture(graph: torch.cuda.CUDAGraph, arena: Arena) -> Generator[None]:
    """Capture into ``graph``; other threads may go on using the device."""
    before = torch.cuda.current_stream()
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    state = generator.clone_state()
    try:
        mode = "thread_local"
        with torch.cuda.graph(graph, arena.pool, arena.stream, capture_error_mode=mode):
            yield
    except BaseException:  # torch leaves its stream, a generator that refuses to draw, and the pool
        torch.cuda.set_stream(before)
        generator.graphsafe_set_state(state)
        _FAILED.append(graph)  # the allocator may still point to it
        forget_arenas()
        with suppress(RuntimeError):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), arena.pool)
        raise
    finally:  # cuBLAS would keep this stream's, in memory that other graphs use too
        torch._C._cuda_clearCublasWorkspaces()


@contextmanager
def nothing_else_is_freed() -> Generator[None]:
    """Without Python's collector: a graph or an event that it frees breaks a capture."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
