"""One buffer for the gradient of a weight matrix.

Autograd would make a full-size gradient for each use of a matrix, here one for the main loss
and one or two for the auxiliary loss, and add them up: as many passes over (d_sae, d) in
memory. Instead, all uses add to one :class:`LatentGradient`, each only the rows that it touches.
A use takes the :func:`handle` of the matrix as an input, which makes it part of the graph, and
returns no gradient for it. When autograd has run all uses it runs the handle, and the buffer
becomes the parameter's gradient.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from sae_lens_auxk.ops import kernels
from sae_lens_auxk.ops.columns import beyond

# How many rows a CPU transposes at once.
ROWS_AT_ONCE = 128


_Backward = Callable[..., tuple[Any, ...]]


def first_derivative_only(backward: _Backward) -> _Backward:
    """Raise an error if the backward pass itself is differentiated.

    Torch's ``once_differentiable`` does the same where a gradient comes in as a tensor; a
    :func:`handle` gets none.
    """

    @wraps(backward)
    def checked(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "the sparse training step has no second derivatives (create_graph=True); "
                "set the environment variable SAE_LENS_AUXK_OPS=dense for a step that has them"
            )
        return backward(ctx, *grad_outputs)

    return checked


class LatentGradient:
    """The gradient of ``W`` in one buffer (d_sae, d).

    ``W`` itself is (d_sae, d), or (d, d_sae) if ``transpose``.
    """

    def __init__(self, W: torch.Tensor, transpose: bool = False):
        self.W = W.detach()
        self.transpose = transpose
        self.shape = W.shape[::-1] if transpose else W.shape
        self._rows: torch.Tensor | None = None
        self._along: torch.Tensor | None = None
        self._pass = -1

    def add_pairs(
        self,
        values: torch.Tensor,
        x: torch.Tensor,
        rows: torch.Tensor,
        latents: torch.Tensor,
        starts: torch.Tensor,
    ) -> None:
        """Add ``values[i] * x[rows[i]]`` to the row of each latent's pairs ``i``.

        Args:
            values: (N,), in the order of the latents.
            x: (B, d).
            rows: (N,) int64, in the same order.
            latents: (N,) each pair's latent, ascending.
            starts: (d_sae + 1,) int64, where each latent's pairs start, and N.
        """
        self._begin()
        if (k := kernels(x)) and self.W.dtype == torch.float32:
            self._rows = k.outer_sums(values, rows, latents, starts, x, self._rows)
            return
        dtype, bags, used = self.W.dtype, starts[:-1], None
        if self._rows is not None and x.device.type == "cpu":
            # On a CPU allocating another W takes longer than all else here. (With CUDA this would
            # wait for the device, to learn the number of latents.)
            used = (bags < starts[1:]).nonzero().squeeze(1)
            bags = bags[used]
        sums = torch.nn.functional.embedding_bag(
            rows, x.to(dtype), bags, per_sample_weights=values.to(dtype), mode="sum"
        )
        self.add_rows(sums, used)

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
        rows = _counted(rows, n_rows)
        if latents is not None:
            into = self.W.new_zeros(self.shape) if self._rows is None else self._rows
            self._rows = into.index_add_(0, latents, rows)
        else:
            self._rows = rows if self._rows is None else self._rows.add_(rows)

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
        W = self.W.T if self.transpose else self.W
        if (k := kernels(rows)) and self.W.dtype == rows.dtype == torch.float32:
            self._begin()
            self._rows, products = k.add_scaled(rows, scale, latents, n_rows, W, self._rows)
            return at_latents(products, latents, len(W))
        rows = _counted(rows, n_rows)
        own, of_latent = (W, scale) if latents is None else (W[latents], scale[latents])
        self.add_rows(rows * of_latent.unsqueeze(1), latents)
        # A backward pass may run inside autocast, which would round.
        with torch.autocast(rows.device.type, enabled=False):
            return at_latents(torch.linalg.vecdot(rows, own), latents, len(W))

    def add_outer(self, a: torch.Tensor, b: torch.Tensor) -> None:
        """Add the outer product of ``a`` (d_sae,) and ``b`` (d,)."""
        self._begin()
        self._rows = _add_multiples(a, b.expand(self.shape), self._rows)

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
    if (k := kernels(W)) and W.dtype == torch.float32:
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
    @first_derivative_only
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:  # noqa: ARG004
        return ctx.gradient.take(), None


def transposed(x: torch.Tensor) -> torch.Tensor:
    """``x.T``, contiguous."""
    if k := kernels(x):
        return k.transposed(x)
    if x.device.type != "cpu":
        return x.T.contiguous()
    # A column of all of x lies in more cache lines than a core's cache holds.
    out = x.new_empty(x.shape[::-1])
    for first in range(0, len(x), ROWS_AT_ONCE):
        rows = slice(first, first + ROWS_AT_ONCE)
        out[:, rows] = x[rows].T
    return out
