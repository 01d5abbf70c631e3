"""Metrics against values worked out by hand or by SAELens."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sae_lens.saes.sae import SAE
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from sae_lens.synthetic import eval_sae_on_synthetic_data

from sae_lens_auxk.compare import peeking
from sae_lens_auxk.compare.cases import cases_of
from sae_lens_auxk.compare.measure import coverage, density_histogram, measure, reconstruction
from sae_lens_auxk.compare.sources import HELD_OUT_SEED, SyntheticPass, source_of
from sae_lens_auxk.compare.train import TrainingLog, build_sae
from tests.compare.conftest import tiny
from tests.helpers import build_sae as random_sae


class ByHand:
    """Eight latents, each with an axis of its own, and 200 samples on which one of them fires.

    A sample is 2 along an axis and is reconstructed as 1. At the end of training, latents 2 and 7
    are dead, and 0 and 1 were dead before. Latent 2 fires again on the held-out samples, and 7
    does not.
    """

    def __init__(self) -> None:
        firings = torch.tensor([50, 25, 30, 40, 40, 10, 5, 0])
        self.sae = StandardSAE(StandardSAEConfig(d_in=8, d_sae=8))
        self.sae.W_enc.data = torch.eye(8)
        self.sae.W_dec.data = torch.eye(8) / 2
        self.x = 2 * torch.eye(8).repeat_interleave(firings, dim=0)
        features = torch.eye(8)[[0, 1, 2, 3, 7]]
        features[3, 4] = 1.0  # between latents 3 and 4, at a cosine of 0.71 with both
        self.log = TrainingLog(
            dead_after=100,
            tokens_since_fired=torch.tensor([0, 99, 100, 0, 0, 0, 0, 250]),
            ever_dead=torch.tensor([True, True, True, False, False, False, False, True]),
            alive_since=torch.tensor([600, 700, 0, 0, 0, 0, 0, 0]),
            n_samples=1000,
            step_seconds=[0.004, 0.002, 0.030],
            step_bytes=[2**30, 3 * 2**29],
        )
        self.data: Any = SimpleNamespace(
            trainer_config=SimpleNamespace(train_batch_size_samples=64),
            true_features=features,
            held_out_features=list((self.x @ features.T).split(64)),
            metrics=lambda _: {"f1": 0.25},
        )

    def measure(self) -> Any:
        return measure(self.sae, self.data, self.x, self.log)


def test_every_number_of_a_run_by_hand() -> None:
    measured = ByHand().measure()
    assert measured["metrics"] == pytest.approx(
        {
            # The mean sample is (50, 25, 30, 40, 40, 10, 5, 0) / 100, whose square is 0.735.
            "explained_variance": 1 - 1 / (4 - 0.735),
            "l0": 1.0,
            "mse": 1.0,
            "dead_fraction": 2 / 8,
            "dense_latents": 5 / 7,  # on more than 20 samples, of the seven that fire
            "f1": 0.25,
            "features_covered": 4 / 5,  # the last one is that of a silent latent
            "junk_share": 2 / 7,
            "ms_per_step": 4.0,
            "peak_memory_gib": 1.5,
        },
        rel=1e-6,
    )
    edges, counts = measured["density"]["log10_edges"], measured["density"]["counts"]
    filled = {edge: n for edge, n in zip(edges[:-1], counts, strict=True) if n}
    assert filled == {-1.75: 1, -1.5: 1, -1.0: 2, -0.75: 3}
    assert measured["silent_latents"] == 1
    # 0 and 1 came back, 2 and 7 did not; 3 to 6 never died.
    groups = measured["peeking"]
    assert {name: (groups[name]["n_alive"], groups[name]["n_firing"]) for name in
            ("revived", "never_died")} == {"revived": (2, 2), "never_died": (4, 4)}  # fmt: skip


def test_peeking_is_measured_of_the_right_latents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peeking, "MIN_LATENTS", 1)
    groups = ByHand().measure()["peeking"]
    # The first true features are those of latents 0 and 1, the fourth lies between 3 and 4.
    for name, age, junk in (
        ("revived", 0.3, 0), ("revived_young", 0.3, 0), ("revived_old", 0.4, 0),
        ("never_died", 1, 0.5),
    ):  # fmt: skip
        assert groups[name]["age"] == pytest.approx(age)
        assert groups[name]["junk_share"] == junk
    assert groups["revived"]["split"] == pytest.approx(0, abs=1e-4)


def test_peeking_is_measured_without_the_true_features() -> None:
    by_hand = ByHand()
    by_hand.data.true_features, by_hand.data.held_out_features = None, []
    assert by_hand.measure()["peeking"]["revived"]["n_alive"] == 2


def test_memory_and_truth_are_left_out_where_there_are_none() -> None:
    by_hand = ByHand()
    by_hand.log.step_bytes = []
    by_hand.data.true_features, by_hand.data.held_out_features = None, []
    missing = {"peak_memory_gib", "features_covered", "junk_share"}
    assert not missing & set(by_hand.measure()["metrics"])


def test_a_metric_without_a_row_in_the_table_is_refused() -> None:
    by_hand = ByHand()
    by_hand.data.metrics = lambda _: {"novelty": 1.0}
    with pytest.raises(ValueError, match="'novelty' is not in the table: add a row to METRICS"):
        by_hand.measure()


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
