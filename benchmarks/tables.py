"""The tables of docs/choosing.md and docs/issue-666.md, out of the committed results.

python benchmarks/tables.py    # writes them into the pages
"""

from dataclasses import dataclass
from pathlib import Path

from sae_lens_auxk.compare.report.vocabulary import number
from sae_lens_auxk.result_files import read_results
from sae_lens_auxk.results import METRICS, PEEKING, Group

DOCS = Path(__file__).parent.parent / "docs"
LOSSES = {
    "SAELens": "SAELens's loss",
    "auxk": "`auxk`",
    "straight_through": "`straight_through`",
    "resampling": "resampling alone",
    "pursuit": "`pursuit`",
}
"""Losses by the first word of their case."""
ARCHITECTURES = {
    "topk": "TopK",
    "batchtopk": "BatchTopK",
    "matryoshka-batchtopk": "Matryoshka",
}
FOUND_AGAIN = (("found_again", "revived"), ("found_again", "never_died"))
BEGIN, END = "<!-- benchmarks/tables.py -->\n", "<!-- end -->"


@dataclass(frozen=True)
class Table:
    """A row for each architecture and loss: mean ± standard deviation over the seeds.

    Attributes:
        results: folders of comparisons, in docs/results.
        columns: a metric and the latents that it is of, "" for all.
    """

    results: tuple[str, ...]
    columns: tuple[tuple[str, str], ...]

    def markdown(self) -> str:
        heads = [(PEEKING if of else METRICS)[key].label for key, of in self.columns]
        names = [
            f"{head}, {of.replace('_', ' ')}" if of else head
            for head, (_, of) in zip(heads, self.columns, strict=True)
        ]
        lines = [
            f"| architecture | loss | {' | '.join(names)} |",
            "|---" * (len(names) + 2) + "|",
        ]
        groups = [
            g for name in self.results for g in read_results(DOCS / "results" / name)["groups"]
        ]
        for name, architecture in ARCHITECTURES.items():
            for case, loss in LOSSES.items():
                for group in groups:
                    if _is(group, case, name):
                        cells = " | ".join(self._cells(group))
                        lines.append(f"| {architecture} | {loss} | {cells} |")
        return "\n".join(lines)

    def _cells(self, group: Group) -> list[str]:
        return [
            (PEEKING if of else METRICS)[key].show(*number(group, key, of))
            for key, of in self.columns
        ]


TABLES = {
    "choosing.md": Table(
        ("pursuit",),
        (
            ("dead_fraction", ""),
            ("explained_variance", ""),
            ("f1", ""),
            ("uniqueness", ""),
            *FOUND_AGAIN,
        ),
    ),
    "issue-666.md": Table(
        ("smollm2-layer15/topk", "smollm2-layer15/batchtopk"),
        (
            ("dead_fraction", ""),
            ("explained_variance", ""),
            ("ce_loss_recovered", ""),
            ("found_again", ""),
            *FOUND_AGAIN,
            ("age", "revived"),
        ),
    ),
}
"""By the page in docs that shows it."""


def _is(group: Group, case: str, architecture: str) -> bool:
    own = group["architecture"].removeprefix("auxk-").replace("_", "-")
    return own == architecture and group["case"].split()[0] == case


def with_table(text: str, table: Table) -> str:
    """A page's text with the table between the two marks."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}{table.markdown()}\n{END}{rest.split(END, 1)[1]}"


def main() -> None:
    for page, table in TABLES.items():
        path = DOCS / page
        path.write_text(with_table(path.read_text(encoding="utf-8"), table), encoding="utf-8")


if __name__ == "__main__":
    main()
