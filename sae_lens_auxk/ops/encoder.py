"""The encoder, computed once and differentiated only where something was selected.

``h = ((x - b_dec) @ W_enc + b_enc) * norm`` for all latents costs one matrix product forward.
Its ordinary backward costs two more and a (B, d_sae) gradient; a TopK step needs a few entries
of it and an auxiliary loss the columns of dead latents.
"""

from copy import copy
from functools import cached_property
from typing import Any

import torch

from sae_lens_auxk.ops import use_triton
from sae_lens_auxk.ops.decoder import Decoder
from sae_lens_auxk.ops.gradient import LatentGradient, handle
from sae_lens_auxk.ops.selected import Selected, matmul_to


class Encoder:
    """The pre-activations of one batch, and parts of them with gradients.

    All gradients of W_enc go to one buffer. ``x`` counts as a constant, so that what is selected
    only has to say how much of it goes to each latent.

    Attributes:
        hidden_pre: (B, d_sae) ``h``, without a graph.
        x: (B, d_in) the centred input, in the parameters' precision.
        gradient: the buffer.
        handle: what makes a use of W_enc part of the graph.
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
            b_dec: (d_in,) to take off ``x``, or None.
            decoder: where it has norms, ``h`` is multiplied by them.
            autocast: what autocast computes in, or None where it is off.
        """
        self.W, self.decoder, self.autocast = W_enc.detach(), decoder, autocast
        self.gradient = LatentGradient(W_enc, transpose=True)
        self.handle = handle(W_enc, self.gradient)
        self._bias: torch.Tensor = _Bias.apply(b_enc, b_dec, self.W)
        norm = decoder.norm
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            self.x = x if b_dec is None else x - b_dec
            dtype = autocast or W_enc.dtype
            weights, bias = W_enc, b_enc
            if norm is not None:
                weights, bias = _scaled_cast(W_enc, norm, dtype), b_enc * norm
            self.hidden_pre = torch.addmm(bias.to(dtype), self.x_autocast, weights.to(dtype))

    @cached_property
    def x_autocast(self) -> torch.Tensor:
        """``x`` in the precision of the products."""
        return self.x.to(self.autocast or self.x.dtype)

    def at_rows(self, rows: torch.Tensor) -> "Encoder":
        """The same for some rows (m,) of the batch, adding to the same buffer."""
        part = copy(self)
        part.__dict__.pop("x_autocast", None)
        part.x = self.x.index_select(0, rows)
        part.hidden_pre = self.hidden_pre.index_select(0, rows)
        return part

    def before_norm(self, h: torch.Tensor, selected: Selected) -> torch.Tensor:
        """Selected values ``h``, divided by their latents' norms, with their graph."""
        pre = h.to(self.W.dtype) / self.decoder.norm_at(selected, h)
        return _AtSelected.apply(pre, self.handle, self._bias, self, selected)

    def columns(self, latents: torch.Tensor | None = None) -> torch.Tensor:
        """(B, n) the columns of ``h`` at ``latents`` (n,), or all, with their graph."""
        h = self.hidden_pre if latents is None else gather_columns(self.hidden_pre, latents)
        return _AtColumns.apply(h, self.handle, self._bias, self.decoder.handle, self, latents)

    def sums(self) -> torch.Tensor:
        """(d_sae,) the sums of ``h`` over the batch, with their graph."""
        x = self.x.sum(dim=0)
        return self.decoder.times_norm(_Sums.apply(self.handle, self._bias, x, self))


class _Bias(torch.autograd.Function):
    """b_enc, and b_dec by the way that it takes to ``h``."""

    @staticmethod
    def forward(
        ctx: Any, b_enc: torch.Tensor, b_dec: torch.Tensor | None, W: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(W)
        ctx.takes_b_dec_off = b_dec is not None
        return b_enc.view_as(b_enc)

    @staticmethod
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
    ) -> torch.Tensor:
        ctx.save_for_backward(h)
        ctx.encoder, ctx.latents = encoder, latents
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        (grad,) = grad_outputs
        (h,) = ctx.saved_tensors
        encoder, latents = ctx.encoder, ctx.latents
        dtype = encoder.W.dtype
        lent = grad.to(encoder.x_autocast.dtype)
        n = grad.shape[1]
        if grad.is_cuda and n % 8:  # see AuxLossInputs.decode_dead
            lent = torch.nn.functional.pad(lent, (0, -n % 8))
        # A column of ones gives the bias's gradient, without another pass over (B, n).
        d_in = encoder.x.shape[1]
        x = torch.nn.functional.pad(encoder.x_autocast, (0, 8))
        x[:, d_in] = 1
        products = matmul_to(lent.T, x, dtype)[:n]
        rows, grad_bias = products[:, :d_in].contiguous(), products[:, d_in]
        norm = encoder.decoder.norm
        if norm is not None:
            # The norm is the same for a whole column, so that it can come after the product.
            own = norm if latents is None else norm.index_select(0, latents)
            rows, grad_bias = rows * own.unsqueeze(1), grad_bias * own
            grad_norm = torch.linalg.vecdot(grad, h, dim=0).to(dtype) / own
            encoder.decoder.add_norm_gradient(_at(grad_norm, latents, norm))
        encoder.gradient.add_rows(rows, latents)
        return None, None, _at(grad_bias, latents, encoder.W[0]), None, None, None


def _at(values: torch.Tensor, latents: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    if latents is None:
        return values
    return torch.zeros_like(like).index_add_(0, latents, values)


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
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        (grad,) = grad_outputs
        (x,) = ctx.saved_tensors
        ctx.encoder.gradient.add_outer(grad, x)
        return None, len(ctx.encoder.x) * grad, None, None


def gather_columns(x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """(B, n): the columns of ``x`` at indices ``columns`` (n,); no gradient."""
    if use_triton(x):
        from sae_lens_auxk.ops import triton_kernels

        return triton_kernels.gather_columns(x, columns)
    return x.index_select(1, columns)


def _scaled_cast(W: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if use_triton(W) and W.dtype == torch.float32:
        from sae_lens_auxk.ops import triton_kernels

        return triton_kernels.scaled_cast(W, scale, dtype)
    return (W * scale).to(dtype)
