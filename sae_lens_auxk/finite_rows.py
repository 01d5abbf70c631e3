"""Keeps NaN and infinity in the activations away from the weights and the counts."""

import warnings
from typing import NamedTuple

import torch

STEPS_BETWEEN_REPORTS = 100


class UsableRows(NamedTuple):
    """Which rows of a batch can be trained on.

    Attributes:
        mask: (B,) bool.
        n: () int64, how many.
        some: () bool, whether there is one.
    """

    mask: torch.Tensor
    n: torch.Tensor
    some: torch.Tensor

    @property
    def n_bad(self) -> torch.Tensor:
        """() int64, how many rows cannot be trained on."""
        return self.mask.numel() - self.n


@torch.no_grad()
def usable_rows(x: torch.Tensor, normalize_activations: str) -> UsableRows:
    """The rows of ``x`` (B, ...) that can be trained on.

    A row must be finite, and under ``constant_norm_rescale``, which divides by its norm, not 0.
    """
    # One sum instead of a look at each entry: an entry that is not finite makes it not finite. So
    # would finite entries beyond 1e35, but their squares, the loss, are not finite either.
    x = x.flatten(1)
    mask = x.sum(dim=1, dtype=torch.promote_types(x.dtype, torch.float32)).isfinite()
    if normalize_activations == "constant_norm_rescale":
        mask = mask & x.any(dim=1)
    n = mask.sum()
    return UsableRows(mask, n, n > 0)


@torch.no_grad()
def replace_rows(x: torch.Tensor, usable: UsableRows) -> torch.Tensor:
    """Put the first usable row of ``x`` (B, ...) in place of every row that is not usable.

    A batch without a usable row becomes ones. A repeated row gives its token more weight, once for
    each bad row, but needs no change of shape and no host synchronisation, which dropping the rows
    would.
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
                "no row of the first training batch is finite: the activations hold NaN or "
                "infinity, or the statistics that SAELens estimated for normalize_activations="
                f"{normalize_activations!r} do"
            )
        # Reading a tensor waits for the device, so on CUDA it is read now and then only.
        if step >= self._next_report or step == 0:
            reported = self.report()
            if reported or usable.n.is_cuda:
                self._next_report = step + STEPS_BETWEEN_REPORTS

    def report(self) -> bool:
        """Warn if there were bad rows so far; whether there were."""
        n_rows = int(self._n_rows)
        if n_rows:
            warnings.warn(
                f"{n_rows} rows of activations with a NaN or infinity so far; each was replaced "
                "by a finite row of its batch (a batch without any was skipped) and not counted "
                "as a token",
                stacklevel=2,
            )
        return n_rows > 0
