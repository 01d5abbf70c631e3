import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sae_lens_auxk import saved_sae
from sae_lens_auxk.saved_sae import fold_scaling_beside, silent_latents
from tests.helpers import build_sae


class ScalerBefore652:
    """SAELens's scaler before it had whitening."""

    scaling_factor: float | None = None

    def load(self, path: Path) -> None:
        self.scaling_factor = json.loads(path.read_text())["scaling_factor"]


def test_scaling_is_folded_with_a_saelens_without_whitening(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saved_sae, "ActivationScaler", ScalerBefore652)
    sae = build_sae("auxk-topk", normalize_activations="expected_average_only_in")
    before = sae.W_enc.detach().clone()
    with pytest.raises(ValueError, match=r"its scaling is missing.* activation_scaler\.json"):
        fold_scaling_beside(sae, tmp_path)
    (tmp_path / "activation_scaler.json").write_text('{"scaling_factor": 3.0}')
    fold_scaling_beside(sae, tmp_path)
    torch.testing.assert_close(sae.W_enc, before * 3)
    assert sae.cfg.normalize_activations == "none"


def test_silent_latents_are_those_that_never_fired(tmp_path: Path) -> None:
    assert silent_latents(tmp_path) is None
    rates = torch.tensor([0.0, 1e-9, 0.5, 0.0, 1.0])
    # As SAELens's trainer writes it.
    save_file({"sparsity": torch.log10(rates + 1e-10)}, tmp_path / "sparsity.safetensors")
    assert silent_latents(tmp_path) == 2
