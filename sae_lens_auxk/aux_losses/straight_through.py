"""Straight-through: the best dead latent of each row learns as if it had fired."""

from typing import Any

import torch

from sae_lens_auxk.aux_losses import AuxLossInputs, register_aux_loss
from sae_lens_auxk.aux_losses.auxk import k_aux_of


@register_aux_loss("straight_through", default_coefficient=1 / 8, uses_k_aux=True, by_mask=True)
def straight_through(inputs: AuxLossInputs, cfg: Any) -> torch.Tensor:
    """``-mean_b [ stopgrad(2 r_b . W_i) h_bi + stopgrad(2 t_b r_b) . W_i ]``, its value taken off.

    Over the rows in which ``2 r_b . W_i > t_b``, less its own value: exactly 0. ``t_b`` is what
    ``h`` must exceed to fire, and ``i`` the latent of ``T_b``, the dead latents nearest to firing
    (as in AuxK), that the residual pulls most, with the largest ``r_b . W_i``.

    If ``i`` fired at the threshold, the row's squared error would change by ``t_b^2 - 2 t_b
    r_b . W_i`` (for a row W_i of length 1). Where that is less than 0 the main loss's gradient
    with respect to its activation is passed straight to ``h_bi``, and its decoder row gets the
    gradient that it would have got. No latent is asked to explain the residual on its own, and
    dead latents compete for each row instead of all learning the same of it.

    Source: a straight-through signal is asked for in SAELens issue #666. Which latents it
    reaches, the threshold and the decoder's part were chosen by measurement
    (docs/straight_through.md), where the plain form, ``-mean_b sum_{i in T_b} stopgrad(2 r_b .
    W_i) h_bi``, is compared with it.
    """
    residual = inputs.residual
    scale = 1.0 if inputs.output_scale is None else inputs.output_scale
    residual = residual * scale
    nearest = inputs.nearest_dead(k_aux_of(cfg))
    with torch.no_grad():
        pull = nearest.project(residual).masked_fill(nearest.h == 0, -torch.inf)
    best = nearest.only(pull.argmax(dim=-1, keepdim=True))
    pull = 2 * best.project(residual).to(inputs.x.dtype)
    threshold = inputs.dead_threshold().detach().to(inputs.x.dtype).clamp(min=0)
    fires = (best.h.detach() != 0) & (pull > threshold * scale**2)
    fired = best.decode_as(threshold * fires).to(inputs.x.dtype)
    gain = (pull * fires * best.h).sum(dim=-1) + 2 * (residual * fired).sum(dim=-1)
    return gain.mean().detach() - gain.mean()
