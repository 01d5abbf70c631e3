"""The tables of a report: every number, residual peeking's, and effects of single latents."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import mean

from sae_lens_auxk.compare.effect import CONTRASTS
from sae_lens_auxk.compare.report.groups import (
    colours,
    columns,
    in_rows,
    label,
    measured,
    number,
    reference_k,
    with_revived,
)
from sae_lens_auxk.compare.schema import EFFECT, PEEKING, Group, Metric, Results
from sae_lens_auxk.compare.seeds import MIN_SEEDS, interval, is_best

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

    caption: str
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
            _count(group["n_seeds"]),
            *(
                Cell(
                    metric.show(*number(group, key)),
                    number(group, key)[0],
                    best=is_best(group, results["groups"], key, metric),
                )
                for key, metric in metrics.items()
            ),
        ]
        for group in _rows(results)
    ]
    labels = [metric.label for metric in metrics.values()]
    head = ["case", "architecture", "k", "seeds", *labels]
    return Table("A row for each case", head, rows, [*metrics.values()])


def _rows(results: Results) -> Iterator[Group]:
    """By k; the groups whose architecture has none stand with those that they are compared with."""
    reference = reference_k(results["groups"])
    ks = {group["k"] for group in results["groups"] if group["k"] is not None}
    for k in sorted(ks) or [None]:
        at_k = [
            group
            for group in results["groups"]
            if group["k"] == k or (group["k"] is None and k == reference)
        ]
        yield from in_rows(at_k, results)


def peeking_table(results: Results) -> Table:
    """A row for each set of revived latents, with the latents that never died in brackets."""
    colour = colours(results)
    groups = with_revived(_rows(results))
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
    caption = "Latents that came back, and in brackets those that never died"
    return Table(caption, ["case", "group", *labels], rows, [*metrics.values()])


def effect_table(results: Results) -> Table:
    """A row for each group of latents, and one for the difference of two whose latents are matched.

    The difference is paired by seed, and needs MIN_SEEDS of them.
    """
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
    rows: list[list[Cell]] = []
    for group, latents, numbers in found:
        case = Cell(label(group, results, with_k=True), colour=colour[group["case"]])
        shown = [
            Cell(metric.show(value, numbers["std"].get(key)), value)
            for key, metric in metrics.items()
            for value in [numbers["mean"].get(key)]
        ]
        rows.append([case, Cell(latents.replace("_", " ")), _count(numbers["n_seeds"]), *shown])
        first = {second: first for first, second in CONTRASTS}.get(latents, "")
        less = {key: _differences(group, first, latents, key) for key in metrics}
        if (n := len(less.get("mse_rise", []))) >= MIN_SEEDS:
            apart = (_difference(metric, less[key]) for key, metric in metrics.items())
            both = f"{first} less {latents}".replace("_", " ")
            rows.append([case, Cell(both), _count(n), *apart])
    labels = [metric.label for metric in metrics.values()]
    caption = (
        "What is lost where a latent is taken out; groups two and two, of like latents, and from "
        f"{MIN_SEEDS} seeds on their difference, paired by seed, with its 95% interval"
    )
    return Table(caption, ["case", "group", "seeds", *labels], rows, [*metrics.values()])


def _differences(group: Group, first: str, second: str, key: str) -> list[float]:
    """``first`` less ``second`` for each seed that has both."""
    effects = [run.get("effect", {}) for run in group["runs"]]
    values = [[effect.get(name, {}).get(key) for name in (first, second)] for effect in effects]
    return [a - b for a, b in values if a is not None and b is not None]


def _difference(metric: Metric, less: Sequence[float]) -> Cell:
    if metric is EFFECT["n_pairs"] or len(less) < MIN_SEEDS:
        return Cell("–")
    text = f"{metric.difference(mean(less))} ({metric.difference(*interval(less))})"
    return Cell(text, mean(less))


def _count(n: int) -> Cell:
    return Cell(str(n), n)


def _against_never_died(
    group: Group, metrics: Mapping[str, Metric], latents: str
) -> Iterator[Cell]:
    never_died = latents.replace("revived", "never_died")
    for key, metric in metrics.items():
        value, spread = number(group, key, latents)
        control, _ = number(group, key, never_died)
        text = metric.show(value, spread)
        yield Cell(text if control is None else f"{text} ({metric.show(control)})", value)
