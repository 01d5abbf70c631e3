"""The first half of ``pursuit`` as a loss of its own."""

from typing import Any

import torch

from sae_lens_auxk import AuxLossInputs, register_aux_loss
from sae_lens_auxk.losses.pursuit import up


@register_aux_loss("pursuit_up", default_coefficient=1 / 2, sync_free=True)
def pursuit_up(inputs: AuxLossInputs, cfg: Any) -> torch.Tensor:  # noqa: ARG001
    """It brings latents back, and does not say where they should not fire."""
    gain = up(inputs).mean()
    return gain.detach() - gain
