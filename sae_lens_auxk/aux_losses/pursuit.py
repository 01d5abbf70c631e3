"""Pursuit: the dead latent that would explain a row best learns as if it had fired."""

from typing import Any

import torch

from sae_lens_auxk.aux_losses.registry import AuxLossInputs, register_aux_loss


@register_aux_loss("pursuit", default_coefficient=1 / 2, sync_free=True)
def pursuit(inputs: AuxLossInputs, cfg: Any) -> torch.Tensor:  # noqa: ARG001
    """``-2 mean_b [ stopgrad(r_b . W_i) h_bi + stopgrad(a_b r_b) . W_i ]``, less its value: 0.

    ``i`` is, of *all* latents (of the level's, where Matryoshka's levels have losses of their own),
    the one with the largest ``p_b = r_b . W_i / |W_i|``, and ``a_b = p_b / |W_i|``. Rows in which
    ``i`` is alive, or ``p_b`` is not above 0, count 0.

    This is one more step of matching pursuit. Firing at ``a_b``, latent ``i`` would lower the row's
    squared error by ``p_b^2``, more than any other latent could. If it is dead, it gets the
    gradients of the main loss as if it had fired: its pre-activation gets that of the activation,
    its decoder row its own (the norm is a constant where ``h`` is rescaled by it). Dead latents
    compete for a row instead of all learning the same of it, and a row that a live latent could
    explain better is left to that one. Directions are compared, so the rows of ``W_dec`` may be of
    any length.

    Deviation from the main loss: ``r_b`` is the residual without the firing. AbsTopK: ``i`` is the
    latent with the largest ``|p_b|``, and may fire negatively: ``a_b`` has the sign of ``p_b``.

    Source: ours (docs/pursuit.md); matching pursuit is Mallat and Zhang 1993.
    """
    residual = inputs.residual
    best = inputs.best_dead_match(residual)
    # Under a run-time normalisation with factor s, firing at a = r . W / s |W|^2 adds s a W. The
    # products s a are all that is needed, and finite where s is 0.
    product, norm = best.project(residual).to(inputs.x.dtype), best.norm()
    if not inputs.by_magnitude:
        product = product.clamp(min=0)
    fired = best.decode_as(product / norm / norm).to(inputs.x.dtype)
    pull = inputs.to_output_units(product)
    gain = 2 * ((pull * best.h).sum(dim=-1) + (residual * fired).sum(dim=-1))
    return gain.mean().detach() - gain.mean()
