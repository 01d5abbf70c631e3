from pathlib import Path

import torch
from safetensors.torch import save_file

from sae_lens_auxk.saved_sae import silent_latents


def test_silent_latents_are_those_that_never_fired(tmp_path: Path) -> None:
    assert silent_latents(tmp_path) is None
    rates = torch.tensor([0.0, 1e-9, 0.5, 0.0, 1.0])
    # As SAELens's trainer writes it.
    save_file({"sparsity": torch.log10(rates + 1e-10)}, tmp_path / "sparsity.safetensors")
    assert silent_latents(tmp_path) == 2
