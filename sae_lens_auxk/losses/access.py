"""Access to the pre-activations and decoder rows of some latents.

An auxiliary loss needs a few columns of ``h``, or its largest entries, and the matching decoder
rows. :class:`LatentAccess` is that interface. :class:`DenseAccess` is plain torch on SAELens's
tensors and serves every architecture; ``SparseAccess`` in :mod:`sae_lens_auxk.step.sparse` never
makes the dense gradients.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from sae_lens_auxk.ops.matrices import row_norms, unit_columns_
from sae_lens_auxk.ops.selection import beyond, indices_of, top_k

Pointwise = Callable[[torch.Tensor], torch.Tensor]
"""Takes and returns a tensor (...)."""


class Activations(Protocol):
    """Pre-activations of some latents in each row, and operations on them.

    ``h`` is (B, m), with its graph; an entry outside of the selection is 0.
    """

    @property
    def h(self) -> torch.Tensor: ...

    def map(self, function: Pointwise) -> "Activations":
        """The same with ``function(h)``, where ``function(s h) = s function(h)`` for ``s > 0``."""
        ...

    def decode(self) -> torch.Tensor:
        """(B, d_in): the sum of ``h_bi W_i`` over the selection, with its graph."""
        ...

    def decode_as(self, values: torch.Tensor) -> torch.Tensor:
        """The same with constants ``values`` (B, m) instead of ``h``.

        W_dec gets the gradient of latents firing at these values. As in SAELens's own loss, the
        norm is a constant if ``h`` is rescaled by it.
        """
        ...

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """(B, m): ``x_b . W_i`` for each entry of ``h``, 0 outside of the selection; no graph."""
        ...

    def norm(self) -> torch.Tensor | float:
        """``|W_i|``, broadcastable to ``h``, never 0; no graph. 1 where ``h`` is rescaled."""
        ...


@dataclass(frozen=True)
class Columns:
    """``h`` of some latents as dense columns, with its graph, and their decoder rows.

    There may be more columns than latents, so that their number need not be known. A column that
    is not real may get any gradient.

    Attributes:
        h: (B, n) ``h``, with its graph; -inf in a column that is not real.
        rows: (n, d_in) their ``W_i``, with their graph.
        latents: (n,) int64, which latents; 0 for a column that is not real.
        real: (n,) bool, which columns belong to a latent.
    """

    h: torch.Tensor
    rows: torch.Tensor
    latents: torch.Tensor
    real: torch.Tensor

    def decode(self, acts: torch.Tensor) -> torch.Tensor:
        """(B, d_in): the sum of ``acts`` (B, n) times ``W_i``; ``acts`` is 0 where not real."""
        if not torch.is_autocast_enabled(acts.device.type):
            acts = acts.to(self.rows.dtype)
        return acts @ self.rows


class LatentAccess(Protocol):
    """One step's ``h`` (B, d_sae) and ``W_i``, both with their graphs.

    ``nearness`` is the SAE's: how near a latent is to firing at ``h``, and how well it matches at
    ``W_i . x_b``. Decoded values keep their sign.
    """

    def columns(self, latents: torch.Tensor | None = None) -> torch.Tensor:
        """(B, n): the columns of ``h`` at ``latents`` (n,), each once, or all of them."""
        ...

    def sums(self) -> torch.Tensor:
        """(d_sae,): the sum of each column of ``nearness(h)``."""
        ...

    def columns_among(self, among: torch.Tensor, bound: int) -> Columns:
        """The columns of some latents.

        Args:
            among: (d_sae,) bool, the latents.
            bound: an upper bound on how many there are.
        """
        ...

    def largest(self, k: int, among: torch.Tensor | None, bound: int) -> Activations:
        """The ``k`` entries of each row with the largest ``nearness(h)``.

        Args:
            k: how many; if fewer can be chosen, all of them.
            among: (d_sae,) bool, the latents to choose from, or None for all.
            bound: an upper bound on how many there are.
        """
        ...

    def best_match(self, x: torch.Tensor, among: torch.Tensor, level: slice) -> Activations:
        """Each row's latent of largest relative match, if it is in ``among``.

        A match is ``nearness(W_i . x_b)``, relative to the root mean square of ``W_i . x`` over
        the rows of the batch.

        Args:
            x: (B, d_in).
            among: (d_sae,) bool, the latents. A row that another latent matches better gets none.
            level: the latents that compete: all, or those of a Matryoshka level.
        """
        ...

    def at_rows(self, rows: torch.Tensor) -> "LatentAccess":
        """The same access for some rows (m,) of the batch."""
        ...


@dataclass(frozen=True)
class DenseAccess:
    """From SAELens's own tensors.

    Attributes:
        h: (B, d_sae), with its graph.
        W_dec: (d_sae, d_in).
        rescaled: whether ``W_i`` is a row of W_dec divided by its norm.
        nearness: the SAE's.
    """

    h: torch.Tensor
    W_dec: torch.Tensor
    rescaled: bool
    nearness: Pointwise

    def columns(self, latents: torch.Tensor | None = None) -> torch.Tensor:
        return self.h if latents is None else self.h.index_select(1, latents)

    def sums(self) -> torch.Tensor:
        h = self.nearness(self.h)
        return h.sum(dim=0, dtype=torch.promote_types(h.dtype, torch.float32))

    def columns_among(self, among: torch.Tensor, bound: int) -> Columns:
        latents = indices_of(among, bound)
        real = ~beyond(latents, among.sum())
        h = self.columns(latents).masked_fill(~real, -torch.inf)
        return Columns(h, decoder_rows(self.W_dec, latents, self.rescaled), latents, real)

    def largest(self, k: int, among: torch.Tensor | None, bound: int) -> Activations:  # noqa: ARG002
        if among is None:
            h, rows = self.h, self.W_dec
        else:
            latents = among.nonzero().squeeze(1)
            h, rows = self.columns(latents), self.W_dec.index_select(0, latents)
        return DenseActivations.of(h, _largest(self.nearness(h), k), rows, self.rescaled)

    def best_match(self, x: torch.Tensor, among: torch.Tensor, level: slice) -> Activations:
        with torch.no_grad():
            rows = self.W_dec[level]
            products = self.nearness(unit_columns_(x.to(rows.dtype) @ rows.T))
            best = products.argmax(dim=-1, keepdim=True) + (level.start or 0)
            chosen = torch.zeros_like(self.h, dtype=torch.bool).scatter_(-1, best, among[best])
        return DenseActivations.of(self.h, chosen, self.W_dec, self.rescaled)

    def at_rows(self, rows: torch.Tensor) -> "DenseAccess":
        return replace(self, h=self.h.index_select(0, rows))


@dataclass(frozen=True)
class DenseActivations:
    """A selection as (B, n) with zeros outside of it; see :class:`Activations`.

    Attributes:
        h: (B, n).
        chosen: (B, n) bool, the selection.
        rows: (n, d_in) rows of W_dec.
        rescaled: whether ``W_i`` is a row divided by its norm.
    """

    h: torch.Tensor
    chosen: torch.Tensor
    rows: torch.Tensor
    rescaled: bool

    @staticmethod
    def of(
        h: torch.Tensor, chosen: torch.Tensor, rows: torch.Tensor, rescaled: bool
    ) -> "DenseActivations":
        """From ``h`` with all its entries."""
        return DenseActivations(h.where(chosen, 0), chosen, rows, rescaled)

    def map(self, function: Pointwise) -> "DenseActivations":
        return replace(self, h=function(self.h))

    def decode(self) -> torch.Tensor:
        return self.h @ _normalized(self.rows, self.rescaled)

    def decode_as(self, values: torch.Tensor) -> torch.Tensor:
        norms = self.rows.detach().norm(dim=-1) if self.rescaled else 1.0
        return (values / norms).to(self.rows.dtype) @ self.rows

    @torch.no_grad()
    def project(self, x: torch.Tensor) -> torch.Tensor:
        products = x.to(self.rows.dtype) @ _normalized(self.rows, self.rescaled).T
        return products.where(self.chosen, 0)

    def norm(self) -> torch.Tensor | float:
        return 1.0 if self.rescaled else row_norms(self.rows)


def decoder_rows(W_dec: torch.Tensor, latents: torch.Tensor, rescaled: bool) -> torch.Tensor:
    """(n, d_in) the ``W_i`` of ``latents`` (n,), with their graph."""
    return _normalized(W_dec.index_select(0, latents), rescaled)


def _normalized(rows: torch.Tensor, rescaled: bool) -> torch.Tensor:
    return rows / rows.norm(dim=-1, keepdim=True) if rescaled else rows


@torch.no_grad()
def _largest(h: torch.Tensor, k: int) -> torch.Tensor:
    """(B, n) bool: which are the ``k`` largest entries of each row of ``h`` (B, n)."""
    if k >= h.shape[1]:
        return torch.ones_like(h, dtype=torch.bool)
    return torch.zeros_like(h, dtype=torch.bool).scatter_(-1, top_k(h, k)[1], True)
