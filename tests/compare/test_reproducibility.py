"""Reproducibility on decoders and records written by hand, and in whole comparisons."""

from pathlib import Path
from statistics import stdev
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_lens_auxk.compare import reproducibility as module
from sae_lens_auxk.compare import run
from sae_lens_auxk.compare.files import pass_folder, read_pass, read_results
from sae_lens_auxk.compare.reproducibility import (
    Alive,
    best_cosines,
    by_chance,
    matched_cosine,
    reproducibility,
    with_reproducibility,
)
from sae_lens_auxk.compare.run import run_comparison
from sae_lens_auxk.compare.schema import AGES, METRICS, PEEKING
from sae_lens_auxk.compare.seeds import groups_of
from tests.compare.conftest import tiny

METRIC_KEYS = {"found_again", "mean_best_cosine", "matched_cosine"}


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "write_report", lambda results, folder: folder / "report.html")


def near(axis: int, cosine: float) -> torch.Tensor:
    """(16,): unit length, with this cosine to an axis below 8."""
    row = torch.zeros(16)
    row[axis], row[axis + 8] = cosine, (1 - cosine**2) ** 0.5
    return row


# Three seeds. A latent is a feature (an axis) with a cosine, at any length.
SEED_0 = torch.stack([near(axis, 1.0) for axis in range(6)])
SEED_1 = torch.stack([*(2 * near(axis, 0.8) for axis in (1, 0, 2)), near(3, 0.6), near(6, 1.0)])
SEED_2 = torch.stack([near(0, 1.0), near(1, 1.0), -near(2, 1.0), -near(3, 1.0)])


def alive(decoder: torch.Tensor, ever_dead: int = 0, age: Any = 0, n_dead: int = 0) -> Alive:
    """The first ``ever_dead`` latents were dead before; ``n_dead`` others still are."""
    n = len(decoder)
    ages = torch.as_tensor(age).expand(n)
    return Alive(decoder, torch.arange(n) < ever_dead, ages, n + n_dead)


def over_others(*runs: Alive, signed: bool = True) -> list[Any]:
    """Of each run, the means over the others."""
    return [module._over_pairs(pairs) for pairs in reproducibility(runs, signed)]


def test_three_seeds_by_hand() -> None:
    first, second, third = over_others(alive(SEED_0), alive(SEED_1), alive(SEED_2))
    # Seed 0's best cosines are 0.8, 0.8, 0.8, 0.6, 0, 0 with seed 1 and 1, 1, 0, 0, 0, 0 with seed
    # 2, which has axes 2 and 3 negated.
    assert first["metrics"] == pytest.approx(
        {
            "found_again": (3 / 6 + 2 / 6) / 2,
            "mean_best_cosine": (3.0 / 6 + 2 / 6) / 2,
            # Five and four pairs.
            "matched_cosine": (3.0 / 5 + 2 / 4) / 2,
        }
    )
    assert second["metrics"]["found_again"] == pytest.approx((3 / 5 + 2 / 5) / 2)
    assert third["metrics"]["found_again"] == pytest.approx((2 / 4 + 2 / 4) / 2)
    assert third["metrics"]["matched_cosine"] == pytest.approx((2 / 4 + 1.6 / 4) / 2)


def test_latents_of_abstopk_may_be_negated() -> None:
    first, _, third = over_others(alive(SEED_0), alive(SEED_1), alive(SEED_2), signed=False)
    assert first["metrics"]["found_again"] == pytest.approx((3 / 6 + 4 / 6) / 2)
    assert third["metrics"]["found_again"] == pytest.approx((4 / 4 + 3 / 4) / 2)
    assert third["metrics"]["matched_cosine"] == pytest.approx((4 / 4 + 3.0 / 4) / 2)


def test_groups_and_ages_by_hand() -> None:
    axes = torch.eye(16)
    age = torch.tensor([3] * 5 + [9] * 5 + [0] * 2)
    first, _ = over_others(alive(axes[:12], ever_dead=7, age=age), alive(axes[4:]))
    # The latents from 4 on are found again.
    assert first["peeking"]["revived"] == pytest.approx(
        {"found_again": 3 / 7, "mean_best_cosine": 3 / 7}
    )
    assert first["peeking"]["never_died"] == {"found_again": 1.0, "mean_best_cosine": 1.0}
    expected: list[float | None] = [None] * AGES  # two latents are too few
    expected[3], expected[9] = pytest.approx(1 / 5), 1.0
    assert first["found_again_by_age"] == expected
    small, _ = over_others(alive(axes[:6], ever_dead=4), alive(axes))
    assert set(small["peeking"]["revived"].values()) == {None}
    assert small["metrics"]["found_again"] == 1.0


def test_one_feature_twice_is_matched_once() -> None:
    a = torch.eye(4)[[0, 0, 1]]
    b = torch.eye(4)[[0, 1, 2]]
    assert torch.equal(best_cosines(a, b)[0], torch.ones(3))
    assert matched_cosine(a, b) == pytest.approx(2 / 3)
    assert matched_cosine(b, a[1:]) == 1.0


def test_chunks_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.randn(50, 6), torch.randn(40, 6)
    whole = best_cosines(a, b)
    monkeypatch.setattr(module, "ROWS_PER_CHUNK", 7)
    for chunked, expected in zip(best_cosines(a, b), whole, strict=True):
        torch.testing.assert_close(chunked, expected)
    back = best_cosines(b, a)
    torch.testing.assert_close(back[0], whole[1])


def test_many_latents_are_drawn_for_the_matching(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = torch.randn(60, 5), torch.randn(70, 5)
    whole, again = matched_cosine(a, b), matched_cosine(b, a)
    assert whole == pytest.approx(again)
    monkeypatch.setattr(module, "MATCHED", 20)
    drawn = matched_cosine(a, b)
    assert drawn == matched_cosine(a, b) == pytest.approx(matched_cosine(b, a))
    assert whole < drawn < best_cosines(a, b)[0].mean() + 0.1


@pytest.mark.parametrize("signed", [True, False])
def test_chance_is_that_of_random_directions(signed: bool) -> None:
    torch.manual_seed(0)
    best = torch.cat(
        [best_cosines(torch.randn(100, 6), torch.randn(24, 6), signed)[0] for _ in range(200)]
    )
    chance = by_chance(24, 6, signed)
    assert (best > 0.7).float().mean().item() == pytest.approx(chance["found_again"], abs=0.02)
    assert best.mean().item() == pytest.approx(chance["mean_best_cosine"], abs=0.01)
    assert by_chance(36_864, 576)["found_again"] == 0


def record(folder: Path, seed: int, decoder: torch.Tensor, **fields: Any) -> Any:
    """A run whose SAE has this decoder and one dead latent more, and its files."""
    name = f"runs/seed-{seed}/auxk"
    (folder / name).mkdir(parents=True)
    n = len(decoder)
    save_file(
        {"W_dec": torch.cat([torch.ones(1, 16), decoder])},
        folder / name / "sae_weights.safetensors",
    )
    lives = {
        "dead": torch.arange(n + 1) == 0,
        "ever_dead": torch.zeros(n + 1, dtype=torch.bool),
        "alive_since": torch.arange(n + 1) * 100,
    }
    save_file(lives, folder / name / "lives.safetensors")
    return {
        "case": "auxk", "architecture": "auxk-topk", "k": 8, "seed": seed, "status": "finished",
        "folder": name, "training_samples": 1000, "metrics": {"l0": 8.0},
        "peeking": {"revived": {"n_latents": 0}, "never_died": {"n_latents": 3}}, **fields,
    }  # fmt: skip


def test_runs_of_a_case_are_compared_and_left_as_they_were(tmp_path: Path) -> None:
    runs = [record(tmp_path, seed, d) for seed, d in enumerate((SEED_0, SEED_1, SEED_2))]
    measured = with_reproducibility(runs, tmp_path, "cpu")
    pairs = reproducibility([alive(seed, n_dead=1) for seed in (SEED_0, SEED_1, SEED_2)])
    for entry, of_run in zip(measured, pairs, strict=True):
        assert entry["metrics"] == {"l0": 8.0, **module._over_pairs(of_run)["metrics"]}
        metrics = [pair["metrics"] for pair in entry["pairs"].values()]
        assert metrics == [pair["metrics"] for pair in of_run]
    assert [[*entry["pairs"]] for entry in measured] == [["1", "2"], ["0", "2"], ["0", "1"]]
    assert [entry["metrics"] for entry in runs] == [{"l0": 8.0}] * 3
    never = (measured[0]["peeking"] or {})["never_died"]
    assert never["n_latents"] == 3
    assert never["found_again"] == pytest.approx((3 / 6 + 2 / 6) / 2)
    (group,) = groups_of(measured)
    # One more latent of each seed is dead.
    ab, ac, bc = (3 / 7 + 3 / 6) / 2, (2 / 7 + 2 / 5) / 2, (2 / 6 + 2 / 5) / 2
    assert group["mean"]["found_again"] == pytest.approx((ab + ac + bc) / 3)
    assert group["std"]["found_again"] == pytest.approx(stdev((ab, ac, bc)))


@pytest.mark.parametrize(
    "other",
    [
        {"status": "failed", "metrics": {}, "peeking": None},
        {"case": "none"},
        {"architecture": "auxk-batchtopk"},
        {"k": 16},
    ],
    ids=str,
)
def test_what_is_no_other_seed(tmp_path: Path, other: dict[str, Any]) -> None:
    runs = [record(tmp_path, 0, SEED_0), record(tmp_path, 1, SEED_1, **other)]
    assert with_reproducibility(runs, tmp_path, "cpu") == runs


@pytest.mark.parametrize(
    "damage",
    [
        None,
        {"dead": None},
        {"ever_dead": torch.zeros(7)},
        {"alive_since": torch.zeros(6, dtype=torch.int64)},
    ],
    ids=str,
)
def test_a_file_that_cannot_be_read_is_named(
    damage: dict[str, torch.Tensor | None] | None, tmp_path: Path
) -> None:
    runs = [record(tmp_path, seed, d) for seed, d in enumerate((SEED_0, SEED_1))]
    folder = tmp_path / runs[0]["folder"]
    path = folder / "lives.safetensors"
    if damage is None:
        path.write_bytes(b"half of a fi")
    else:
        lives = load_file(path) | damage
        save_file({name: values for name, values in lives.items() if values is not None}, path)
    for read in (
        lambda: with_reproducibility(runs, tmp_path, "cpu"),
        lambda: module.read_lives(folder, 7),
    ):
        with pytest.raises(ValueError, match=f"{folder} cannot be read.* Move {folder.parent} "):
            read()


@pytest.mark.parametrize("gone", ["sae_weights.safetensors", "lives.safetensors"])
def test_runs_without_their_files_are_left_out(tmp_path: Path, gone: str) -> None:
    runs = [record(tmp_path, seed, d) for seed, d in enumerate((SEED_0, SEED_1, SEED_2))]
    (tmp_path / runs[2]["folder"] / gone).unlink()
    *two, last = with_reproducibility(runs, tmp_path, "cpu")
    assert last == runs[2]
    both = over_others(alive(SEED_0, n_dead=1), alive(SEED_1, n_dead=1))
    for entry, found in zip(two, both, strict=True):
        assert entry["metrics"] == {"l0": 8.0, **found["metrics"]}


def test_a_run_whose_latents_are_all_dead_finds_nothing_and_counts(tmp_path: Path) -> None:
    runs = [record(tmp_path, seed, d) for seed, d in enumerate((SEED_0, SEED_0, SEED_1[:0]))]
    first, _, dead = with_reproducibility(runs, tmp_path, "cpu")
    assert dead["metrics"]["found_again"] == 0.0
    assert dead["metrics"]["mean_best_cosine"] is None
    assert first["metrics"]["found_again"] == pytest.approx((6 / 7 + 0) / 2)
    assert first["metrics"]["mean_best_cosine"] == 1.0


def test_killing_latents_does_not_raise_what_is_found_again() -> None:
    """Three of four latents are found again; with the fourth dead they are no more of all."""
    whole, killed = alive(torch.eye(16)[:4]), alive(torch.eye(16)[:3], n_dead=1)
    other = alive(torch.eye(16)[:3])
    assert over_others(whole, other)[0]["metrics"]["found_again"] == 0.75
    assert over_others(killed, other)[0]["metrics"]["found_again"] == 0.75


def test_the_architecture_says_whether_signs_count(tmp_path: Path) -> None:
    runs = [
        record(tmp_path, seed, decoder, architecture="auxk-abstopk")
        for seed, decoder in ((0, SEED_0), (2, SEED_2))
    ]
    measured = with_reproducibility(runs, tmp_path, "cpu")
    assert measured[1]["metrics"]["found_again"] == pytest.approx(4 / 5)


def test_ages_are_tenths_of_the_training(tmp_path: Path) -> None:
    """Latent i of a record came alive at sample 100 i, so each tenth of 1000 has one."""
    (entry, _) = (record(tmp_path, seed, torch.eye(16)[:11]) for seed in (0, 1))
    latents = module.alive_latents(entry, tmp_path, "cpu")
    assert latents is not None
    assert latents.age.tolist() == [1, 2, 3, 4, 5, 6, 7, 8, 9, 9, 9]


@pytest.mark.oldest
def test_a_whole_comparison_and_a_seed_that_is_added(tmp_path: Path) -> None:
    run_comparison(tiny(), tmp_path)
    for entry in read_results(tmp_path)["runs"]:
        assert not METRIC_KEYS & set(entry["metrics"])
        assert "found_again_by_age" not in entry

    run_comparison(tiny(seeds=[0, 1]), tmp_path)
    two = read_results(tmp_path)
    run_comparison(tiny(seeds=[0, 1, 2]), tmp_path)
    three = read_results(tmp_path)
    run_comparison(tiny(seeds=[0, 1, 2]), tmp_path / "at once")
    assert set(METRICS) >= METRIC_KEYS
    assert METRIC_KEYS - {"matched_cosine"} <= set(PEEKING)
    for entry, at_once in zip(
        three["runs"], read_results(tmp_path / "at once")["runs"], strict=True
    ):
        assert set(entry["metrics"]) >= METRIC_KEYS
        assert {"found_again", "mean_best_cosine"} <= set((entry["peeking"] or {})["revived"])
        assert len(entry["found_again_by_age"]) == AGES
        for key in METRIC_KEYS:
            assert entry["metrics"][key] == at_once["metrics"][key]
    changed = [
        entry["metrics"]["mean_best_cosine"] != before["metrics"]["mean_best_cosine"]
        for entry, before in zip(three["runs"], two["runs"], strict=False)
    ]
    assert all(changed)
    assert {"found_again", "matched_cosine"} <= set(three["groups"][0]["mean"])
    assert not METRIC_KEYS & set(read_pass(pass_folder(tmp_path, 0))[0]["metrics"])


def test_seeds_with_models_of_their_own_are_not_compared(tmp_path: Path) -> None:
    run_comparison(tiny(seeds=[0, 1], synthetic_model={"seed": None}), tmp_path)
    assert not METRIC_KEYS & set(read_results(tmp_path)["runs"][0]["metrics"])
