"""The table of docs/choosing.md, out of the committed results.

python benchmarks/choosing.py
"""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent.parent / "docs" / "results" / "pursuit" / "results.json"
CASES = {
    "SAELens": "SAELens's loss",
    "auxk": "`auxk`",
    "straight_through": "`straight_through`",
    "resampling": "resampling alone",
    "pursuit": "`pursuit`",
}
ARCHITECTURES = {
    "topk": "TopK",
    "batchtopk": "BatchTopK",
    "matryoshka-batchtopk": "Matryoshka",
}


def table(path: Path = RESULTS) -> str:
    """The Markdown table: a row a loss and architecture, mean ± standard deviation over seeds."""
    groups = json.loads(path.read_text(encoding="utf-8"))["groups"]
    rows = [
        "| architecture | loss | dead | explained variance | F1 | uniqueness "
        "| found again, revived (never died) |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, architecture in ARCHITECTURES.items():
        for case, loss in CASES.items():
            cells = _cells(_find(groups, case, name))
            rows.append(f"| {architecture} | {loss} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _find(groups: list[dict[str, Any]], case: str, architecture: str) -> dict[str, Any]:
    for group in groups:
        plain = group["architecture"].removeprefix("auxk-").replace("_", "-")
        if plain == architecture and group["case"].split()[0] == case:
            return group
    raise KeyError(f"{RESULTS} has no {case} with {architecture}")


def _cells(group: dict[str, Any]) -> list[str]:
    mean, std = group["mean"], group["std"]
    revived, never_died = (
        group["peeking"][of]["mean"]["found_again"] for of in ("revived", "never_died")
    )
    shares = [f"{mean[key]:.3f} ± {std[key]:.3f}" for key in ("explained_variance", "f1")]
    return [
        f"{mean['dead_fraction']:.1%} ± {100 * std['dead_fraction']:.1f}",
        *shares,
        f"{mean['uniqueness']:.3f} ± {std['uniqueness']:.3f}",
        f"{revived:.2f} ({never_died:.2f})",
    ]


if __name__ == "__main__":
    print(table())
