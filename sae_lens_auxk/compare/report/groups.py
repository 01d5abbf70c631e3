"""What all parts of a report share: which groups are compared, their names and colours.

A spread is the sample standard deviation over seeds. With one seed there is none, and none is
shown.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, median_low, stdev

from sae_lens_auxk.compare.schema import AGES, METRICS, Group, Metric, Results, Run

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#777777", "#8c6d1f")
"""Okabe and Ito's colours, which colour-blind people tell apart, with grey and brown for their
black and yellow: yellow is hard to see on white. More cases get them darkened, then lightened."""

ACROSS_SEEDS = ("found_again", "mean_best_cosine", "matched_cosine")
"""The metrics, of a whole SAE and of a group of latents, that compare a run with other seeds."""
Number = tuple[float | None, float | None]
"""A mean and its spread."""


def number(group: Group, key: str, latents: str = "") -> Number:
    """Mean and spread of a metric, or of a peeking measure of "revived" or "never_died" latents."""
    numbers = group["peeking"].get(latents, {}) if latents else group
    return numbers.get("mean", {}).get(key), numbers.get("std", {}).get(key)


def finished_runs(results: Results, group: Group) -> list[Run]:
    """The runs of a group, one for each seed, that finished."""
    key = (group["case"], group["architecture"], group["k"])
    return [
        run
        for run in results["runs"]
        if run["status"] == "finished" and (run["case"], run["architecture"], run["k"]) == key
    ]


def found_again_by_age(results: Results, group: Group) -> list[Number]:
    """AGES shares found again, by the part of training in which latents last came alive."""
    runs = [run.get("found_again_by_age") for run in finished_runs(results, group)]
    numbers: list[Number] = []
    for age in range(AGES):
        shares = [run[age] for run in runs if run]
        known = [share for share in shares if share is not None]
        spread = stdev(known) if len(known) > 1 else None
        numbers.append((mean(known) if known else None, spread))
    return numbers


def measured(
    groups: Sequence[Group], metrics: Mapping[str, Metric], latents: str = ""
) -> dict[str, Metric]:
    """The metrics that at least one group has."""
    return {
        key: metric
        for key, metric in metrics.items()
        if any(number(group, key, latents)[0] is not None for group in groups)
    }


def columns(results: Results) -> dict[str, Metric]:
    """The metrics of a whole SAE that a group has, in the order in which they are shown.

    Where no true features are known, reproducibility is the best evidence, and comes first.
    """
    metrics = measured(results["groups"], METRICS)
    first = () if "f1" in metrics else ACROSS_SEEDS
    return {key: metrics[key] for key in dict.fromkeys((*first, *metrics)) if key in metrics}


def are_level(a: Number, b: Number) -> bool:
    """Whether two numbers differ by no more than their spreads together."""
    return abs((a[0] or 0.0) - (b[0] or 0.0)) <= (a[1] or 0.0) + (b[1] or 0.0)


def is_best(group: Group, key: str, metric: Metric, results: Results) -> bool:
    """Whether a group is better than every other with its k, and level with none."""
    own = number(group, key)
    if metric.better is None or own[0] is None:
        return False
    # Two seeds are one pair, whose numbers have no spread worth the name.
    if key in ACROSS_SEEDS and group["n_seeds"] == 2:
        return False
    others = [
        number(other, key)
        for other in results["groups"]
        if other is not group and other["k"] == group["k"]
    ]
    known = [other for other in others if other[0] is not None]
    sign = 1 if metric.better == "up" else -1
    return bool(known) and all(
        sign * (own[0] - (other[0] or 0.0)) > 0 and not are_level(own, other) for other in known
    )


def with_revived(groups: Iterable[Group]) -> list[Group]:
    """The groups that have revived latents."""
    return [group for group in groups if number(group, "n_latents", "revived")[0]]


def reference_k(groups: Iterable[Group]) -> float | None:
    """The k at which cases are compared: that of most groups, or the middle one of several."""
    counts = Counter(group["k"] for group in groups if group["k"] is not None)
    most = max(counts.values(), default=0)
    return median_low(k for k, count in counts.items() if count == most) if counts else None


def compared(results: Results) -> list[Group]:
    """The groups at the reference k, and those whose architecture has no k."""
    k = reference_k(results["groups"])
    return [group for group in results["groups"] if group["k"] in (k, None)]


def one_of_several_k(results: Results) -> float | None:
    """The reference k, if a comparison leaves out groups with another k."""
    several = len({group["k"] for group in results["groups"]} - {None}) > 1
    return reference_k(results["groups"]) if several else None


def label(group: Group, results: Results, with_k: bool = False) -> str:
    """The case, with its architecture if the case has several, and k if asked for."""
    several = {g["architecture"] for g in results["groups"] if g["case"] == group["case"]}
    parts = [group["case"]]
    if len(several) > 1:
        parts.append(group["architecture"].removeprefix("auxk-"))
    if with_k and group["k"] is not None:
        parts.append(f"k {group['k']}")
    return ", ".join(parts)


def colours(results: Results) -> dict[str, str]:
    """A colour for each case, in the order of the runs, so that it never depends on a result."""
    cases = dict.fromkeys(run["case"] for run in results["runs"])
    return {
        case: _shade(PALETTE[i % len(PALETTE)], i // len(PALETTE)) for i, case in enumerate(cases)
    }


def _shade(colour: str, turn: int) -> str:
    """The colour itself, then darker, then lighter, and again."""
    target, share = ((0, 0.0), (0, 0.45), (255, 0.5))[turn % 3]
    channels = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return "#" + "".join(f"{round(c + (target - c) * share):02x}" for c in channels)
