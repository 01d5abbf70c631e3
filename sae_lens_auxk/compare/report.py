"""A comparison's results as something to read: report.html, report.md and figures/*.png.

Everything comes from the content of results.json. ``series.py`` makes of it what is drawn and
said; here it is put on paper, by plotly for the page and by matplotlib for the images, which
needs no browser.
"""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from matplotlib.figure import Figure as Image
from plotly.offline import get_plotlyjs
from plotly.subplots import make_subplots

from sae_lens_auxk.compare.series import (
    Figure,
    Series,
    Table,
    answer,
    figures,
    footnote,
    main_table,
    peeking_table,
    troubles,
)

DASHES = (("solid", "-"), ("dash", "--"), ("dot", ":"), ("dashdot", "-."))
MARKERS = (("circle", "o"), ("square", "s"), ("diamond", "D"), ("triangle-up", "^"), ("x", "X"))
"""Plotly's name and matplotlib's; an architecture has one of each."""
LEGEND_CHARACTERS = 34


def write_report(results: Mapping[str, Any], folder: Path) -> Path:
    """Write report.html, report.md and figures/*.png; return the path of report.html.

    Args:
        results: the content of results.json, finished or not.
        folder: where to; files of an earlier report are replaced one by one, each at once.
    """
    folder = Path(folder)
    (folder / "figures").mkdir(parents=True, exist_ok=True)
    drawn = figures(results)
    for stale in {path.stem for path in (folder / "figures").glob("*.png")} - {
        figure.name for figure in drawn
    }:
        (folder / "figures" / f"{stale}.png").unlink()
    for figure in drawn:
        _replace(folder / "figures" / f"{figure.name}.png", lambda path, f=figure: _png(f, path))
    markdown, page = _markdown(results, drawn), _html(results, drawn)
    _replace(folder / "report.md", lambda path: path.write_text(markdown, encoding="utf-8"))
    report = folder / "report.html"
    _replace(report, lambda path: path.write_text(page, encoding="utf-8"))
    return report


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` make a file beside ``path``, then give it that name."""
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    write(partial)
    os.replace(partial, path)


# --- Markdown --------------------------------------------------------------------------------


def _markdown(results: Mapping[str, Any], drawn: Sequence[Figure]) -> str:
    tables = [main_table(results), peeking_table(results)]
    parts = [f"# {_plain(results['name'])}", _plain(results["data"].get("description", ""))]
    parts += ["\n".join(f"- **{head}**: {_plain(text)}" for head, text in answer(results))]
    parts += ["\n".join(f"- {_plain(trouble)}" for trouble in troubles(results))]
    parts += [_markdown_table(table) for table in tables if table.rows]
    parts += [footnote(results)]
    parts += [f"![{figure.title}](figures/{figure.name}.png)" for figure in drawn]
    return "\n\n".join(part for part in parts if part) + "\n"


def _markdown_table(table: Table) -> str:
    lines = [table.columns, ["---"] * len(table.columns)]
    lines += [[_plain(cell.text).replace("|", "\\|") for cell in row] for row in table.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    text = " ".join(text.split())
    for character in "\\`*_<[":
        text = text.replace(character, "\\" + character)
    return text


# --- HTML ------------------------------------------------------------------------------------

# Forbids the browser to load anything: what the page needs is in the page.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
)

STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.45 system-ui, sans-serif; color: #1b1b1b; background: #fff;
       max-width: 1400px; margin: 0 auto; padding: 14px 20px 60px; }
h1 { font-size: 22px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 30px 0 4px; }
p { margin: 4px 0 8px; max-width: 140ch; }
.note { color: #595959; font-size: 13px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 16px; margin: 10px 0;
     padding: 10px 16px; background: #f3f6f9; border-left: 4px solid #0072b2; }
dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
.trouble { background: #fdf3e7; border-left: 4px solid #d55e00; padding: 8px 16px; }
.trouble ul { margin: 0; padding-left: 20px; } .trouble li { overflow-wrap: anywhere; }
.wide { overflow: auto; max-height: 75vh; }
table { border-collapse: collapse; font-size: 12.5px; font-variant-numeric: tabular-nums; }
small { display: block; font-size: 10px; line-height: 1; color: #595959; }
th, td { padding: 3px 7px; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th { position: sticky; top: 0; background: #fff; vertical-align: bottom; padding: 3px 0; }
th.text, td.text { text-align: left; }
td.name { white-space: normal; min-width: 170px; max-width: 260px; overflow-wrap: anywhere; }
th button { font: inherit; border: 0; background: none; cursor: pointer; padding: 2px 5px;
            text-decoration: underline dotted #767676; }
th[aria-sort=ascending] button::after { content: " \\2191"; color: #000; }
th[aria-sort=descending] button::after { content: " \\2193"; color: #000; }
tbody tr:hover { background: #f3f6f9; }
.key { display: inline-block; width: 11px; height: 11px; margin-right: 6px; border-radius: 2px; }
pre { font-size: 12px; background: #f6f6f6; padding: 8px; overflow-x: auto; }
details { margin: 4px 0; } summary { cursor: pointer; overflow-wrap: anywhere; }
"""

# Sorts by data-value where a cell has one; empty cells stay at the end either way.
SORT = """
document.querySelectorAll("table.sortable").forEach(table => {
  const body = table.tBodies[0];
  table.querySelectorAll("th").forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const value = row => row.cells[column].dataset.value;
      const order = (a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === "" || y === "") return (x === "") - (y === "");
        const numeric = head.dataset.kind === "number";
        const sign = numeric ? Number(x) - Number(y) : x.localeCompare(y);
        return down ? -sign : sign;
      };
      [...body.rows].sort(order).forEach(row => body.append(row));
    });
  });
});
"""


def _html(results: Mapping[str, Any], drawn: Sequence[Figure]) -> str:
    name = escape(results["name"])
    lines = "".join(
        f"<dt>{escape(head)}</dt><dd>{escape(text)}</dd>" for head, text in answer(results)
    )
    problems = "".join(f"<li>{escape(trouble)}</li>" for trouble in troubles(results))
    sections = []
    main, peeking = main_table(results), peeking_table(results)
    if main.rows:
        sections.append(f"<h2>All numbers</h2>{_html_table(main)}")
    for figure in drawn:
        plot = _plotly(figure).to_html(
            full_html=False,
            include_plotlyjs=False,
            div_id=figure.name,
            config={"responsive": True, "displayModeBar": False},
        )
        sections.append(
            f"<h2>{escape(figure.title)}</h2><p class=note>{escape(figure.caption)}</p>{plot}"
        )
        if figure.name == "peeking":
            sections.append(_html_table(peeking))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}</title><link rel="icon" href="data:,"><style>{STYLE}</style>
<script>{get_plotlyjs()}</script></head><body>
<h1>{name}</h1>
<p class="note">{escape(results["data"].get("description", ""))}</p>
<dl>{lines}</dl>
{f'<div class="trouble"><ul>{problems}</ul></div>' if problems else ""}
<p class="note">{escape(footnote(results))}</p>
{"".join(sections)}
<h2>How it was made</h2>{_configs(results)}
<script>{SORT}</script>
</body></html>
"""


def _html_table(table: Table) -> str:
    kinds = ["number" if kind else "text" for kind in table.numeric]
    head = "".join(
        f'<th class="{kind}" data-kind="{kind}" scope="col">'
        f'<button type="button">{escape(column)}</button></th>'
        for column, kind in zip(table.columns, kinds, strict=True)
    )
    rows: list[str] = []
    for row in table.rows:
        cells = ""
        for cell, kind in zip(row, kinds, strict=True):
            value = cell.text if kind == "text" else "" if cell.value is None else repr(cell.value)
            key = f'<span class="key" style="background:{cell.colour}"></span>'
            cells += (
                f'<td class="{kind}{" name" if cell.colour else ""}" data-value="{escape(value)}">'
                f"{key if cell.colour else ''}{_small_spread(escape(cell.text))}</td>"
            )
        rows.append(f"<tr>{cells}</tr>")
    return (
        f'<div class="wide"><table class="sortable"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _small_spread(text: str) -> str:
    number, plus_minus, spread = text.partition(" ± ")
    return f"{number}<small>{plus_minus}{spread}</small>" if plus_minus else text


def _configs(results: Mapping[str, Any]) -> str:
    """The command, and behind a click the whole comparison and each case's SAE config."""
    packages = ", ".join(f"{name} {number}" for name, number in results["packages"].items())
    folded = {"the comparison": results["comparison"], "the data": results["data"]}
    for run in results["runs"]:
        key = ", ".join(str(run[part]) for part in ("case", "architecture")) + f", k {run['k']}"
        if run.get("sae_config") and key not in folded:
            folded[key] = run["sae_config"]
    return (
        f"<p class=note>{escape(results['machine'])}; {escape(packages)}; begun "
        f"{escape(results['created'])}</p><pre>{escape(results['command'])}</pre>"
        "<details><summary>Configurations</summary>"
        + "".join(
            f"<details><summary>{escape(key)}</summary>"
            f"<pre>{escape(json.dumps(content, indent=1))}</pre></details>"
            for key, content in folded.items()
        )
        + "</details>"
    )


# --- figures ---------------------------------------------------------------------------------


def _short(text: str) -> str:
    """Short enough to leave room for the data; the ends are what tells long names apart."""
    if len(text) <= LEGEND_CHARACTERS:
        return text
    half = LEGEND_CHARACTERS // 2
    return f"{text[:half].rstrip()}…{text[-half + 1 :].lstrip()}"


def _plotly(figure: Figure) -> go.Figure:
    columns = min(len(figure.panels), figure.columns)
    n_rows = -(-len(figure.panels) // columns)
    fig = make_subplots(
        rows=n_rows,
        cols=columns,
        shared_yaxes=figure.shared_y,
        subplot_titles=[panel.title for panel in figure.panels],
        horizontal_spacing=0.03,
        vertical_spacing=min(0.5, 80 / figure.height) if n_rows > 1 else 0,
    )
    for index, panel in enumerate(figure.panels):
        row, column = divmod(index, columns)
        at: Any = {"row": row + 1, "col": column + 1}
        for series in panel.series:
            for trace in _traces(series):
                fig.add_trace(trace, **at)
        fig.update_xaxes(title_text=panel.x_title, range=panel.x_range, **at)
        fig.update_yaxes(title_text=panel.y_title if column == 0 else None, **at)
        if panel.categories:
            fig.update_yaxes(
                tickvals=list(range(len(panel.categories))),
                ticktext=[_svg_text(_short(name)) for name in panel.categories],
                range=[len(panel.categories) - 0.4, -0.6],
                automargin=True,
                **at,
            )
    fig.update_layout(
        template="plotly_white",
        height=figure.height,
        margin={"l": 70, "r": 20, "t": 40, "b": 60},
        legend={"x": 1.01, "y": 1, "xanchor": "left", "yanchor": "top", "font_size": 12},
        font_family="system-ui, sans-serif",
        hoverlabel_namelength=-1,
    )
    return fig


def _traces(series: Series) -> list[go.Scatter]:
    label = _svg_text(series.label)
    shared = {"legendgroup": label, "showlegend": False}
    traces: list[go.Scatter] = []
    if series.band:
        x, low, high = series.band
        traces.append(
            go.Scatter(
                x=[*x, *x[::-1]],
                y=[*low, *high[::-1]],
                fill="toself",
                mode="none",
                fillcolor=_rgba(series.colour, 0.15),
                hoverinfo="skip",
                **shared,
            )
        )
    symbol = MARKERS[series.style % len(MARKERS)][0]
    traces.append(
        go.Scatter(
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
    )
    return traces


def _error(values: Sequence[float | None]) -> dict[str, Any] | None:
    if not any(values):
        return None
    return {"array": [value or 0 for value in values], "thickness": 1, "width": 3}


def _rgba(colour: str, opacity: float) -> str:
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},{opacity})"


def _png(figure: Figure, path: Path) -> None:
    columns = min(len(figure.panels), figure.columns)
    n_rows = -(-len(figure.panels) // columns)
    image = Image(figsize=(11, figure.height / 100), dpi=120, layout="constrained")
    image.suptitle(_no_math(figure.title), x=0.01, ha="left", fontsize=11, weight="bold")
    grid = image.subplots(n_rows, columns, squeeze=False, sharey=figure.shared_y)
    handles: dict[str, Any] = {}
    for axes, panel in zip(grid.flat, figure.panels, strict=False):
        for series in panel.series:
            handle = _draw(axes, series)
            if series.in_legend:
                handles[series.label] = handle
        axes.set_title(_no_math(panel.title), fontsize=10)
        axes.set_xlabel(panel.x_title)
        axes.set_xlim(*(panel.x_range or (None, None)))
        axes.grid(alpha=0.3)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        if panel.categories:
            axes.set_yticks(
                range(len(panel.categories)),
                [_no_math(_short(name)) for name in panel.categories],
            )
            axes.set_ylim(len(panel.categories) - 0.4, -0.6)
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
    # The legend's handle and the line; the points follow one by one, as some lack an error.
    handle = axes.plot(
        [v if v is not None else float("nan") for v in series.x],
        [v if v is not None else float("nan") for v in series.y],
        color=series.colour,
        linestyle=DASHES[series.style % len(DASHES)][1] if "lines" in series.mode else "none",
        marker=marker if "markers" in series.mode else None,
        markerfacecolor=series.colour if series.filled else "none",
        drawstyle="steps-post" if series.steps else "default",
        linewidth=1.6,
        markersize=6,
    )[0]
    if "markers" in series.mode:
        for i, (x, value) in enumerate(zip(series.x, series.y, strict=True)):
            if x is None or value is None:
                continue
            axes.errorbar(
                x,
                value,
                xerr=(series.x_error[i] or None) if series.x_error else None,
                yerr=(series.y_error[i] or None) if series.y_error else None,
                fmt=marker,
                color=series.colour,
                markerfacecolor=series.colour if series.filled else "white",
                markersize=6,
                elinewidth=1,
            )
    return handle


def _svg_text(text: str) -> str:
    """plotly takes some tags for markup, and what stands between two dollars for a formula."""
    return escape(text).replace("$", "&#36;")


def _no_math(text: str) -> str:
    """matplotlib takes what stands between two dollars for a formula."""
    return text.replace("$", r"\$")
