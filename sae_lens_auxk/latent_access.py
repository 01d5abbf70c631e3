"""Ways to the pre-activations and decoder rows of some latents.

What an auxiliary loss needs of a step is a few columns of ``h``, or its largest entries, and
the decoder rows that go with them. :class:`LatentAccess` says so without saying how:
:class:`DenseAccess` is plain torch on SAELens's tensors and serves every architecture,
``SparseAccess`` in :mod:`sae_lens_auxk.sparse_topk` never makes the dense gradients.
"""

from dataclasses import dataclass, replace
from typing import Protocol

import torch

from sae_lens_auxk.ops.columns import beyond, indices_of
from sae_lens_auxk.ops.topk import top_k


class Activations(Protocol):
    """Pre-activations of some latents in each row, and what can be done with them.

    ``h`` is (B, m), with its graph; an entry that does not belong to the selection is 0.
    """

    @property
    def h(self) -> torch.Tensor: ...

    def relu(self) -> "Activations":
        """The same with negative values set to 0."""
        ...

    def decode(self) -> torch.Tensor:
        """(B, d_in): the sum of ``h_bi W_i`` over the selection, with its graph."""
        ...

    def decode_as(self, values: torch.Tensor) -> torch.Tensor:
        """The same with constants ``values`` (B, m) in the place of ``h``.

        W_i's gradient is that of a latent which fires at that value: as in SAELens's own loss
        its norm, where ``h`` is rescaled by it, is no way to change the output.
        """
        ...

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """(B, m): ``x_b . W_i`` for each entry of ``h``, without a graph."""
        ...


class Columns(Protocol):
    """``h`` of some latents as (B, n), with its graph; there may be more columns than latents.

    ``h`` is -inf in a column that no latent belongs to.
    """

    @property
    def h(self) -> torch.Tensor: ...

    def decode(self, acts: torch.Tensor) -> torch.Tensor:
        """(B, d_in): the sum of ``acts`` (B, n) times ``W_i``; ``acts`` is 0 where h is -inf."""
        ...


class LatentAccess(Protocol):
    """One step's ``h`` (B, d_sae) and ``W_i``; everything with its graph."""

    def columns(self, latents: torch.Tensor | None = None) -> torch.Tensor:
        """(B, n): the columns of ``h`` at ``latents`` (n,), each once, or all of them."""
        ...

    def sums(self) -> torch.Tensor:
        """(d_sae,): the sum of each column of ``h``."""
        ...

    def columns_among(self, among: torch.Tensor, at_most: int) -> Columns:
        """The columns of some latents.

        Args:
            among: (d_sae,) bool, the latents.
            at_most: a number that those are no more than.
        """
        ...

    def largest(self, k: int, among: torch.Tensor | None, at_most: int) -> Activations:
        """The ``k`` largest ``h`` of each row.

        Args:
            k: how many; where fewer can be chosen, all of these.
            among: (d_sae,) bool, the latents to choose from, or None for all.
            at_most: a number that those are no more than.
        """
        ...

    def best_match(self, x: torch.Tensor, among: torch.Tensor, level: slice) -> Activations:
        """The latent of each row with the largest ``W_i . x_b``, where it is one of some latents.

        Args:
            x: (B, d_in).
            among: (d_sae,) bool, the latents. Rows that another latent matches better get nothing.
            level: the latents that there are to compare with, all or those of a Matryoshka level.
        """
        ...

    def shortfall(self, threshold: torch.Tensor, among: torch.Tensor, at_most: int) -> torch.Tensor:
        """(B,): the sums of ``relu(threshold - h)`` over some latents.

        Args:
            threshold: broadcastable to (B, d_sae).
            among: (d_sae,) bool, the latents.
            at_most: a number that those are no more than.
        """
        ...

    def at_rows(self, rows: torch.Tensor) -> "LatentAccess":
        """The same for some rows (m,) of the batch."""
        ...


@dataclass(frozen=True)
class DenseAccess:
    """From SAELens's own tensors.

    Attributes:
        h: (B, d_sae), with its graph.
        W_dec: (d_sae, d_in).
        rescaled: whether ``W_i`` is a row of W_dec divided by its norm.
    """

    h: torch.Tensor
    W_dec: torch.Tensor
    rescaled: bool

    def columns(self, latents: torch.Tensor | None = None) -> torch.Tensor:
        return self.h if latents is None else self.h.index_select(1, latents)

    def sums(self) -> torch.Tensor:
        return self.h.sum(dim=0, dtype=torch.promote_types(self.h.dtype, torch.float32))

    def columns_among(self, among: torch.Tensor, at_most: int) -> Columns:
        latents = indices_of(among, at_most)
        h = self.columns(latents).masked_fill(beyond(latents, among.sum()), -torch.inf)
        return DenseColumns(h, _normalized(self.W_dec.index_select(0, latents), self.rescaled))

    def largest(self, k: int, among: torch.Tensor | None, at_most: int) -> Activations:  # noqa: ARG002
        if among is None:
            return MaskedColumns(keep_largest(self.h, k), self.W_dec, self.rescaled)
        latents = among.nonzero().squeeze(1)
        rows = self.W_dec.index_select(0, latents)
        return MaskedColumns(keep_largest(self.columns(latents), k), rows, self.rescaled)

    def best_match(self, x: torch.Tensor, among: torch.Tensor, level: slice) -> Activations:
        with torch.no_grad():
            rows = _normalized(self.W_dec[level], self.rescaled)
            products = x.to(rows.dtype) @ rows.T
            best = products.argmax(dim=-1, keepdim=True) + (level.start or 0)
        h = self.h.gather(1, best).where(among[best], 0)
        h = torch.zeros_like(self.h).scatter(-1, best, h)
        return MaskedColumns(h, self.W_dec, self.rescaled)

    def shortfall(
        self,
        threshold: torch.Tensor,
        among: torch.Tensor,
        at_most: int,  # noqa: ARG002
    ) -> torch.Tensor:
        latents = among.nonzero().squeeze(1)
        if threshold.ndim > 0 and threshold.shape[-1] > 1:
            threshold = threshold.index_select(-1, latents)
        h = self.columns(latents)
        missing = (threshold.to(h.dtype) - h).relu()
        return missing.sum(dim=-1, dtype=torch.promote_types(missing.dtype, torch.float32))

    def at_rows(self, rows: torch.Tensor) -> "DenseAccess":
        return replace(self, h=self.h.index_select(0, rows))


@dataclass(frozen=True)
class DenseColumns:
    """See :class:`Columns`; ``rows`` (n, d_in) are their ``W_i``."""

    h: torch.Tensor
    rows: torch.Tensor

    def decode(self, acts: torch.Tensor) -> torch.Tensor:
        if not torch.is_autocast_enabled(acts.device.type):
            acts = acts.to(self.rows.dtype)
        return acts @ self.rows


@dataclass(frozen=True)
class MaskedColumns:
    """A selection as (B, n) with zeros outside of it, and the n rows of W_dec that belong to it."""

    h: torch.Tensor
    rows: torch.Tensor
    rescaled: bool

    def relu(self) -> "MaskedColumns":
        return replace(self, h=self.h.relu())

    def decode(self) -> torch.Tensor:
        return self.h @ _normalized(self.rows, self.rescaled)

    def decode_as(self, values: torch.Tensor) -> torch.Tensor:
        norms = self.rows.detach().norm(dim=-1) if self.rescaled else 1.0
        return (values / norms).to(self.rows.dtype) @ self.rows

    @torch.no_grad()
    def project(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.rows.dtype) @ _normalized(self.rows, self.rescaled).T


def _normalized(rows: torch.Tensor, rescaled: bool) -> torch.Tensor:
    return rows / rows.norm(dim=-1, keepdim=True) if rescaled else rows


@dataclass(frozen=True)
class LevelAccess:
    """The latents from ``start`` on that belong to one level of a Matryoshka SAE.

    Attributes:
        whole: the access to all latents.
        start: the level's first latent.
        end: the first one that is no longer of the level.
        d_sae: how many there are in all.
    """

    whole: LatentAccess
    start: int
    end: int
    d_sae: int

    def columns(self, latents: torch.Tensor | None = None) -> torch.Tensor:
        if latents is None:
            return self.whole.columns()[:, self.start : self.end]
        return self.whole.columns(latents + self.start)

    def sums(self) -> torch.Tensor:
        return self.whole.sums()[self.start : self.end]

    def columns_among(self, among: torch.Tensor, at_most: int) -> Columns:
        at_most = min(at_most, self.end - self.start)
        return self.whole.columns_among(self._of_all(among), at_most)

    def largest(self, k: int, among: torch.Tensor | None, at_most: int) -> Activations:
        assert among is not None
        return self.whole.largest(k, self._of_all(among), min(at_most, self.end - self.start))

    def best_match(self, x: torch.Tensor, among: torch.Tensor, level: slice) -> Activations:
        assert level == slice(None)
        return self.whole.best_match(x, self._of_all(among), slice(self.start, self.end))

    def shortfall(self, threshold: torch.Tensor, among: torch.Tensor, at_most: int) -> torch.Tensor:
        at_most = min(at_most, self.end - self.start)
        return self.whole.shortfall(threshold, self._of_all(among), at_most)

    def _of_all(self, of_level: torch.Tensor) -> torch.Tensor:
        of_all = torch.zeros(self.d_sae, dtype=torch.bool, device=of_level.device)
        of_all[self.start : self.end] = of_level
        return of_all

    def at_rows(self, rows: torch.Tensor) -> "LevelAccess":
        return replace(self, whole=self.whole.at_rows(rows))


def keep_largest(h: torch.Tensor, k: int) -> torch.Tensor:
    """(B, n): ``h`` with all but the ``k`` largest entries of each row set to 0.

    Where ``k >= n`` this is ``h`` itself.
    """
    if k >= h.shape[1]:
        return h
    with torch.no_grad():
        _, indices = top_k(h, k)
    return torch.zeros_like(h).scatter(-1, indices, h.gather(-1, indices))
