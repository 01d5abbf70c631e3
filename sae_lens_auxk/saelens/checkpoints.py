"""Handle a trained SAE's files as SAELens's runners do, for code that runs without them."""

from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE, TrainingSAE
from safetensors.torch import load_file

from sae_lens_auxk.saelens.names import (
    ACTIVATION_SCALER_CFG_FILENAME,
    ACTIVATION_WHITENING_FILENAME,
    SPARSITY_FILENAME,
    ActivationScaler,
)

ESTIMATED_SCALING = ("expected_average_only_in", "covariance_whitening")
"""Values of ``normalize_activations`` for which the weights need the scaler that training
estimated. Folding it in sets the field to "none"."""


def fold_scaling(sae: TrainingSAE[Any], scaler: ActivationScaler) -> None:
    """Fold an estimated scaling or whitening of the activations into the weights.

    Afterwards the SAE takes and returns activations in the language model's units. The scaler
    is emptied, so that nothing scales twice.
    """
    if scaler.scaling_factor is not None:
        sae.fold_activation_norm_scaling_factor(scaler.scaling_factor)
        scaler.scaling_factor = None
    if (whitening := scaler.whitening) is not None:
        sae.fold_activation_whitening(
            mean=whitening.mean,
            whitening_matrix=whitening.matrix,
            unwhitening_matrix=whitening.inverse_matrix,
        )
        scaler.whitening = None


def fold_scaling_beside(sae: TrainingSAE[Any], checkpoint: Path) -> None:
    """Fold the scaling in a training checkpoint's own files into the weights loaded from it.

    Raises:
        ValueError: see :func:`scaling_beside`.
    """
    fold_scaling(sae, scaling_beside(sae.cfg.normalize_activations, checkpoint))


def scaling_beside(mode: str, checkpoint: Path) -> ActivationScaler:
    """The scaling in a training checkpoint's own files.

    Args:
        mode: the SAE's ``normalize_activations``.
        checkpoint: the checkpoint's folder.

    Raises:
        ValueError: the SAE was trained on scaled activations, and the scaling is missing.
    """
    scaler, file = ActivationScaler(), checkpoint / ACTIVATION_SCALER_CFG_FILENAME
    if file.is_file():
        scaler.load(file)
    whitens = mode == "covariance_whitening"
    found = scaler.whitening if whitens else scaler.scaling_factor
    # SAELens writes the scaler after the weights: an interrupted checkpoint has none.
    if mode in ESTIMATED_SCALING and found is None:
        files = [file.name] + [ACTIVATION_WHITENING_FILENAME] * whitens
        raise ValueError(
            f"{checkpoint} has normalize_activations={mode!r}, but its scaling is missing: there "
            f"must be {' and '.join(files)}. Use a checkpoint that was written completely."
        )
    return scaler


@torch.no_grad()
def open_sae(folder: Path, device: str = "cpu") -> SAE[Any]:
    """Load an SAE and encode a row: what is wrong in its config may show only then."""
    sae = SAE.load_from_disk(folder, device=device)
    sae.encode(sae.W_dec.new_zeros(1, 1, sae.cfg.d_in))
    return sae


def silent_latents(folder: Path) -> int | None:
    """Number of latents that have not fired since the last ``feature_sampling_window`` began.

    None if the folder has no file of firing rates.
    """
    path = folder / SPARSITY_FILENAME
    if not path.is_file():
        return None
    log_sparsity = load_file(path)["sparsity"]
    # SAELens adds 1e-10 to a firing rate before it takes the logarithm.
    return int((log_sparsity <= log_sparsity.new_tensor(1e-10).log10()).sum())
