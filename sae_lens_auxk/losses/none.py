"""No auxiliary loss: the baseline."""

from typing import Any

import torch

from sae_lens_auxk.losses.record import AuxLossInputs
from sae_lens_auxk.losses.registry import register_aux_loss


@register_aux_loss("none", default_coefficient=0.0, capturable=True, shardable=True)
def none(inputs: AuxLossInputs, cfg: Any) -> torch.Tensor:  # noqa: ARG001
    """0. Dead latents are still counted, so that runs can be compared."""
    return inputs.x.new_zeros(())
