"""The k largest entries of each row, or of a whole batch, exact and in two levels.

``torch.topk`` reads a row several times. The k largest entries of a row lie in the k groups
with the largest maxima: where an entry is in none of them, there are k group maxima, each an
entry of its own, that are not smaller. So one pass finds the group maxima, and ``torch.topk``
is left with as many maxima and candidates as there are groups.
"""

import torch

from sae_lens_auxk.ops import use_triton

MIN_ENTRIES = 8_192


def top_k(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and int64 indices of the ``k`` largest entries of each row, in no order.

    Args:
        x: (B, n), contiguous.
        k: at most n.

    Returns:
        (B, k) values and (B, k) indices, as from ``x.topk(k, sorted=False)`` but for the
        choice among equal entries.
    """
    size = group_size(x.shape[1], k)
    if size < 4:
        values, indices = x.topk(k, dim=-1, sorted=False)
        return values, indices
    grouped = x.unflatten(1, (-1, size))
    groups = group_max(x, size).topk(k, dim=-1, sorted=False).indices
    candidates = grouped.gather(1, groups.unsqueeze(-1).expand(-1, -1, size)).flatten(1)
    values, found = candidates.topk(k, dim=-1, sorted=False)
    indices = groups.gather(1, found // size) * size + found % size
    return values, indices


def top_k_of_batch(x: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same over the whole of ``x``: ``n`` values and indices into ``x.flatten()``."""
    values, indices = top_k(x.reshape(1, -1), n)
    return values[0], indices[0]


def group_max(x: torch.Tensor, size: int) -> torch.Tensor:
    """(B, n / size): the largest of each ``size`` neighbouring entries of a row."""
    if use_triton(x):
        from sae_lens_auxk.ops import triton_kernels

        return triton_kernels.group_max(x, size)
    return x.unflatten(1, (-1, size)).amax(dim=-1)


def group_size(n: int, k: int) -> int:
    """The power of two that divides ``n`` and balances group maxima with candidates."""
    size = 1
    if n >= MIN_ENTRIES:
        while 2 * size * 2 * size * k <= 2 * n and n % (2 * size) == 0 and size < 128:
            size *= 2
    return size
