"""AuxK: the dead latents nearest to firing reconstruct the residual of the live ones."""

from typing import Any

import torch

from sae_lens_auxk.losses.record import AuxLossInputs
from sae_lens_auxk.losses.registry import register_aux_loss


@register_aux_loss(
    "auxk",
    default_coefficient=1 / 32,
    uses_k_aux=True,
    sync_free=True,
    capturable=True,
    shardable=True,
)
def auxk(inputs: AuxLossInputs, cfg: Any) -> torch.Tensor:
    """``mean_b || sum_{i in T_b} h_bi W_i + bias - r_b ||^2``.

    ``T_b``: the ``min(k_aux, |D|)`` dead latents with the largest ``h_b``. The bias is what
    ``cfg.aux_bias`` says. Its gradient reaches the parameters of the selected dead latents
    and ``b_dec``, never a live latent.

    ``cfg.aux_normalize``: times ``V(x) / V(target)``, a constant, where ``V(y)`` is ``mean_b ||
    y_b - mean_b y_b ||^2`` and the target is ``r``, with the constant ``b`` where the bias is
    "matched". 0 where ``V(target)`` is 0, as in a batch of one row. ``V(r)`` falls as the
    reconstruction gets better, so that the loss counts ``1 / FVU`` times as much: 4 times where the
    SAE explains 75% of the variance, 22 times where it explains 95.5%.

    Source: Gao et al. 2024, "Scaling and evaluating sparse autoencoders", appendix A.2, and their
    published code (openai/sparse_autoencoder, ``main`` in train.py and ``normalized_mse`` in
    kernels.py), which is ``aux_bias="matched"``, ``aux_relu=True`` and ``aux_normalize=True``. It
    divides the main loss by ``V(x)`` and this one by ``V(target)``; SAELens's main loss is not
    divided, hence ``V(x)`` here. Deviation from that code: ``V(x)`` is computed on the batch, not
    on a sample taken before training.

    Deviation from SAELens and sparsify: no factor ``min(|D| / k_aux, 1)``. AbsTopK: ``T_b`` has the
    latents with the largest ``|h_b|``, which keep their signs, as in SAELens's own loss;
    ``cfg.aux_relu`` would drop the negative ones.
    """
    acts = inputs.nearest_dead(cfg.resolved_k_aux)
    if cfg.aux_relu:
        acts = acts.map(torch.relu)
    reconstruction = acts.decode().to(inputs.x.dtype)
    target = inputs.residual
    if cfg.aux_bias != "none":
        reconstruction = reconstruction + inputs.b_dec
    if cfg.aux_bias == "matched":
        target = target + inputs.to_output_units(inputs.b_dec.detach())
    error = inputs.to_output_units(reconstruction) - target
    loss = error.square().sum(dim=-1).mean()
    if cfg.aux_normalize:
        variance = _variance(target)
        loss = loss * (_variance(inputs.x) / variance).where(variance > 0, 0)
    return loss


def _variance(y: torch.Tensor) -> torch.Tensor:
    """() the mean squared distance of the rows of ``y`` (B, d_in) from their mean."""
    return (y - y.mean(dim=0)).square().sum(dim=-1).mean()
