"""Keeps NaN and infinity in the activations away from the weights and the counts."""

import torch


@torch.no_grad()
def usable_rows(x: torch.Tensor, normalize_activations: str) -> torch.Tensor:
    """(B,) bool: the rows of ``x`` (B, ...) that can be trained on.

    A row must be finite, and under ``constant_norm_rescale``, which divides by its norm, not 0.
    """
    x = x.flatten(1)
    usable = x.isfinite().all(dim=1)
    if normalize_activations == "constant_norm_rescale":
        usable = usable & x.any(dim=1)
    return usable


@torch.no_grad()
def replace_rows(x: torch.Tensor, usable: torch.Tensor) -> torch.Tensor:
    """Put in place of every other row of ``x`` (B, ...) the nearest usable row above it.

    The first rows take the batch's last usable row; a batch without any becomes ones. A
    repeated row costs nothing but a little weight on its token, needs no change of shape and
    no host synchronisation, which dropping the row would.
    """
    rows = torch.arange(x.shape[0], device=x.device)
    source = torch.where(usable, rows, -1)
    last = source.max()
    source = source.cummax(dim=0).values
    source = torch.where(source < 0, last, source).clamp(min=0)
    return torch.where(last >= 0, x.index_select(0, source), 1.0)
