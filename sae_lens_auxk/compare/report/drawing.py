"""Figures drawn by matplotlib: as PNG, and as SVG that stands in a page."""

import re
from collections.abc import Sequence
from html import escape
from io import StringIO
from typing import Any, BinaryIO

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Image

from sae_lens_auxk.compare.report.figures import Figure, Series

DASHES = ("-", "--", ":", "-.")
MARKERS = "osD^X"
"""An architecture has one of each."""
LEGEND_CHARACTERS = 34
LINES = "#808080"
"""Seen on a light page and on a dark one. Black text is left to the page, which colours it."""
LOOK: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": LINES,
    "axes.grid": True,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "figure.dpi": 120,
    "font.sans-serif": ["DejaVu Sans"],
    "grid.alpha": 0.3,
    "grid.color": LINES,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",
    "text.parse_math": False,  # the name of a case may have dollars
    "xtick.color": LINES,
    "xtick.labelcolor": "black",
    "ytick.color": LINES,
    "ytick.labelcolor": "black",
}


def png(figure: Figure, file: BinaryIO) -> None:
    with rc_context(LOOK):
        image = drawn(figure)
        image.suptitle(figure.title, x=0.01, ha="left", fontsize=11, weight="bold")
        image.savefig(file, format="png")


def svg(figure: Figure) -> str:
    """An element for a page that has this figure once, and shows its title."""
    file = StringIO()
    with rc_context({**LOOK, "svg.hashsalt": figure.name}):
        none = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        drawn(figure).savefig(file, format="svg", transparent=True, metadata=none)
    attributes, _, content = file.getvalue().partition("<svg ")[2].partition(">")
    title, description = f"{figure.name}-title", f"{figure.name}-description"
    return (
        f'<svg role="img" aria-labelledby="{title} {description}" {attributes}>'
        f'<title id="{title}">{escape(figure.title)}</title>'
        f'<desc id="{description}">{escape(figure.caption)}</desc>'
        # matplotlib numbers its groups from 1 in each figure. Nothing refers to them.
        + re.sub(r'<g id="[^"]+">', "<g>", content)
    )


def drawn(figure: Figure) -> Image:
    image = Image(figsize=(11, figure.height))
    grid = image.subplots(figure.n_rows, figure.n_columns, squeeze=False, sharey=True)
    for axes, panel in zip(grid.flat, figure.panels, strict=False):
        lines = {series.label: _draw(axes, series) for series in panel.series}
        axes.set_title(panel.title)
        axes.set_xlabel(panel.x_title)
        axes.set_ylabel(panel.y_title)
        if names := [_short(name) for name in panel.categories]:
            axes.set_yticks(range(len(names)), names)
            axes.set_ylim(len(names) - 0.4, -0.6)
            # An axis that leaves out 0 makes results of small differences.
            axes.axvline(0, color=LINES, linewidth=1)
        else:
            labels = [_short(label) for label in lines]
            image.legend([*lines.values()], labels, loc="outside right upper")
    for axes in grid.flat[len(figure.panels) :]:
        axes.set_visible(False)
    return image


def _draw(axes: Axes, series: Series) -> Any:
    if series.band:
        axes.fill_between(*series.band, color=series.colour, alpha=0.15, linewidth=0)
    line, *_ = axes.errorbar(
        _numbers(series.x),
        _numbers(series.y),
        xerr=_numbers(series.x_error) if any(series.x_error) else None,
        yerr=_numbers(series.y_error) if any(series.y_error) else None,
        color=series.colour,
        linestyle=DASHES[series.style % len(DASHES)],
        marker=MARKERS[series.style % len(MARKERS)] if series.points else None,
        markerfacecolor=series.colour if series.filled else "none",
        drawstyle="steps-post" if series.steps else "default",
        elinewidth=1,
    )
    return line


def _numbers(values: Sequence[float | None]) -> Any:
    """NaN for None. It is not drawn."""
    return np.asarray(values, float)


def _short(text: str) -> str:
    """Short enough to leave room for the data; the ends are what tells long names apart."""
    if len(text) <= LEGEND_CHARACTERS:
        return text
    half = LEGEND_CHARACTERS // 2
    return f"{text[:half].rstrip()}…{text[-half + 1 :].lstrip()}"
