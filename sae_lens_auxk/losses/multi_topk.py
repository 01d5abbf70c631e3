"""Multi-TopK: reconstruct the input a second time, with four times as many latents."""

from typing import Any

import torch

from sae_lens_auxk.losses.record import AuxLossInputs
from sae_lens_auxk.losses.registry import register_aux_loss


@register_aux_loss(
    "multi_topk",
    default_coefficient=1 / 8,
    uses_dead_latents=False,
    topk_only=True,
    capturable=True,
    shardable=True,
)
def multi_topk(inputs: AuxLossInputs, cfg: Any) -> torch.Tensor:
    """``mean_b || x - decode(relu(top 4k of h)) ||^2``.

    It uses the ``4k`` largest ``h`` of each row, dead or alive, so all parameters get a gradient.
    BatchTopK's ``k`` is an average; there, every row uses ``int(4 k)`` latents.

    Source: Gao et al. 2024, section 4.3 (Multi-TopK, ``L(k) + L(4k) / 8``), with the ReLU of
    their TopK (section 2.3). AbsTopK, which has no ReLU: the ``4k`` largest ``|h|``, as they are.
    """
    acts = inputs.largest(max(1, int(4 * cfg.k)))
    reconstruction = acts.map(inputs.fire).decode().to(inputs.x.dtype)
    error = inputs.x - inputs.to_output_units(reconstruction + inputs.b_dec)
    return error.square().sum(dim=-1).mean()
