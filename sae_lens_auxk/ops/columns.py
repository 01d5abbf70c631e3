"""Columns of the pre-activations and of a weight matrix: finding, reading, scaling them."""

import torch

from sae_lens_auxk.ops import kernels


def indices_of(mask: torch.Tensor, bound: int) -> torch.Tensor:
    """(n,) int64: the indices where ``mask`` is True, then 0s; n is ``bound``, rounded up.

    ``nonzero()`` would wait for the device, as the shape of its result depends on the values. n
    is a multiple of 64, as a product in bfloat16 is otherwise up to 5 times slower.
    """
    return mask.nonzero_static(size=-bound // 64 * -64, fill_value=0).squeeze(1)


def beyond(columns: torch.Tensor, n_columns: torch.Tensor) -> torch.Tensor:
    """(n,) bool: which of ``columns`` (n, ...) come after the first ``n_columns`` ()."""
    return torch.arange(len(columns), device=columns.device) >= n_columns


def row_norms(W: torch.Tensor) -> torch.Tensor:
    """(n,): the norms of the rows of ``W`` (n, d), to divide by: never 0; no graph."""
    return W.detach().norm(dim=-1).clamp(min=torch.finfo(W.dtype).tiny)


def gather_columns(
    x: torch.Tensor, columns: torch.Tensor, n_columns: torch.Tensor | None = None
) -> torch.Tensor:
    """(B, n): the columns of ``x`` at indices ``columns`` (n,); no gradient.

    If ``n_columns`` () is given, only the first ``n_columns`` count; the others are -inf.
    """
    if k := kernels(x):
        return k.gather_columns(x, columns, n_columns)
    gathered = x.index_select(1, columns)
    if n_columns is None:
        return gathered
    return gathered.masked_fill_(beyond(columns, n_columns), -torch.inf)


def shortfall(
    h: torch.Tensor,
    threshold: torch.Tensor,
    columns: torch.Tensor,
    n_columns: torch.Tensor,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """How far columns of ``h`` are below a threshold; no gradient.

    Args:
        h: (B, d_sae).
        threshold: () or (B, 1).
        columns: (n,) int64, of which the first ``n_columns`` () count.
        dtype: of the second result.

    Returns:
        (B,) the sums of ``relu(threshold - h)`` over the columns, in float32 or float64; (B, n)
        1 where it is above 0, else 0.
    """
    if (k := kernels(h)) and h.dtype != torch.float64:
        return k.shortfall(h, threshold, columns, n_columns, dtype)
    missing = (threshold.to(h.dtype) - gather_columns(h, columns)).relu()
    missing = missing.masked_fill(beyond(columns, n_columns), 0)
    precise = torch.promote_types(h.dtype, torch.float32)
    return missing.sum(dim=-1, dtype=precise), (missing > 0).to(dtype)


def scaled_product(
    x: torch.Tensor,
    W: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """(B, n): ``(x @ W + bias) * scale``, in the precision of ``x``; no gradient.

    Args:
        x: (B, d).
        W: (d, n), contiguous, or the transpose of a contiguous matrix.
        scale: (n,), or None for 1.
        bias: (n,), or None for 0.
    """
    dtype = x.dtype
    # On a CPU allocating another W takes longer than multiplying the product in place.
    afterwards = W.device.type == "cpu" and W.dtype == dtype
    if scale is None or afterwards:
        weights = W.to(dtype)
    else:
        bias = None if bias is None else bias * scale
        if W.is_contiguous():
            weights = scaled_cast(W, scale, dtype)
        else:
            weights = scaled_cast(W.T, scale.unsqueeze(1), dtype).T
    product = x @ weights if bias is None else torch.addmm(bias.to(dtype), x, weights)
    return product.mul_(scale) if scale is not None and afterwards else product


def scaled_cast(W: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``W`` (m, n) times ``scale``, (n,) or (m, 1), in ``dtype``; no gradient."""
    if (k := kernels(W)) and W.dtype == torch.float32:
        return k.scaled_cast(W, scale, dtype)
    return (W * scale).to(dtype)
