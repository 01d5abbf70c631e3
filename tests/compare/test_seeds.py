"""What several seeds say, on numbers written by hand."""

import random
from itertools import combinations
from statistics import mean, stdev
from typing import Any

import pytest

from sae_lens_auxk.compare.schema import ACROSS_SEEDS, METRICS, Group
from sae_lens_auxk.compare.seeds import (
    best_of,
    by_seed,
    groups_of,
    in_order,
    is_better,
    is_beyond_chance,
    of_one_l0,
    unbeaten,
)

EV = METRICS["explained_variance"]
FOUND = METRICS["found_again"]


def of_seeds(values: Any, key: str = "explained_variance", l0: float = 32, case: str = "a") -> Any:
    """The runs of a case with these values by seed, a list or a mapping."""
    of_seed = values if isinstance(values, dict) else dict(enumerate(values))
    return [
        {"case": case, "architecture": "auxk-topk", "k": 32, "seed": seed, "status": "finished",
         "metrics": {key: value, "l0": l0}, "peeking": None, "sae_config": {"d_sae": 1000}}
        for seed, value in of_seed.items()
    ]  # fmt: skip


def of_pairs(*shares: float, d_sae: int = 1000) -> Any:
    """The runs of three or more seeds that find these shares, by pair: 01, 02, 12."""
    n = next(n for n in range(2, 9) if n * (n - 1) / 2 == len(shares))
    runs = of_seeds([0.0] * n, "found_again")
    for (i, j), share in zip(combinations(range(n), 2), shares, strict=True):
        for run, other in ((runs[i], j), (runs[j], i)):
            pair = {"metrics": {"found_again": share}, "peeking": {}, "found_again_by_age": []}
            run.setdefault("pairs", {})[str(other)] = pair
    for run in runs:
        found = [pair["metrics"]["found_again"] for pair in run["pairs"].values()]
        run["metrics"]["found_again"] = mean(found)
        run["sae_config"]["d_sae"] = d_sae
    return runs


def group(runs: Any) -> Group:
    (only,) = groups_of(runs)
    return only


def ev(*values: float, **more: Any) -> Group:
    return group(of_seeds(values, **more))


def test_the_spread_of_found_again_is_that_of_the_pairs() -> None:
    """The referee's numbers: 0.7 points over the runs' means were 1.5 over the pairs."""
    found = group(of_pairs(0.723, 0.710, 0.693))
    assert found["mean"]["found_again"] == pytest.approx(0.708667)
    assert found["std"]["found_again"] == pytest.approx(0.015044, abs=1e-6)
    assert group(of_pairs(0.723))["std"]["found_again"] is None


def test_a_pair_is_what_both_seeds_find() -> None:
    runs = of_pairs(0.2, 0.4, 0.6)
    runs[0]["pairs"]["1"]["metrics"]["found_again"] = 0.3
    assert group(runs)["std"]["found_again"] == pytest.approx(stdev([0.25, 0.4, 0.6]))


def test_a_seeds_value_is_what_leaving_it_out_changes() -> None:
    ab, ac, bc = 0.30, 0.34, 0.44
    expected = [ab + ac - bc, ab + bc - ac, ac + bc - ab]
    assert by_seed(of_pairs(ab, ac, bc), "found_again") == pytest.approx(expected)
    assert stdev(expected) == pytest.approx(2 * stdev([ab, ac, bc]))
    four = by_seed(of_pairs(0.1, 0.2, 0.3, 0.4, 0.5, 0.6), "found_again")
    assert four[0] == pytest.approx(4 * 0.35 - 3 * mean([0.4, 0.5, 0.6]))
    assert mean(four) == pytest.approx(0.35)
    assert by_seed(of_pairs(0.5), "found_again") == []


@pytest.mark.parametrize("of_a_seed", [True, False], ids=["seeds vary", "pairs vary"])
@pytest.mark.parametrize("n_pairs", [3, 6])
def test_no_more_than_a_fortieth_is_called_better_by_chance(n_pairs: int, of_a_seed: bool) -> None:
    rng = random.Random(0)
    n, trials = {3: 3, 6: 4}[n_pairs], 3000
    found = 0
    for _ in range(trials):
        seeds = [rng.gauss(0, 1) for _ in range(n)]
        shares = [
            seeds[i] + seeds[j] if of_a_seed else rng.gauss(0, 1)
            for i, j in combinations(range(n), 2)
        ]
        found += is_beyond_chance(by_seed(of_pairs(*shares), "found_again"))
    # Exact where seeds vary, and cautious where only pairs do: a deviation is 0.003.
    low, high = (0.016, 0.034) if of_a_seed else (0.0, 0.016)
    assert low < found / trials < high


@pytest.mark.parametrize(
    ("n", "quantile"), [(3, 4.30265), (4, 3.18245), (5, 2.77645)], ids=lambda v: str(v)
)
def test_the_interval_is_students(n: int, quantile: float) -> None:
    """The quantiles are those of a printed table."""
    noise = [(-1.0) ** i * (i < n - n % 2) for i in range(n)]
    noise = [value / stdev(noise) for value in noise]
    limit = quantile / n**0.5
    assert is_beyond_chance([1.001 * limit + value for value in noise])
    assert not is_beyond_chance([0.999 * limit + value for value in noise])
    assert not is_beyond_chance([-10 * limit + value for value in noise])


def test_differences_are_paired_by_seed() -> None:
    """Seeds that are far apart do not hide a difference that each of them has."""
    a, b = ev(0.1, 0.5, 0.9), ev(0.09, 0.49, 0.892)
    assert is_better(a, b, "explained_variance", EV)
    assert not is_better(b, a, "explained_variance", EV)
    assert not is_better(a, ev(0.49, 0.892, 0.09), "explained_variance", EV)
    other_seeds = group(of_seeds({0: 0.09, 1: 0.49, 3: 0.0}))
    assert not is_better(a, other_seeds, "explained_variance", EV)
    shuffled = group(of_seeds({2: 0.892, 0: 0.09, 1: 0.49}))
    assert is_better(a, shuffled, "explained_variance", EV)


def test_a_smaller_share_of_dead_latents_is_better() -> None:
    key = "dead_fraction"
    a, b = ev(0.1, 0.11, 0.1, key=key), ev(0.2, 0.21, 0.2, key=key)
    assert is_better(a, b, key, METRICS[key])
    assert not is_better(b, a, key, METRICS[key])


def test_two_seeds_tell_nothing_apart() -> None:
    assert not is_better(ev(0.9, 0.9), ev(0.1, 0.1), "explained_variance", EV)
    assert is_better(ev(0.9, 0.9, 0.9), ev(0.1, 0.1, 0.1), "explained_variance", EV)


def test_found_again_is_compared_over_the_same_pairs() -> None:
    better = group(of_pairs(0.50, 0.52, 0.54))
    assert is_better(better, group(of_pairs(0.40, 0.42, 0.44)), "found_again", FOUND)
    # As large, but the pairs differ by 0.08, 0.10 and 0.12: a half-width of 0.0994.
    assert is_better(better, group(of_pairs(0.42, 0.42, 0.42)), "found_again", FOUND)
    assert not is_better(better, group(of_pairs(0.425, 0.425, 0.425)), "found_again", FOUND)
    two = of_pairs(0.40, 0.42, 0.44)
    del two[2]["metrics"]["found_again"]
    assert not is_better(better, group(two), "found_again", FOUND)


def test_few_latents_found_again_are_better_than_none() -> None:
    for d_sae, some in ((2900, False), (3100, True)):
        few = group(of_pairs(0.01, 0.01, 0.01, d_sae=d_sae))
        none = group(of_pairs(0.0, 0.0, 0.0, d_sae=d_sae))
        assert is_better(few, none, "found_again", FOUND) == some


def test_a_mean_is_not_lowered_by_a_run_without_the_number() -> None:
    few = group(of_pairs(0.035, 0.035, 0.035) + of_seeds({3: None}, "found_again"))
    assert is_better(few, group(of_pairs(0.0, 0.0, 0.0)), "found_again", FOUND)


@pytest.mark.parametrize(("d_sae", "some"), [(290, False), (310, True)])
def test_few_latents_less_that_are_dead_are_not_better(d_sae: int, some: bool) -> None:
    """faults.md, A5: two to four latents rank anything."""
    key = "dead_fraction"
    a, b = of_seeds([0.2] * 3, key), of_seeds([0.3] * 3, key)
    for run in a + b:
        run["sae_config"]["d_sae"] = d_sae
    assert is_better(group(a), group(b), key, METRICS[key]) == some


def test_other_l0_are_not_compared() -> None:
    for l0, some in ((29.1, True), (35.2, True), (29.0, False), (35.3, False), (0.0, False)):
        other = ev(0.1, 0.1, 0.1, l0=l0)
        assert is_better(ev(0.9, 0.9, 0.9), other, "explained_variance", EV) == some


@pytest.mark.parametrize("key", [*ACROSS_SEEDS[1:], "junk_share", "dense_latents"])
def test_no_case_is_better_by_a_mean_over_latents_that_it_may_kill(key: str) -> None:
    assert METRICS[key].better is None
    assert not is_better(ev(0.9, 0.9, 0.9, key=key), ev(0, 0, 0, key=key), key, METRICS[key])


def test_order_and_best_follow_from_the_rule() -> None:
    key = "explained_variance"
    noisy, low, high = ev(0.0, 0.5, 1.0), ev(0.2, 0.2, 0.2), ev(0.6, 0.61, 0.6)
    assert is_better(high, low, key, EV)
    assert unbeaten([noisy, low, high], key, EV) == [noisy, high]
    assert in_order([low, noisy, high], key, EV) == [noisy, high, low]
    assert best_of([noisy, low, high], key, EV) is None
    assert best_of([low, high], key, EV) is high
    assert best_of([high], key, EV) is None


def test_the_best_is_of_the_l0_that_most_have() -> None:
    key = "explained_variance"
    low, high, sparse = ev(0.2, 0.2, 0.2), ev(0.6, 0.6, 0.6), ev(0.9, 0.9, 0.9, l0=14.5)
    assert of_one_l0([sparse, low, high]) == [low, high]
    assert best_of([sparse, low, high], key, EV) is high
    assert in_order([sparse, low, high], key, EV) == [sparse, high, low]
    # The middle one is near both others, which are not near each other.
    chain = [ev(0.9, 0.9, 0.9, l0=30), ev(0.8, 0.8, 0.8, l0=32.5), ev(0.7, 0.7, 0.7, l0=35)]
    assert of_one_l0(chain) == chain[:2]
    more = [*chain, ev(0.1, 0.1, 0.1, l0=35)]
    assert of_one_l0(more) == more[1:]


def test_a_circle_of_cases_with_other_seeds_ends() -> None:
    """Each is better than the next on the three seeds that both have."""
    a = group(of_seeds({0: 1.0, 1: 1.0, 2: 1.0, 6: 0.0, 7: 0.0, 8: 0.0}))
    b = group(of_seeds({0: 0.0, 1: 0.0, 2: 0.0, 3: 1.0, 4: 1.0, 5: 1.0}))
    c = group(of_seeds({3: 0.0, 4: 0.0, 5: 0.0, 6: 1.0, 7: 1.0, 8: 1.0}))
    assert in_order([a, b, c], "explained_variance", EV) == [a, b, c]
