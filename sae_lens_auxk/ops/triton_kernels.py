# pyright: reportMissingParameterType=false, reportUnknownParameterType=false, reportIndexIssue=false, reportCallIssue=false
"""Triton kernels for CUDA. Each has its plain torch reference beside the call that chooses it.

They run on a CPU too, by Triton's interpreter (``TRITON_INTERPRET=1``), which is how they are
tested where there is no GPU.
"""

import torch
import triton
import triton.language as tl


def group_max(x: torch.Tensor, size: int) -> torch.Tensor:
    """(B, n / size): the largest of each ``size`` neighbouring entries of a row of ``x`` (B, n).

    ``size`` is a power of two that divides n; ``x`` is contiguous.
    """
    n_groups = x.numel() // size
    out = torch.empty(x.shape[0], x.shape[1] // size, dtype=x.dtype, device=x.device)
    groups = max(1, 8192 // size)
    _group_max[(triton.cdiv(n_groups, groups),)](
        x, out, n_groups, SIZE=size, GROUPS=groups, num_warps=8
    )
    return out


@triton.jit
def _group_max(x_ptr, out_ptr, n_groups, SIZE: tl.constexpr, GROUPS: tl.constexpr):
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    offsets = group[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    x = tl.load(x_ptr + offsets, mask=group[:, None] < n_groups, other=float("-inf"))
    tl.store(out_ptr + group, tl.max(x, axis=1), mask=group < n_groups)


def outer_sums(
    values: torch.Tensor, rows: torch.Tensor, starts: torch.Tensor, x: torch.Tensor
) -> torch.Tensor:
    """(d_sae, d): for each latent the sum of ``values * x[rows]`` over its pairs, in float32.

    Args:
        values: (N,) in the order of the latents.
        rows: (N,) int64, likewise.
        starts: (d_sae + 1,) int64, where each latent's pairs start, and N.
        x: (B, d), contiguous.
    """
    d_sae, d = starts.numel() - 1, x.shape[1]
    out = torch.empty(d_sae, d, dtype=torch.float32, device=x.device)
    width = triton.next_power_of_2(d)
    _outer_sums[(d_sae,)](values, rows, starts, x, out, d, WIDTH=width, num_warps=4)
    return out


@triton.jit
def _outer_sums(values_ptr, rows_ptr, starts_ptr, x_ptr, out_ptr, d, WIDTH: tl.constexpr):
    latent = tl.program_id(0).to(tl.int64)
    start = tl.load(starts_ptr + latent)
    end = tl.load(starts_ptr + latent + 1)
    column = tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], dtype=tl.float32)
    for pair in range(start, end):
        row = tl.load(rows_ptr + pair)
        value = tl.load(values_ptr + pair).to(tl.float32)
        x = tl.load(x_ptr + row * d + column, mask=column < d, other=0.0)
        total += value * x.to(tl.float32)
    tl.store(out_ptr + latent * d + column, total, mask=column < d)


def transposed(x: torch.Tensor) -> torch.Tensor:
    """(n, m): ``x.T`` of a contiguous (m, n), contiguous too."""
    m, n = x.shape
    out = torch.empty(n, m, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(m, 64), triton.cdiv(n, 64))
    _transposed[grid](x, out, m, n, TILE=64, num_warps=8)
    return out


@triton.jit
def _transposed(x_ptr, out_ptr, m, n, TILE: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    j = tl.program_id(1).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = (i[:, None] < m) & (j[None, :] < n)
    x = tl.load(x_ptr + i[:, None] * n + j[None, :], mask=inside)
    inside = (j[:, None] < n) & (i[None, :] < m)
    tl.store(out_ptr + j[:, None] * m + i[None, :], tl.trans(x), mask=inside)


def scaled_cast(W: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(d, n): ``W * scale`` (n,) in ``dtype``, in one pass."""
    out = torch.empty(W.shape, dtype=dtype, device=W.device)
    d, n = W.shape
    _scaled_cast[(triton.cdiv(n, 1024), d)](W, scale, out, n, WIDTH=1024, num_warps=4)
    return out


@triton.jit
def _scaled_cast(W_ptr, scale_ptr, out_ptr, n, WIDTH: tl.constexpr):
    column = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    offsets = tl.program_id(1).to(tl.int64) * n + column
    W = tl.load(W_ptr + offsets, mask=column < n, other=0.0)
    scale = tl.load(scale_ptr + column, mask=column < n, other=0.0)
    tl.store(out_ptr + offsets, W * scale, mask=column < n)


def gather_columns(x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """(B, n): ``x[:, columns]`` of a contiguous ``x``."""
    n = columns.numel()
    out = torch.empty(x.shape[0], n, dtype=x.dtype, device=x.device)
    _gather_columns[(triton.cdiv(n, 2048), x.shape[0])](
        x, columns, out, x.shape[1], n, WIDTH=2048, num_warps=4
    )
    return out


@triton.jit
def _gather_columns(x_ptr, columns_ptr, out_ptr, width, n, WIDTH: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    column = tl.load(columns_ptr + i, mask=i < n, other=0)
    x = tl.load(x_ptr + row * width + column, mask=i < n)
    tl.store(out_ptr + row * n + i, x, mask=i < n)
