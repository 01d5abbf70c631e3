"""Ghost gradients: dead latents, seen through exp, reconstruct the residual."""

from typing import Any

import torch

from sae_lens_auxk.losses.record import AuxLossInputs
from sae_lens_auxk.losses.registry import register_aux_loss


@register_aux_loss(
    "ghost_gradients", default_coefficient=1.0, sync_free=True, capturable=True, shardable=True
)
def ghost_gradients(inputs: AuxLossInputs, cfg: Any) -> torch.Tensor:  # noqa: ARG001
    """The MSE between ``r`` and the ghost output, scaled so that its value is the main MSE.

    The ghost output is ``sum_{i in D} exp(h_bi) W_i``, scaled in each row to half the norm
    of ``r_b``. Both scales are constants to the gradient. Each row's largest ``h`` is subtracted
    before exp, because exp of an LLM's pre-activations overflows. This changes neither value nor
    gradient: the scale to half the residual's norm cancels a common factor.

    Source: Anthropic, Circuits Updates January 2024, "Ghost Grads"; abandoned by them in March
    2024. It is kept unchanged as a baseline, also for AbsTopK, although exp favours one sign only.
    """
    # In h's own precision: rounding exp(h) adds no more error than rounding h already has.
    # In place, since autocast would otherwise compute exp in float32.
    dead = inputs.dead_columns()
    largest = inputs.largest_of(dead.h)
    acts = (dead.h - largest.clamp(min=torch.finfo(largest.dtype).min)).exp_()
    ghost = inputs.to_output_units(dead.decode(acts))

    residual = inputs.residual
    tiny = torch.finfo(ghost.dtype).tiny
    with torch.no_grad():
        half_norm = residual.norm(dim=-1, keepdim=True) / 2
        norm = ghost.norm(dim=-1, keepdim=True)
        scale = half_norm / norm.where(norm > 0, torch.inf)
    ghost_mse = (ghost * scale - residual).square().sum(dim=-1).mean()
    main_mse = residual.square().sum(dim=-1).mean()
    return ghost_mse * (main_mse / ghost_mse.detach().clamp(min=tiny))
