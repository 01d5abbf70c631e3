"""Straight-through: dead latents feel the main loss as if they fired, and nothing else."""

from typing import Any

import torch

from sae_lens_auxk.aux_losses import AuxLossInputs, register_aux_loss
from sae_lens_auxk.aux_losses.auxk import k_aux_of


@register_aux_loss("straight_through", default_coefficient=1 / 32, uses_k_aux=True, by_mask=True)
def straight_through(inputs: AuxLossInputs, cfg: Any) -> torch.Tensor:
    """``-mean_b sum_{i in T_b} stopgrad(2 r_b . W_i) h_bi``, less its own value: exactly 0.

    The gradient of the main MSE with respect to the activation of a dead latent, passed
    straight to its pre-activation. No latent is asked to explain the residual on its own,
    and W_dec gets no gradient but through the norm factor of ``h``, where it has one.

    Source: asked for in SAELens issue #666. ``T_b`` as in AuxK.
    """
    acts = inputs.nearest_dead(k_aux_of(cfg))
    residual = inputs.residual
    if inputs.output_scale is not None:
        residual = residual * inputs.output_scale
    pull = 2 * acts.project(residual).to(inputs.x.dtype)
    nudge = -(pull * acts.h).sum(dim=-1).mean()
    return nudge - nudge.detach()
