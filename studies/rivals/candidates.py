"""Changes to ``pursuit`` that were tried.

Where most latents stayed dead: ``pursuit_dead``. On Gemma 3 the residual lies mostly in a few
directions, and latents that are alive but silent have their rows there. They matched almost every
row better than a dead latent did. ``pursuit`` compares each match with what is usual for its
latent; here only dead latents compete.

Where TopK explains less than without a loss: ``pursuit_gated`` and ``pursuit_exchange``. With TopK
a latent fires only if it is among the row's k largest, and ``pursuit`` may teach it rows where it
never is.
"""

from typing import Any

import torch

from sae_lens_auxk import AuxLossInputs, register_aux_loss
from sae_lens_auxk.losses.pursuit import down
from sae_lens_auxk.ops.matrices import row_norms


@register_aux_loss(
    "pursuit_dead", default_coefficient=1 / 2, uses_k_aux=True, sync_free=True, capturable=True
)
def pursuit_dead(inputs: AuxLossInputs, cfg: Any) -> torch.Tensor:
    """``pursuit`` where ``i`` is the dead latent with the largest ``r_b . W_i / |W_i|``.

    Only for SAEs that rescale activations by the decoder norm, as TopK's do.
    """
    columns, residual = inputs.dead_columns(), inputs.residual
    with torch.no_grad():
        matches = (residual @ columns.rows.T).masked_fill(~columns.real, -torch.inf)
        product, best = matches.max(dim=1, keepdim=True)
        latents = columns.latents[best[:, 0]]
        product = inputs.fire(product)
    rows = inputs.W_dec.index_select(0, latents)
    fired = product * rows / row_norms(rows).unsqueeze(1)
    h = columns.h.gather(1, best)
    up = 2 * (inputs.total(product * h) + (residual * fired).sum(dim=-1))
    gain = up + down(inputs, cfg.resolved_k_aux)
    return _without_value(gain)


@register_aux_loss("pursuit_gated", default_coefficient=1 / 2, uses_k_aux=True)
def pursuit_gated(inputs: AuxLossInputs, cfg: Any) -> torch.Tensor:
    """``pursuit`` where the up half counts only rows with ``2 a_b > t_b``.

    ``t_b`` is what firing takes: for TopK the row's smallest activation. Firing just above it
    lowers the squared error only then.
    """
    gain = _up_above(inputs, inputs.residual, inputs.firing_threshold().detach() / 2)
    return _without_value(gain + down(inputs, cfg.resolved_k_aux))


@register_aux_loss("pursuit_exchange", default_coefficient=1 / 2, uses_k_aux=True)
def pursuit_exchange(inputs: AuxLossInputs, cfg: Any) -> torch.Tensor:
    """``pursuit`` where the dead latent takes the place of the row's weakest one. For TopK.

    The residual of the up half is that without the weakest active latent, and a row counts if
    ``a_b`` is larger than that latent's activation.
    """
    with torch.no_grad():
        active = inputs.largest(int(cfg.k))
        acts = inputs.fire(active.h.to(inputs.x.dtype))
        weakest = acts.where(acts > 0, torch.inf).amin(dim=-1, keepdim=True)
        part = active.decode_as(acts.where(acts == weakest, 0))
        residual = inputs.residual + inputs.to_output_units(part)
    gain = _up_above(inputs, residual, weakest.where(weakest.isfinite(), 0))
    return _without_value(gain + down(inputs, cfg.resolved_k_aux))


def _up_above(inputs: AuxLossInputs, residual: torch.Tensor, least: torch.Tensor) -> torch.Tensor:
    """(B,): the up half of ``pursuit`` for ``residual``, in rows where ``a_b`` exceeds ``least``.

    Only for SAEs that rescale activations by the decoder norm, and without a run-time
    normalisation.
    """
    best = inputs.best_dead_match(residual)
    product = inputs.fire(best.project(residual).to(inputs.x.dtype))
    product = product.where(product > least, 0)
    fired = best.decode_as(product).to(inputs.x.dtype)
    return 2 * (inputs.total(product * best.h) + (residual * fired).sum(dim=-1))


def _without_value(gain: torch.Tensor) -> torch.Tensor:
    return gain.mean().detach() - gain.mean()
