"""Pursuit: the dead latent that a row suits best learns as if it had fired."""

from typing import Any

import torch

from sae_lens_auxk.losses.record import AuxLossInputs
from sae_lens_auxk.losses.registry import register_aux_loss


@register_aux_loss(
    "pursuit",
    default_coefficient=1 / 2,
    uses_k_aux=True,
    sync_free=True,
    capturable=True,
    shardable=True,
)
def pursuit(inputs: AuxLossInputs, cfg: Any) -> torch.Tensor:
    """One more step of matching pursuit, and a push down where firing would be wrong. Value 0.

    Up: ``-2 mean_b [ stopgrad(r_b . W_i) h_bi + stopgrad(a_b r_b) . W_i ]``. Of *all* latents (or
    the level's, if each Matryoshka level has its own loss), ``i`` is the one with the largest ``r_b
    . W_i`` relative to its own root mean square over the batch, and ``a_b = r_b . W_i / |W_i|^2``.
    Rows in which ``i`` is alive, or ``a_b`` is not above 0, count 0.

    Down: ``-2 mean_b sum_{j in T_b, h_bj > 0} stopgrad(min(r_b . W_j - h_bj |W_j|^2, 0)) h_bj``,
    where ``T_b`` are the ``min(k_aux, |D|)`` dead latents with the largest ``h_b``.

    Firing at ``a_b`` lowers the row's squared error as much as latent ``i`` can. If it is dead, it
    gets the gradients of the main loss as if it had fired: its pre-activation gets that of the
    activation, its decoder row its own (the norm is a constant where ``h`` is rescaled by it). Dead
    latents compete for a row instead of all learning the same of it, and a row that suits a live
    latent better is left to that one. The rows of ``W_dec`` may be of any length.

    Deviation from matching pursuit, which takes the largest ``r_b . W_i / |W_i|``: where the
    residual lies mostly in a few directions, latents there would win almost every row, alive or
    not. studies/rivals has both.

    A latent that only ever learns where to fire comes back firing on whatever rows have large
    activations, and stays there: too rare to be useful, too frequent to be dead. So the dead
    latents near to firing also get the main loss's gradient as if they fired at ``h``, where it
    points down. studies/pursuit shows what each half does.

    Deviation from the main loss: each latent is assumed to fire alone. The up half uses ``r_b``
    from before the firing. AbsTopK: ``i`` is the latent with the largest ``|r_b . W_i|``, relative
    to the same, and may fire negatively: ``a_b`` has the sign of ``r_b . W_i``; ``T_b`` has the
    largest ``|h_b|``, which is pushed towards 0.

    Source: ours; matching pursuit is Mallat and Zhang 1993.
    """
    gain = up(inputs) + down(inputs, cfg.resolved_k_aux)
    return gain.mean().detach() - gain.mean()


def up(inputs: AuxLossInputs) -> torch.Tensor:
    """(B,): the gain if the best match of each row fires; 0 if it is alive."""
    residual = inputs.residual
    best = inputs.best_dead_match(residual)
    # Under a run-time normalisation with factor s, firing at a = r . W / s |W|^2 adds s a W. The
    # products s a are all that is needed, and finite where s is 0.
    product, norm = best.project(residual).to(inputs.x.dtype), best.norm()
    product = inputs.fire(product)
    fired = best.decode_as(product / norm / norm).to(inputs.x.dtype)
    pull = inputs.to_output_units(product)
    return 2 * (inputs.total(pull * best.h) + (residual * fired).sum(dim=-1))


def down(inputs: AuxLossInputs, k: int) -> torch.Tensor:
    """(B,): what the k dead latents nearest to firing lose, each if it fired alone."""
    nearest = inputs.nearest_dead(k)
    acts = inputs.fire(nearest.h.detach().to(inputs.x.dtype))
    norm = nearest.norm()
    missing = nearest.project(inputs.residual) - inputs.to_output_units(acts * norm * norm)
    # Against the activation's sign, that is, where the main loss would make it smaller.
    push = inputs.to_output_units(missing.where(missing * acts < 0, 0))
    return 2 * inputs.total(push * nearest.h)
