"""A weight matrix in a training step: products with a few rows, and one buffer for its gradient.

Autograd would make a full-size gradient for each use of a matrix, here one for the main loss
and one or two for the auxiliary loss, and add them up: as many passes over (d_sae, d) in
memory. Instead, all uses add to one :class:`LatentGradient`, each only the rows that it touches.
A use takes the :func:`handle` of the matrix as an input, which makes it part of the graph, and
returns no gradient for it. When autograd has run all uses it runs the handle, and the buffer
becomes the parameter's gradient.
"""

from functools import cached_property
from typing import Any

import torch

from sae_lens_auxk.ops import KERNELS
from sae_lens_auxk.ops.selection import Selected, add_rows, beyond

# How many rows a CPU takes at once.
ROWS_AT_ONCE = 128


def refuse_second_derivative() -> None:
    """Raise an error if the backward pass that runs is itself differentiated.

    Torch's ``once_differentiable`` does the same where a gradient comes in as a tensor; a
    :func:`handle` gets none.
    """
    if torch.is_grad_enabled():
        raise RuntimeError(
            "the sparse training step has no second derivatives (create_graph=True); "
            "set the environment variable SAE_LENS_AUXK_OPS=dense for a step that has them"
        )


class LatentGradient:
    """The gradient of ``W`` in one buffer (d_sae, d).

    ``W`` itself is (d_sae, d), or (d, d_sae) if ``transpose``.
    """

    def __init__(self, W: torch.Tensor, transpose: bool = False):
        self.W = W.detach()
        self.transpose = transpose
        self._rows: torch.Tensor | None = None
        self._along: torch.Tensor | None = None
        self._pass = -1

    @property
    def _by_latent(self) -> torch.Tensor:
        """(d_sae, d) ``W``, a row for each latent."""
        return self.W.T if self.transpose else self.W

    def add_selected(self, selected: Selected, values: torch.Tensor, x: torch.Tensor) -> None:
        """Add to each latent's row the sum of ``values * x`` over its selected entries.

        Args:
            selected: (N,) entries.
            values: (N,).
            x: a row for each bag, or one for each row of the batch.
        """
        self._begin()
        self._rows = selected.add_outer(self._rows, values, x, like=self.W)

    def add_rows(
        self,
        rows: torch.Tensor,
        latents: torch.Tensor | None = None,
        n_rows: torch.Tensor | None = None,
    ) -> None:
        """Add ``rows`` (n, d) to those of ``latents`` (n,), which may repeat; None: to all.

        If ``n_rows`` () is given, only the first ``n_rows`` count.
        """
        self._begin()
        self._rows = add_rows(self._rows, _counted(rows, n_rows), latents, len(self._by_latent))

    def add_scaled(
        self,
        rows: torch.Tensor,
        scale: torch.Tensor,
        latents: torch.Tensor | None,
        n_rows: torch.Tensor | None,
    ) -> torch.Tensor:
        """Add ``scale`` times ``rows`` to those of some latents.

        Args:
            rows: (n, d).
            scale: (d_sae,).
            latents: (n,) int64, each once; None for all.
            n_rows: () int64, how many of the rows count; None for all.

        Returns:
            (d_sae,) the products of the rows with their latents' own vectors in W, else 0.
        """
        W = self._by_latent
        if (k := KERNELS[rows.device.type]) and self.W.dtype == rows.dtype == torch.float32:
            self._begin()
            self._rows, products = k.add_scaled(rows, scale, latents, n_rows, W, self._rows)
            return at_latents(products, latents, len(W))
        rows = _counted(rows, n_rows)
        own, of_latent = (W, scale) if latents is None else (W[latents], scale[latents])
        self.add_rows(rows * of_latent.unsqueeze(1), latents)
        # A backward pass may run inside autocast, which would round.
        with torch.autocast(rows.device.type, enabled=False):
            return at_latents(torch.linalg.vecdot(rows, own), latents, len(W))

    def add_along(self, scale: torch.Tensor) -> None:
        """Add ``scale`` (d_sae,) times ``W`` itself (not transposed), row by row."""
        self._begin()
        self._along = scale if self._along is None else self._along + scale

    def _begin(self) -> None:
        # A backward pass that does not reach W leaves its sums behind; the next must not use them.
        current = torch._C._current_graph_task_id()
        if current != self._pass:
            self._rows = self._along = None
            self._pass = current

    def take(self) -> torch.Tensor | None:
        """The gradient that this backward pass added, in the layout of ``W``; None if it added
        none."""
        self._begin()
        total, along = self._rows, self._along
        # Autograd would copy a gradient that something else still holds.
        self._rows = self._along = None
        if along is not None:
            total = _add_multiples(along, self.W, total)
        if total is not None and self.transpose:
            total = transposed(total)
        return total


def at_latents(values: torch.Tensor, latents: torch.Tensor | None, d_sae: int) -> torch.Tensor:
    """(d_sae,): ``values`` (n,) added up at their latents (n,); None: one for each."""
    if latents is None:
        return values
    return values.new_zeros(d_sae).index_add_(0, latents, values)


def _counted(rows: torch.Tensor, n_rows: torch.Tensor | None) -> torch.Tensor:
    """``rows``, with all but the first ``n_rows`` () set to 0 if it is given."""
    if n_rows is None:
        return rows
    return rows.masked_fill(beyond(rows, n_rows).unsqueeze(1), 0)


def _add_multiples(scale: torch.Tensor, W: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
    """``scale`` (n,) times the rows of ``W`` (n, d), added to ``out`` in place, if there is one."""
    if (k := KERNELS[W.device.type]) and W.dtype == torch.float32:
        return k.add_multiples(scale, W, out)
    scaled = scale.unsqueeze(1).to(W.dtype)
    return W * scaled if out is None else out.addcmul_(W, scaled)


def handle(W: torch.Tensor, gradient: LatentGradient) -> torch.Tensor:
    """An empty tensor that stands for ``W`` in the graph, with ``gradient`` as its gradient."""
    return _Handle.apply(W, gradient)  # type: ignore[no-any-return]


class _Handle(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, W: torch.Tensor, gradient: LatentGradient) -> torch.Tensor:
        ctx.gradient = gradient
        ctx.set_materialize_grads(False)
        return W.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:  # noqa: ARG004
        refuse_second_derivative()
        return ctx.gradient.take(), None


def transposed(x: torch.Tensor) -> torch.Tensor:
    """``x.T``, contiguous."""
    if k := KERNELS[x.device.type]:
        return k.transposed(x)
    if x.device.type != "cpu":
        return x.T.contiguous()
    # A column of all of x lies in more cache lines than a core's cache holds.
    out = x.new_empty(x.shape[::-1])
    for first in range(0, len(x), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        out[:, rows] = x[rows].T
    return out


def row_norms(W: torch.Tensor) -> torch.Tensor:
    """(n,): the norms of the rows of ``W`` (n, d), to divide by: never 0; no graph."""
    return W.detach().norm(dim=-1).clamp(min=torch.finfo(W.dtype).tiny)


def column_norms(x: torch.Tensor) -> torch.Tensor:
    """(n,): the norms of the columns of ``x`` (B, n), at least in float32."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if x.device.type != "cpu":
        return torch.linalg.vector_norm(x, dim=0, dtype=dtype)
    # There it goes down one column after the other, which takes 10 times as long.
    squares = [rows.to(dtype).square().sum(dim=0) for rows in x.split(ROWS_AT_ONCE)]
    return torch.stack(squares).sum(dim=0).sqrt()


def unit_columns_(products: torch.Tensor) -> torch.Tensor:
    """``products`` (B, n), contiguous, each column divided by its norm, in place; no gradient.

    The norm is the root mean square times the root of B.
    """
    norms = column_norms(products)
    # 0 / 0 would be NaN, which is the largest of all products.
    norms = norms.where(norms > 0, torch.inf)
    if k := KERNELS[products.device.type]:
        # Torch divides bfloat16 by float32 entry by entry, in over twice the time.
        return k.scaled_cast(products, norms.reciprocal(), products.dtype, out=products)
    return products.div_(norms)


def scaled_product(
    x: torch.Tensor,
    W: torch.Tensor,
    scale: torch.Tensor | None,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """(B, n): ``(x @ W + bias) * scale``, in the precision of ``x``; no gradient.

    Args:
        x: (B, d).
        W: (d, n), contiguous, or the transpose of a contiguous matrix.
        scale: (n,), or None for 1.
        bias: (n,), or None for 0.
    """
    dtype = x.dtype
    # On a CPU allocating another W takes longer than multiplying the product in place.
    afterwards = W.device.type == "cpu" and W.dtype == dtype
    if scale is None or afterwards:
        weights = W.to(dtype)
    else:
        bias = None if bias is None else bias * scale
        if W.is_contiguous():
            weights = _scaled_cast(W, scale, dtype)
        else:
            weights = _scaled_cast(W.T, scale.unsqueeze(1), dtype).T
    product = x @ weights if bias is None else torch.addmm(bias.to(dtype), x, weights)
    return product.mul_(scale) if scale is not None and afterwards else product


def _scaled_cast(W: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``W`` (m, n) times ``scale``, (n,) or (m, 1), in ``dtype``; no gradient."""
    if (k := KERNELS[W.device.type]) and W.dtype == torch.float32:
        return k.scaled_cast(W, scale, dtype)
    return (W * scale).to(dtype)


class Decoder:
    """W_dec in one training step. Every use of it adds to one gradient buffer.

    Attributes:
        W_dec: (d_sae, d_in) the parameter.
        W: the same without a graph.
        norm: (d_sae,) the norms of its rows, without a graph; None unless pre-activations are
            multiplied by them.
        gradient: the buffer.
        handle: the tensor that stands for W_dec in the graph.
    """

    def __init__(self, W_dec: torch.Tensor, rescaled: bool, autocast: torch.dtype | None):
        """
        Args:
            W_dec: (d_sae, d_in).
            rescaled: whether it has norms.
            autocast: the precision of autocast, or None if it is off.
        """
        self.W_dec, self.W = W_dec, W_dec.detach()
        self.norm = self.W.norm(dim=-1) if rescaled else None
        self.gradient = LatentGradient(W_dec)
        # Not an attribute of the gradient, which the graph holds: it would hold itself.
        self.handle = handle(W_dec, self.gradient)
        self._autocast = autocast

    def weighted_sums(self, values: torch.Tensor, selected: Selected) -> torch.Tensor:
        """(n_bags, d_in): the sums of ``values`` times rows of W_dec, with their graph."""
        return _WeightedSums.apply(values, self.handle, self, selected)  # type: ignore[no-any-return]

    def dots(self, x: torch.Tensor, selected: Selected) -> torch.Tensor:
        """The products of ``x`` (n_bags, d_in) with the selected rows of W_dec; no graph."""
        W = self._matrix(selected)
        return selected.dots(x.to(W.dtype), W)

    def all_matches(self, x: torch.Tensor, latents: slice) -> torch.Tensor:
        """(B, n): products of ``x`` (B, d_in) with rows of W_dec, in unit columns; no graph."""
        x = x.to(self._autocast or self.W.dtype)
        return unit_columns_(scaled_product(x, self.W[latents].T, None))

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
        # A row of zeros has no direction in which its norm could grow.
        self.gradient.add_along(grad / self.norm.where(self.norm > 0, torch.inf))

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
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        refuse_second_derivative()
        values, W = ctx.saved_tensors
        decoder, selected = ctx.decoder, ctx.selected
        grad = grad_outputs[0].to(W.dtype).contiguous()
        decoder.gradient.add_selected(selected, values, grad)
        return selected.dots(grad, W).view_as(values).to(values.dtype), None, None, None


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
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        refuse_second_derivative()
        (grad,) = grad_outputs
        pre, norm = ctx.saved_tensors
        products, selected = grad * pre, ctx.selected
        products = products if selected is None else selected.sum_by_latent(products)
        ctx.decoder.add_norm_gradient(products)
        return grad * norm, None, None, None
