"""Keeps NaN and infinity in the activations away from the weights and the counts."""

from typing import NamedTuple

import torch


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


@torch.no_grad()
def usable_rows(x: torch.Tensor, normalize_activations: str) -> UsableRows:
    """The rows of ``x`` (B, ...) that can be trained on.

    A row must be finite, and under ``constant_norm_rescale``, which divides by its norm, not 0.
    """
    # One sum instead of a look at each entry: what is not finite makes it not finite. So would
    # finite entries beyond 1e35, but their squares, the loss, are not finite either.
    x = x.flatten(1)
    mask = x.sum(dim=1, dtype=torch.promote_types(x.dtype, torch.float32)).isfinite()
    if normalize_activations == "constant_norm_rescale":
        mask = mask & x.any(dim=1)
    n = mask.sum()
    return UsableRows(mask, n, n > 0)


@torch.no_grad()
def replace_rows(x: torch.Tensor, usable: UsableRows) -> torch.Tensor:
    """Put the first usable row of ``x`` (B, ...) in place of every row that is not usable.

    A batch without a usable row becomes ones. A repeated row gives its token more weight, as much
    as there are bad rows, but needs no change of shape and no host synchronisation, which dropping
    the rows would.
    """
    first = usable.mask.int().argmax(dim=0, keepdim=True)
    instead = x.index_select(0, first).where(usable.some, 1.0)
    return torch.where(usable.mask.view(-1, *[1] * (x.ndim - 1)), x, instead)
