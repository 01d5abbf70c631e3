"""The files beside a checkpoint's weights: scaling, and firing rates."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sae_lens_auxk.saelens.checkpoints import fold_scaling_beside, silent_latents
from tests.helpers import build_sae


def test_the_scaling_beside_a_checkpoint_is_folded(tmp_path: Path) -> None:
    sae = build_sae("auxk-topk", normalize_activations="expected_average_only_in")
    before = sae.W_enc.detach().clone()
    with pytest.raises(ValueError, match=r"its scaling is missing.* activation_scaler\.json"):
        fold_scaling_beside(sae, tmp_path)
    (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": 3.0}')
    fold_scaling_beside(sae, tmp_path)
    torch.testing.assert_close(sae.W_enc, before * 3)
    assert sae.cfg.normalize_activations == "none"


def test_a_missing_whitening_is_named(tmp_path: Path) -> None:
    sae = build_sae("auxk-topk", normalize_activations="covariance_whitening")
    (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": 3.0}')
    names = r"activation_scaler\.json and activation_whitening\.safetensors"
    with pytest.raises(ValueError, match=f"its scaling is missing.* {names}"):
        fold_scaling_beside(sae, tmp_path)


def test_silent_latents_are_those_that_never_fired(tmp_path: Path) -> None:
    assert silent_latents(tmp_path) is None
    rates = torch.tensor([0.0, 1e-9, 0.5, 0.0, 1.0])
    # As SAELens's trainer writes it.
    save_file({"sparsity": torch.log10(rates + 1e-10)}, tmp_path / "sparsity.safetensors")
    assert silent_latents(tmp_path) == 2
