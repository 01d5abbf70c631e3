"""Metrics against values worked out by hand or by SAELens."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.saes.sae import SAE
from sae_lens.synthetic import eval_sae_on_synthetic_data

from sae_lens_auxk.compare.cases import cases_of
from sae_lens_auxk.compare.measure import coverage, density_histogram, reconstruction
from sae_lens_auxk.compare.sources import HELD_OUT_SEED, SyntheticPass, source_of
from sae_lens_auxk.compare.train import build_sae
from tests.compare.conftest import tiny
from tests.helpers import build_sae as random_sae


def test_coverage_by_hand() -> None:
    features = torch.eye(4, 5)
    latents = torch.tensor(
        [
            [2.0, 0.0, 0.0, 0.0, 0.0],  # feature 0
            [-1.0, 0.1, 0.0, 0.0, 0.0],  # feature 0 again, sign aside
            [0.0, 1.0, 0.0, 0.0, 1.0],  # feature 1, at 0.71
            [0.0, 0.0, 0.3, 0.0, 1.0],  # feature 2, at 0.29: junk
        ]
    )
    assert coverage(latents, features) == {"features_covered": 0.5, "junk_share": 0.25}
    assert coverage(latents[:0], features) == {"features_covered": 0.0, "junk_share": None}


def test_density_by_hand() -> None:
    density = density_histogram(torch.tensor([0.0, 1e-7, 0.02, 0.02, 0.5, 1.0]))
    counts, edges = density["counts"], density["log10_edges"]
    assert len(counts) == len(edges) - 1
    filled = {(edges[i], edges[i + 1]): counts[i] for i in range(len(counts)) if counts[i]}
    assert filled == {(-6.0, -5.75): 1, (-1.75, -1.5): 2, (-0.5, -0.25): 1, (-0.25, 0.0): 1}
    assert math.log10(0.02) > -1.75


def test_reconstruction_is_saelens_own(tmp_path: Path) -> None:
    """EV, L0 and silent latents are those of SAELens's evaluation of the same samples."""
    comparison = tiny(aux_variant=["none"])
    source = source_of(comparison)
    config = cases_of(comparison)[0].sae_config(comparison, source.d_in)
    training_sae = build_sae(config, seed=1)
    data: Any = source.open(0, {"": training_sae})
    training_sae.save_inference_model(tmp_path)
    sae = SAE.load_from_disk(tmp_path)
    assert isinstance(data, SyntheticPass)
    metrics, rates = reconstruction(sae, data.held_out(), batch_size=32)
    torch.manual_seed(0 + HELD_OUT_SEED)
    expected = eval_sae_on_synthetic_data(
        sae,
        data.model.feature_dict,
        data.model.activation_generator,
        num_samples=256,
        batch_size=32,
    )
    assert metrics["explained_variance"] == pytest.approx(expected.explained_variance, abs=1e-6)
    assert metrics["l0"] == expected.sae_l0
    assert int((rates == 0).sum()) == expected.dead_latents
    own = data.metrics(sae)
    assert own["f1"] == expected.classification.f1_score
    assert (own["mcc"], own["uniqueness"]) == (expected.mcc, expected.uniqueness)


@torch.no_grad()
def test_mse_is_summed_over_the_width() -> None:
    sae = random_sae("auxk-topk")
    x = torch.randn(40, 8)
    metrics, rates = reconstruction(sae, x, batch_size=16)
    acts = sae.encode(x)
    expected = (sae.decode(acts) - x).pow(2).sum(1).mean().item()
    assert metrics["mse"] == pytest.approx(expected, rel=1e-5)
    assert torch.allclose(rates, (acts != 0).float().mean(0))


def test_held_out_samples_are_new_and_always_the_same() -> None:
    comparison = tiny(aux_variant=["none"])
    source = source_of(comparison)
    sae = build_sae(cases_of(comparison)[0].sae_config(comparison, source.d_in), seed=0)
    data = source.open(0, {"": sae})
    trained_on = torch.cat([next(data.batches())[data.hook_name] for _ in range(8)])
    held_out = data.held_out()
    assert held_out.shape == (256, 12)
    assert torch.equal(held_out, data.held_out())
    # Some samples have no feature at all, and are the bias alone.
    assert (held_out != trained_on).any(dim=1).float().mean() > 0.5
