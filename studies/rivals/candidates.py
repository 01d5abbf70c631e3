"""Two changes to which dead latent ``pursuit`` teaches, tried where it leaves most latents dead.

On Gemma 3 the residual lies mostly in a few directions, and latents that are alive but silent have
their rows there. They match every row better than a dead latent does, and dead latents learn only
from rows that they match best. Either change lets them win; all else is pursuit's.
"""

from typing import Any

import torch

from sae_lens_auxk import AuxLossInputs, register_aux_loss
from sae_lens_auxk.losses.pursuit import pursuit_among
from sae_lens_auxk.ops.matrices import row_norms

properties = {
    "default_coefficient": 1 / 2,
    "uses_k_aux": True,
    "sync_free": True,
    "capturable": True,
}


@register_aux_loss("pursuit_relative", **properties)
def pursuit_relative(inputs: AuxLossInputs, cfg: Any) -> torch.Tensor:
    """Each match is compared relative to the latent's own root mean square over the batch."""
    rows = inputs.W_dec.detach()
    residual = inputs.residual.to(rows.dtype)
    # mean_b (r_b . W_i)^2 without a product for each row of the batch
    usual = (rows @ (residual.T @ residual / len(residual)) * rows).sum(dim=1).sqrt()
    weight = row_norms(rows) / usual.clamp(min=torch.finfo(rows.dtype).tiny)
    return pursuit_among(inputs, cfg, weight)


@register_aux_loss("pursuit_dead", **properties)
def pursuit_dead(inputs: AuxLossInputs, cfg: Any) -> torch.Tensor:
    """Only dead latents compete."""
    return pursuit_among(inputs, cfg, inputs.dead.to(inputs.W_dec.dtype))
