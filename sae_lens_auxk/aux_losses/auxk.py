"""AuxK: the dead latents nearest to firing reconstruct what the live ones left over."""

from typing import Any

import torch

from sae_lens_auxk.aux_losses.registry import AuxLossInputs, register_aux_loss


@register_aux_loss("auxk", default_coefficient=1 / 32, uses_k_aux=True, sync_free=True)
def auxk(inputs: AuxLossInputs, cfg: Any) -> torch.Tensor:
    """``mean_b || sum_{i in T_b} h_bi W_i + bias - r_b ||^2``.

    ``T_b``: the ``min(k_aux, |D|)`` dead latents with the largest ``h_b``. The bias is what
    ``cfg.aux_bias`` says. Its gradient reaches the parameters of the selected dead latents
    and ``b_dec``, never a live latent.

    Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders", appendix A.2 (no
    bias) and their published code ("matched"). Deviation from SAELens and
    sparsify: no factor ``min(|D| / k_aux, 1)``. AbsTopK: ``T_b`` has the largest ``|h_b|``, with
    their signs, as in SAELens's own loss of it; ``cfg.aux_relu`` would drop the negative ones.
    """
    acts = inputs.nearest_dead(cfg.resolved_k_aux)
    if cfg.aux_relu:
        acts = acts.relu()
    reconstruction = acts.decode().to(inputs.x.dtype)
    target = inputs.residual
    if cfg.aux_bias != "none":
        reconstruction = reconstruction + inputs.b_dec
    if cfg.aux_bias == "matched":
        target = target + inputs.to_output_units(inputs.b_dec.detach())
    error = inputs.to_output_units(reconstruction) - target
    return error.square().sum(dim=-1).mean()
