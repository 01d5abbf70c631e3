"""A few selected latents of each row, and the three products with them.

The training step of a sparse autoencoder needs these three products, each a derivative of the
others: for each row a weighted sum of rows of a (d_sae, d) matrix, for each selected entry a dot
product, and for each latent a weighted sum of rows of (B, d). There are two forms.

- :class:`Pairs`: (row, latent) pairs. Only what is selected is read. The torch reference is
  ``torch.nn.functional.embedding_bag`` throughout.
- :class:`InColumns`: entries of a dense (B, n) over n of the latents. A dense product reads all of
  them, but at least ten times as fast, which pays off if n is small.

``values`` have one entry for each selected one, float32 or float64, in any shape. No function
here has a gradient; :mod:`sae_lens_auxk.ops.encoder` and :mod:`~sae_lens_auxk.ops.decoder` add
them.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from sae_lens_auxk.ops import kernels
from sae_lens_auxk.ops.gradient import LatentGradient

# With fewer pairs a row torch's embedding_bag is as fast (benchmarks/parts.py).
MIN_PAIRS_FOR_KERNEL = 64


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

    def add_to(
        self, gradient: LatentGradient, values: torch.Tensor, x: torch.Tensor, by_bag: bool
    ) -> None:
        """Add ``values * x`` to the rows of ``gradient``.

        ``x`` has a row for each bag if ``by_bag``, else one for each row of the batch.
        """
        order, latents, starts = self.by_latent
        rows = self._bags_by_latent if by_bag else self._rows_by_latent
        values = values.flatten().index_select(0, order)
        gradient.add_pairs(values, x.contiguous(), rows, latents, starts)

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
        return kernels(self.latents) if many else None


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

    def add_to(
        self,
        gradient: LatentGradient,
        values: torch.Tensor,
        x: torch.Tensor,
        by_bag: bool,  # noqa: ARG002
    ) -> None:
        """See :meth:`Pairs.add_to`; a bag is a row here."""
        dense = self._dense(values, x.dtype)
        gradient.add_rows(matmul_to(dense.T, x, gradient.W.dtype), self.columns)

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
