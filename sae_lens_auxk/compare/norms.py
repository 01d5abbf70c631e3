"""Rows with a large norm, which are left out of training and measuring.

A few tokens (the first of a text, and some that stand for a pause) have activations a hundred times
as long as the others. They hold most of the variance, and so most of the loss.
"""

from collections.abc import Iterable, Iterator

import torch


class RowFilter:
    """Leaves out the rows whose norm is above ``multiple`` times the median of held-out rows.

    Attributes:
        largest: the largest norm that stays.
    """

    def __init__(self, held_out: torch.Tensor, multiple: float):
        norms = torch.linalg.vector_norm(held_out.float(), dim=-1)
        self.largest = multiple * norms.nanmedian().item()
        self._n_rows = 0
        self._n_left_out = 0

    def keeps(self, rows: torch.Tensor) -> torch.Tensor:
        """(...) bool of rows (..., d_in). A row with NaN does not stay."""
        return torch.linalg.vector_norm(rows.float(), dim=-1) <= self.largest

    def full_batches(self, batches: Iterable[torch.Tensor]) -> Iterator[torch.Tensor]:
        """The rows that stay, in their order, in batches as large as they came; counts them."""
        kept: list[torch.Tensor] = []
        for batch in batches:
            kept.append(batch[self.keeps(batch)])
            self._n_rows += len(batch)
            self._n_left_out += len(batch) - len(kept[-1])
            if sum(map(len, kept)) >= len(batch):
                rows = torch.cat(kept)
                yield rows[: len(batch)]
                kept = [rows[len(batch) :]]

    @property
    def share_left_out(self) -> float:
        """Of the rows of all batches so far."""
        return self._n_left_out / max(self._n_rows, 1)
