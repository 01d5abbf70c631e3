"""Straight-through: a dead latent that would explain a row best learns as if it had fired."""

from typing import Any

import torch

from sae_lens_auxk.aux_losses import AuxLossInputs, register_aux_loss


@register_aux_loss("straight_through", default_coefficient=1 / 2, by_mask=True)
def straight_through(inputs: AuxLossInputs, cfg: Any) -> torch.Tensor:  # noqa: ARG001
    """``-mean_b 2 [ stopgrad(p_b) h_bi + stopgrad(p_b r_b) . W_i ]``, its value taken off.

    ``i`` is of *all* latents (where Matryoshka's levels have losses of their own, of all of the
    level's) the one with the largest ``p_b = r_b . W_i``; rows in which it is live, or ``p_b`` not
    above 0, count 0. The loss is less its own value: exactly 0.

    It is one more step of matching pursuit. The latent that the residual pulls most (for rows W_i
    of length 1) would lower the row's squared error most, by ``p_b^2``, if it fired at ``p_b``. If
    it is dead, the main loss's gradient with respect to its activation is passed straight to
    ``h_bi``, and its decoder row gets the gradient that it would have got. No latent is asked to
    explain the residual on its own, dead latents compete for each row instead of all learning the
    same of it, and a row that a live latent could explain better is left to that one.

    Source: a straight-through signal is asked for in SAELens issue #666; matching pursuit is
    Mallat and Zhang 1993. What is passed, where to and at which coefficient was chosen by
    measurement (docs/straight_through.md), where the plain form, ``-mean_b sum_{i in T_b}
    stopgrad(2 r_b . W_i) h_bi``, is compared with it.
    """
    scale = 1.0 if inputs.output_scale is None else inputs.output_scale
    residual = inputs.residual * scale
    best = inputs.best_dead_match(residual)
    pull = best.project(residual).to(inputs.x.dtype).clamp(min=0).where(best.h != 0, 0)
    fired = best.decode_as(pull / scale**2).to(inputs.x.dtype)
    gain = 2 * ((pull * best.h).sum(dim=-1) + (residual * fired).sum(dim=-1))
    return gain.mean().detach() - gain.mean()
