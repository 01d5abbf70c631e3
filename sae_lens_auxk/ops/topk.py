"""The k largest entries of each row, or of a whole batch, exact and in two levels.

``torch.topk`` reads a row several times. The k largest entries of a row lie in the k groups
with the largest maxima: where an entry is in none of them, there are k group maxima, each an
entry of its own, that are not smaller. So one pass finds the group maxima, and ``torch.topk``
reads only these and the entries of k groups.
"""

import torch

from sae_lens_auxk.ops import kernels

MIN_ENTRIES = 8_192
# The kernel runs one program for each row: for a single long row torch is faster.
MIN_ROWS_FOR_KERNEL = 2


def top_k(
    x: torch.Tensor, k: int, among: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Values and int64 indices of the ``k`` largest entries of each row, in no order.

    Args:
        x: (B, n), contiguous.
        k: at most n.
        among: (n,) bool, the columns to choose from; None for all. Where there are fewer than
            k of them, the remaining values are -inf.

    Returns:
        (B, k) values and (B, k) indices, as from ``x.topk(k, sorted=False)`` except for the
        choice among equal entries.
    """
    size = group_size(x.shape[1], k)
    if size < 4:
        return _largest(x, k, among)
    groups = _largest(group_max(x, size, among), k)[1]
    if module := _kernels(x, k * size):
        return module.largest(x, k, among, groups, size)
    candidates = x.unflatten(1, (-1, size)).gather(1, groups.unsqueeze(-1).expand(-1, -1, size))
    if among is not None:
        candidates = candidates.masked_fill_(~among.view(-1, size)[groups], -torch.inf)
    values, found = candidates.flatten(1).topk(k, dim=-1, sorted=False)
    return values, groups.gather(1, found // size) * size + found % size


def _largest(
    x: torch.Tensor, k: int, among: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    if module := _kernels(x, x.shape[1]):
        return module.largest(x, k, among)
    if among is not None:
        x = x.masked_fill(~among, -torch.inf)
    values, indices = x.topk(k, dim=-1, sorted=False)
    return values, indices


def _kernels(x: torch.Tensor, n_candidates: int):
    module = kernels(x)
    if module is None or x.dtype == torch.float64 or len(x) < MIN_ROWS_FOR_KERNEL:
        return None
    return module if n_candidates <= module.MAX_CANDIDATES else None


def top_k_of_batch(x: torch.Tensor, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Values of the ``n`` largest entries of all of ``x``, and indices into ``x.flatten()``."""
    values, indices = top_k(x.reshape(1, -1), n)
    return values[0], indices[0]


def group_max(x: torch.Tensor, size: int, among: torch.Tensor | None = None) -> torch.Tensor:
    """(B, n / size): the largest of each ``size`` neighbouring entries of a row.

    If ``among`` (n,) is given, only those columns count.
    """
    if module := kernels(x):
        return module.group_max(x, size, among)
    if among is not None:
        x = x.masked_fill(~among, -torch.inf)
    return x.unflatten(1, (-1, size)).amax(dim=-1)


def group_size(n: int, k: int) -> int:
    """The power of two that divides ``n`` and balances group maxima with candidates."""
    size = 1
    if n >= MIN_ENTRIES:
        while 2 * size * 2 * size * k <= 2 * n and n % (2 * size) == 0 and size < 128:
            size *= 2
    return size
