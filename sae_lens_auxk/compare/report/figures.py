"""The data of a report's figures, not yet drawn."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

from sae_lens_auxk.compare.latents import has_signed_rows
from sae_lens_auxk.compare.report.groups import (
    colours,
    columns,
    compared,
    found_again_by_age,
    in_rows,
    label,
    number,
    one_of_several_k,
)
from sae_lens_auxk.compare.reproducibility import by_chance
from sae_lens_auxk.compare.schema import (
    ACROSS_SEEDS,
    AGES,
    METRICS,
    PEEKING,
    Group,
    Metric,
    Results,
)

FIGURES = (
    "pareto",
    "explained_variance",
    "dead_latents",
    "density",
    "found_again",
    "found_again_by_age",
    "peeking",
)
"""Names of all figures that a report can have."""
MAX_POINTS = 300
MAX_COLUMNS = 4
MAX_LINES = 6
"""More lines in one pair of axes cannot be told apart."""
NO_PANEL = ("n_alive", "n_firing", "n_latents", "firing_rate", "age", *ACROSS_SEEDS)
"""All but the last say which latents a group has; the last have a figure of their own."""


@dataclass(frozen=True)
class Series:
    """One line. ``style`` numbers dash and marker, ``band`` is (x, low, high)."""

    label: str
    colour: str
    x: Sequence[float | None]
    y: Sequence[float | None]
    style: int = 0
    points: bool = False
    steps: bool = False
    filled: bool = True
    x_error: Sequence[float | None] = ()
    y_error: Sequence[float | None] = ()
    band: tuple[Sequence[float], Sequence[float], Sequence[float]] | None = None


@dataclass(frozen=True)
class Panel:
    """One pair of axes, with a legend or with ``categories``.

    y counts the categories from the top down, and x then has a line at 0.
    """

    series: Sequence[Series]
    x_title: str = ""
    y_title: str = ""
    title: str = ""
    categories: Sequence[str] = ()


@dataclass(frozen=True)
class Figure:
    """One panel, or several of the same categories in rows of MAX_COLUMNS."""

    name: str
    title: str
    caption: str
    panels: Sequence[Panel]

    @property
    def n_columns(self) -> int:
        return min(len(self.panels), MAX_COLUMNS)

    @property
    def n_rows(self) -> int:
        return -(-len(self.panels) // MAX_COLUMNS)

    @property
    def height(self) -> float:
        """Height in inches, with room for the names beside the axes or in the legend."""
        if names := self.panels[0].categories:
            return self.n_rows * (0.9 + 0.22 * max(len(names), 3))
        return max(4.0, 1.3 + 0.24 * len(self.panels[0].series))


def figures_of(results: Results) -> list[Figure]:
    """The figures for which there are data.

    Where each case is a line, there are MAX_LINES, those of the table's first rows.
    """
    k = one_of_several_k(results)
    at_k = f" At k {k}." if k else ""
    in_lines = at_k + _left_out(results)
    again = (
        Figure(
            "found_again",
            "Found again: latents that came back (filled) and that never died (hollow)",
            "A direction that other seeds find too is in the data. Means over the alive latents of "
            "a group; bars: standard deviation over pairs of seeds. docs/methods.md says "
            f"what they do not show.{_chance(results)}{at_k}",
            [*_by_group(results, ("found_again", "mean_best_cosine"))],
        ),
        Figure(
            "found_again_by_age",
            "Found again, by the time at which a latent last came alive",
            "Latents that never died belong to the first tenth of training. A latent that came "
            "back late has had less time to learn. Shaded: standard deviation over pairs of "
            f"seeds.{in_lines}",
            [Panel([*_by_age(results)], "share of training", "share found again")],
        ),
    )
    others = (
        _reconstruction(results),
        Figure(
            "dead_latents",
            "Dead latents over training",
            f"Share of latents that are dead; shaded: standard deviation over seeds.{in_lines}",
            [Panel([*_dead(results)], "training samples", "dead fraction")],
        ),
        Figure(
            "density",
            "How often latents fire",
            "Histogram of log10 of the share of held-out samples that a latent fires on, mean over "
            f"seeds; latents that never fire on them are not in it.{in_lines}",
            [Panel([*_density(results)], "log10 of firing rate", "latents")],
        ),
        Figure(
            "peeking",
            "Residual peeking: latents that came back (filled) and that never died (hollow)",
            "What counts is the difference from latents that never died and fire as often. In the "
            "table these are in brackets, and the latents that came back are halved by their age. "
            f"docs/methods.md defines each measure and says where it fails.{at_k}",
            [*_by_group(results, [key for key in PEEKING if key not in NO_PANEL])],
        ),
    )
    # As in the tables: where no true features are known, this is the best evidence.
    made = (
        (*again, *others) if next(iter(columns(results)), "") in ACROSS_SEEDS else (*others, *again)
    )
    return [figure for figure in made if any(panel.series for panel in figure.panels)]


def _in_lines(results: Results) -> list[Group]:
    return in_rows(compared(results), results)[:MAX_LINES]


def _left_out(results: Results) -> str:
    names = [label(group, results) for group in in_rows(compared(results), results)[MAX_LINES:]]
    if not names:
        return ""
    return f" Left out, and in the table: {', '.join(names)}."


def _line(
    group: Group,
    results: Results,
    x: Sequence[float | None],
    y: Sequence[float | None],
    **more: Any,
) -> Series:
    """In the colour of the group's case and the style of its architecture."""
    architectures = list(dict.fromkeys(run["architecture"] for run in results["runs"]))
    style = architectures.index(group["architecture"])
    return Series(label(group, results), colours(results)[group["case"]], x, y, style, **more)


def _reconstruction(results: Results) -> Figure:
    """Explained variance against L0, or by case where all have the same k, and so about one L0."""
    groups = in_rows(results["groups"], results)
    if len({group["k"] for group in groups}) == 1 and groups[0]["k"] is not None:
        return Figure(
            "explained_variance",
            "Explained variance",
            "To the right is better. Bars: standard deviation over seeds.",
            [
                _of_cases(
                    groups,
                    results,
                    METRICS["explained_variance"],
                    "explained_variance",
                    [""],
                )
            ],
        )
    return Figure(
        "pareto",
        "Explained variance against L0",
        f"Up and to the left is better. Bars: standard deviation over seeds.{_left_out(results)}",
        [Panel([*_pareto(results)], "L0: latents that fire on a sample", "explained variance")],
    )


def _pareto(results: Results) -> Iterator[Series]:
    lines = {label(group, results): list[Group]() for group in _in_lines(results)}
    for group in results["groups"]:
        if number(group, "l0")[0] is not None and label(group, results) in lines:
            lines[label(group, results)].append(group)
    for groups in filter(None, lines.values()):
        groups.sort(key=lambda group: group["mean"]["l0"] or 0.0)
        x, x_error = zip(*(number(group, "l0") for group in groups), strict=True)
        y, y_error = zip(*(number(group, "explained_variance") for group in groups), strict=True)
        yield _line(groups[0], results, x, y, points=True, x_error=x_error, y_error=y_error)


def _dead(results: Results) -> Iterator[Series]:
    for group in _in_lines(results):
        runs = [run["history"] for run in group["runs"]]
        values: dict[float, list[float]] = {}
        for history in runs:
            for at, dead in zip(history["samples"], history["dead_fraction"], strict=True):
                if at is not None and dead is not None:
                    values.setdefault(at, []).append(dead)
        x = sorted(at for at, of_runs in values.items() if len(of_runs) == len(runs))
        if not x:
            continue
        x = x[:: -(-len(x) // MAX_POINTS)]
        y = [mean(values[at]) for at in x]
        band = None
        if len(runs) > 1:
            band = _band(x, y, [stdev(values[at]) for at in x])
        yield _line(group, results, x, y, band=band)


def _density(results: Results) -> Iterator[Series]:
    for group in _in_lines(results):
        found = (run["density"] for run in group["runs"])
        densities = [density for density in found if density is not None]
        edges, *others = (density["log10_edges"] for density in densities)
        if any(other != edges for other in others):
            continue
        columns = zip(*(density["counts"] for density in densities), strict=True)
        counts = [mean(column) for column in columns]
        yield _line(group, results, edges, [*counts, counts[-1]], steps=True)


def _by_age(results: Results) -> Iterator[Series]:
    for group in _in_lines(results):
        x: list[float] = []
        y: list[float] = []
        spread: list[float] = []
        for age, (share, std) in enumerate(found_again_by_age(group)):
            if share is not None:
                x.append((age + 0.5) / AGES)
                y.append(share)
                spread.append(std or 0.0)
        if x:
            yield _line(group, results, x, y, points=True, band=_band(x, y, spread))


def _band(
    x: Sequence[float], y: Sequence[float], spread: Sequence[float]
) -> tuple[Sequence[float], Sequence[float], Sequence[float]]:
    """x, and the lower and upper end of a band around shares y."""
    pairs = [(max(v - s, 0.0), min(v + s, 1.0)) for v, s in zip(y, spread, strict=True)]
    return x, [low for low, _ in pairs], [high for _, high in pairs]


def _chance(results: Results) -> str:
    """What random directions would have, at most: as if all latents of the largest were alive."""
    sizes = {
        (sae["d_sae"], sae["d_in"], has_signed_rows(run["architecture"]))
        for run in results["runs"]
        for sae in [run["sae_config"]]
        if run["status"] == "finished"
    }
    shares = [by_chance(*size)["found_again"] for size in sizes]
    chance = max((share for share in shares if share is not None), default=0.0)
    bound = f"At most {100 * chance:.2g}%" if chance >= 1e-4 else "Fewer than 0.01%"
    return f" {bound} of random directions would be found again."


def _by_group(results: Results, keys: Sequence[str]) -> Iterator[Panel]:
    """A panel for each measure of the latents that came back and of those that never died."""
    which = ("never_died", "revived")
    groups = [
        group
        for group in in_rows(compared(results), results)
        if any(number(group, key, latents)[0] is not None for key in keys for latents in which)
    ]
    for key in keys:
        if any(number(group, key, "revived")[0] is not None for group in groups):
            yield _of_cases(groups, results, PEEKING[key], key, which)


def _of_cases(
    groups: Sequence[Group], results: Results, metric: Metric, key: str, latents: Sequence[str]
) -> Panel:
    """A row for each case, with a point, and its spread, for each group of its latents."""
    colour = colours(results)
    names = [label(group, results) for group in groups]
    factor, unit = (100, ", %") if metric.percent else (1, "")
    series = [
        Series(
            name,
            colour[group["case"]],
            [None if value is None else factor * value],
            [row],
            points=True,
            filled=which != "never_died",
            x_error=[None if spread is None else factor * spread],
        )
        for row, (name, group) in enumerate(zip(names, groups, strict=True))
        for which in latents
        for value, spread in [number(group, key, which)]
    ]
    return Panel(series, title=metric.label + unit, categories=names)
