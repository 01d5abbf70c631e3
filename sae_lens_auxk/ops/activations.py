"""The selected activations of a step as SAELens's trainer takes them."""

from copy import deepcopy
from typing import Any, TypeVar

import torch
from typing_extensions import override

from sae_lens_auxk.ops.decoder import Decoder
from sae_lens_auxk.ops.gradient import first_derivative_only
from sae_lens_auxk.ops.selected import Pairs

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
        acts = SelectedActivations.of(selected.rows, selected.latents, h, shape)
        return acts.to_dense() if dense else acts

    @staticmethod
    @first_derivative_only
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
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
def smallest_active(feature_acts: torch.Tensor, k: int, by_magnitude: bool = False) -> torch.Tensor:
    """(B, 1): the smallest activation above 0 of each row, or 0 if there is none.

    Args:
        feature_acts: (B, d_sae), dense or sparse COO.
        k: the most entries that a row has; a :class:`SelectedActivations` has them all.
        by_magnitude: whether activations may be negative; then it is the smallest absolute one.
    """
    if isinstance(feature_acts, SelectedActivations):
        acts = feature_acts.detach()._values().unflatten(0, (-1, k))
        acts = acts.abs() if by_magnitude else acts
    else:
        acts = feature_acts.to_dense()
        acts = (acts.abs() if by_magnitude else acts).topk(k, sorted=False).values
    smallest = acts.masked_fill(acts <= 0, torch.inf).amin(dim=-1, keepdim=True)
    return smallest.masked_fill(smallest.isinf(), 0.0)


def _as(cls: type[_T], acts: torch.Tensor) -> _T:
    return torch.Tensor._make_subclass(cls, acts)


def unflatten(x: torch.Tensor, leading: torch.Size) -> torch.Tensor:
    """(N, ...) -> (*leading, ...), also for the sparse COO that torch cannot reshape."""
    shape = (*leading, *x.shape[1:])
    if not x.is_sparse:
        return x.reshape(shape)
    x = x.coalesce()
    rows, *others = x.indices()
    unraveled = torch.unravel_index(rows, leading) if leading else ()
    return torch.sparse_coo_tensor(torch.stack([*unraveled, *others]), x.values(), shape)
