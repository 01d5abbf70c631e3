"""The encoder, computed once and differentiated only where something was selected.

``h = ((x - b_dec) @ W_enc + b_enc) * norm`` for all latents costs one matrix product forward.
Its ordinary backward costs two more and a (B, d_sae) gradient; a TopK step needs a few entries
of it and an auxiliary loss the columns of dead latents.
"""

from copy import copy
from functools import cached_property
from typing import Any

import torch

from sae_lens_auxk.ops.columns import beyond, gather_columns, scaled_product, shortfall
from sae_lens_auxk.ops.decoder import Decoder
from sae_lens_auxk.ops.gradient import LatentGradient, at_latents, first_derivative_only, handle
from sae_lens_auxk.ops.selected import Selected, matmul_to


class Encoder:
    """The pre-activations of one batch, and parts of them with gradients.

    All gradients of W_enc go to one buffer. ``x`` is a constant: for each latent, the gradient is
    a weighted sum of its rows.

    Attributes:
        hidden_pre: (B, d_sae) ``h``, without a graph.
        x: (B, d_in) the centred input, in the parameters' precision.
        gradient: the buffer.
        handle: the tensor that stands for W_enc in the graph.
    """

    def __init__(
        self,
        x: torch.Tensor,
        W_enc: torch.Tensor,
        b_enc: torch.Tensor,
        b_dec: torch.Tensor | None,
        decoder: Decoder,
        autocast: torch.dtype | None,
    ):
        """
        Args:
            x: (B, d_in), without a graph.
            W_enc: (d_in, d_sae).
            b_enc: (d_sae,).
            b_dec: (d_in,) to subtract from ``x``, or None.
            decoder: where it has norms, ``h`` is multiplied by them.
            autocast: the precision of autocast, or None if it is off.
        """
        self.W, self.decoder, self.autocast = W_enc.detach(), decoder, autocast
        self.gradient = LatentGradient(W_enc, transpose=True)
        self.handle = handle(W_enc, self.gradient)
        self._bias: torch.Tensor = _Bias.apply(b_enc, b_dec, self.W)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            self.x = x if b_dec is None else x - b_dec
            self.hidden_pre = scaled_product(self.x_autocast, W_enc, decoder.norm, b_enc)

    @cached_property
    def x_autocast(self) -> torch.Tensor:
        """``x`` in the precision of the products."""
        return self.x.to(self.autocast or self.x.dtype)

    def at_rows(self, rows: torch.Tensor) -> "Encoder":
        """The encoder of some rows (m,) of the batch. It adds to the same buffer."""
        part = copy(self)
        part.__dict__.pop("x_autocast", None)
        part.x = self.x.index_select(0, rows)
        part.hidden_pre = self.hidden_pre.index_select(0, rows)
        return part

    def before_norm(self, h: torch.Tensor, selected: Selected) -> torch.Tensor:
        """Selected values ``h``, divided by their latents' norms, with their graph."""
        pre = h.to(self.W.dtype) / self.decoder.norm_at(selected, h)
        return _AtSelected.apply(pre, self.handle, self._bias, self, selected)

    def columns(
        self, latents: torch.Tensor | None = None, n_latents: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(B, n) the columns of ``h`` at ``latents`` (n,), or all, with their graph.

        If ``n_latents`` () is given, only the first ``n_latents`` count; the others are -inf.
        """
        h = self.hidden_pre
        if latents is not None:
            h = gather_columns(h, latents, n_latents)
        graph = self.handle, self._bias, self.decoder.handle
        return _AtColumns.apply(h, *graph, self, latents, n_latents)

    @property
    def bias(self) -> torch.Tensor:
        """(d_sae,) b_enc, without a graph."""
        return self._bias.detach()

    def shortfall(
        self, threshold: torch.Tensor, latents: torch.Tensor, n_latents: torch.Tensor
    ) -> torch.Tensor:
        """(B,) the sums of ``relu(threshold - h)`` over some latents, with their graph.

        Args:
            threshold: () or (B, 1), a constant.
            latents: (n,) int64, of which the first ``n_latents`` () count.
        """
        return _Shortfall.apply(
            self.handle, self._bias, self.decoder.handle, self, threshold, latents, n_latents
        )

    def sums(self) -> torch.Tensor:
        """(d_sae,) the sums of ``h`` over the batch, with their graph."""
        x = self.x.sum(dim=0)
        return self.decoder.times_norm(_Sums.apply(self.handle, self._bias, x, self))


class _Bias(torch.autograd.Function):
    """b_enc; its backward also gives b_dec the gradient that comes through ``h``."""

    @staticmethod
    def forward(
        ctx: Any, b_enc: torch.Tensor, b_dec: torch.Tensor | None, W: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(W)
        ctx.takes_b_dec_off = b_dec is not None
        return b_enc.view_as(b_enc)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        (grad,) = grad_outputs
        (W,) = ctx.saved_tensors
        return grad, -(W @ grad) if ctx.takes_b_dec_off else None, None


class _AtSelected(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        pre: torch.Tensor,
        handle: torch.Tensor,  # noqa: ARG004
        bias: torch.Tensor,  # noqa: ARG004
        encoder: Encoder,
        selected: Selected,
    ) -> torch.Tensor:
        ctx.encoder, ctx.selected = encoder, selected
        return pre.view_as(pre)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        (grad,) = grad_outputs
        encoder, selected = ctx.encoder, ctx.selected
        x = encoder.x_autocast if selected.in_autocast else encoder.x
        selected.add_to(encoder.gradient, grad, x, by_bag=False)
        return None, None, selected.sum_by_latent(grad), None, None


class _AtColumns(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: torch.Tensor,
        handle: torch.Tensor,  # noqa: ARG004
        bias: torch.Tensor,  # noqa: ARG004
        decoder_handle: torch.Tensor,  # noqa: ARG004
        encoder: Encoder,
        latents: torch.Tensor | None,
        n_latents: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.encoder, ctx.latents, ctx.n_latents = encoder, latents, n_latents
        return h.view_as(h)

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        (grad,) = grad_outputs
        encoder, latents = ctx.encoder, ctx.latents
        grad_low = grad.to(encoder.x_autocast.dtype)
        n = grad.shape[1]
        if grad.is_cuda and n % 8:  # see indices_of
            grad_low = torch.nn.functional.pad(grad_low, (0, -n % 8))
        sums = matmul_to(grad_low.T, _with_ones(encoder.x_autocast), encoder.W.dtype)[:n]
        bias = _add_sums(encoder, sums, latents, ctx.n_latents)
        return None, None, bias, None, None, None, None


class _Shortfall(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        handle: torch.Tensor,  # noqa: ARG004
        bias: torch.Tensor,  # noqa: ARG004
        decoder_handle: torch.Tensor,  # noqa: ARG004
        encoder: Encoder,
        threshold: torch.Tensor,
        latents: torch.Tensor,
        n_latents: torch.Tensor,
    ) -> torch.Tensor:
        dtype = encoder.x_autocast.dtype
        total, below = shortfall(encoder.hidden_pre, threshold, latents, n_latents, dtype)
        ctx.save_for_backward(below, latents, n_latents)
        ctx.encoder = encoder
        return total

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        (grad,) = grad_outputs
        below, latents, n_latents = ctx.saved_tensors
        encoder = ctx.encoder
        # A row has one gradient for all latents, so it can be multiplied with x, which is small.
        x = (_with_ones(encoder.x) * -grad.unsqueeze(1)).to(below.dtype)
        sums = matmul_to(below.T, x, encoder.W.dtype)
        bias = _add_sums(encoder, sums, latents, n_latents)
        return None, bias, None, None, None, None, None


def _with_ones(x: torch.Tensor) -> torch.Tensor:
    """``x`` (B, d_in) with a column of ones and 7 of zeros.

    The column of ones gives the bias's gradient without another pass over (B, n).
    """
    padded = torch.nn.functional.pad(x, (0, 8))
    padded[:, x.shape[1]] = 1
    return padded


def _add_sums(
    encoder: Encoder,
    sums: torch.Tensor,
    latents: torch.Tensor | None,
    n_latents: torch.Tensor | None = None,
) -> torch.Tensor:
    """Add the gradients of W_enc and of the norms that follow from one of columns of ``h``.

    Args:
        encoder: the encoder.
        sums: (n, d_in + 8), for each column the sum of its gradient times :func:`_with_ones`.
        latents: (n,) int64, which columns; None for all.
        n_latents: () int64, how many of them count; None for all.

    Returns:
        (d_sae,) the gradient of the bias.
    """
    d_in = encoder.W.shape[0]
    rows, grad_bias = sums[:, :d_in], sums[:, d_in]
    norm = encoder.decoder.norm
    if n_latents is not None:
        # A column that does not count may get any gradient from a loss: NaN, as it is -inf.
        grad_bias = grad_bias.masked_fill(beyond(sums, n_latents), 0)
    grad_bias = at_latents(grad_bias, latents, len(encoder.bias))
    if norm is not None:
        # A column has one norm, so it can be multiplied after the product. The norm's own gradient
        # is the sum of the column's gradient times what the norm multiplies: linear in x.
        products = encoder.gradient.add_scaled(rows, norm, latents, n_latents)
        encoder.decoder.add_norm_gradient(products + grad_bias * encoder.bias)
        return grad_bias * norm
    encoder.gradient.add_rows(rows.contiguous(), latents, n_latents)
    return grad_bias


class _Sums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        handle: torch.Tensor,  # noqa: ARG004
        bias: torch.Tensor,
        x: torch.Tensor,
        encoder: Encoder,
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.encoder = encoder
        with torch.autocast(x.device.type, enabled=False):
            return x @ encoder.W + len(encoder.x) * bias

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        (grad,) = grad_outputs
        (x,) = ctx.saved_tensors
        ctx.encoder.gradient.add_outer(grad, x)
        return None, len(ctx.encoder.x) * grad, None, None
