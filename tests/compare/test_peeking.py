from typing import Any

import pytest
import torch
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig

from benchmarks.peeking import planted
from sae_lens_auxk.compare import peeking
from sae_lens_auxk.compare.peeking import MIN_FIRINGS, MIN_LATENTS, measure_peeking
from tests.helpers import ARCHITECTURES, build_sae

FREE = ("error_auc", "rows_hurt", "latents_hurt", "near_duplicate_share")
TRUTH = ("junk_share", "duplicate_share", "features_hurt")
SETTINGS = [(a, s) for a in ("jumprelu", "topk") for s in ("rotation", "shrinkage")]


def orthogonal(
    decoder: torch.Tensor, encoder: torch.Tensor | None = None, n: int = 2000
) -> tuple[StandardSAE, torch.Tensor]:
    """A ReLU SAE of these latents, and rows with each of d_in orthogonal features at 10%."""
    d_sae, d_in = decoder.shape
    sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=d_sae))
    sae.W_dec.data, sae.W_enc.data = decoder, (decoder if encoder is None else encoder).T.clone()
    x = (torch.rand(n, d_in) < 0.1).float() * (1 + torch.rand(n, d_in))
    return sae, x


def split(d_sae: int, n_revived: int) -> dict[str, torch.Tensor]:
    revived = torch.arange(d_sae) < n_revived
    return {"revived": revived, "never_died": ~revived}


def test_latents_that_are_orthogonal_features() -> None:
    sae, x = orthogonal(torch.eye(16))
    measured = measure_peeking(sae, x, true_features=torch.eye(16), **split(16, 8))
    rate = (x > 0).float().mean().item()
    for group in measured.values():
        assert group["n_latents"] == 8
        assert group["firing_rate"] == pytest.approx(rate, abs=0.02)
        for key in ("junk_share", "duplicate_share", "near_duplicate_share"):
            assert group[key] == 0
        # Alone in its direction, and there only where it fires: one of each.
        assert group["features_hurt"] == pytest.approx(1, abs=0.01)
        assert group["latents_hurt"] == pytest.approx(1, abs=0.01)
        assert group["rows_hurt"] == pytest.approx(rate, abs=0.02)


def test_a_latent_that_is_four_features_hurts_four() -> None:
    decoder = torch.eye(32)
    for i in range(6):
        decoder[i] = 0
        decoder[i, 4 * i : 4 * i + 4] = 0.5
    sae, x = orthogonal(decoder[:, :24], n=4000)
    sae.W_dec.data[24:] = torch.eye(24)[:8]
    sae.W_enc.data = sae.W_dec.data.T.clone()
    features = torch.eye(24)
    measured = measure_peeking(sae, x, true_features=features, **split(32, 6))["revived"]
    assert measured["features_hurt"] == pytest.approx(4, abs=0.2)
    assert measured["junk_share"] == 0  # the cosine is exactly one half


def test_minus_a_feature_is_junk() -> None:
    decoder = torch.cat([-torch.eye(8), torch.eye(8)])
    sae, x = orthogonal(decoder, torch.eye(8).repeat(2, 1))
    measured = measure_peeking(sae, x, true_features=torch.eye(8), **split(16, 8))
    assert measured["revived"]["junk_share"] == 1
    assert measured["never_died"]["junk_share"] == 0
    assert measured["revived"]["duplicate_share"] == 0


def test_of_two_latents_with_a_feature_the_better_is_no_duplicate() -> None:
    worse = torch.eye(16)[:8] + 0.5 * torch.eye(16)[8:]
    sae, x = orthogonal(torch.cat([worse, torch.eye(16)[:8]]))
    measured = measure_peeking(sae, x, true_features=torch.eye(16), **split(16, 8))
    assert measured["revived"]["duplicate_share"] == 1
    assert measured["never_died"]["duplicate_share"] == 0
    for group in measured.values():  # without the features, both are near another
        assert group["near_duplicate_share"] == 1


def test_error_auc_is_the_probability_of_a_worse_row() -> None:
    sae, x = orthogonal(torch.eye(16)[:10], n=1000)
    group = measure_peeking(sae, x, **split(10, 5))["revived"]
    acts = sae.encode(x)
    error = (x - sae.decode(acts)).pow(2).sum(1) / (x - x.mean(0)).pow(2).sum(1)
    rank = error.argsort().argsort()  # as the measure does, ties by position
    expected = []
    for latent in range(5):
        fires = acts[:, latent] > 0
        expected.append((rank[fires][:, None] > rank[~fires]).float().mean().item())
    assert group["error_auc"] == pytest.approx(sum(expected) / 5, abs=1e-4)


@pytest.mark.parametrize(("architecture", "spoilt_by"), SETTINGS)
@pytest.mark.parametrize("seed", [0, 1])
def test_planted_correctors_differ_from_planted_features(
    architecture: str, spoilt_by: str, seed: int
) -> None:
    worlds = planted(architecture, spoilt_by, seed)
    feature = worlds["feature"].measure()
    for key in ("rows_hurt", "features_hurt"):
        assert feature["revived"][key] == pytest.approx(feature["never_died"][key], rel=0.25)
    for kind in ("mean error", "error direction"):
        corrector = worlds[kind].measure()
        # latents_hurt is mutual: the corrected latents of the control lose the corrector too.
        for key, factor in (("rows_hurt", 2.0), ("latents_hurt", 1.2), ("features_hurt", 1.2)):
            value: Any = corrector["revived"][key]
            assert value > factor * feature["revived"][key]  # type: ignore[operator]
            assert value > factor * corrector["never_died"][key]  # type: ignore[operator]
        not_new = corrector["revived"]["junk_share"] + corrector["revived"]["duplicate_share"]  # type: ignore[operator]
        # A principal direction of shrunk features may be one of them, held better than before.
        assert not_new >= 0.75
    assert feature["revived"]["junk_share"] == feature["revived"]["duplicate_share"] == 0
    assert worlds["duplicate"].measure()["revived"]["duplicate_share"] == 1
    assert worlds["duplicate"].measure()["revived"]["near_duplicate_share"] == 1
    assert worlds["random"].measure()["revived"]["junk_share"] == 1


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_with_its_own_reconstruction(architecture: str) -> None:
    """The error is the SAE's own: latents that do nothing but b_dec leave the rest as it is."""
    sae = build_sae(architecture, d_in=8, d_sae=24).eval()
    x = torch.randn(500, 8)
    data = peeking._Data(sae, x)
    torch.testing.assert_close(data.e, (x - sae.decode(sae.encode(x))).detach())
    measured = measure_peeking(sae, x, true_features=torch.randn(50, 8), **split(24, 12))
    for group in measured.values():
        if group["n_latents"] >= MIN_LATENTS:  # type: ignore[operator]
            assert all(value is not None for value in group.values())


@pytest.mark.parametrize("normalize", ["layer_norm", "constant_norm_rescale"])
def test_run_time_normalisation(normalize: str) -> None:
    sae = build_sae("auxk-topk", normalize_activations=normalize)
    x = torch.randn(300, 8) * 5
    data = peeking._Data(sae, x)
    error = (x - sae.decode(sae.encode(x))).detach()
    scale = x.std(1) if normalize == "layer_norm" else x.norm(dim=1) / 8**0.5
    torch.testing.assert_close(data.e * scale[:, None], error, rtol=1e-3, atol=1e-3)


def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    worlds = planted("jumprelu", "rotation", 0)
    whole = worlds["mean error"].measure()
    monkeypatch.setattr(peeking, "ROWS_PER_CHUNK", 999)
    for name, group in worlds["mean error"].measure().items():
        assert group == pytest.approx(whole[name], rel=1e-3)


def test_too_few_latents_have_no_numbers() -> None:
    sae, x = orthogonal(torch.eye(16))
    measured = measure_peeking(sae, x, true_features=torch.eye(16), **split(16, MIN_LATENTS - 1))
    assert measured["revived"] == {
        "n_latents": MIN_LATENTS - 1, **dict.fromkeys(("firing_rate", *FREE, *TRUTH))
    }  # fmt: skip
    none = measure_peeking(sae, x, **split(16, 0))
    assert none["revived"]["n_latents"] == none["never_died"]["n_latents"] == 0
    assert measure_peeking(sae, x, **split(16, 16))["never_died"]["n_latents"] == 0


def test_latents_that_hardly_fire_are_not_measured() -> None:
    sae, x = orthogonal(torch.eye(16))
    x[MIN_FIRINGS - 1 :, 0] = 0
    x[:, 1] = 0
    assert measure_peeking(sae, x, **split(16, 8))["revived"]["n_latents"] == 6


def test_an_sae_of_which_nothing_fires_has_no_numbers() -> None:
    sae, x = orthogonal(torch.eye(16), encoder=torch.zeros(16, 16))
    measured = measure_peeking(sae, x, true_features=torch.eye(16), **split(16, 8))
    none = {"n_latents": 0, **dict.fromkeys(("firing_rate", *FREE, *TRUTH))}
    assert measured == {"revived": none, "never_died": none}


def test_without_true_features_only_their_measures_are_missing() -> None:
    sae, x = orthogonal(torch.eye(16))
    group = measure_peeking(sae, x, **split(16, 8))["revived"]
    assert all(group[key] is None for key in TRUTH)
    assert all(group[key] is not None for key in FREE)


def test_a_large_group_is_drawn_from_by_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peeking, "MAX_LATENTS", 6)
    sae, x = orthogonal(torch.eye(24) + 0.3 * torch.rand(24, 24))
    results = [measure_peeking(sae, x, **split(24, 16), seed=seed) for seed in (0, 0, 1)]
    assert results[0]["revived"]["n_latents"] == 6
    assert results[0] == results[1] != results[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"revived": torch.ones(15, dtype=torch.bool)},
            r"revived is .* must be torch.bool \(16,\)",
        ),
        ({"never_died": torch.ones(16)}, "never_died is torch.float32"),
        ({"true_features": torch.eye(15)}, r"true_features is \(15, 15\), must be \(n, 16\)"),
        ({"x": torch.ones(2000, 15)}, r"x is \(2000, 15\)"),
    ],
)
def test_wrong_shapes_are_refused(change: dict[str, Any], message: str) -> None:
    sae, x = orthogonal(torch.eye(16))
    with pytest.raises(ValueError, match=message):
        measure_peeking(sae, **{"x": x, **split(16, 8), **change})
