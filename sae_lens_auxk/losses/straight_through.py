"""Straight-through: dead latents near firing feel the main loss as if they were active."""

from typing import Any

import torch

from sae_lens_auxk.losses.record import AuxLossInputs
from sae_lens_auxk.losses.registry import register_aux_loss


@register_aux_loss(
    "straight_through",
    default_coefficient=1 / 32,
    uses_k_aux=True,
    sync_free=True,
    capturable=True,
    shardable=True,
)
def straight_through(inputs: AuxLossInputs, cfg: Any) -> torch.Tensor:
    """``-mean_b sum_{i in T_b} stopgrad(2 r_b . W_i) h_bi``, less its own value: exactly 0.

    ``T_b``: the ``min(k_aux, |D|)`` dead latents with the largest ``h_b``. The factor is the
    gradient of the main MSE with respect to ``a_bi``, passed straight to ``h_bi``. The decoder gets
    no gradient, except through the norm that ``h`` is rescaled by.

    Source: asked for in SAELens issue #666. AbsTopK: ``T_b`` has the largest ``|h_b|``, as
    SAELens's own loss of it does; its activation passes the gradient on whatever the sign.
    """
    nearest = inputs.nearest_dead(cfg.resolved_k_aux)
    # Scaled as the output is, by the chain rule.
    pull = 2 * nearest.project(inputs.to_output_units(inputs.residual)).to(inputs.x.dtype)
    loss = -inputs.total(pull * nearest.h).mean()
    return loss - loss.detach()
