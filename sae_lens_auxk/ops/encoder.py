"""The encoder, computed once and differentiated only where something was selected.

``h = ((x - b_dec) @ W_enc + b_enc) * norm`` for all latents costs one matrix product forward.
Its ordinary backward costs two more and a (B, d_sae) gradient; a TopK step needs a few entries
of it and an auxiliary loss the columns of dead latents.
"""

from typing import Any

import torch

from sae_lens_auxk.ops import use_triton
from sae_lens_auxk.ops.selected import Selected, outer_sums, transposed


class Encoder:
    """The pre-activations of one batch, and parts of them with gradients.

    Attributes:
        hidden_pre: (B, d_sae) ``h``, without a graph.
        x: (B, d_in) the centred input, in the parameters' precision.
    """

    def __init__(
        self,
        x: torch.Tensor,
        W_enc: torch.Tensor,
        b_enc: torch.Tensor,
        b_dec: torch.Tensor | None,
        norm: torch.Tensor | None,
    ):
        """
        Args:
            x: (B, d_in), without a graph.
            W_enc: (d_in, d_sae).
            b_enc: (d_sae,).
            b_dec: (d_in,) to take off ``x``, or None.
            norm: (d_sae,) to multiply with, or None.
        """
        device = x.device.type
        self.autocast = (
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        )
        self.W_enc, self.b_enc, self.b_dec, self.norm = W_enc, b_enc, b_dec, norm
        with torch.no_grad(), torch.autocast(device, enabled=False):
            self.x = x if b_dec is None else x - b_dec
            dtype = self.autocast or W_enc.dtype
            weights, bias = W_enc, b_enc
            if norm is not None:
                norm = norm.detach()
                weights, bias = _scaled_cast(W_enc, norm, dtype), b_enc * norm
            self.hidden_pre = torch.addmm(bias.to(dtype), self.x.to(dtype), weights.to(dtype))

    def selected(self, selected: Selected) -> torch.Tensor:
        """(N,) the pre-activations of pairs, before ``norm``, with their graph."""
        h = self.hidden_pre[selected.rows, selected.latents].to(self.W_enc.dtype)
        if self.norm is not None:
            h = h / self.norm.detach()[selected.latents]
        return _AtSelected.apply(self.W_enc, self.b_enc, self.b_dec, h, self.x, selected)

    def columns(self, latents: torch.Tensor) -> torch.Tensor:
        """(B, n) the columns of ``h`` at ``latents`` (n,), with their graph."""
        h = gather_columns(self.hidden_pre, latents)
        norm = None if self.norm is None else self.norm.index_select(0, latents)
        return _AtColumns.apply(self.W_enc, self.b_enc, self.b_dec, norm, h, self, latents)

    def pairs(
        self, h: torch.Tensor, latents: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """(B, k) pre-activations before ``norm``, with a graph over the columns ``latents``.

        Args:
            h: (B, k) the values of ``h``.
            latents: (n,) the columns that they are in.
            positions: (B, k) which of them.
        """
        pre = h.to(self.W_enc.dtype)
        if self.norm is not None:
            pre = pre / self.norm.detach()[latents][positions]
        return _AtPairs.apply(self.W_enc, self.b_enc, self.b_dec, pre, self, latents, positions)

    def dense(self) -> torch.Tensor:
        """(B, d_sae) all of ``h``, with its graph."""
        return _AtColumns.apply(
            self.W_enc, self.b_enc, self.b_dec, self.norm, self.hidden_pre, self, None
        )


class _AtSelected(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        W_enc: torch.Tensor,
        b_enc: torch.Tensor,  # noqa: ARG004
        b_dec: torch.Tensor | None,
        h: torch.Tensor,
        x: torch.Tensor,
        selected: Selected,
    ) -> torch.Tensor:
        ctx.save_for_backward(W_enc, x)
        ctx.selected = selected
        ctx.takes_b_dec_off = b_dec is not None
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        (grad,) = grad_outputs
        W_enc, x = ctx.saved_tensors
        grad_W = transposed(outer_sums(grad, x, ctx.selected, ctx.selected.rows))
        grad_b = torch.zeros_like(W_enc[0]).index_add_(0, ctx.selected.latents, grad)
        grad_b_dec = -(W_enc @ grad_b) if ctx.takes_b_dec_off else None
        return grad_W, grad_b, grad_b_dec, None, None, None


class _AtColumns(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        W_enc: torch.Tensor,
        b_enc: torch.Tensor,  # noqa: ARG004
        b_dec: torch.Tensor | None,
        norm: torch.Tensor | None,
        h: torch.Tensor,
        encoder: Encoder,
        latents: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.save_for_backward(W_enc, norm, h, encoder.x, latents)
        ctx.takes_b_dec_off = b_dec is not None
        ctx.autocast = encoder.autocast
        return h.view_as(h)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        (grad,) = grad_outputs
        W_enc, norm, h, x, latents = ctx.saved_tensors
        dtype = W_enc.dtype
        grad_norm = None
        if norm is not None:
            if ctx.needs_input_grad[3]:
                grad_norm = torch.linalg.vecdot(grad, h, dim=0).to(dtype) / norm
            grad = grad * norm.to(grad.dtype)
        compute = ctx.autocast or dtype
        grad_W = matmul_to(x.to(compute).T, grad.to(compute), dtype)
        grad_b = grad.sum(dim=0, dtype=dtype)
        if latents is not None:
            grad_W = torch.zeros_like(W_enc).index_copy_(1, latents, grad_W)
            grad_b = torch.zeros_like(W_enc[0]).index_copy_(0, latents, grad_b)
        grad_b_dec = -(W_enc @ grad_b) if ctx.takes_b_dec_off else None
        return grad_W, grad_b, grad_b_dec, grad_norm, None, None, None


class _AtPairs(torch.autograd.Function):
    """Like :class:`_AtSelected` with a dense product backward, for many pairs a row."""

    @staticmethod
    def forward(
        ctx: Any,
        W_enc: torch.Tensor,
        b_enc: torch.Tensor,  # noqa: ARG004
        b_dec: torch.Tensor | None,
        pre: torch.Tensor,
        encoder: Encoder,
        latents: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(W_enc, encoder.x, latents, positions)
        ctx.takes_b_dec_off = b_dec is not None
        ctx.autocast = encoder.autocast
        return pre.view_as(pre)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        (grad,) = grad_outputs
        W_enc, x, latents, positions = ctx.saved_tensors
        compute = ctx.autocast or W_enc.dtype
        dense = torch.zeros(x.shape[0], latents.numel(), dtype=compute, device=x.device)
        dense.scatter_(1, positions, grad.to(compute))
        grad_W = torch.zeros_like(W_enc).index_copy_(
            1, latents, matmul_to(x.to(compute).T, dense, W_enc.dtype)
        )
        grad_b = torch.zeros_like(W_enc[0]).index_add_(
            0, latents[positions.flatten()], grad.flatten().to(W_enc.dtype)
        )
        grad_b_dec = -(W_enc @ grad_b) if ctx.takes_b_dec_off else None
        return grad_W, grad_b, grad_b_dec, None, None, None, None


def matmul_to(a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``a @ b`` in ``dtype``, without a rounding to the operands' precision where torch can."""
    if a.is_cuda and a.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def gather_columns(x: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """(B, n): the columns of ``x`` at ascending indices ``columns`` (n,); no gradient."""
    if use_triton(x):
        from sae_lens_auxk.ops import triton_kernels

        return triton_kernels.gather_columns(x, columns)
    return x.index_select(1, columns)


def _scaled_cast(W: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if use_triton(W) and W.dtype == torch.float32:
        from sae_lens_auxk.ops import triton_kernels

        return triton_kernels.scaled_cast(W, scale, dtype)
    return (W * scale).to(dtype)
