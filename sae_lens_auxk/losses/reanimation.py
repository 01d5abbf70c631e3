"""Reanimation: raise the pre-activations of latents that did not fire in the batch."""

from typing import Any

import torch

from sae_lens_auxk.losses.record import AuxLossInputs
from sae_lens_auxk.losses.registry import register_aux_loss


@register_aux_loss(
    "reanimation",
    default_coefficient=1e-3,
    default_dead_criterion="batch",
    sync_free=True,
    capturable=True,
    shardable=True,
)
def reanimation(inputs: AuxLossInputs, cfg: Any) -> torch.Tensor:  # noqa: ARG001
    """``-d_in * mean over (B, d_sae) of h * [dead]``.

    The source subtracts the mean from an MSE that is a mean over elements; the factor ``d_in``
    converts its coefficient to SAELens's MSE, a sum over ``d_in``. "Dead" is "silent in this batch"
    unless ``cfg.dead_criterion`` says otherwise. It was seen to make latents dense when it is too
    strong.

    Source: Overcomplete, "Handling dead codes in SAEs". AbsTopK: ``|h|`` is raised, since its
    selection compares that.
    """
    B, d_in = inputs.x.shape
    # where() instead of a product: a live latent's sum may be NaN, and its gradient must be exactly
    # 0.
    total = inputs.total(inputs.hidden_pre_sums().where(inputs.dead, 0).to(inputs.x.dtype))
    return -d_in * total / (B * inputs.d_sae)
