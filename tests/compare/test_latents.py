"""The measures of single latents on SAEs made by hand."""

import pytest
import torch
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig

from sae_lens_auxk.compare import latents as module
from sae_lens_auxk.compare.latents import count_firings, measure_latents
from studies.peeking.planted import auc, planted
from tests.helpers import ARCHITECTURES, build_sae

SETTINGS = [(a, s) for a in ("jumprelu", "topk") for s in ("rotation", "shrinkage")]


def orthogonal(
    decoder: torch.Tensor, encoder: torch.Tensor | None = None, n: int = 2000
) -> tuple[StandardSAE, torch.Tensor]:
    """A ReLU SAE of these latents, and rows with each of d_in orthogonal features at 10%."""
    torch.manual_seed(0)
    d_sae, d_in = decoder.shape
    sae = StandardSAE(StandardSAEConfig(d_in=d_in, d_sae=d_sae))
    sae.W_dec.data, sae.W_enc.data = decoder, (decoder if encoder is None else encoder).T.clone()
    x = (torch.rand(n, d_in) < 0.1).float() * (1 + torch.rand(n, d_in))
    return sae, x


def measure(
    sae: StandardSAE, x: torch.Tensor, features: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """All latents that fire. The features are orthogonal, so that x reads their activations."""
    firings = count_firings(sae, x)
    acts = [] if features is None else list((x @ features.T).split(300))
    return measure_latents(sae, x, (firings > 0).nonzero().flatten(), firings, features, acts)


def test_firings_are_counted() -> None:
    sae, x = orthogonal(torch.eye(16), n=5000)
    assert torch.equal(count_firings(sae, x), (x > 0).sum(dim=0).float())


def test_latents_that_are_orthogonal_features() -> None:
    sae, x = orthogonal(torch.eye(16))
    measured = measure(sae, x, torch.eye(16))
    for key in ("junk_share", "duplicate_share", "nearest_cosine"):
        assert measured[key].tolist() == pytest.approx([0] * 16, abs=1e-6)
    assert measured["features_hurt"].tolist() == pytest.approx([1] * 16, abs=0.01)
    assert measured["split"].tolist() == pytest.approx([0] * 16, abs=1e-4)


def test_the_spread_of_a_direction_is_the_participation_ratio_of_its_cosines() -> None:
    torch.manual_seed(0)
    W, x = torch.randn(5, 16), torch.randn(3000, 16) + 7
    x[:, 0] = (torch.rand(3000) < 0.05) * 20.0
    W[0] = torch.eye(16)[0] * 3
    sae, _ = orthogonal(W)
    spread = measure(sae, x)["direction_spread"]
    centred = x - x.mean(dim=0)
    cosine = torch.nn.functional.cosine_similarity(centred[:, None], W[None], dim=-1)
    expected = (cosine**2).sum(0) ** 2 / (cosine**4).sum(0) / 3000
    torch.testing.assert_close(spread, expected)
    # A Gaussian's, which is 1/3 where d_in is large.
    x[:, 0] = torch.randn(3000)
    assert measure(sae, x)["direction_spread"].tolist() == pytest.approx([18 / 48] * 5, abs=0.02)


def test_the_nearest_latent_must_be_another_and_alive() -> None:
    decoder = torch.eye(8)
    decoder[1] = torch.tensor([0.6, 0.8, 0, 0, 0, 0, 0, 0])
    decoder[2] = decoder[0]
    encoder = torch.eye(8)
    encoder[2] = -1.0  # never fires
    sae, x = orthogonal(decoder, encoder)
    measured = measure(sae, x)["nearest_cosine"]
    assert measured.tolist() == pytest.approx([0.6, 0.6, 0, 0, 0, 0, 0], abs=1e-6)


def test_a_latent_that_is_four_features_hurts_four() -> None:
    decoder = torch.eye(32)
    for i in range(6):
        decoder[i] = 0
        decoder[i, 4 * i : 4 * i + 4] = 0.5
    sae, x = orthogonal(decoder[:, :24], n=4000)
    sae.W_dec.data[24:] = torch.eye(24)[:8]
    sae.W_enc.data = sae.W_dec.data.T.clone()
    measured = measure(sae, x, torch.eye(24))
    assert measured["features_hurt"][:6].tolist() == pytest.approx([4] * 6, abs=0.4)
    assert measured["junk_share"].sum() == 0  # the cosine is exactly one half


def test_a_latent_that_fires_once_is_measured() -> None:
    sae, x = orthogonal(torch.eye(16))
    x[1:, 0] = 0
    x[0, 0] = 1.5
    measured = measure(sae, x, torch.eye(16))
    assert measured["features_hurt"][0] == pytest.approx(1, abs=0.01)
    assert measured["junk_share"][0] == 0


def test_minus_a_feature_is_junk() -> None:
    decoder = torch.cat([-torch.eye(8), torch.eye(8)])
    sae, x = orthogonal(decoder, torch.eye(8).repeat(2, 1))
    measured = measure(sae, x, torch.eye(8))
    assert measured["junk_share"].tolist() == [1] * 8 + [0] * 8
    assert measured["duplicate_share"].sum() == 0
    assert measured["split"][:8].isnan().all()


def test_of_two_latents_with_a_feature_the_worse_is_the_duplicate() -> None:
    worse = torch.eye(16)[:8] + 0.5 * torch.eye(16)[8:]
    sae, x = orthogonal(torch.cat([worse, torch.eye(16)[:8]]))
    measured = measure(sae, x, torch.eye(16))
    assert measured["duplicate_share"].tolist() == [1] * 8 + [0] * 8
    assert measured["nearest_cosine"].tolist() == pytest.approx([0.8**0.5] * 16, abs=1e-5)


def test_a_feature_that_two_latents_share_is_split() -> None:
    """Latent 0 is silent where feature 1 is there, and latent 16 holds both features then."""
    both = torch.eye(16)[:1] + torch.eye(16)[1:2]
    encoder = torch.cat([torch.eye(16), both])
    encoder[0, 1] = -10.0
    sae, x = orthogonal(torch.cat([torch.eye(16), both]), encoder)
    x[:, 1] = (torch.rand(2000) < 0.5) * 1.0
    sae.b_enc.data[16] = -1.0
    split = measure(sae, x, torch.eye(16))["split"]
    assert split[0] > 0.1
    assert split[2:16].max() < 0.01


def test_without_true_features_or_their_activations_some_measures_are_missing() -> None:
    sae, x = orthogonal(torch.eye(16))
    firings = count_firings(sae, x)
    latents = torch.arange(4)
    free = {"direction_spread", "nearest_cosine"}
    assert set(measure_latents(sae, x, latents, firings)) == free
    with_features = measure_latents(sae, x, latents, firings, torch.eye(16))
    assert set(with_features) == free | {"junk_share", "duplicate_share", "features_hurt"}
    assert set(measure(sae, x, torch.eye(16))) == {*with_features, "split"}


def test_a_few_latents_get_the_numbers_that_they_have_among_all() -> None:
    world = planted("jumprelu", "shrinkage", 0)["mean error"]
    firings = count_firings(world.sae, world.x)
    alive = (firings > 0).nonzero().flatten()
    measured, _ = world.measure()
    few = measure_latents(
        world.sae, world.x, alive[::7], firings, world.true_features, [world.feature_acts]
    )
    for name, values in few.items():
        torch.testing.assert_close(
            values, measured[name][::7], rtol=1e-3, atol=1e-4, equal_nan=True
        )


@pytest.mark.parametrize("normalize", ["layer_norm", "constant_norm_rescale"])
def test_the_rows_are_those_that_the_sae_reconstructs(normalize: str) -> None:
    sae = build_sae("auxk-topk", normalize_activations=normalize).eval()
    x = torch.randn(300, 8) * 5 + 3
    seen = sae.process_sae_in(x)
    plain = build_sae("auxk-topk").eval()
    plain.load_state_dict(sae.state_dict())
    latents, firings = torch.arange(4), count_firings(sae, x)
    torch.testing.assert_close(
        measure_latents(sae, x, latents, firings)["direction_spread"],
        measure_latents(plain, seen.detach(), latents, firings)["direction_spread"],
    )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_is_measured(architecture: str) -> None:
    sae = build_sae(architecture, d_in=8, d_sae=24).eval()
    x, features = torch.randn(500, 8), torch.randn(50, 8)
    firings = count_firings(sae, x)
    latents = (firings > 0).nonzero().flatten()
    measured = measure_latents(
        sae, x, latents, firings, features, [torch.rand(500, 50).to_sparse()]
    )
    assert all(values.shape == latents.shape for values in measured.values())
    assert all(v.isfinite().all() for name, v in measured.items() if name != "split")


def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    world = planted("jumprelu", "rotation", 0)["mean error"]
    whole, _ = world.measure()
    monkeypatch.setattr(module, "ROWS_PER_CHUNK", 999)
    for name, values in world.measure()[0].items():
        torch.testing.assert_close(values, whole[name], rtol=1e-3, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(("architecture", "spoilt_by"), SETTINGS)
def test_planted_correctors_differ_from_planted_features(architecture: str, spoilt_by: str) -> None:
    worlds = {kind: world.measure() for kind, world in planted(architecture, spoilt_by, 0).items()}

    def ranking(kind: str, key: str) -> float:
        measured, which = worlds[kind]
        found = auc(measured[key], which)
        assert found is not None
        return found

    for key in ("features_hurt", "direction_spread", "nearest_cosine"):
        assert 0.25 < ranking("feature", key) < 0.75
    for kind in ("mean error", "error direction", "random"):
        assert ranking(kind, "direction_spread") > 0.85
        assert ranking(kind, "features_hurt") > 0.7
    for kind in ("mean error", "error direction"):
        assert ranking(kind, "nearest_cosine") > 0.9
        measured, which = worlds[kind]
        not_new = measured["junk_share"][which] + measured["duplicate_share"][which]
        # A principal direction of shrunk features may be one of them, held better than before.
        assert not_new.mean() >= 0.75
    measured, which = worlds["duplicate"]
    assert (measured["duplicate_share"] == which.float()).all()
    measured, which = worlds["random"]
    assert (measured["junk_share"] == which.float()).all()


def test_auc_by_hand() -> None:
    values = torch.tensor([3.0, 1.0, 2.0, 1.0, torch.nan])
    assert auc(values, torch.tensor([True, True, False, False, True])) == 0.625
    assert auc(values, torch.zeros(5, dtype=torch.bool)) is None


def test_the_sign_of_a_row_counts_only_where_activations_are_not_negative(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    decoder = torch.cat([-torch.eye(8), 0.5 * torch.eye(8)])
    sae, x = orthogonal(decoder, torch.eye(8).repeat(2, 1))
    monkeypatch.setattr(sae.cfg, "architecture", lambda: "abstopk")
    measured = measure(sae, x, torch.eye(8))
    assert measured["junk_share"].sum() == 0
    assert measured["nearest_cosine"].tolist() == pytest.approx([1] * 16)
