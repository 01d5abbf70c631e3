"""Keeps NaN and infinity in the activations away from the weights and the counts."""

import torch


@torch.no_grad()
def replace_nonfinite_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Put in place of every row that holds a NaN or infinity the nearest finite row above it.

    The first rows take the batch's last finite row; a batch without any becomes zeros. A
    repeated row costs nothing but a little weight on its token, needs no change of shape and
    no host synchronisation, which dropping the row would.

    Args:
        x: (B, ...) activations.

    Returns:
        The activations (B, ...) and the number of finite rows, an int64 scalar tensor.
    """
    finite = x.flatten(1).isfinite().all(dim=1)
    rows = torch.arange(x.shape[0], device=x.device)
    source = torch.where(finite, rows, -1)
    last = source.max()
    source = source.cummax(dim=0).values
    source = torch.where(source < 0, last, source).clamp(min=0)
    x = torch.where(last >= 0, x.index_select(0, source), 0.0)
    return x, finite.sum()
