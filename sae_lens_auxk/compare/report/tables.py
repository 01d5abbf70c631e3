"""The tables of a report: every number, residual peeking's, and effects of single latents."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from sae_lens_auxk.compare.report.groups import (
    colours,
    columns,
    is_best,
    label,
    measured,
    number,
    with_revived,
)
from sae_lens_auxk.compare.schema import EFFECT, PEEKING, Group, Metric, Results

TEXT_COLUMNS = 2
"""Number of columns at the left that hold text; the others hold numbers."""


@dataclass(frozen=True)
class Cell:
    """A text. Numbers are sorted by ``value``, a case has its ``colour``, the best is bold."""

    text: str
    value: float | None = None
    colour: str = ""
    best: bool = False


@dataclass(frozen=True)
class Table:
    """A table; each row has one cell per column, the last ones for the ``metrics``."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    metrics: Sequence[Metric]


def main_table(results: Results) -> Table:
    """One row per group, and one column for each metric that a group has."""
    colour = colours(results)
    metrics = columns(results)
    rows = [
        [
            Cell(group["case"], colour=colour[group["case"]]),
            Cell(group["architecture"]),
            Cell("–" if group["k"] is None else str(group["k"]), group["k"]),
            Cell(str(group["n_seeds"]), group["n_seeds"]),
            *(
                Cell(
                    metric.show(*number(group, key)),
                    number(group, key)[0],
                    best=is_best(group, key, metric, results),
                )
                for key, metric in metrics.items()
            ),
        ]
        for group in results["groups"]
    ]
    labels = [metric.label for metric in metrics.values()]
    return Table(["case", "architecture", "k", "seeds", *labels], rows, [*metrics.values()])


def peeking_table(results: Results) -> Table:
    """A row for each set of revived latents, with the latents that never died in brackets."""
    colour = colours(results)
    groups = with_revived(results["groups"])
    metrics = measured(groups, PEEKING, "revived")
    rows = [
        [
            Cell(label(group, results, with_k=True), colour=colour[group["case"]]),
            Cell(latents.replace("_", ", ")),
            *_against_never_died(group, metrics, latents),
        ]
        for group in groups
        for latents in ("revived", "revived_young", "revived_old")
        if latents in group["peeking"]
    ]
    labels = [metric.label for metric in metrics.values()]
    return Table(["case", "group", *labels], rows, [*metrics.values()])


def effect_table(results: Results) -> Table:
    """A row for each group of latents, two and two: the latents of both are matched."""
    colour = colours(results)
    found = [
        (group, latents, numbers)
        for group in results["groups"]
        for latents, numbers in group.get("effect", {}).items()
    ]
    metrics = {
        key: metric
        for key, metric in EFFECT.items()
        if any(numbers["mean"].get(key) is not None for *_, numbers in found)
    }
    rows = [
        [
            Cell(label(group, results, with_k=True), colour=colour[group["case"]]),
            Cell(latents.replace("_", " ")),
            *(
                Cell(metric.show(mean, numbers["std"].get(key)), mean)
                for key, metric in metrics.items()
                for mean in [numbers["mean"].get(key)]
            ),
        ]
        for group, latents, numbers in found
    ]
    labels = [metric.label for metric in metrics.values()]
    return Table(["case", "group", *labels], rows, [*metrics.values()])


def _against_never_died(
    group: Group, metrics: Mapping[str, Metric], latents: str
) -> Iterator[Cell]:
    never_died = latents.replace("revived", "never_died")
    for key, metric in metrics.items():
        value, spread = number(group, key, latents)
        control, _ = number(group, key, never_died)
        text = metric.show(value, spread)
        yield Cell(text if control is None else f"{text} ({metric.show(control)})", value)
