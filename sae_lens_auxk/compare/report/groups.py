"""What all parts of a report share: which groups are compared, their names and colours.

With one seed there is no spread, and none is shown.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, median_low

from sae_lens_auxk.compare.schema import ACROSS_SEEDS, AGES, METRICS, Group, Metric, Results
from sae_lens_auxk.compare.seeds import in_order, over_pairs_at_age, spread

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#777777", "#8c6d1f")
"""Okabe and Ito's colours, which colour-blind people tell apart, with grey and brown for their
black and yellow: yellow is hard to see on white. More cases get them darkened, then lightened."""

QUESTIONS = {
    "f1": "Best F1 with true features",
    "found_again": "Most latents found again by other seeds",
    "ce_loss_recovered": "Best CE loss recovered",
    "explained_variance": "Best explained variance",
    "dead_fraction": "Fewest dead latents",
}
"""What a report answers, the most telling first."""
Number = tuple[float | None, float | None]
"""A mean and its spread."""


def number(group: Group, key: str, latents: str = "") -> Number:
    """Mean and spread of a metric, or of a peeking measure of "revived" or "never_died" latents."""
    numbers = group["peeking"].get(latents, {}) if latents else group
    return numbers.get("mean", {}).get(key), numbers.get("std", {}).get(key)


def found_again_by_age(group: Group) -> list[Number]:
    """AGES shares found again, by the part of training in which latents last came alive."""
    shares = [run["found_again_by_age"] for run in group["runs"] if "found_again_by_age" in run]
    numbers: list[Number] = []
    for age in range(AGES):
        known = [of_run[age] for of_run in shares]
        values = [value for value in known if value is not None]
        pairs = over_pairs_at_age(group["runs"], age)
        numbers.append((mean(values) if values else None, spread(pairs)))
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


def with_revived(groups: Iterable[Group]) -> list[Group]:
    """The groups that have revived latents."""
    return [group for group in groups if number(group, "n_latents", "revived")[0]]


def reference_k(groups: Iterable[Group]) -> float | None:
    """The k at which cases are compared: that of most groups, or the middle one of several."""
    counts = Counter(group["k"] for group in groups if group["k"] is not None)
    most = max(counts.values(), default=0)
    return median_low(k for k, count in counts.items() if count == most) if counts else None


def compared(results: Results, k: float | None = None) -> list[Group]:
    """The groups at a k, if None the reference k, and those whose architecture has no k."""
    k = reference_k(results["groups"]) if k is None else k
    return [group for group in results["groups"] if group["k"] in (k, None)]


def in_rows(groups: Sequence[Group], results: Results) -> list[Group]:
    """In the order of a table's rows: each stands below all that are better at the first question.

    Otherwise they keep the comparison's order.
    """
    metrics = columns(results)
    asked = first_question(metrics)
    return in_order(groups, asked, metrics[asked]) if asked else [*groups]


def first_question(metrics: Mapping[str, Metric]) -> str | None:
    return next((key for key in QUESTIONS if key in metrics), None)


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
