"""Products with a few selected latents of each row.

A selection is a list of (row, latent) pairs. The three products below are what the training
step of a sparse autoencoder needs, each a derivative of the others; they read or write only
the selected rows of a (d_sae, d) matrix. The torch references are all
``torch.nn.functional.embedding_bag`` in disguise.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from sae_lens_auxk.ops import use_triton


@dataclass(frozen=True)
class Selected:
    """(bag, latent) pairs, sorted by bag; a bag is a row, or one level of a row.

    Attributes:
        rows: (N,) int64, the row of the batch that each pair belongs to.
        latents: (N,) int64.
        bags: (N,) int64, ascending.
        offsets: (n_bags,) int64, where each bag's pairs start.
        d_sae: the number of latents to choose from.
    """

    rows: torch.Tensor
    latents: torch.Tensor
    bags: torch.Tensor
    offsets: torch.Tensor
    d_sae: int

    @staticmethod
    def per_row(latents: torch.Tensor, d_sae: int) -> "Selected":
        """From (B, k) latents, the same number in each row."""
        B, k = latents.shape
        rows = torch.arange(B, device=latents.device)
        repeated = rows.repeat_interleave(k, output_size=B * k)
        return Selected(repeated, latents.reshape(-1), repeated, rows * k, d_sae)

    @staticmethod
    def from_bags(
        rows: torch.Tensor, latents: torch.Tensor, bags: torch.Tensor, n_bags: int, d_sae: int
    ) -> "Selected":
        """From pairs whose ``bags`` are ascending already."""
        starts = torch.arange(n_bags, device=bags.device)
        return Selected(rows, latents, bags, torch.searchsorted(bags, starts), d_sae)

    @cached_property
    def by_latent(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(N,) the order that sorts the pairs by latent, (d_sae + 1,) where each one starts."""
        latents, order = self.latents.sort(stable=True)
        bounds = torch.arange(self.d_sae + 1, device=latents.device)
        return order, torch.searchsorted(latents, bounds)


def weighted_sums(values: torch.Tensor, W: torch.Tensor, selected: Selected) -> torch.Tensor:
    """(n_bags, d): for each bag the sum of ``values * W[latents]``, with gradients.

    ``values`` (N,) and ``W`` (d_sae, d) have the same dtype, float32 or float64.
    """
    return _WeightedSums.apply(values, W, selected)  # type: ignore[no-any-return]


class _WeightedSums(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: torch.Tensor, W: torch.Tensor, selected: Selected
    ) -> torch.Tensor:
        ctx.save_for_backward(values, W)
        ctx.selected = selected
        return torch.nn.functional.embedding_bag(
            selected.latents, W, selected.offsets, per_sample_weights=values, mode="sum"
        )

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        (grad,) = grad_outputs
        values, W = ctx.saved_tensors
        grad = grad.contiguous()
        return (
            dots(grad, W, ctx.selected),
            outer_sums(values, grad, ctx.selected, ctx.selected.bags),
            None,
        )


def dots(x: torch.Tensor, W: torch.Tensor, selected: Selected) -> torch.Tensor:
    """(N,): for each pair the product ``x[bag] . W[latent]``; no gradient."""
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        x, W, selected.latents, selected.offsets, selected.bags, 0, -1
    )


def outer_sums(
    values: torch.Tensor, x: torch.Tensor, selected: Selected, rows: torch.Tensor
) -> torch.Tensor:
    """(d_sae, d): for each latent the sum of ``values * x[rows]`` over its pairs; no gradient.

    ``rows`` is ``selected.rows`` where ``x`` has a row for each row of the batch, or
    ``selected.bags`` where it has one for each bag.
    """
    order, starts = selected.by_latent
    if use_triton(x) and x.dtype == torch.float32:
        from sae_lens_auxk.ops import triton_kernels

        return triton_kernels.outer_sums(values[order], rows[order], starts, x)
    return torch.nn.functional.embedding_bag(
        rows[order], x, starts[:-1], per_sample_weights=values[order], mode="sum"
    )


def transposed(x: torch.Tensor) -> torch.Tensor:
    """``x.T``, contiguous."""
    if use_triton(x):
        from sae_lens_auxk.ops import triton_kernels

        return triton_kernels.transposed(x)
    return x.T.contiguous()
