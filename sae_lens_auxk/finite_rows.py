"""Keep rows that would ruin a step, such as rows with NaN, out of the weights and counts."""

import warnings
from typing import NamedTuple

import torch

STEPS_BETWEEN_REPORTS = 100


class UsableRows(NamedTuple):
    """Which rows of a batch can be trained on.

    Attributes:
        mask: (B,) bool.
        n: () int64, their number.
        some: () bool, whether there is at least one.
    """

    mask: torch.Tensor
    n: torch.Tensor
    some: torch.Tensor

    @property
    def n_bad(self) -> torch.Tensor:
        """() int64, how many rows cannot be trained on."""
        return self.mask.numel() - self.n


@torch.no_grad()
def usable_rows(x: torch.Tensor, normalize_activations: str, dtype: torch.dtype) -> UsableRows:
    """The rows of ``x`` (B, ...) that can be trained on.

    A row's norm must be finite and at most :func:`largest_norm`. Under ``constant_norm_rescale``,
    which divides by it, it must not be 0 either.

    Args:
        x: the batch.
        normalize_activations: the SAE's.
        dtype: the dtype of the SAE's losses, float32 or float64.
    """
    x = x.flatten(1)
    if x.dtype == torch.float64:  # torch's norm cannot take a narrower dtype than its input
        x = x.to(dtype)
    norm = torch.linalg.vector_norm(x, dim=1, dtype=dtype)
    mask = norm <= largest_norm(dtype)
    if normalize_activations == "constant_norm_rescale":
        mask = mask & (norm > 0)
    n = mask.sum()
    return UsableRows(mask, n, n > 0)


def largest_norm(dtype: torch.dtype) -> float:
    """The largest row norm that does not ruin a training step: 4e9 in float32.

    A weight's gradient grows with the square of a row's norm, and gradient clipping squares it
    again. If that overflows, the gradient of the whole batch becomes 0 or NaN.
    """
    return torch.finfo(dtype).max ** 0.25


@torch.no_grad()
def replace_rows(x: torch.Tensor, usable: UsableRows) -> torch.Tensor:
    """Put the first usable row of ``x`` (B, ...) in place of every row that is not usable.

    A batch without a usable row becomes all ones. Repeating a row gives its token extra weight,
    once for each bad row. Dropping rows instead would change the shape and synchronise with the
    host.
    """
    first = usable.mask.int().argmax(dim=0, keepdim=True)
    instead = x.index_select(0, first).where(usable.some, 1.0)
    return torch.where(usable.mask.view(-1, *[1] * (x.ndim - 1)), x, instead)


class BadRowWatch:
    """Counts the rows of a run that could not be trained on, and warns about them."""

    def __init__(self) -> None:
        self._n_rows: torch.Tensor | int = 0
        self._next_report = 0

    def count(self, usable: UsableRows, step: int, normalize_activations: str) -> None:
        """Count a step's bad rows; warn, at most once in 100 steps.

        Raises:
            ValueError: it is the first step of a run, and no row of its batch is usable.
        """
        self._n_rows = self._n_rows + usable.n_bad
        if step == 0 and not usable.some:
            raise ValueError(
                "no row of the first training batch is finite and has a reasonable norm: the "
                "activations hold NaN or infinity, or the statistics that SAELens estimated for "
                f"normalize_activations={normalize_activations!r} do"
            )
        # Reading a tensor waits for the device, so on CUDA it is read only now and then.
        if step >= self._next_report or step == 0:
            reported = self.report()
            if reported or usable.n.is_cuda:
                self._next_report = step + STEPS_BETWEEN_REPORTS

    def report(self) -> bool:
        """Warn if there have been bad rows so far, and return whether there have."""
        n_rows = int(self._n_rows)
        if n_rows:
            warnings.warn(
                f"{n_rows} rows of activations with a NaN, infinity or a norm out of range so far; "
                "each was replaced by a usable row of its batch (a batch without any was skipped) "
                "and not counted as a token",
                stacklevel=2,
            )
        return n_rows > 0
