"""The decoder: weighted sums of rows of W_dec, differentiated into one buffer."""

from functools import cached_property
from typing import Any

import torch

from sae_lens_auxk.ops.columns import row_norms, scaled_cast, scaled_product
from sae_lens_auxk.ops.gradient import LatentGradient, first_derivative_only, handle
from sae_lens_auxk.ops.selected import Selected, matmul_to
from sae_lens_auxk.sharded.latents import ALL_LATENTS, AllLatents


class Decoder:
    """W_dec in one training step. Every use of it adds to one gradient buffer.

    Attributes:
        W: (d_sae, d_in) W_dec, without a graph.
        norm: (d_sae,) the norms of its rows, without a graph; None unless pre-activations are
            multiplied by them.
        gradient: the buffer.
        handle: the tensor that stands for W_dec in the graph.
    """

    def __init__(
        self,
        W_dec: torch.Tensor,
        rescaled: bool,
        autocast: torch.dtype | None,
        latents: AllLatents = ALL_LATENTS,
    ):
        """
        Args:
            W_dec: (d_sae, d_in).
            rescaled: whether it has norms.
            autocast: the precision of autocast, or None if it is off.
            latents: those of ``W_dec``; sums of its rows are over all latents.
        """
        self.W = W_dec.detach()
        self.norm = self.W.norm(dim=-1) if rescaled else None
        self.gradient = LatentGradient(W_dec)
        # Not an attribute of the gradient, which the graph holds: it would hold itself.
        self.handle = handle(W_dec, self.gradient)
        self._autocast = autocast
        self._latents = latents

    def weighted_sums(self, values: torch.Tensor, selected: Selected) -> torch.Tensor:
        """(n_bags, d_in): the sums of ``values`` times rows of W_dec, with their graph."""
        return self._latents.sum(_WeightedSums.apply(values, self.handle, self, selected))

    def dots(self, x: torch.Tensor, selected: Selected) -> torch.Tensor:
        """The products of ``x`` (n_bags, d_in) with the selected rows of W_dec; no graph."""
        W = self._matrix(selected)
        return selected.dots(x.to(W.dtype), W)

    def all_dots(self, x: torch.Tensor, latents: slice) -> torch.Tensor:
        """(B, n): the products of ``x`` (B, d_in) with rows of W_dec at unit length; no graph."""
        norms = row_norms(self.W[latents]) if self.norm is None else self.norm[latents]
        # 0 / 0 would be NaN, which is the largest of all products.
        scale = 1 / norms.clamp(min=torch.finfo(norms.dtype).tiny)
        return scaled_product(x.to(self._autocast or self.W.dtype), self.W[latents].T, scale)

    def of_columns(
        self, acts: torch.Tensor, latents: torch.Tensor, n_latents: torch.Tensor
    ) -> torch.Tensor:
        """(B, d_in): the sums of ``acts`` times rows of W_dec, with the graph of both.

        Where there are norms, the rows are divided by them, which is part of the graph.

        Args:
            acts: (B, n), 0 in columns without a latent.
            latents: (n,) int64, of which the first ``n_latents`` () count.
        """
        sums = _OfColumns.apply(acts, self.handle, self, latents, n_latents)
        return self._latents.sum(sums)

    def times_norm(self, pre: torch.Tensor, selected: Selected | None = None) -> torch.Tensor:
        """``pre`` of selected entries times the norms of their latents, with the graph of both.

        Without ``selected`` there is one entry for each latent, (d_sae,).
        """
        if self.norm is None:
            return pre
        return _TimesNorm.apply(pre, self.handle, self, selected)

    def norm_at(self, selected: Selected | None, like: torch.Tensor) -> torch.Tensor | float:
        """The norms of selected latents in a shape that broadcasts to ``like``; no graph."""
        if self.norm is None:
            return 1.0
        if selected is None:
            return self.norm
        return self.norm.index_select(0, selected.latents.flatten()).view(-1, *like.shape[1:])

    def length_at(self, selected: Selected, like: torch.Tensor) -> torch.Tensor | float:
        """The lengths of selected latents' ``W_i``, never 0, as :meth:`norm_at` gives its norms.

        1 if there are norms, since ``W_i`` is then a row divided by its norm.
        """
        if self.norm is not None:
            return 1.0
        rows = self.W.index_select(0, selected.latents.flatten())
        return row_norms(rows).view(-1, *like.shape[1:])

    def add_norm_gradient(self, grad: torch.Tensor) -> None:
        """Add the gradient of W_dec that follows from that of its norms (d_sae,)."""
        assert self.norm is not None
        self.gradient.add_along(grad / self._norm_or_inf)

    @cached_property
    def _norm_or_inf(self) -> torch.Tensor:
        assert self.norm is not None
        # A row of zeros has no direction in which its norm could grow.
        return self.norm.where(self.norm > 0, torch.inf)

    def _matrix(self, selected: Selected) -> torch.Tensor:
        W = selected.matrix(self.W)
        if not selected.in_autocast:
            return W
        return self._in_autocast if W is self.W else W.to(self._autocast or W.dtype)

    @cached_property
    def _in_autocast(self) -> torch.Tensor:
        return self.W.to(self._autocast or self.W.dtype)


class _WeightedSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: torch.Tensor,
        handle: torch.Tensor,  # noqa: ARG004
        decoder: Decoder,
        selected: Selected,
    ) -> torch.Tensor:
        W = decoder._matrix(selected)
        ctx.save_for_backward(values, W)
        ctx.decoder, ctx.selected = decoder, selected
        return selected.weighted_sums(values, W)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        values, W = ctx.saved_tensors
        decoder, selected = ctx.decoder, ctx.selected
        grad = grad_outputs[0].to(W.dtype).contiguous()
        selected.add_to(decoder.gradient, values, grad, by_bag=True)
        return selected.dots(grad, W).view_as(values).to(values.dtype), None, None, None


class _OfColumns(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        acts: torch.Tensor,
        handle: torch.Tensor,  # noqa: ARG004
        decoder: Decoder,
        latents: torch.Tensor,
        n_latents: torch.Tensor,
    ) -> torch.Tensor:
        dtype = decoder._autocast or decoder.W.dtype
        rows = decoder.W.index_select(0, latents)
        if decoder.norm is not None:
            rows = scaled_cast(rows, 1 / decoder.norm[latents].unsqueeze(1), dtype)
        acts, rows = acts.to(dtype), rows.to(dtype)
        ctx.save_for_backward(acts, rows)
        ctx.decoder, ctx.latents, ctx.n_latents = decoder, latents, n_latents
        return matmul_to(acts, rows, decoder.W.dtype)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        acts, rows = ctx.saved_tensors
        decoder, latents = ctx.decoder, ctx.latents
        grad = grad_outputs[0].to(rows.dtype)
        sums = matmul_to(acts.T, grad, decoder.W.dtype)
        norm = decoder.norm
        if norm is None:
            decoder.gradient.add_rows(sums, latents, ctx.n_latents)
        else:
            products = decoder.gradient.add_scaled(sums, 1 / norm, latents, ctx.n_latents)
            decoder.add_norm_gradient(-products / norm.square())
        return grad @ rows.T, None, None, None, None


class _TimesNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        pre: torch.Tensor,
        handle: torch.Tensor,  # noqa: ARG004
        decoder: Decoder,
        selected: Selected | None,
    ) -> torch.Tensor:
        norm = decoder.norm_at(selected, pre)
        ctx.save_for_backward(pre, norm)
        ctx.decoder, ctx.selected = decoder, selected
        return pre * norm

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        (grad,) = grad_outputs
        pre, norm = ctx.saved_tensors
        products = grad * pre
        selected = ctx.selected
        products = products if selected is None else selected.sum_by_latent(products)
        ctx.decoder.add_norm_gradient(products)
        return grad * norm, None, None, None
