"""The table of docs/choosing.md, out of the committed results.

python benchmarks/choosing.py
"""

import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"
RESULTS = DOCS / "results" / "pursuit" / "results.json"
FIGURE = DOCS / "assets" / "choosing.png"
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


def draw(path: Path = RESULTS, target: Path = FIGURE) -> None:
    """Found again and dead latents, a panel an architecture and a row a loss."""
    import matplotlib.pyplot as plt

    groups = json.loads(path.read_text(encoding="utf-8"))["groups"]
    figure, axes = plt.subplots(
        2, len(ARCHITECTURES), figsize=(10, 4.2), sharex="row", sharey=True, layout="constrained"
    )
    losses = [loss.strip("`") for loss in CASES.values()]
    for column, (name, architecture) in enumerate(ARCHITECTURES.items()):
        found, dead = axes[0, column], axes[1, column]
        for row, case in enumerate(CASES):
            group = _find(groups, case, name)
            colour = "#0072b2" if case == "pursuit" else "#5f6368"
            for latents, face in (("never_died", "white"), ("revived", colour)):
                peeking = group["peeking"][latents]
                found.errorbar(
                    peeking["mean"]["found_again"],
                    row,
                    xerr=peeking["std"]["found_again"],
                    fmt="o",
                    color=colour,
                    markerfacecolor=face,
                    markersize=7,
                )
            dead.barh(row, group["mean"]["dead_fraction"], color=colour, height=0.6)
        found.set(title=architecture, xlim=(0, 0.8))
        dead.set(xlim=(0, 0.4), yticks=range(len(losses)))
        dead.set_yticklabels(losses)
        for axis in (found, dead):
            axis.grid(axis="x", alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].invert_yaxis()
    axes[0, 1].set_xlabel("found again by another seed: revived (filled), never died (hollow)")
    axes[1, 1].set_xlabel("share of latents that are dead")
    figure.savefig(target, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    print(table())
    draw()
