"""The other change to ``pursuit`` that was tried where most latents stayed dead: ``pursuit_dead``.

On Gemma 3 the residual lies mostly in a few directions, and latents that are alive but silent have
their rows there. They matched almost every row better than a dead latent did. ``pursuit`` compares
each match with what is usual for its latent; here only dead latents compete.
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
    return gain.mean().detach() - gain.mean()
