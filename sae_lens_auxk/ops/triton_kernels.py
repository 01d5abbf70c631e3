# pyright: reportMissingParameterType=false, reportUnknownParameterType=false, reportIndexIssue=false, reportCallIssue=false
"""Triton kernels for CUDA. Each has a plain torch reference next to the call that chooses it.

They also run on a CPU in Triton's interpreter (``TRITON_INTERPRET=1``), which tests use without a
GPU.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl

_Launch = TypeVar("_Launch", bound=Callable[..., Any])


def _on_its_device(launch: _Launch) -> _Launch:
    """Launch on the device of the first argument: Triton would take the current device."""

    @wraps(launch)
    def on_device(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        with torch.cuda.device_of(x):
            return launch(x, *args, **kwargs)

    return on_device  # type: ignore[return-value]


# How many rows one program takes, where a row is little work or all need the same indices.
ROWS = 8


@_on_its_device
def group_max(x: torch.Tensor, size: int, among: torch.Tensor | None = None) -> torch.Tensor:
    """(B, n / size): the largest of each ``size`` neighbouring entries of a row of ``x`` (B, n).

    ``size`` is a power of two that divides n; ``x`` is contiguous. ``among`` (n,) bool: the
    columns that count, None for all.
    """
    out = torch.empty(x.shape[0], x.shape[1] // size, dtype=x.dtype, device=x.device)
    groups = max(1, 8192 // size)
    n_rows, n_groups = out.shape
    if among is None:
        # Without a mask all rows can be one, so that short rows do not leave programs half empty.
        n_rows, n_groups = 1, out.numel()
    _group_max[(triton.cdiv(n_groups, groups), n_rows)](
        x,
        x if among is None else among,
        out,
        n_groups,
        MASKED=among is not None,
        SIZE=size,
        GROUPS=groups,
        num_warps=8,
    )
    return out


@triton.jit
def _group_max(
    x_ptr,
    among_ptr,
    out_ptr,
    n_groups,
    MASKED: tl.constexpr,
    SIZE: tl.constexpr,
    GROUPS: tl.constexpr,
):
    row = tl.program_id(1).to(tl.int64)
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    offsets = group[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    inside = group[:, None] < n_groups
    x = tl.load(x_ptr + row * n_groups * SIZE + offsets, mask=inside, other=float("-inf"))
    if MASKED:
        among = tl.load(among_ptr + offsets, mask=inside, other=0)
        x = tl.where(among != 0, x, float("-inf"))
    tl.store(out_ptr + row * n_groups + group, tl.max(x, axis=1), mask=group < n_groups)


# How many numbers one program of `largest` can hold.
MAX_CANDIDATES = 16_384


@_on_its_device
def largest(
    x: torch.Tensor,
    k: int,
    among: torch.Tensor | None = None,
    groups: torch.Tensor | None = None,
    size: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(B, k) values and int64 indices of the ``k`` largest entries of each row, in no order.

    One program for each row holds all of its numbers. It finds the k-th largest by bisection over
    their bits, and writes the larger ones, and then equal ones up to k.

    Args:
        x: (B, n) float32, bfloat16 or float16, contiguous.
        k: at most the number of candidates.
        among: (n,) bool, the columns that count; the others are -inf.
        groups: (B, g) int64, the groups of ``size`` neighbours that are the candidates. None:
            all of the row. There are at most MAX_CANDIDATES.
        size: see ``groups``.
    """
    B, n = x.shape
    n_candidates = n if groups is None else groups.shape[1] * size
    values = torch.empty(B, k, dtype=x.dtype, device=x.device)
    indices = torch.empty(B, k, dtype=torch.int64, device=x.device)
    width = triton.next_power_of_2(n_candidates)
    _largest[(B,)](
        x,
        x if groups is None else groups,
        x if among is None else among,
        values,
        indices,
        n,
        n_candidates,
        k,
        GROUPED=groups is not None,
        MASKED=among is not None,
        SIZE=size,
        BITS=16 if x.dtype == torch.bfloat16 else 32,
        WIDTH=width,
        num_warps=max(4, min(16, width // 1024)),
    )
    return values, indices


@triton.jit
def _largest(
    x_ptr,
    groups_ptr,
    among_ptr,
    values_ptr,
    indices_ptr,
    n,
    n_candidates,
    k,
    GROUPED: tl.constexpr,
    MASKED: tl.constexpr,
    SIZE: tl.constexpr,
    BITS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, WIDTH)
    inside = i < n_candidates
    index = i
    if GROUPED:
        group = tl.load(groups_ptr + row * (n_candidates // SIZE) + i // SIZE, mask=inside, other=0)
        index = group.to(tl.int32) * SIZE + i % SIZE
    x = tl.load(x_ptr + row * n + index, mask=inside, other=0.0)
    if MASKED:
        x = tl.where(tl.load(among_ptr + index, mask=inside, other=0) != 0, x, float("-inf"))
    # The bits of a float as a positive number with the same order.
    bits = x.to(tl.float32).to(tl.int32, bitcast=True)
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    if BITS == 16:  # all that bfloat16 has
        key = (key >> 16) + 0x8000
        threshold = tl.zeros([], dtype=tl.int32)
    else:
        key = key.to(tl.int64) + 0x80000000
        threshold = tl.zeros([], dtype=tl.int64)
    key = tl.where(inside, key, -1)
    for b in tl.static_range(BITS):  # pyright: ignore[reportGeneralTypeIssues]
        higher = threshold + (1 << (BITS - 1 - b))
        enough = tl.sum((key >= higher).to(tl.int32), axis=0) >= k
        threshold = tl.where(enough, higher, threshold)
    above, equal = key > threshold, key == threshold
    n_above = tl.sum(above.to(tl.int32), axis=0)
    place = tl.where(
        above,
        tl.cumsum(above.to(tl.int32), axis=0) - 1,
        n_above + tl.cumsum(equal.to(tl.int32), axis=0) - 1,
    )
    chosen = above | (equal & (place < k))
    tl.store(values_ptr + row * k + place, x, mask=chosen)
    tl.store(indices_ptr + row * k + place, index.to(tl.int64), mask=chosen)


# How many pairs of a latent one program adds up. Some latents are in most rows, others in none.
PAIRS_AT_ONCE = 64


@_on_its_device
def outer_sums(
    values: torch.Tensor,
    rows: torch.Tensor,
    latents: torch.Tensor,
    starts: torch.Tensor,
    x: torch.Tensor,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """(d_sae, d): for each latent the sum of ``values * x[rows]`` over its pairs, in float32.

    A program for each latent adds up its first pairs. A second kernel, with a program for every so
    many of all pairs, adds the rest of the latents that have more, in no fixed order. Where torch
    must be deterministic (``torch.use_deterministic_algorithms``), the first kernel does it all.

    Args:
        values: (N,) in the order of the latents.
        rows: (N,) int64, in the same order.
        latents: (N,) each pair's latent.
        starts: (d_sae + 1,) int64, where each latent's pairs start, and N.
        x: (B, d), contiguous.
        out: (d_sae, d) to add to, in place; None for a new one.
    """
    d_sae, d = starts.numel() - 1, x.shape[1]
    add = out is not None
    if out is None:
        out = torch.empty(d_sae, d, dtype=torch.float32, device=x.device)
    width = triton.next_power_of_2(d)
    alone = torch.are_deterministic_algorithms_enabled()
    limit = values.numel() if alone else PAIRS_AT_ONCE
    _outer_sums[(d_sae,)](values, rows, starts, x, out, d, limit, ADD=add, WIDTH=width, num_warps=4)
    if not alone:
        _outer_sums_left[(triton.cdiv(values.numel(), limit),)](
            values, rows, latents, starts, x, out, d, limit, WIDTH=width, num_warps=4
        )
    return out


@triton.jit
def _outer_sum(values_ptr, rows_ptr, x_ptr, start, end, d, WIDTH: tl.constexpr):
    column = tl.arange(0, WIDTH)
    total = tl.zeros([WIDTH], dtype=tl.float32)
    for pair in range(start, end):
        row = tl.load(rows_ptr + pair)
        value = tl.load(values_ptr + pair).to(tl.float32)
        x = tl.load(x_ptr + row * d + column, mask=column < d, other=0.0)
        total += value * x.to(tl.float32)
    return total


@triton.jit
def _outer_sums(
    values_ptr,
    rows_ptr,
    starts_ptr,
    x_ptr,
    out_ptr,
    d,
    limit,
    ADD: tl.constexpr,
    WIDTH: tl.constexpr,
):
    latent = tl.program_id(0).to(tl.int64)
    start = tl.load(starts_ptr + latent)
    end = tl.minimum(tl.load(starts_ptr + latent + 1), start + limit)
    total = _outer_sum(values_ptr, rows_ptr, x_ptr, start, end, d, WIDTH)
    column = tl.arange(0, WIDTH)
    if ADD:
        # A row that nothing is added to is not read.
        inside = column < tl.where(end > start, d, 0)
        total += tl.load(out_ptr + latent * d + column, mask=inside, other=0.0)
        tl.store(out_ptr + latent * d + column, total, mask=inside)
    else:
        tl.store(out_ptr + latent * d + column, total, mask=column < d)


@triton.jit
def _outer_sums_left(
    values_ptr,
    rows_ptr,
    latents_ptr,
    starts_ptr,
    x_ptr,
    out_ptr,
    d,
    limit,
    WIDTH: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * limit
    # No other latent has pairs here that _outer_sums has left: they would have begun before.
    latent = tl.load(latents_ptr + first).to(tl.int64)
    start = tl.maximum(first, tl.load(starts_ptr + latent) + limit)
    end = tl.minimum(first + limit, tl.load(starts_ptr + latent + 1))
    if start < end:
        total = _outer_sum(values_ptr, rows_ptr, x_ptr, start, end, d, WIDTH)
        column = tl.arange(0, WIDTH)
        tl.atomic_add(out_ptr + latent * d + column, total, mask=column < d)


@_on_its_device
def add_multiples(
    scale: torch.Tensor, W: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """(n, d): ``scale`` (n,) times the rows of ``W`` (n, d), in float32.

    Args:
        scale: rows with a scale of 0 are not read.
        W: of any strides.
        out: (n, d) to add to, in place; None for a new one.
    """
    n, d = W.shape
    add = out is not None
    if out is None:
        out = torch.empty(n, d, dtype=torch.float32, device=W.device)
    width = triton.next_power_of_2(d)
    _add_multiples[(triton.cdiv(n, ROWS),)](
        scale.contiguous(),
        W,
        out,
        n,
        d,
        W.stride(0),
        W.stride(1),
        ADD=add,
        ROWS=ROWS,
        WIDTH=width,
        num_warps=4,
    )
    return out


@triton.jit
def _add_multiples(
    scale_ptr,
    W_ptr,
    out_ptr,
    n,
    d,
    W_stride,
    W_step,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * ROWS
    column = tl.arange(0, WIDTH).to(tl.int64)
    for row in range(first, tl.minimum(first + ROWS, n)):
        scale = tl.load(scale_ptr + row).to(tl.float32)
        inside = column < tl.where(scale != 0, d, 0)
        W = tl.load(W_ptr + row * W_stride + column * W_step, mask=inside, other=0.0)
        total = scale * W
        if ADD:
            total += tl.load(out_ptr + row * d + column, mask=inside, other=0.0)
            tl.store(out_ptr + row * d + column, total, mask=inside)
        else:
            tl.store(out_ptr + row * d + column, total, mask=column < d)


# Columns of W that one program reads. Programs of the same columns run one after another, so that
# this slice of W, 2 bytes an entry, mostly stays in the GPU's cache while all rows read from it.
SLICE = 256


@_on_its_device
def weighted_sums(values: torch.Tensor, latents: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """(B, d): for each row the sum of ``values * W[latents]``, in float32.

    Args:
        values: (B, k).
        latents: (B, k) int64.
        W: (d_sae, d), contiguous.
    """
    B, k = values.shape
    d = W.shape[1]
    out = torch.empty(B, d, dtype=torch.float32, device=W.device)
    width = min(SLICE, triton.next_power_of_2(d))
    _weighted_sums[(B, triton.cdiv(d, width))](
        values, latents, W, out, k, d, BLOCK=16, WIDTH=width, num_warps=2
    )
    return out


@triton.jit
def _weighted_sums(
    values_ptr, latents_ptr, W_ptr, out_ptr, k, d, BLOCK: tl.constexpr, WIDTH: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    sums = tl.zeros([BLOCK, WIDTH], dtype=tl.float32)
    for first in range(0, k, BLOCK):
        i = first + tl.arange(0, BLOCK)
        latent = tl.load(latents_ptr + row * k + i, mask=i < k, other=0)
        value = tl.load(values_ptr + row * k + i, mask=i < k, other=0.0).to(tl.float32)
        inside = (i < k)[:, None] & (column < d)[None, :]
        W = tl.load(W_ptr + latent[:, None] * d + column[None, :], mask=inside, other=0.0)
        sums += value[:, None] * W.to(tl.float32)
    tl.store(out_ptr + row * d + column, tl.sum(sums, axis=0), mask=column < d)


@_on_its_device
def dots(x: torch.Tensor, latents: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
    """(B, k): the products ``x[row] . W[latent]``, in float32.

    Args:
        x: (B, d), contiguous.
        latents: (B, k) int64.
        W: (d_sae, d), contiguous.
    """
    B, k = latents.shape
    d = W.shape[1]
    width = min(SLICE, triton.next_power_of_2(d))
    slices = triton.cdiv(d, width)
    parts = torch.empty(slices, B, k, dtype=torch.float32, device=W.device)
    _dots[(B, slices)](x, latents, W, parts, B, k, d, BLOCK=16, WIDTH=width, num_warps=4)
    return parts.sum(dim=0)


@triton.jit
def _dots(x_ptr, latents_ptr, W_ptr, parts_ptr, B, k, d, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    x = tl.load(x_ptr + row * d + column, mask=column < d, other=0.0).to(tl.float32)
    for first in range(0, k, BLOCK):
        i = first + tl.arange(0, BLOCK)
        latent = tl.load(latents_ptr + row * k + i, mask=i < k, other=0)
        inside = (i < k)[:, None] & (column < d)[None, :]
        W = tl.load(W_ptr + latent[:, None] * d + column[None, :], mask=inside, other=0.0)
        products = tl.sum(W.to(tl.float32) * x[None, :], axis=1)
        tl.store(parts_ptr + (tl.program_id(1) * B + row) * k + i, products, mask=i < k)


@_on_its_device
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


@_on_its_device
def scaled_cast(
    W: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype, out: torch.Tensor | None = None
) -> torch.Tensor:
    """(m, n): ``W * scale``, which is (n,) or (m, 1), in ``dtype``, in one pass; all contiguous.

    ``out`` may be ``W``.
    """
    if out is None:
        out = torch.empty(W.shape, dtype=dtype, device=W.device)
    m, n = W.shape
    of_row = scale.ndim == 2
    _scaled_cast[(m, triton.cdiv(n, 1024))](
        W, scale, out, n, OF_ROW=of_row, WIDTH=1024, num_warps=4
    )
    return out


@triton.jit
def _scaled_cast(W_ptr, scale_ptr, out_ptr, n, OF_ROW: tl.constexpr, WIDTH: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    offsets = row * n + column
    W = tl.load(W_ptr + offsets, mask=column < n, other=0.0)
    if OF_ROW:
        scale = tl.load(scale_ptr + row)
    else:
        scale = tl.load(scale_ptr + column, mask=column < n, other=0.0)
    tl.store(out_ptr + offsets, W * scale, mask=column < n)


@_on_its_device
def gather_columns(
    x: torch.Tensor, columns: torch.Tensor, n_columns: torch.Tensor | None = None
) -> torch.Tensor:
    """See :func:`sae_lens_auxk.ops.selection.gather_columns`; ``x`` is contiguous."""
    n = columns.numel()
    out = torch.empty(x.shape[0], n, dtype=x.dtype, device=x.device)
    grid = (triton.cdiv(n, 2048), triton.cdiv(x.shape[0], ROWS))
    _gather_columns[grid](
        x,
        columns,
        columns if n_columns is None else n_columns,
        out,
        x.shape[0],
        x.shape[1],
        n,
        COUNTED=n_columns is not None,
        ROWS=ROWS,
        WIDTH=2048,
        num_warps=4,
    )
    return out


@triton.jit
def _gather_columns(
    x_ptr,
    columns_ptr,
    n_columns_ptr,
    out_ptr,
    B,
    width,
    n,
    COUNTED: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    i = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    counts = i < n
    if COUNTED:
        counts = counts & (i < tl.load(n_columns_ptr))
    column = tl.load(columns_ptr + i, mask=counts, other=0)
    first = tl.program_id(1).to(tl.int64) * ROWS
    for row in range(first, tl.minimum(first + ROWS, B)):
        x = tl.load(x_ptr + row * width + column, mask=counts, other=float("-inf"))
        tl.store(out_ptr + row * n + i, x, mask=i < n)


@_on_its_device
def add_scaled(
    rows: torch.Tensor,
    scale: torch.Tensor,
    latents: torch.Tensor | None,
    n_rows: torch.Tensor | None,
    W: torch.Tensor,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(d_sae, d): ``scale`` times ``rows`` at their latents; (n,) the rows' products with W's.

    Args:
        rows: (n, d), of any strides.
        scale: (d_sae,).
        latents: (n,) int64, each once; None for all.
        n_rows: () int64, how many of the rows count; None for all.
        W: (d_sae, d), of any strides.
        out: (d_sae, d) to add to, in place; None for a new one.
    """
    n, d = rows.shape
    add = out is not None
    if out is None:
        out = torch.zeros(W.shape, dtype=torch.float32, device=rows.device)
    products = torch.zeros(n, dtype=torch.float32, device=rows.device)
    _add_scaled[(triton.cdiv(n, 16),)](
        rows,
        scale,
        scale if latents is None else latents,
        scale if n_rows is None else n_rows,
        W,
        out,
        products,
        n,
        d,
        rows.stride(0),
        rows.stride(1),
        W.stride(0),
        W.stride(1),
        ALL=latents is None,
        COUNTED=n_rows is not None,
        ADD=add,
        LATENTS=16,
        WIDTH=128,
        num_warps=4,
    )
    return out, products


@triton.jit
def _add_scaled(
    rows_ptr,
    scale_ptr,
    latents_ptr,
    n_rows_ptr,
    W_ptr,
    out_ptr,
    products_ptr,
    n,
    d,
    rows_stride,
    rows_step,
    W_stride,
    W_step,
    ALL: tl.constexpr,
    COUNTED: tl.constexpr,
    ADD: tl.constexpr,
    LATENTS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    i = tl.program_id(0).to(tl.int64) * LATENTS + tl.arange(0, LATENTS)
    counts = i < n
    if COUNTED:
        counts = counts & (i < tl.load(n_rows_ptr))
    latent = i
    if not ALL:
        latent = tl.load(latents_ptr + i, mask=counts, other=0)
    scale = tl.load(scale_ptr + latent, mask=counts, other=0.0)
    products = tl.zeros([LATENTS], dtype=tl.float32)
    for first in range(0, d, WIDTH):
        column = (first + tl.arange(0, WIDTH)).to(tl.int64)
        inside = counts[:, None] & (column < d)[None, :]
        offsets = i[:, None] * rows_stride + column[None, :] * rows_step
        rows = tl.load(rows_ptr + offsets, mask=inside, other=0.0)
        # Transposed, as neighbouring latents are neighbours in W_enc.
        W = tl.load(
            W_ptr + column[:, None] * W_step + latent[None, :] * W_stride,
            mask=counts[None, :] & (column < d)[:, None],
            other=0.0,
        )
        products += tl.sum(rows * tl.trans(W), axis=1)
        to = out_ptr + latent[:, None] * d + column[None, :]
        scaled = rows * scale[:, None]
        if ADD:
            scaled += tl.load(to, mask=inside, other=0.0)
        tl.store(to, scaled, mask=inside)
    tl.store(products_ptr + i, products, mask=counts)
