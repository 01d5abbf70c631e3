"""Which latents are compared with which, on SAEs made by hand."""

from typing import Any

import pytest
import torch

from sae_lens_auxk.compare import peeking
from sae_lens_auxk.compare.peeking import MIN_LATENTS, measure_peeking, nearest_in_rate
from tests.compare.test_latents import orthogonal

MEASURES = ("junk_share", "duplicate_share", "features_hurt", "split", "direction_spread",
            "nearest_cosine")  # fmt: skip
GROUPS = {
    f"{which}{part}" for which in ("revived", "never_died") for part in ("", "_young", "_old")
}


def halved(d_sae: int, n_revived: int) -> dict[str, Any]:
    """The first latents were revived, one every 10 samples of 1000, the latest first."""
    revived = torch.arange(d_sae) < n_revived
    alive_since = (900 - 10 * torch.arange(d_sae)) * revived
    return {
        "revived": revived,
        "never_died": ~revived,
        "alive_since": alive_since,
        "training_samples": 1000,
    }


def test_the_numbers_of_each_group() -> None:
    """12 latents came back: 6 lately, each minus a feature, and 6 early, which are features."""
    decoder = torch.eye(24)
    decoder[:6] *= -1
    sae, x = orthogonal(decoder, torch.eye(24))
    # The revived fire on 100 rows, and so do 6 of those that never died. One of each is silent.
    firings = torch.tensor([100] * 18 + [250] * 6)
    firings[[5, 23]] = 0
    firings[11] = 400  # which the 5 that fire on 250 are nearest to
    x = (1 + torch.rand(24, 2000)) * (torch.arange(2000) < firings[:, None])
    x = torch.stack([row[torch.randperm(2000)] for row in x], dim=1)
    given = halved(24, 12)
    acts = list(x.split(500))
    measured = measure_peeking(sae, x, true_features=torch.eye(24), feature_acts=acts, **given)
    assert set(measured) == GROUPS
    counts = [(measured[name]["n_alive"], measured[name]["n_firing"]) for name in
              ("revived", "never_died")]  # fmt: skip
    assert counts == [(12, 11), (12, 11)]
    came_back = [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 11]
    for name, members, junk, age in (
        ("revived", came_back, 5 / 11, 0.16),
        ("revived_young", came_back[:5], 1, 0.12),
        ("revived_old", came_back[5:], 0, 0.18),
    ):
        group = measured[name]
        assert group["n_latents"] == len(members)
        assert group["junk_share"] == pytest.approx(junk)
        assert group["age"] == pytest.approx(age)
        assert group["firing_rate"] == pytest.approx(0.05)
        control = measured[name.replace("revived", "never_died")]
        # Of the 6 that fire on 100 rows the first 5, for all that fire as often.
        assert control["n_latents"] == (5 if name == "revived_young" else 10)
        assert control["firing_rate"] == pytest.approx(0.05)
        assert control["junk_share"] == 0
        assert control["age"] == 1
        assert ("n_alive" in control) == (name == "revived")
        for key in MEASURES:
            assert control[key] is not None


def test_the_nearest_in_firing_rate_on_a_log_scale() -> None:
    firings = torch.tensor([10.0, 1.0, 4.0, 25.0, 30.0, 100.0, 101.0, 102.0])
    offered = torch.arange(1, 8)
    chosen = nearest_in_rate(firings, torch.tensor([0]), offered)
    assert chosen.tolist() == [2, 3, 4, 1, 5]  # 4 and 25 are both 2.5 times away
    twice = nearest_in_rate(firings, torch.tensor([0, 7]), offered)
    assert twice[5:].tolist() == [7, 6, 5, 4, 3]


def test_split_is_averaged_over_latents_that_are_not_junk() -> None:
    decoder = torch.eye(24)
    decoder[:3] *= -1
    sae, x = orthogonal(decoder, torch.eye(24))
    acts = [x + 0.3 * torch.randn_like(x)]
    measured = measure_peeking(
        sae, x, true_features=torch.eye(24), feature_acts=acts, **halved(24, 12)
    )
    assert measured["revived"]["split"] is not None
    decoder[3:8] *= -1  # 8 of 12 are junk now, which leaves fewer than MIN_LATENTS
    measured = measure_peeking(
        sae, x, true_features=torch.eye(24), feature_acts=acts, **halved(24, 12)
    )
    assert measured["revived"]["junk_share"] == pytest.approx(8 / 12)
    assert measured["revived"]["split"] is None
    decoder[:12] = -torch.eye(24)[:12]
    measured = measure_peeking(
        sae, x, true_features=torch.eye(24), feature_acts=acts, **halved(24, 12)
    )
    assert measured["revived"]["split"] is None
    assert measured["revived"]["junk_share"] == 1


def test_too_few_latents_have_no_numbers() -> None:
    sae, x = orthogonal(torch.eye(16))
    few = measure_peeking(sae, x, true_features=torch.eye(16), **halved(16, MIN_LATENTS - 1))
    group = few["revived"]
    assert group.pop("n_alive") == group.pop("n_firing") == MIN_LATENTS - 1
    assert group.pop("n_latents") == MIN_LATENTS - 1
    assert set(group.values()) == {None}
    none = measure_peeking(sae, x, **halved(16, 0))
    assert none["revived"]["n_latents"] == none["never_died"]["n_latents"] == 0
    assert none["never_died"]["n_alive"] == none["never_died"]["n_firing"] == 16
    assert measure_peeking(sae, x, **halved(16, 16))["never_died"]["n_latents"] == 0


def test_an_sae_of_which_nothing_fires() -> None:
    sae, x = orthogonal(torch.eye(16))
    measured = measure_peeking(sae, -x, true_features=torch.eye(16), **halved(16, 8))
    assert measured["revived"]["n_alive"] == 8
    assert measured["revived"]["n_firing"] == measured["revived"]["n_latents"] == 0


def test_a_large_group_is_drawn_from_by_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peeking, "MAX_LATENTS", 6)
    sae, x = orthogonal(torch.eye(24) + 0.3 * torch.rand(24, 24))
    results = [measure_peeking(sae, x, **halved(24, 16), seed=seed) for seed in (0, 0, 1)]
    assert results[0]["revived"]["n_latents"] == 6
    assert results[0]["revived"]["n_firing"] == 16
    assert results[0] == results[1] != results[2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"revived": torch.ones(15).bool()}, r"revived is .* must be torch.bool \(16,\)"),
        ({"never_died": torch.ones(16)}, "never_died is torch.float32"),
        ({"alive_since": torch.ones(16)}, "alive_since is torch.float32 .* must be torch.int64"),
        ({"true_features": torch.eye(15)}, r"true_features is \(15, 15\), must be \(n, 16\)"),
        ({"x": torch.ones(2000, 15)}, r"x is \(2000, 15\)"),
        ({"feature_acts": [torch.ones(7, 16)]}, "feature_acts has 7 rows, must have those of x"),
    ],
)
def test_wrong_shapes_are_refused(change: dict[str, Any], message: str) -> None:
    sae, x = orthogonal(torch.eye(16))
    with pytest.raises(ValueError, match=message):
        measure_peeking(sae, **{"x": x, **halved(16, 8), **change})
