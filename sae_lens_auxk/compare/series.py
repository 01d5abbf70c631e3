"""What a report says and draws, made from the content of results.json.

Nothing here knows HTML, Markdown, plotly or matplotlib. A spread is the sample standard
deviation over seeds; with one seed there is none, and none is shown.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import mean, median_low, stdev
from typing import Any

Group = Mapping[str, Any]

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#777777", "#8c6d1f")
"""Okabe and Ito's colours, which colour-blind people tell apart, with grey and brown for their
black and yellow: yellow is hard to see on white. More cases get them darkened, then lightened."""
MAX_POINTS = 300


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


@dataclass(frozen=True)
class Series:
    """One line or set of points. ``style`` numbers dash and marker, ``band`` is (x, low, high)."""

    label: str
    colour: str
    x: Sequence[float | None]
    y: Sequence[float | None]
    style: int = 0
    mode: str = "lines"
    steps: bool = False
    filled: bool = True
    in_legend: bool = True
    x_error: Sequence[float | None] = ()
    y_error: Sequence[float | None] = ()
    band: tuple[Sequence[float], Sequence[float], Sequence[float]] | None = None
    hover: Sequence[str] = ()


@dataclass(frozen=True)
class Panel:
    """One pair of axes; with ``categories`` y counts these from the top down."""

    series: Sequence[Series]
    x_title: str
    y_title: str = ""
    title: str = ""
    categories: Sequence[str] = ()
    x_range: tuple[float, float] | None = None


@dataclass(frozen=True)
class Figure:
    """Panels in rows of ``columns``; ``height`` in pixels."""

    name: str
    title: str
    caption: str
    panels: Sequence[Panel]
    height: int = 430
    columns: int = 4
    shared_y: bool = False


@dataclass(frozen=True)
class Cell:
    text: str
    value: float | None = None
    colour: str = ""


@dataclass(frozen=True)
class Table:
    columns: Sequence[str]
    numeric: Sequence[bool]
    rows: Sequence[Sequence[Cell]] = field(default_factory=list)


# --- cases -----------------------------------------------------------------------------------


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


def _styles(results: Mapping[str, Any]) -> dict[str, int]:
    return {
        a: i for i, a in enumerate(dict.fromkeys(run["architecture"] for run in results["runs"]))
    }


def reference_k(groups: Iterable[Group]) -> int | None:
    """The k that most groups have, of several the middle one. Cases are compared at one k."""
    counts = Counter(group["k"] for group in groups if group["k"] is not None)
    most = max(counts.values(), default=0)
    return median_low(k for k, count in counts.items() if count == most) if counts else None


def compared(results: Mapping[str, Any]) -> list[Group]:
    """The groups at the reference k, and those whose architecture has no k."""
    k = reference_k(results["groups"])
    return [group for group in results["groups"] if group["k"] in (k, None)]


def label(group: Group, results: Mapping[str, Any], with_k: bool = False) -> str:
    """The case, with the architecture where the case has several, and k if asked for."""
    several = {g["architecture"] for g in results["groups"] if g["case"] == group["case"]}
    parts = [group["case"]]
    if len(several) > 1:
        parts.append(group["architecture"].removeprefix("auxk-"))
    if with_k and group["k"] is not None:
        parts.append(f"k {group['k']}")
    return ", ".join(parts)


# --- the answer ------------------------------------------------------------------------------


def answer(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(question, answer) lines. Cases whose spreads overlap are level: ``|a - b| <= s_a + s_b``."""
    groups = compared(results)
    if not groups:
        return [("No answer yet", "no run has finished.")]
    names = [label(group, results) for group in groups]
    lines: list[tuple[str, str]] = []
    for question, metric in (
        ("Fewest dead latents", "dead_fraction"),
        ("Best explained variance", "explained_variance"),
        ("Best CE loss recovered", "ce_loss_recovered"),
        ("Best F1 with true features", "f1"),
    ):
        values = [(group["mean"].get(metric), group["std"].get(metric)) for group in groups]
        text = _ranking(names, values, METRICS[metric])
        if text:
            lines.append((question, text))
    return [*lines, _peeking_answer(groups, names)]


def _ranking(
    names: Sequence[str], values: Sequence[tuple[float | None, float | None]], metric: Metric
) -> str:
    known = [(name, v, s) for name, (v, s) in zip(names, values, strict=True) if v is not None]
    if not known:
        return ""
    known.sort(key=lambda entry: entry[1], reverse=metric.best is max)
    first, last = known[0], known[-1]
    level = [e for e in known[1:] if _level(first, e)]
    text = f"{first[0]} ({metric.show(*first[1:])})"
    if level:
        text += f", level with {_list(f'{name} ({metric.show(v, s)})' for name, v, s in level)}"
    if len(known) > 1 + len(level):
        text += (
            f"; {'most' if metric.best is min else 'worst'} {last[0]} ({metric.show(*last[1:])})"
        )
    return text + "."


def _level(a: tuple[str, float, float | None], b: tuple[str, float, float | None]) -> bool:
    return abs(a[1] - b[1]) <= (a[2] or 0.0) + (b[2] or 0.0)


def _list(texts: Iterable[str]) -> str:
    texts = list(texts)
    if len(texts) > 3:
        return f"{', '.join(texts[:2])} and {len(texts) - 2} more"
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if texts[1:] else texts)


def _peeking_answer(groups: Sequence[Group], names: Sequence[str]) -> tuple[str, str]:
    question = "Residual peeking"
    for key, what in (
        ("junk_share", "revived latents that match no true feature"),
        ("rows_hurt", "share of rows that removing a revived latent hurts (noise: 0.333)"),
    ):
        show = PEEKING[key].show
        known: list[tuple[str, float, float | None]] = []
        for name, group in zip(names, groups, strict=True):
            value, spread = _peeking(group, "revived", key)
            if value is not None:
                never = show(*_peeking(group, "never_died", key))
                compared_with = f"; never died {never}" if never != "–" else ""
                said = f"{name} ({show(value, spread)}{compared_with})"
                known.append((said, value, spread))
        if not known:
            continue
        known.sort(key=lambda entry: entry[1])
        least, most = known[0], known[-1]
        if len(known) == 1:
            return question, f"{what}: {least[0]}."
        if _level(least, most):
            return question, f"{what}: all level, {_list(entry[0] for entry in known)}."
        level = sum(_level(least, entry) for entry in known[1:])
        also = f" and {level} level with it" if level else ""
        return question, f"{what}: least {least[0]}{also}; most {most[0]}."
    return question, "nothing to measure it on: too few latents were dead and came back."


def _peeking(group: Group, which: str, key: str) -> tuple[float | None, float | None]:
    measured = (group.get("peeking") or {}).get(which) or {}
    return (measured.get("mean") or {}).get(key), (measured.get("std") or {}).get(key)


def footnote(results: Mapping[str, Any]) -> str:
    """What the numbers are means of, and at which k the answer compares."""
    seeds = sorted({group["n_seeds"] for group in results["groups"]})
    k = reference_k(results["groups"])
    ks = {group["k"] for group in results["groups"]} - {None}
    parts: list[str] = []
    if seeds == [1]:
        parts.append("One seed: no spread is known, and a small lead may be chance")
    elif seeds:
        count = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        parts.append(f"Mean ± sample standard deviation over {count} seeds; level: spreads overlap")
    if len(ks) > 1:
        parts.append(f"the answer compares at k {k}; the table has every k")
    return ". ".join([part[0].upper() + part[1:] for part in parts]) + "." if parts else ""


def troubles(results: Mapping[str, Any]) -> list[str]:
    """Runs that failed, each with its error, and those that are not finished."""
    failed = [
        f"Failed: {run['name']}: {run.get('error') or 'no error was written down'}"
        for run in results["runs"]
        if run["status"] == "failed"
    ]
    names = [run["name"] for run in results["runs"] if run["status"] == "unfinished"]
    return failed + ([f"Not finished: {'; '.join(names)}"] if names else [])


# --- tables ----------------------------------------------------------------------------------


def main_table(results: Mapping[str, Any]) -> Table:
    """A row a group, a column a metric that any group has."""
    groups = results["groups"]
    keys = [key for key in METRICS if any(g["mean"].get(key) is not None for g in groups)]
    colour = colours(results)
    return Table(
        ["case", "architecture", "k", "seeds", *(METRICS[key].label for key in keys)],
        [False, False, *[True] * (2 + len(keys))],
        [
            [
                Cell(group["case"], colour=colour[group["case"]]),
                Cell(group["architecture"]),
                Cell("–" if group["k"] is None else str(group["k"]), group["k"]),
                Cell(str(group["n_seeds"]), group["n_seeds"]),
                *(
                    Cell(METRICS[key].show(value, group["std"].get(key)), value)
                    for key in keys
                    for value in [group["mean"].get(key)]
                ),
            ]
            for group in groups
        ],
    )


def peeking_table(results: Mapping[str, Any]) -> Table:
    """Two rows a group that has revived latents: those, and those that never died."""
    colour = colours(results)
    groups = [g for g in results["groups"] if _n_latents(g)]
    keys = [
        key for key in PEEKING if any(_peeking(g, "revived", key)[0] is not None for g in groups)
    ]
    rate, count = Metric("firing rate", 4), Metric("latents", 0)
    rows = [
        [
            Cell(label(group, results, with_k=True), colour=colour[group["case"]]),
            Cell(which.replace("_", " ")),
            *(
                Cell(metric.show(value, spread), value)
                for key, metric in [
                    ("n_latents", count),
                    ("firing_rate", rate),
                    *((key, PEEKING[key]) for key in keys),
                ]
                for value, spread in [_peeking(group, which, key)]
            ),
        ]
        for group in groups
        for which in ("revived", "never_died")
    ]
    columns = ["case", "group", "latents", "firing rate", *(PEEKING[key].label for key in keys)]
    return Table(columns, [False, False, *[True] * (2 + len(keys))], rows)


def _n_latents(group: Group) -> float:
    return _peeking(group, "revived", "n_latents")[0] or 0


# --- figures ---------------------------------------------------------------------------------


def figures(results: Mapping[str, Any]) -> list[Figure]:
    """The figures that there are data for."""
    made = (_pareto(results), _dead(results), _density(results), _peeking_figure(results))
    return [figure for figure in made if figure is not None]


def _at_k(results: Mapping[str, Any]) -> str:
    ks = {group["k"] for group in results["groups"]} - {None}
    return f" At k {reference_k(results['groups'])}." if len(ks) > 1 else ""


def _finished(results: Mapping[str, Any], group: Group) -> list[Mapping[str, Any]]:
    key = ("case", "architecture", "k")
    return [
        run
        for run in results["runs"]
        if run["status"] == "finished" and all(run[part] == group[part] for part in key)
    ]


def _pareto(results: Mapping[str, Any]) -> Figure | None:
    colour, style = colours(results), _styles(results)
    lines: dict[str, list[Group]] = {}
    for group in results["groups"]:
        if group["mean"].get("l0") is not None:
            lines.setdefault(label(group, results), []).append(group)
    if not lines:
        return None
    series: list[Series] = []
    for name, groups in lines.items():
        groups = sorted(groups, key=lambda group: group["mean"]["l0"])
        series.append(
            Series(
                name,
                colour[groups[0]["case"]],
                [group["mean"]["l0"] for group in groups],
                [group["mean"].get("explained_variance") for group in groups],
                style=style[groups[0]["architecture"]],
                mode="lines+markers",
                x_error=[group["std"].get("l0") for group in groups],
                y_error=[group["std"].get("explained_variance") for group in groups],
                hover=[label(group, results, with_k=True) for group in groups],
            )
        )
    return Figure(
        "pareto",
        "Explained variance against L0",
        "Up and to the left is better. Bars: standard deviation over seeds.",
        [Panel(series, "L0: latents that fire on a sample", "explained variance")],
        height=_height(len(series)),
    )


def _dead(results: Mapping[str, Any]) -> Figure | None:
    colour, style = colours(results), _styles(results)
    series: list[Series] = []
    for group in compared(results):
        runs = [run["history"] for run in _finished(results, group)]
        values: dict[float, list[float]] = {}
        for history in runs:
            for x, y in zip(
                history.get("samples", ()), history.get("dead_fraction", ()), strict=False
            ):
                if y is not None:
                    values.setdefault(x, []).append(y)
        x = sorted(at for at, ys in values.items() if len(ys) == len(runs))
        x = x[:: -(-len(x) // MAX_POINTS)] if x else x
        if not x:
            continue
        y = [mean(values[at]) for at in x]
        band = None
        if len(runs) > 1:
            spread = [stdev(values[at]) for at in x]
            band = (
                x,
                [max(v - s, 0.0) for v, s in zip(y, spread, strict=True)],
                [min(v + s, 1.0) for v, s in zip(y, spread, strict=True)],
            )
        series.append(
            Series(
                label(group, results),
                colour[group["case"]],
                x,
                y,
                style=style[group["architecture"]],
                band=band,
            )
        )
    if not series:
        return None
    return Figure(
        "dead_latents",
        "Dead latents over training",
        "Share of latents that are dead; shaded: standard deviation over seeds." + _at_k(results),
        [Panel(series, "training samples", "dead fraction")],
        height=_height(len(series)),
    )


def _density(results: Mapping[str, Any]) -> Figure | None:
    colour, style = colours(results), _styles(results)
    series: list[Series] = []
    for group in compared(results):
        runs = [run for run in _finished(results, group) if run.get("density")]
        edges = [run["density"]["log10_edges"] for run in runs]
        if not runs or any(other != edges[0] for other in edges):
            continue
        counts = [
            mean(column) for column in zip(*(run["density"]["counts"] for run in runs), strict=True)
        ]
        silent = mean(run.get("silent_latents") or 0 for run in runs)
        series.append(
            Series(
                label(group, results),
                colour[group["case"]],
                edges[0],
                [*counts, counts[-1]],
                style=style[group["architecture"]],
                steps=True,
                hover=[f"{label(group, results)}: {silent:.0f} silent"] * len(edges[0]),
            )
        )
    if not series:
        return None
    return Figure(
        "density",
        "How often latents fire",
        "Histogram of log10 of the share of held-out samples that a latent fires on, mean over "
        "seeds; latents that never fire on them are not in it." + _at_k(results),
        [Panel(series, "log10 of firing rate", "latents")],
        height=_height(len(series)),
    )


def _peeking_figure(results: Mapping[str, Any]) -> Figure | None:
    colour = colours(results)
    groups = [g for g in compared(results) if _n_latents(g)]
    keys = [
        key for key in PEEKING if any(_peeking(g, "revived", key)[0] is not None for g in groups)
    ]
    if not keys:
        return None
    names = [label(group, results) for group in groups]
    panels: list[Panel] = []
    for key in keys:
        percent = 100 if PEEKING[key].percent else 1
        series = [
            Series(
                f"{name}, {which.replace('_', ' ')}",
                colour[group["case"]],
                [value if value is None else percent * value],
                [row],
                mode="markers",
                filled=which == "revived",
                in_legend=False,
                x_error=[spread if spread is None else percent * spread],
            )
            for row, (name, group) in enumerate(zip(names, groups, strict=True))
            for which in ("never_died", "revived")
            for value, spread in [_peeking(group, which, key)]
        ]
        title = PEEKING[key].label + (", %" if PEEKING[key].percent else "")
        panels.append(Panel(series, "", title=title, categories=names))
    rows = -(-len(panels) // 4)
    return Figure(
        "peeking",
        "Residual peeking: latents that came back (filled) and that never died (hollow)",
        "The removal of an error corrector hurts a bit of many features, rows or latents. What "
        "counts is the difference from latents that never died; docs/peeking.md has each "
        "measure's definition and where it fails." + _at_k(results),
        panels,
        height=rows * (90 + 22 * max(len(names), 3)),
        shared_y=True,
    )


def _height(n_lines: int) -> int:
    """Enough for the legend beside the plot."""
    return max(400, 130 + 24 * n_lines)
