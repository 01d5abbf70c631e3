"""report.md."""

from collections.abc import Sequence

from sae_lens_auxk.compare.report.figures import Figure
from sae_lens_auxk.compare.report.summary import answer, footnote, settings, troubles
from sae_lens_auxk.compare.report.tables import (
    Cell,
    Table,
    effect_table,
    main_table,
    peeking_table,
)
from sae_lens_auxk.compare.schema import Results
from sae_lens_auxk_cli import printable


def markdown_of(results: Results, drawn: Sequence[Figure]) -> str:
    tables = {
        "All numbers": main_table(results),
        "Residual peeking": peeking_table(results),
        "Effect of a latent": effect_table(results),
    }
    parts = [f"# {_escaped(results['name'])}", _escaped(results["data"].get("description", ""))]
    parts += ["; ".join(f"{head} {_escaped(text)}" for head, text in settings(results))]
    parts += ["\n".join(f"- **{head}**: {_escaped(text)}" for head, text in answer(results))]
    parts += ["\n".join(f"- {_escaped(trouble)}" for trouble in troubles(results))]
    parts += [footnote(results)]
    for head, table in tables.items():
        if table.rows:
            parts += [f"## {head}", f"{table.caption}.", _table(table), "What the columns mean:"]
            parts += ["\n".join(f"- {m.label}: {_escaped(m.definition)}" for m in table.metrics)]
    for figure in drawn:
        parts += [f"## {figure.title}", f"![{figure.title}](figures/{figure.name}.png)"]
        parts += [_escaped(figure.caption)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _table(table: Table) -> str:
    lines = [table.columns, ["---"] * len(table.columns)]
    lines += [[_cell(cell) for cell in row] for row in table.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(cell: Cell) -> str:
    text = _escaped(cell.text).replace("|", "\\|")
    return f"**{text}**" if cell.best else text


def _escaped(text: str) -> str:
    """Text that Markdown, and a terminal, shows as it is, on one line."""
    text = printable(" ".join(text.split()))
    for character in "\\`*_<[":
        text = text.replace(character, "\\" + character)
    return text
