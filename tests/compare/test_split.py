"""The split measure on activations made by hand."""

import pytest
import torch

from sae_lens_auxk.compare.split import split_gain

N = 4000


def r2(y: torch.Tensor, *regressors: torch.Tensor) -> float:
    """Share of the variance of ``y`` (n,) that least squares with a constant explains."""
    design = torch.stack([torch.ones_like(y), *regressors], dim=1).double()
    left = y.double() - design @ torch.linalg.lstsq(design, y[:, None].double()).solution[:, 0]
    return 1 - (left.var() / y.double().var()).item()


def feature() -> torch.Tensor:
    torch.manual_seed(0)
    return (torch.rand(N) < 0.2) * (1 + torch.rand(N))


def noise() -> torch.Tensor:
    return (torch.rand(N) < 0.2).float()


def gain(latents: list[torch.Tensor], target: torch.Tensor, own: int = 0) -> float:
    acts = torch.stack(latents, dim=1)
    batches = zip(acts.split(1001), target[:, None].split(1001), strict=True)
    return split_gain(batches, torch.tensor([own])).item()


def test_a_feature_split_by_its_size_is_explained_by_two_latents_only() -> None:
    y = feature()
    weak, strong = y * (y < 1.5), y * (y >= 1.5)
    half = slice(1, None, 2)
    rows = torch.cat(
        [torch.arange(start, min(start + 1001, N))[half] for start in range(0, N, 1001)]
    )
    better = max(r2(y[rows], weak[rows]), r2(y[rows], strong[rows]))
    for own, other in ((weak, strong), (strong, weak)):
        assert gain([own, noise(), other], y) == pytest.approx(1 - better, abs=1e-4)
        # From the position of the other latent it is the same pair.
        assert gain([noise(), own, other], y, own=2) == pytest.approx(1 - better, abs=1e-4)
    assert 0.3 < 1 - better < 0.5


def test_a_latent_that_holds_its_feature_has_no_gain() -> None:
    y = feature()
    other = noise() * (y > 0)  # fires only where the feature does
    assert gain([y, noise(), other], y) == pytest.approx(0, abs=1e-5)


def test_a_poor_copy_of_a_latent_is_not_a_split() -> None:
    y = feature()
    assert gain([y + 0.5 * noise(), y, noise()], y) == pytest.approx(0, abs=1e-5)


def test_the_partner_is_not_judged_on_the_rows_that_it_was_chosen_on() -> None:
    torch.manual_seed(0)
    y, latents = torch.randn(100), [torch.randn(100) for _ in range(2000)]
    # On its own rows the best of 2000 partners explains a quarter of the noise.
    assert gain_of_short(latents, y) < 0.1


def gain_of_short(latents: list[torch.Tensor], target: torch.Tensor) -> float:
    return split_gain([(torch.stack(latents, 1), target[:, None])], torch.tensor([0])).item()


def test_collinear_and_silent_partners_add_nothing() -> None:
    y = feature()
    blurred = y + noise()
    assert gain([blurred, 2 * blurred, torch.zeros(N)], y) == pytest.approx(0, abs=1e-4)


def test_a_target_that_does_not_vary_has_no_gain() -> None:
    y = feature()
    assert gain([y, noise()], torch.zeros(N)) != gain([y, noise()], torch.zeros(N))  # NaN


def test_each_latent_has_its_own_target() -> None:
    y = feature()
    z = noise() * (1 + torch.rand(N))
    acts = torch.stack([z, y * (y < 1.5), y * (y >= 1.5)], dim=1)
    gains = split_gain([(acts, torch.stack([y, z], dim=1))], torch.tensor([1, 0]))
    assert gains[0] > 0.3
    assert gains[1] == pytest.approx(0, abs=1e-4)


def test_a_suppressor_is_no_part_of_a_feature() -> None:
    """One latent holds the feature and an error, and the other the error: their difference."""
    y = feature()
    error = noise() * (1 + torch.rand(N))
    for own, other in ((y + error, error), (error, y + error)):
        assert gain([own, noise(), other], y) == pytest.approx(0, abs=1e-3)
    acts = torch.stack([y + error, error], dim=1)
    either_sign = split_gain([(acts, y[:, None])], torch.tensor([0]), signed=False)
    assert either_sign > 0.3


def test_two_latents_that_explain_little_alone_can_have_a_gain_of_nearly_one() -> None:
    y = feature()
    z = 20 * torch.rand(N)
    assert gain([y + z, y + 20 - z], y) > 0.9


def test_a_large_mean_costs_no_digits() -> None:
    y = feature()
    weak, strong = y * (y < 1.5), y * (y >= 1.5)
    expected = gain([weak, noise(), strong], y)
    shifted = gain([weak + 1000, noise() + 1000, strong + 1000], y + 1000)
    assert shifted == pytest.approx(expected, abs=2e-3)
