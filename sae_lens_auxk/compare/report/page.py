"""report.html: one file that loads nothing."""

import json
from collections.abc import Sequence
from html import escape

from sae_lens_auxk.compare.report.drawing import svg
from sae_lens_auxk.compare.report.figures import Figure
from sae_lens_auxk.compare.report.summary import answer, footnote, settings, troubles
from sae_lens_auxk.compare.report.tables import (
    TEXT_COLUMNS,
    Table,
    effect_table,
    main_table,
    peeking_table,
)
from sae_lens_auxk.compare.schema import Results

# Forbids the browser to load anything, because the page holds all that it needs.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"

STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --faint: #595959; --paper: #fff;
        --panel: #f3f6f9; --warning: #fdf3e7; --line: #ddd; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3e5e8; --faint: #a9afb6; --paper: #16191d;
          --panel: #20262e; --warning: #35281a; --line: #3a4048; }
  /* The darkest colours of cases are hard to see on black. */
  .key, .plot svg { filter: brightness(1.35); }
}
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper);
       max-width: 1400px; margin: 0 auto; padding: 14px 20px 60px; }
h1 { font-size: 22px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 30px 0 4px; }
p { margin: 4px 0 8px; max-width: 140ch; }
.note { color: var(--faint); font-size: 13px; }
dl { display: grid; grid-template-columns: fit-content(26ch) 1fr; gap: 4px 16px; margin: 10px 0;
     padding: 10px 16px; background: var(--panel); border-left: 4px solid #0072b2; }
dt { font-weight: 600; } dd { margin: 0; overflow-wrap: anywhere; }
dl.settings { display: flex; flex-wrap: wrap; gap: 2px 22px; font-size: 13px;
              border: 0; padding: 0; background: none; }
.settings div { display: flex; gap: 6px; }
@media (max-width: 700px) {
  dl { grid-template-columns: 1fr; } dd { margin-bottom: 8px; } .settings dd { margin: 0; }
  .name { min-width: 110px; max-width: 130px; }
}
.trouble { background: var(--warning); border-left: 4px solid #d55e00; padding: 8px 16px; }
.trouble ul { margin: 0; padding-left: 20px; } .trouble li { overflow-wrap: anywhere; }
.wide { overflow: auto; max-height: 75vh; }
figure { margin: 0; } caption { text-align: left; padding: 4px 0; color: var(--faint); }
table { border-collapse: collapse; font-size: 12.5px; font-variant-numeric: tabular-nums; }
small { display: block; font-size: 10px; line-height: 1; color: var(--faint); }
th, td { padding: 3px 7px; border-bottom: 1px solid var(--line); text-align: right;
         white-space: nowrap; }
th { position: sticky; top: 0; background: var(--paper); vertical-align: bottom; padding: 3px 0; }
.plot { overflow-x: auto; }
.plot svg { width: 100%; height: auto; min-width: 720px; fill: var(--ink); }
tr > :first-child { position: sticky; left: 0; background: var(--paper); }
thead > tr > :first-child { z-index: 1; }
.text { text-align: left; }
tbody th { font-weight: inherit; vertical-align: baseline; padding: 3px 7px; top: auto; }
td.best { font-weight: 700; }
.name { white-space: normal; min-width: 170px; max-width: 260px; overflow-wrap: anywhere; }
th button { font: inherit; color: inherit; border: 0; background: none; cursor: pointer;
            padding: 2px 5px; text-decoration: underline dotted #767676; }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
tbody tr:hover, tbody tr:hover > * { background: var(--panel); }
:focus-visible { outline: 2px solid #0072b2; outline-offset: 2px; }
.key { display: inline-block; width: 11px; height: 11px; margin-right: 6px; border-radius: 2px; }
pre { font-size: 12px; background: var(--panel); padding: 8px; overflow-x: auto; }
details { margin: 4px 0; } summary { cursor: pointer; overflow-wrap: anywhere; }
@page { size: landscape; }
@media print {
  .wide { overflow: visible; max-height: none; zoom: 0.7; } .plot svg { min-width: 0; }
  h2, .note { break-after: avoid; } tr, .plot { break-inside: avoid; }
}
"""

# Sorts by data-value. Empty cells stay at the end in both directions.
SORT = """
document.querySelectorAll("table.sortable").forEach(table => {
  const body = table.tBodies[0];
  table.querySelectorAll("thead th").forEach((head, column) => {
    head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      table.querySelectorAll("thead th").forEach(other => other.removeAttribute("aria-sort"));
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
// Paper has nothing to unfold. The configurations are long, and in results.json.
addEventListener("beforeprint", () => {
  document.querySelectorAll("details.meanings").forEach(folded => { folded.open = true; });
});
"""


def page_of(results: Results, drawn: Sequence[Figure]) -> str:
    name = escape(results["name"])
    lines = "".join(
        f"<dt>{escape(head)}</dt><dd>{escape(text)}</dd>" for head, text in answer(results)
    )
    given = "".join(
        f"<div><dt>{escape(head)}</dt><dd>{escape(text)}</dd></div>"
        for head, text in settings(results)
    )
    problems = "".join(f"<li>{escape(trouble)}</li>" for trouble in troubles(results))
    sections = []
    main, peeking = main_table(results), peeking_table(results)
    if main.rows:
        sections.append(f"<h2>All numbers</h2>{_table(main)}")
    for figure in drawn:
        sections.append(
            f"<h2>{escape(figure.title)}</h2><figure>"
            f"<figcaption class=note>{escape(figure.caption)}</figcaption>"
            f'<div class="plot" tabindex="0" role="group" aria-label="{escape(figure.title)}">'
            f"{svg(figure)}</div></figure>"
        )
        if figure.name == "peeking":
            sections.append(_table(peeking))
    if (effect := effect_table(results)).rows:
        sections.append(f"<h2>Effect of a latent</h2>{_table(effect)}")
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}</title><link rel="icon" href="data:,"><style>{STYLE}</style></head><body><main>
<h1>{name}</h1>
<p class="note">{escape(results["data"].get("description", ""))}</p>
<dl class="settings">{given}</dl>
<dl>{lines}</dl>
{f'<div class="trouble"><ul>{problems}</ul></div>' if problems else ""}
<p class="note">{escape(footnote(results))}</p>
{"".join(sections)}
<h2>How it was made</h2>{_configs(results)}
</main><script>{SORT}</script>
</body></html>
"""


def _table(table: Table) -> str:
    kinds = ["text" if i < TEXT_COLUMNS else "number" for i in range(len(table.columns))]
    head = "".join(
        f'<th class="{kind}" data-kind="{kind}" scope="col">'
        f'<button type="button">{escape(column)}</button></th>'
        for column, kind in zip(table.columns, kinds, strict=True)
    )
    meanings = "".join(
        f"<dt>{escape(metric.label)}</dt><dd>{escape(metric.definition)}</dd>"
        for metric in table.metrics
    )
    rows: list[str] = []
    for row in table.rows:
        cells = ""
        for column, (cell, kind) in enumerate(zip(row, kinds, strict=True)):
            value = cell.text if kind == "text" else "" if cell.value is None else repr(cell.value)
            classes = " ".join(
                [kind, *(["name"] if cell.colour else []), *(["best"] if cell.best else [])]
            )
            key = f'<span class="key" style="background:{cell.colour}"></span>'
            tag, scope = ("td", "") if column else ("th", ' scope="row"')
            cells += (
                f'<{tag}{scope} class="{classes}" data-value="{escape(value)}">'
                f"{key if cell.colour else ''}{_small_spread(escape(cell.text))}</{tag}>"
            )
        rows.append(f"<tr>{cells}</tr>")
    return (
        f'<div class="wide" tabindex="0" role="group" aria-label="{escape(table.caption)}">'
        f'<table class="sortable"><caption>{escape(table.caption)}. Click a head to sort.</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        '<details class="meanings"><summary>What the columns mean</summary>'
        f"<dl>{meanings}</dl></details>"
    )


def _small_spread(text: str) -> str:
    number, plus_minus, spread = text.partition(" ± ")
    return f"{number}<small>{plus_minus}{spread}</small>" if plus_minus else text


def _configs(results: Results) -> str:
    """The command, and folded away the whole comparison and each case's SAE config."""
    packages = ", ".join(f"{name} {number}" for name, number in results["packages"].items())
    folded = {"the comparison": results["comparison"], "the data": results["data"]}
    for run in results["runs"]:
        key = f"{run['case']}, {run['architecture']}, k {run['k']}"
        if run.get("sae_config") and key not in folded:
            folded[key] = run["sae_config"]
    return (
        f"<p class=note>{escape(results['machine'])}; {escape(packages)}; begun "
        f"{escape(results['created'])}</p>{_pre(results['command'])}"
        "<details><summary>Configurations</summary>"
        + "".join(
            f"<details><summary>{escape(key)}</summary>"
            f"{_pre(json.dumps(content, indent=1))}</details>"
            for key, content in folded.items()
        )
        + "</details>"
    )


def _pre(text: str) -> str:
    """Text as it is. Where it scrolls it must be reachable by the keyboard."""
    return f'<pre tabindex="0" role="group" aria-label="text">{escape(text)}</pre>'
