"""What all parts of a report share: metrics, which groups are compared, their names and colours.

A group is an entry of ``groups`` in results.json. A spread is the sample standard deviation over
seeds; with one seed there is none, and none is shown.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low
from typing import Any

Group = Mapping[str, Any]

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#777777", "#8c6d1f")
"""Okabe and Ito's colours, which colour-blind people tell apart, with grey and brown for their
black and yellow: yellow is hard to see on white. More cases get them darkened, then lightened."""


@dataclass(frozen=True)
class Metric:
    """How a number is called and written; ``best`` is min, max or None where neither is."""

    label: str
    digits: int
    percent: bool = False
    best: Any = None

    def show(self, value: float | None, spread: float | None = None) -> str:
        """``0.123 ± 0.004``, or a dash for None."""
        if value is None:
            return "–"
        factor, unit = (100, "%") if self.percent else (1, "")
        text = f"{factor * value:.{self.digits}f}"
        if spread is not None:
            text += f" ± {factor * spread:.{self.digits}f}"
        return text + unit


METRICS = {
    "dead_fraction": Metric("dead", 1, percent=True, best=min),
    "explained_variance": Metric("EV", 3, best=max),
    "l0": Metric("L0", 1),
    "ce_loss_recovered": Metric("CE recovered", 3, best=max),
    "f1": Metric("F1", 3, best=max),
    "mcc": Metric("MCC", 3),
    "precision": Metric("precision", 3),
    "recall": Metric("recall", 3),
    "uniqueness": Metric("unique", 3),
    "features_covered": Metric("covered", 1, percent=True),
    "junk_share": Metric("junk", 1, percent=True),
    "dense_latents": Metric("dense", 1, percent=True),
    "mse": Metric("MSE", 3),
    "ms_per_step": Metric("ms/step", 1),
    "peak_memory_gib": Metric("GiB", 2),
}
"""The columns of the main table, those first that answer "which one"."""

PEEKING = {
    "junk_share": Metric("junk", 1, percent=True, best=min),
    "duplicate_share": Metric("duplicates", 1, percent=True),
    "features_hurt": Metric("features hurt", 2),
    "rows_hurt": Metric("rows hurt", 3, best=min),
    "latents_hurt": Metric("latents hurt", 2),
    "near_duplicate_share": Metric("near duplicates", 1, percent=True),
    "error_auc": Metric("error AUC", 3),
}
"""``sae_lens_auxk.compare.peeking``'s measures, of which docs/peeking.md is about."""


def number(group: Group, key: str, latents: str = "") -> tuple[float | None, float | None]:
    """Mean and spread of a metric, or of a peeking measure of "revived" or "never_died" latents."""
    numbers = group["peeking"].get(latents, {}) if latents else group
    return numbers.get("mean", {}).get(key), numbers.get("std", {}).get(key)


def measured(
    groups: Sequence[Group], metrics: Mapping[str, Metric], latents: str = ""
) -> dict[str, Metric]:
    """Those of the metrics that any of the groups has."""
    return {
        key: metric
        for key, metric in metrics.items()
        if any(number(group, key, latents)[0] is not None for group in groups)
    }


def with_revived(groups: Iterable[Group]) -> list[Group]:
    """The groups that have revived latents."""
    return [group for group in groups if number(group, "n_latents", "revived")[0]]


def reference_k(groups: Iterable[Group]) -> int | None:
    """The k that most groups have, of several the middle one. Cases are compared at one k."""
    counts = Counter(group["k"] for group in groups if group["k"] is not None)
    most = max(counts.values(), default=0)
    return median_low(k for k, count in counts.items() if count == most) if counts else None


def compared(results: Mapping[str, Any]) -> list[Group]:
    """The groups at the reference k, and those whose architecture has no k."""
    k = reference_k(results["groups"])
    return [group for group in results["groups"] if group["k"] in (k, None)]


def one_of_several_k(results: Mapping[str, Any]) -> int | None:
    """The reference k, if there are others that are left out of a comparison."""
    several = len({group["k"] for group in results["groups"]} - {None}) > 1
    return reference_k(results["groups"]) if several else None


def label(group: Group, results: Mapping[str, Any], with_k: bool = False) -> str:
    """The case, with the architecture where the case has several, and k if asked for."""
    several = {g["architecture"] for g in results["groups"] if g["case"] == group["case"]}
    parts = [group["case"]]
    if len(several) > 1:
        parts.append(group["architecture"].removeprefix("auxk-"))
    if with_k and group["k"] is not None:
        parts.append(f"k {group['k']}")
    return ", ".join(parts)


def colours(results: Mapping[str, Any]) -> dict[str, str]:
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
