"""Choosing a few latents of each row, and the three products with the chosen ones.

The training step of a sparse autoencoder needs these three products, each a derivative of the
others: for each row a weighted sum of rows of a (d_sae, d) matrix, for each selected entry a dot
product, and for each latent a weighted sum of rows of (B, d). There are two forms.

- :class:`Pairs`: (row, latent) pairs. Only what is selected is read. The torch reference is
  ``torch.nn.functional.embedding_bag`` throughout.
- :class:`InColumns`: entries of a dense (B, n) over n of the latents. A dense product reads all of
  them, but at least ten times as fast, which pays off if n is small.

``values`` have one entry for each selected one, float32 or float64, in any shape. No function
here has a gradient; :mod:`sae_lens_auxk.ops.encoder` and :mod:`~sae_lens_auxk.ops.matrices` add
them.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from sae_lens_auxk.ops import KERNELS

SPARSE_DEVICES = ("cpu", "cuda")

# With fewer pairs a row torch's embedding_bag is as fast (benchmarks/parts.py).
MIN_PAIRS_FOR_KERNEL = 64

# With up to this many times k candidates, a dense product is faster than pairs. Measured on a CPU
# (False) and on an H200 (docs/performance.md).
COLUMNS_WORTH_A_PAIR = {False: 6, True: 64}

# Where allocating another W takes longer than all else of add_outer.
SLOW_TO_ALLOCATE = ("cpu",)

# ``torch.topk`` reads a row several times, so top_k has two levels. The k largest entries of a row
# lie in the k groups with the largest maxima: where an entry is in none of them, there are k group
# maxima, each an entry of its own, that are not smaller. So one pass finds the group maxima, and
# ``torch.topk`` reads only these and the entries of k groups.
MIN_ENTRIES_FOR_GROUPS = 8_192
# The kernel runs one program for each row: for a single long row torch is faster.
MIN_ROWS_FOR_KERNEL = 2


def has_sparse_operations(x: torch.Tensor) -> bool:
    """Whether torch has all operations of the sparse step on a tensor's device.

    On MPS there is no embedding_bag or nonzero_static, and before torch 2.9 no sparse tensor. There
    SAELens's dense step is taken.
    """
    return x.device.type in SPARSE_DEVICES


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
    if module := _top_k_kernels(x, k * size):
        return module.largest(x, k, among, groups, size)
    candidates = x.unflatten(1, (-1, size)).gather(1, groups.unsqueeze(-1).expand(-1, -1, size))
    if among is not None:
        candidates = candidates.masked_fill_(~among.view(-1, size)[groups], -torch.inf)
    values, found = candidates.flatten(1).topk(k, dim=-1, sorted=False)
    return values, groups.gather(1, found // size) * size + found % size


def _largest(
    x: torch.Tensor, k: int, among: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    if module := _top_k_kernels(x, x.shape[1]):
        return module.largest(x, k, among)
    if among is not None:
        x = x.masked_fill(~among, -torch.inf)
    values, indices = x.topk(k, dim=-1, sorted=False)
    return values, indices


def _top_k_kernels(x: torch.Tensor, n_candidates: int):
    module = KERNELS[x.device.type]
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
    if module := KERNELS[x.device.type]:
        return module.group_max(x, size, among)
    if among is not None:
        x = x.masked_fill(~among, -torch.inf)
    return x.unflatten(1, (-1, size)).amax(dim=-1)


def group_size(n: int, k: int) -> int:
    """The power of two that divides ``n`` and balances group maxima with candidates."""
    size = 1
    if n >= MIN_ENTRIES_FOR_GROUPS:
        while 2 * size * 2 * size * k <= 2 * n and n % (2 * size) == 0 and size < 128:
            size *= 2
    return size


def indices_of(mask: torch.Tensor, bound: int) -> torch.Tensor:
    """(n,) int64: the indices where ``mask`` is True, then 0s; n is ``bound``, rounded up.

    ``nonzero()`` would wait for the device, as the shape of its result depends on the values. n
    is a multiple of 64, as a product in bfloat16 is otherwise up to 5 times slower.
    """
    n = -bound // 64 * -64
    if has_sparse_operations(mask):
        return mask.nonzero_static(size=n, fill_value=0).squeeze(1)
    found = mask.nonzero().squeeze(1)
    return torch.nn.functional.pad(found, (0, n - len(found)))


def beyond(columns: torch.Tensor, n_columns: torch.Tensor) -> torch.Tensor:
    """(n,) bool: which of ``columns`` (n, ...) come after the first ``n_columns`` ()."""
    return torch.arange(len(columns), device=columns.device) >= n_columns


def gather_columns(
    x: torch.Tensor, columns: torch.Tensor, n_columns: torch.Tensor | None = None
) -> torch.Tensor:
    """(B, n): the columns of ``x`` at indices ``columns`` (n,); no gradient.

    If ``n_columns`` () is given, only the first ``n_columns`` count; the others are -inf.
    """
    if k := KERNELS[x.device.type]:
        return k.gather_columns(x, columns, n_columns)
    gathered = x.index_select(1, columns)
    if n_columns is None:
        return gathered
    return gathered.masked_fill_(beyond(columns, n_columns), -torch.inf)


def largest_among(
    h: torch.Tensor, k: int, among: torch.Tensor | None, bound: int
) -> tuple[torch.Tensor, "Selected"]:
    """The ``k`` largest entries of each row, in the form that is faster to compute with.

    Args:
        h: (B, d_sae).
        k: how many.
        among: (d_sae,) bool, the latents to choose from; None for all.
        bound: an upper bound on their number, known without waiting for the device.

    Returns:
        (B, m) values, -inf for surplus ones where there are fewer than k latents, and where
        they are.
    """
    d_sae = h.shape[1]
    dense = bound <= COLUMNS_WORTH_A_PAIR[h.is_cuda] * k
    if among is None or (h.is_cuda and not dense):
        values, latents = top_k(h, min(k, d_sae), among)
        return values, Pairs.per_row(latents, d_sae)
    columns = indices_of(among, bound)
    values, positions = gather_columns(h, columns, among.sum()), None
    if k < len(columns):
        values, positions = top_k(values, k)
    selected = InColumns(columns, positions, d_sae)
    return values, selected if dense else Pairs.per_row(selected.latents, d_sae)


class ByLatent(NamedTuple):
    """Pairs in the order of their latents.

    Attributes:
        order: (N,) int64, the pairs' places.
        latents: (N,) int32, ascending.
        starts: (d_sae + 1,) int64, where each latent's pairs start, and N.
    """

    order: torch.Tensor
    latents: torch.Tensor
    starts: torch.Tensor


@dataclass(frozen=True)
class Pairs:
    """(bag, latent) pairs, sorted by bag; a bag is a row, or one level of a row.

    Attributes:
        rows: (N,) int64, the row of the batch that each pair belongs to.
        latents: (N,) int64.
        bags: (N,) int64, ascending.
        offsets: (n_bags,) int64, where each bag's pairs start.
        d_sae: the number of latents to choose from.
        per_bag: how many pairs each bag has, or None where bags differ.
    """

    rows: torch.Tensor
    latents: torch.Tensor
    bags: torch.Tensor
    offsets: torch.Tensor
    d_sae: int
    per_bag: int | None = None

    @staticmethod
    def per_row(latents: torch.Tensor, d_sae: int) -> "Pairs":
        """From (B, k) latents, the same number in each row."""
        B, k = latents.shape
        places = torch.arange(B * k, device=latents.device)
        rows = places // k
        return Pairs(rows, latents.reshape(-1), rows, places[::k].contiguous(), d_sae, k)

    @staticmethod
    def from_bags(
        rows: torch.Tensor, latents: torch.Tensor, bags: torch.Tensor, n_bags: int, d_sae: int
    ) -> "Pairs":
        """From pairs whose ``bags`` are ascending already."""
        starts = torch.arange(n_bags, device=bags.device)
        return Pairs(rows, latents, bags, torch.searchsorted(bags, starts), d_sae)

    @cached_property
    def by_latent(self) -> ByLatent:
        """The pairs in the order of their latents."""
        # A sort of 32-bit keys takes half as many passes as one of 64-bit keys.
        latents, order = self.latents.int().sort(stable=True)
        bounds = torch.arange(self.d_sae + 1, device=latents.device, dtype=torch.int32)
        return ByLatent(order, latents, torch.searchsorted(latents, bounds))

    @cached_property
    def _rows_by_latent(self) -> torch.Tensor:
        return self.rows.index_select(0, self.by_latent.order)

    @cached_property
    def _bags_by_latent(self) -> torch.Tensor:
        if self.bags is self.rows:
            return self._rows_by_latent
        return self.bags.index_select(0, self.by_latent.order)

    @property
    def in_autocast(self) -> bool:
        """Whether products are best given their matrices in autocast's precision."""
        # Reading a few rows of W twice in float32 is faster than converting all of it first.
        return self._kernels is not None and self.latents.numel() >= 2 * self.d_sae

    def matrix(self, W: torch.Tensor) -> torch.Tensor:
        """The rows of ``W`` (d_sae, d) that the products read from."""
        return W

    def weighted_sums(self, values: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
        """(n_bags, d): for each bag the sum of ``values * W[latents]``, in values's dtype.

        ``W`` is what :meth:`matrix` gives.
        """
        if k := self._kernels:
            return k.weighted_sums(values.view(self._grid), self._table, W)
        return torch.nn.functional.embedding_bag(
            self.latents, W, self.offsets, per_sample_weights=values.flatten(), mode="sum"
        )

    def dots(self, x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
        """(N,): for each pair the product ``x[bag] . W[latent]``, in float32 or x's dtype.

        ``W`` is what :meth:`matrix` gives.
        """
        if k := self._kernels:
            return k.dots(x, self._table, W).flatten()
        dots = torch.ops.aten._embedding_bag_per_sample_weights_backward
        if x.device.type != "cpu":
            return dots(x.contiguous(), W, self.latents, self.offsets, self.bags, 0, -1)
        # With the latents as bags of rows, as a core's cache holds much of x but little of W: on a
        # CPU this takes half the time.
        order, latents, starts = self.by_latent
        products = dots(W, x, self._bags_by_latent, starts[:-1], latents.long(), 0, -1)
        return torch.empty_like(products).scatter_(0, order, products)

    def add_outer(
        self, into: torch.Tensor | None, values: torch.Tensor, x: torch.Tensor, like: torch.Tensor
    ) -> torch.Tensor:
        """(d_sae, d): ``into`` in place, or 0, plus for each latent the sum of ``values * x``.

        Args:
            into: the sums so far, or None.
            values: (N,).
            x: a row for each bag, or one for each row of the batch.
            like: of the dtype of the sums.
        """
        order, latents, starts = self.by_latent
        rows = self._bags_by_latent if len(x) == len(self.offsets) else self._rows_by_latent
        values, x = values.flatten().index_select(0, order), x.contiguous()
        if (k := KERNELS[x.device.type]) and like.dtype == torch.float32:
            return k.outer_sums(values, rows, latents, starts, x, into)
        bags, used = starts[:-1], None
        if into is not None and x.device.type in SLOW_TO_ALLOCATE:
            # Only the latents that have any. (With CUDA this would wait for their number.)
            used = (bags < starts[1:]).nonzero().squeeze(1)
            bags = bags[used]
        sums = torch.nn.functional.embedding_bag(
            rows, x.to(like.dtype), bags, per_sample_weights=values.to(like.dtype), mode="sum"
        )
        return add_rows(into, sums, used, self.d_sae)

    def sum_by_latent(self, values: torch.Tensor) -> torch.Tensor:
        """(d_sae,): the sum of ``values`` over each latent's pairs."""
        return values.new_zeros(self.d_sae).index_add_(0, self.latents, values.flatten())

    @property
    def _grid(self) -> tuple[int, int]:
        assert self.per_bag is not None
        return self.offsets.numel(), self.per_bag

    @property
    def _table(self) -> torch.Tensor:
        return self.latents.view(self._grid)

    @property
    def _kernels(self):
        many = self.per_bag is not None and self.per_bag >= MIN_PAIRS_FOR_KERNEL
        return KERNELS[self.latents.device.type] if many else None


@dataclass(frozen=True)
class InColumns:
    """Entries of a dense (B, n), k in each row.

    Attributes:
        columns: (n,) int64, the latents of the n columns. They may repeat if the entries of
            the repetitions are 0.
        positions: (B, k) int64, which columns; None for all n, in order.
        d_sae: the number of latents to choose from.
    """

    columns: torch.Tensor
    positions: torch.Tensor | None
    d_sae: int

    @property
    def in_autocast(self) -> bool:
        return True

    def matrix(self, W: torch.Tensor) -> torch.Tensor:
        """(n, d): the rows of the n columns."""
        return W.index_select(0, self.columns)

    @property
    def latents(self) -> torch.Tensor:
        """(B, k), or (n,) for all columns."""
        if self.positions is None:
            return self.columns
        return self.columns.index_select(0, self.positions.flatten()).view_as(self.positions)

    def weighted_sums(self, values: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
        """(B, d): see :meth:`Pairs.weighted_sums`."""
        return matmul_to(self._dense(values, W.dtype), W, values.dtype)

    def dots(self, x: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
        """(B, k): see :meth:`Pairs.dots`."""
        products = x @ W.T
        return products if self.positions is None else products.gather(1, self.positions)

    def add_outer(
        self, into: torch.Tensor | None, values: torch.Tensor, x: torch.Tensor, like: torch.Tensor
    ) -> torch.Tensor:
        """See :meth:`Pairs.add_outer`."""
        dense = self._dense(values, x.dtype)
        return add_rows(into, matmul_to(dense.T, x, like.dtype), self.columns, self.d_sae)

    def sum_by_latent(self, values: torch.Tensor) -> torch.Tensor:
        """See :meth:`Pairs.sum_by_latent`."""
        sums = values.new_zeros(self.d_sae)
        if self.positions is None:
            return sums.index_add_(0, self.columns, values.sum(dim=0))
        return sums.index_add_(0, self.latents.flatten(), values.flatten())

    def _dense(self, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        values = values.to(dtype)
        if self.positions is None:
            return values
        dense = values.new_zeros(len(values), self.columns.numel())
        return dense.scatter_(1, self.positions, values)


Selected = Pairs | InColumns


def matmul_to(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``a @ b`` in ``dtype``, without a rounding to the operands' precision where torch can."""
    if a.is_cuda and a.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def add_rows(
    into: torch.Tensor | None, rows: torch.Tensor, latents: torch.Tensor | None, d_sae: int
) -> torch.Tensor:
    """(d_sae, d): ``into`` in place, or 0, plus ``rows`` (n, d) at ``latents`` (n,); None: all."""
    if latents is None:
        return rows if into is None else into.add_(rows)
    into = rows.new_zeros(d_sae, rows.shape[1]) if into is None else into
    return into.index_add_(0, latents, rows)
