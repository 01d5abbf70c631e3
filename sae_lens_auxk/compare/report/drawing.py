"""Figures drawn: by plotly for the page, by matplotlib, which needs no browser, for the images."""

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from matplotlib.figure import Figure as Image
from plotly.colors import hex_to_rgb
from plotly.subplots import make_subplots

from sae_lens_auxk.compare.report.figures import Figure, Series

DASHES = (("solid", "-"), ("dash", "--"), ("dot", ":"), ("dashdot", "-."))
MARKERS = (("circle", "o"), ("square", "s"), ("diamond", "D"), ("triangle-up", "^"), ("x", "X"))
"""Plotly's name and matplotlib's; an architecture has one of each."""
LEGEND_CHARACTERS = 34


def _short(text: str) -> str:
    """Short enough to leave room for the data; the ends are what tells long names apart."""
    if len(text) <= LEGEND_CHARACTERS:
        return text
    half = LEGEND_CHARACTERS // 2
    return f"{text[:half].rstrip()}…{text[-half + 1 :].lstrip()}"


def plotly_figure(figure: Figure) -> go.Figure:
    fig = make_subplots(
        rows=figure.n_rows,
        cols=figure.n_columns,
        shared_yaxes=True,
        subplot_titles=[panel.title for panel in figure.panels],
        horizontal_spacing=0.03,
        vertical_spacing=min(0.5, 80 / figure.height) if figure.n_rows > 1 else 0,
    )
    for index, panel in enumerate(figure.panels):
        row, column = divmod(index, figure.n_columns)
        at: Any = {"row": row + 1, "col": column + 1}
        for series in panel.series:
            for trace in _traces(series):
                fig.add_trace(trace, **at)
        fig.update_xaxes(title_text=panel.x_title, **at)
        fig.update_yaxes(title_text=panel.y_title if column == 0 else None, **at)
        if panel.categories:
            fig.update_yaxes(
                tickvals=list(range(len(panel.categories))),
                ticktext=[_svg_text(_short(name)) for name in panel.categories],
                range=[len(panel.categories) - 0.4, -0.6],
                automargin=True,
                **at,
            )
            # An axis that starts elsewhere makes results of small differences.
            fig.update_xaxes(rangemode="tozero", **at)
    fig.update_layout(
        template="plotly_white",
        height=figure.height,
        margin={"l": 70, "r": 20, "t": 40, "b": 60},
        legend={
            "x": 1.01,
            "y": 1,
            "xanchor": "left",
            "yanchor": "top",
            "font_size": 12,
            # Plotly's gap between groups makes long legends scroll.
            "tracegroupgap": 0,
        },
        font_family="system-ui, sans-serif",
        hoverlabel_namelength=-1,
    )
    return fig


def _traces(series: Series) -> Iterator[go.Scatter]:
    label = _svg_text(series.label)
    shared = {"legendgroup": label, "showlegend": False}
    if series.band:
        x, low, high = series.band
        yield go.Scatter(
            x=[*x, *x[::-1]],
            y=[*low, *high[::-1]],
            fill="toself",
            mode="none",
            fillcolor=f"rgba({','.join(map(str, hex_to_rgb(series.colour)))},0.15)",
            hoverinfo="skip",
            **shared,
        )
    symbol = MARKERS[series.style % len(MARKERS)][0]
    yield go.Scatter(
        x=list(series.x),
        y=list(series.y),
        mode=series.mode,
        line={
            "color": series.colour,
            "dash": DASHES[series.style % len(DASHES)][0],
            "shape": "hv" if series.steps else "linear",
            "width": 2,
        },
        marker={
            "symbol": symbol if series.filled else f"{symbol}-open",
            "color": series.colour,
            "size": 9,
            "line_width": 2 if not series.filled else 0,
        },
        error_x=_error(series.x_error),
        error_y=_error(series.y_error),
        name=_svg_text(_short(series.label)),
        text=[_svg_text(text) for text in series.hover] or label,
        hovertemplate="%{text}<br>%{x:.4g}, %{y:.4g}<extra></extra>",
        **{**shared, "showlegend": series.in_legend},
    )


def _error(values: Sequence[float | None]) -> dict[str, Any] | None:
    if not any(values):
        return None
    return {"array": [value or 0 for value in values], "thickness": 1, "width": 3}


def png(figure: Figure, path: Path) -> None:
    image = Image(figsize=(11, figure.height / 100), dpi=120, layout="constrained")
    image.suptitle(_no_math(figure.title), x=0.01, ha="left", fontsize=11, weight="bold")
    grid = image.subplots(figure.n_rows, figure.n_columns, squeeze=False, sharey=True)
    handles: dict[str, Any] = {}
    for axes, panel in zip(grid.flat, figure.panels, strict=False):
        for series in panel.series:
            handle = _draw(axes, series)
            if series.in_legend:
                handles[series.label] = handle
        axes.set_title(_no_math(panel.title), fontsize=10)
        axes.set_xlabel(panel.x_title)
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if panel.categories:
            axes.set_yticks(
                range(len(panel.categories)),
                [_no_math(_short(name)) for name in panel.categories],
            )
            axes.set_ylim(len(panel.categories) - 0.4, -0.6)
            axes.set_xlim(left=min(0, axes.get_xlim()[0]))
    for axes in grid[:, 0]:
        axes.set_ylabel(figure.panels[0].y_title)
    for axes in list(grid.flat)[len(figure.panels) :]:
        axes.set_visible(False)
    if handles:
        image.legend(
            handles.values(),
            [_no_math(_short(label)) for label in handles],
            loc="outside right upper",
            fontsize=8,
            frameon=False,
        )
    image.savefig(path, format="png")


def _draw(axes: Any, series: Series) -> Any:
    marker = MARKERS[series.style % len(MARKERS)][1]
    if series.band:
        axes.fill_between(*series.band, color=series.colour, alpha=0.15, linewidth=0)
    # The legend's handle and the line; the points follow with their errors.
    handle = axes.plot(
        _or_nan(series.x),
        _or_nan(series.y),
        color=series.colour,
        linestyle=DASHES[series.style % len(DASHES)][1] if "lines" in series.mode else "none",
        marker=marker if "markers" in series.mode else None,
        markerfacecolor=series.colour if series.filled else "none",
        drawstyle="steps-post" if series.steps else "default",
        linewidth=1.6,
        markersize=6,
    )[0]
    if "markers" in series.mode:
        axes.errorbar(
            _or_nan(series.x),
            _or_nan(series.y),
            xerr=_or_nan(series.x_error) if series.x_error else None,
            yerr=_or_nan(series.y_error) if series.y_error else None,
            fmt=marker,
            color=series.colour,
            markerfacecolor=series.colour if series.filled else "white",
            markersize=6,
            elinewidth=1,
        )
    return handle


def _or_nan(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else value for value in values]


def _svg_text(text: str) -> str:
    """plotly takes some tags for markup, and what stands between two dollars for a formula."""
    return escape(text).replace("$", "&#36;")


def _no_math(text: str) -> str:
    """matplotlib takes what stands between two dollars for a formula."""
    return text.replace("$", r"\$")
