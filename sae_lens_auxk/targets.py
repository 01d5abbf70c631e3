"""The reconstruction targets of a batch, and their residual."""

from typing import NamedTuple

import torch


class Targets(NamedTuple):
    """Targets of one batch, detached, in at least float32.

    Attributes:
        x: (B, d_in) what the decoder's output is compared with. Under ``normalize_activations=
            "layer_norm"`` each row's mean is subtracted, as it is from the decoder's output.
        residual: (B, d_in) ``x`` minus the reconstruction.
        scale: (B, 1) factor from the decoder's output to the units of ``x``, or None. Only the two
            run-time modes of ``normalize_activations`` have one; the others change the data before
            the SAE sees it.
    """

    x: torch.Tensor
    residual: torch.Tensor
    scale: torch.Tensor | None


@torch.no_grad()
def targets_of(
    sae_in: torch.Tensor, sae_out: torch.Tensor, normalize_activations: str, dtype: torch.dtype
) -> Targets:
    """The targets of a step.

    Args:
        sae_in: (B, ...) with d_in entries a row.
        sae_out: the reconstruction, of the same shape.
        normalize_activations: the SAE's.
        dtype: of the result.
    """
    x = sae_in.flatten(1).to(dtype)
    residual = x - sae_out.flatten(1)
    if normalize_activations == "layer_norm":
        return Targets(x - x.mean(dim=-1, keepdim=True), residual, x.std(dim=-1, keepdim=True))
    if normalize_activations == "constant_norm_rescale":
        return Targets(x, residual, x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5)
    return Targets(x, residual, None)
