"""The encoder, computed once and differentiated only where something was selected.

``h = ((x - b_dec) @ W_enc + b_enc) * norm`` for all latents costs one matrix product forward.
Its ordinary backward costs two more and a (B, d_sae) gradient; a TopK step needs a few entries
of it and an auxiliary loss the columns of dead latents. The entries that fire are handed on as
SAELens's trainer takes them.
"""

from copy import copy, deepcopy
from functools import cached_property
from typing import Any, TypeVar

import torch
from typing_extensions import override

from sae_lens_auxk.ops.matrices import (
    Decoder,
    LatentGradient,
    at_latents,
    handle,
    refuse_second_derivative,
    scaled_product,
)
from sae_lens_auxk.ops.selection import Pairs, Selected, beyond, gather_columns, matmul_to


class Encoder:
    """The pre-activations of one batch, and parts of them with gradients.

    All gradients of W_enc go to one buffer. ``x`` is a constant: for each latent, the gradient is
    a weighted sum of its rows.

    Attributes:
        hidden_pre: (B, d_sae) ``h``, without a graph.
        x: (B, d_in) the centred input, in the parameters' precision.
        W_enc, b_enc, b_dec: the parameters; b_dec is None where it is not subtracted.
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
        self.W_enc, self.b_enc, self.b_dec = W_enc, b_enc, b_dec
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
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        refuse_second_derivative()
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
        refuse_second_derivative()
        (grad,) = grad_outputs
        encoder, selected = ctx.encoder, ctx.selected
        x = encoder.x_autocast if selected.in_autocast else encoder.x
        encoder.gradient.add_selected(selected, grad, x)
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
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        refuse_second_derivative()
        (grad,) = grad_outputs
        encoder, latents, n_latents = ctx.encoder, ctx.latents, ctx.n_latents
        grad_low = grad.to(encoder.x_autocast.dtype)
        n = grad.shape[1]
        if grad.is_cuda and n % 8:  # see indices_of
            grad_low = torch.nn.functional.pad(grad_low, (0, -n % 8))
        # A column of ones gives the bias's gradient without another pass over (B, n).
        ones = torch.nn.functional.pad(encoder.x_autocast, (0, 8))
        ones[:, encoder.x.shape[1]] = 1
        sums = matmul_to(grad_low.T, ones, encoder.W.dtype)[:n]
        rows, grad_bias = sums[:, : encoder.x.shape[1]], sums[:, encoder.x.shape[1]]
        if n_latents is not None:
            # A column that does not count may get any gradient from a loss: NaN, as it is -inf.
            grad_bias = grad_bias.masked_fill(beyond(sums, n_latents), 0)
        grad_bias = at_latents(grad_bias, latents, len(encoder.bias))
        norm = encoder.decoder.norm
        if norm is None:
            encoder.gradient.add_rows(rows.contiguous(), latents, n_latents)
        else:
            # A column has one norm, so it can be multiplied after the product. The norm's own
            # gradient is the sum of the column's gradient times what the norm multiplies.
            products = encoder.gradient.add_scaled(rows, norm, latents, n_latents)
            encoder.decoder.add_norm_gradient(products + grad_bias * encoder.bias)
            grad_bias = grad_bias * norm
        return None, None, grad_bias, None, None, None, None


# --- activations -----------------------------------------------------------------------------

_T = TypeVar("_T", bound=torch.Tensor)

_OVER_ROWS = ((0,), (-2,), (("dim", 0),), (("dim", -2),))


class SelectedActivations(torch.Tensor):
    """A sparse COO tensor (B, d_sae) whose ``sum(0)`` and ``sum(-2)`` are dense and do not wait.

    SAELens's trainer asks at every step which latents fired, and how often:
    ``acts.bool().float().sum(0)``. Torch's own result is sparse, and to count its entries it sorts
    them and waits for the device. Otherwise this is an ordinary sparse COO tensor.
    """

    @staticmethod
    def of(
        rows: torch.Tensor, latents: torch.Tensor, values: torch.Tensor, shape: torch.Size
    ) -> "SelectedActivations":
        """From (N,) rows, latents and values, without a graph; no pair may occur twice."""
        acts = torch.sparse_coo_tensor(
            torch.stack([rows, latents]), values, shape, check_invariants=False
        )
        return _as(SelectedActivations, acts)

    # Torch's operations return ordinary tensors; only the methods here return this class.
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @override
    def bool(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._like(super().bool(*args, **kwargs))

    @override
    def float(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._like(super().float(*args, **kwargs))

    @override
    def sum(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if (*args, *kwargs.items()) not in _OVER_ROWS or not self.is_floating_point():
            return super().sum(*args, **kwargs)
        values, latents = self._values(), self._indices()[-1]
        return values.new_zeros(self.shape[-1]).index_add_(0, latents, values)

    @staticmethod
    def _like(acts: torch.Tensor) -> torch.Tensor:
        return acts if acts.requires_grad else _as(SelectedActivations, acts)

    # Torch copies and pickles subclasses by their storage, which a sparse tensor does not have.

    @override
    def __deepcopy__(self, memo: dict[int, Any]) -> torch.Tensor:
        return deepcopy(_as(torch.Tensor, self), memo)

    @override
    def __reduce_ex__(self, protocol: Any) -> Any:
        return _as(torch.Tensor, self).__reduce_ex__(protocol)


def _as(cls: type[_T], acts: torch.Tensor) -> _T:
    return torch.Tensor._make_subclass(cls, acts)


def activations(
    pre: torch.Tensor,
    h: torch.Tensor,
    selected: Pairs,
    decoder: Decoder,
    shape: torch.Size,
    dense: bool,
) -> torch.Tensor:
    """``shape``, (B, d_sae): selected activations, with their graph; 0 elsewhere.

    Args:
        pre: (N,) activations before the decoder norm, with their graph.
        h: (N,) the same times the norm, without one.
        selected: (N,) pairs, each once.
        decoder: where the norms are.
        shape: of the result.
        dense: whether the result is dense; else it is a :class:`SelectedActivations`.
    """
    return _Activations.apply(pre, decoder.handle, h, selected, decoder, shape, dense)  # type: ignore[no-any-return]


class _Activations(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        pre: torch.Tensor,
        handle: torch.Tensor,  # noqa: ARG004
        h: torch.Tensor,
        selected: Pairs,
        decoder: Decoder,
        shape: torch.Size,
        dense: bool,
    ) -> torch.Tensor:
        ctx.save_for_backward(pre)
        ctx.selected, ctx.decoder = selected, decoder
        if dense:  # torch's to_dense() of a sparse tensor may wait for the device
            return h.new_zeros(shape).index_put_((selected.rows, selected.latents), h)
        return SelectedActivations.of(selected.rows, selected.latents, h, shape)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        refuse_second_derivative()
        (pre,) = ctx.saved_tensors
        selected, decoder = ctx.selected, ctx.decoder
        grad = _at_pairs(grad_outputs[0], selected).to(pre.dtype)
        if decoder.norm is not None:
            decoder.add_norm_gradient(selected.sum_by_latent(grad * pre))
        return grad * decoder.norm_at(selected, pre), None, None, None, None, None, None


def _at_pairs(x: torch.Tensor, selected: Pairs) -> torch.Tensor:
    """(N,): the entries of ``x`` (B, d_sae), dense or sparse COO, at the pairs."""
    if not x.is_sparse:
        return x[selected.rows, selected.latents]
    x = x.coalesce()
    keys = x.indices()[0] * selected.d_sae + x.indices()[1]
    wanted = selected.rows * selected.d_sae + selected.latents
    place = torch.searchsorted(keys, wanted).clamp(max=max(len(keys) - 1, 0))
    if len(keys) == 0:
        return x.values().new_zeros(len(wanted))
    return x.values()[place].where(keys[place] == wanted, 0)


@torch.no_grad()
def smallest_active(feature_acts: torch.Tensor, k: int) -> torch.Tensor:
    """(B, 1): the smallest absolute activation other than 0 of each row, or 0 if there is none.

    Args:
        feature_acts: (B, d_sae), dense or sparse COO.
        k: the most entries that a row has; a :class:`SelectedActivations` has them all.
    """
    if isinstance(feature_acts, SelectedActivations):
        acts = feature_acts.detach()._values().abs().unflatten(0, (-1, k))
    else:
        acts = feature_acts.to_dense().abs().topk(k, sorted=False).values
    smallest = acts.masked_fill(acts <= 0, torch.inf).amin(dim=-1, keepdim=True)
    return smallest.masked_fill(smallest.isinf(), 0.0)


def unflatten(x: torch.Tensor, leading: torch.Size) -> torch.Tensor:
    """(N, ...) -> (*leading, ...), also for the sparse COO that torch cannot reshape."""
    shape = (*leading, *x.shape[1:])
    if not x.is_sparse:
        return x.reshape(shape)
    x = x.coalesce()
    rows, *others = x.indices()
    unraveled = torch.unravel_index(rows, leading) if leading else ()
    return torch.sparse_coo_tensor(torch.stack([*unraveled, *others]), x.values(), shape)
