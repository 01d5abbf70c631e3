"""What several seeds say: means, spreads, and whether one case is better than another.

``is_better`` is the one rule. The answers of a report, the bold in its tables and the order of
their rows all follow from it.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from math import sqrt
from statistics import mean, stdev

from scipy.special import stdtrit

from sae_lens_auxk.compare.schema import (
    ACROSS_SEEDS,
    EffectOfGroup,
    EffectOverSeeds,
    Group,
    MeanAndStd,
    Metric,
    Numbers,
    Pair,
    Run,
)

MIN_SEEDS = 3
"""Fewer tell nothing apart."""
MIN_LATENTS = 30
"""Nor do shares that rest on fewer latents."""
MAX_L0_RATIO = 1.1
"""Nor are SAEs compared whose L0 differ by more."""
CONFIDENCE = 0.95
Case = tuple[str, str, float | None]


def case_of(run: Run) -> Case:
    """What the seeds of a case have in common: its name, its architecture and its k."""
    return run["case"], run["architecture"], run["k"]


def groups_of(runs: Sequence[Run]) -> Iterator[Group]:
    """Mean and standard deviation over the seeds of each case's finished runs.

    A number that some runs do not have is averaged over the others. The standard deviation is
    that of a sample, so it is None for a single run. Numbers that compare seeds have that of the
    pairs of seeds: a run's mean over its pairs shares all but one with every other run's.
    """
    grouped: dict[Case, list[Run]] = {}
    for run in runs:
        if run["status"] == "finished":
            grouped.setdefault(case_of(run), []).append(run)
    for (case, architecture, k), members in grouped.items():
        yield {
            "case": case,
            "architecture": architecture,
            "k": k,
            "n_seeds": len(members),
            "runs": members,
            **_mean_and_std(members),
            "peeking": {
                latents: _mean_and_std([run for run in members if run["peeking"]], latents)
                for latents in next((run["peeking"] for run in members if run["peeking"]), {})
            },
            **_effect_of(members),
        }


def _mean_and_std(runs: Sequence[Run], latents: str = "") -> MeanAndStd:
    found = _over_seeds([numbers_of(run, latents) for run in runs])
    for key in ACROSS_SEEDS:
        if key in found["std"]:
            found["std"][key] = spread(over_pairs(runs, key, latents))
    return found


def _over_seeds(rows: Sequence[Numbers]) -> MeanAndStd:
    means: Numbers = {}
    stds: Numbers = {}
    for key in dict.fromkeys(key for row in rows for key in row):
        values = [value for row in rows if (value := row.get(key)) is not None]
        means[key] = mean(values) if values else None
        stds[key] = spread(values)
    return {"mean": means, "std": stds}


def _effect_of(runs: Sequence[Run]) -> EffectOfGroup:
    rows: dict[str, list[Numbers]] = {}
    for run in runs:
        for name, numbers in run.get("effect", {}).items():
            rows.setdefault(name, []).append(numbers)
    found: dict[str, EffectOverSeeds] = {}
    for name, of_seeds in rows.items():
        # A seed with too few pairs has nothing else.
        compared = [numbers for numbers in of_seeds if numbers.get("mse_rise") is not None]
        found[name] = {**_over_seeds(compared or of_seeds), "n_seeds": len(compared)}
    return {"effect": found} if found else {}


def numbers_of(measured: Run | Pair, latents: str = "") -> Numbers:
    """The metrics, or the peeking measures of these latents."""
    return (measured["peeking"] or {}).get(latents, {}) if latents else measured["metrics"]


def spread(values: Sequence[float]) -> float | None:
    """The standard deviation of a sample; None of fewer than two values."""
    return stdev(values) if len(values) > 1 else None


def over_pairs(runs: Sequence[Run], key: str, latents: str = "") -> list[float]:
    """A number for each pair of seeds: the mean of what each of the two finds in the other."""
    return _of_pairs(runs, lambda pair: numbers_of(pair, latents).get(key))


def over_pairs_at_age(runs: Sequence[Run], age: int) -> list[float]:
    """As ``over_pairs``, of the share found again of latents of this age."""
    return _of_pairs(runs, lambda pair: pair["found_again_by_age"][age])


def _of_pairs(runs: Sequence[Run], value: Callable[[Pair], float | None]) -> list[float]:
    numbers: list[float] = []
    for a, b in combinations(runs, 2):
        there = a.get("pairs", {}).get(str(b["seed"]))
        back = b.get("pairs", {}).get(str(a["seed"]))
        if there and back and (x := value(there)) is not None and (y := value(back)) is not None:
            numbers.append((x + y) / 2)
    return numbers


# --- the rule --------------------------------------------------------------------------------


def is_better(a: Group, b: Group, key: str, metric: Metric) -> bool:
    """Whether case ``a`` is better than case ``b``.

    It is if the differences of the seeds that both have, ``a`` less ``b``, are beyond chance. No
    case is better on fewer than MIN_LATENTS latents found again, nor on so few that are dead in the
    other only, nor if one has more than MAX_L0_RATIO times the L0 of the other.
    """
    if metric.better is None or not have_one_l0(a, b) or too_few_latents(a, b, key):
        return False
    first, second = (a, b) if metric.better == "up" else (b, a)
    return is_beyond_chance(differences(first, second, key))


def differences(a: Group, b: Group, key: str) -> list[float]:
    """``a`` less ``b`` for each seed that both have."""
    both = [
        {run["seed"]: run for run in group["runs"] if run["metrics"].get(key) is not None}
        for group in (a, b)
    ]
    seeds = [seed for seed in both[0] if seed in both[1]]
    of_a, of_b = (by_seed([of[seed] for seed in seeds], key) for of in both)
    return [x - y for x, y in zip(of_a, of_b, strict=False)]


def is_beyond_chance(differences: Sequence[float]) -> bool:
    """Whether the 95% interval of the mean of three or more differences is above 0.

    Example:
        >>> is_beyond_chance([0.9, 1.0, 1.1]), is_beyond_chance([0.5, 1.0, 1.5])
        (True, False)
    """
    return len(differences) >= MIN_SEEDS and interval(differences)[0] > 0


def interval(differences: Sequence[float]) -> tuple[float, float]:
    """The 95% t interval of the mean of two or more differences."""
    n = len(differences)
    quantile = float(stdtrit(n - 1, (1 + CONFIDENCE) / 2))
    half = quantile * stdev(differences) / sqrt(n)
    return mean(differences) - half, mean(differences) + half


def by_seed(runs: Sequence[Run], key: str, latents: str = "") -> list[float]:
    """A metric's value for each run, of runs that all have it.

    With ``latents``, of one that compares seeds that of "revived" or "never_died" latents.

    Of a metric that compares seeds it is the jackknife's pseudo-value, n times the mean over the
    pairs less n - 1 times that over the pairs without the seed. Their mean is that over the pairs.
    Where pairs that have a seed in common vary together, their spread is what it must be, and
    where they do not, it is too large (Efron and Stein 1981).
    """
    if key not in ACROSS_SEEDS:
        return [run["metrics"][key] or 0.0 for run in runs]
    n, everywhere = len(runs), over_pairs(runs, key, latents)
    if n < MIN_SEEDS or len(everywhere) < n * (n - 1) / 2:
        return []  # results of version 1 with more than three seeds
    without = [mean(over_pairs([r for r in runs if r is not run], key, latents)) for run in runs]
    return [n * mean(everywhere) - (n - 1) * rest for rest in without]


def have_one_l0(a: Group, b: Group) -> bool:
    """Whether their L0 differ by at most a tenth."""
    low, high = sorted(map(_l0, (a, b)))
    return 0 < high <= MAX_L0_RATIO * low


def _l0(group: Group) -> float:
    return group["mean"].get("l0") or 0.0


def too_few_latents(a: Group, b: Group, key: str) -> bool:
    """Whether ``a`` would be better than ``b`` by a share of too few latents."""
    if key == "dead_fraction":
        return n_latents(b, key) - n_latents(a, key) < MIN_LATENTS
    return key == "found_again" and n_latents(a, key) < MIN_LATENTS


def n_latents(group: Group, share: str) -> float:
    """The number that is this share of all latents, in the mean."""
    return (group["mean"].get(share) or 0.0) * group["runs"][0]["sae_config"].get("d_sae", 0)


def of_one_l0(groups: Sequence[Group]) -> list[Group]:
    """Those that can be compared: the most cases of which any two have about the same L0."""
    windows = [
        [other for other in groups if have_one_l0(low, other) and _l0(other) >= _l0(low)]
        for low in groups
    ]
    return max(windows, key=len, default=[])


def in_order(groups: Sequence[Group], key: str, metric: Metric) -> list[Group]:
    """Each stands below all that are better than it; else they keep their order."""
    left, ordered = list(groups), list[Group]()
    while left:
        # Where cases have other seeds, each of those that are left may be worse than one.
        ordered.append(next((g for g in left if not _is_worse(g, left, key, metric)), left[0]))
        left = [group for group in left if group is not ordered[-1]]
    return ordered


def unbeaten(groups: Sequence[Group], key: str, metric: Metric) -> list[Group]:
    """Those that no other of them is better than."""
    return [group for group in groups if not _is_worse(group, groups, key, metric)]


def best_of(groups: Sequence[Group], key: str, metric: Metric) -> Group | None:
    """The best of those that can be compared, if there is one."""
    rivals = of_one_l0([group for group in groups if group["mean"].get(key) is not None])
    return next((group for group in rivals if is_best(group, rivals, key, metric)), None)


def is_best(group: Group, groups: Sequence[Group], key: str, metric: Metric) -> bool:
    """Whether it is better than every other that has about its L0, of one or more."""
    others = [
        other
        for other in groups
        if other is not group and have_one_l0(group, other) and other["mean"].get(key) is not None
    ]
    return bool(others) and all(is_better(group, other, key, metric) for other in others)


def _is_worse(group: Group, groups: Sequence[Group], key: str, metric: Metric) -> bool:
    return any(is_better(other, group, key, metric) for other in groups if other is not group)
