"""The tables and figures of docs/issue-666.md, out of docs/results/smollm2-layer15.

python benchmarks/real_model.py
"""

import json
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent / "docs"
RESULTS = DOCS / "results" / "smollm2-layer15"
PAGE = DOCS / "issue-666.md"
FIGURES = DOCS / "assets"
COMPARISONS = {"topk": "TopK", "batchtopk": "BatchTopK"}
LOSSES = {
    "SAELens": "SAELens's loss",
    "auxk": "`auxk`",
    "pursuit": "`pursuit`",
    "resampling": "resampling alone",
}
OWN_WINDOW = "SAELens's loss, its own window"
Group = dict[str, Any]


def groups() -> list[tuple[str, str, Group]]:
    """(architecture, loss, its means and spreads), in the order of the tables."""
    found: list[tuple[str, str, Group]] = []
    window = _groups("window")
    for name, architecture in COMPARISONS.items():
        own = {group["case"]: group for group in _groups(name)}
        found += [(architecture, loss, own[case]) for case, loss in LOSSES.items() if case in own]
        found += [(architecture, OWN_WINDOW, g) for g in window if g["architecture"] == name]
    return found


def _groups(name: str) -> list[Group]:
    path = RESULTS / name / "results.json"
    return json.loads(path.read_text(encoding="utf-8"))["groups"] if path.is_file() else []


def quality_table() -> str:
    rows = [
        "| architecture | loss | seeds | dead | explained variance | CE loss recovered |",
        "|---|---|---|---|---|---|",
    ]
    for architecture, loss, group in groups():
        cells = [
            _share(group, "dead_fraction"),
            _number(group, "explained_variance"),
            _number(group, "ce_loss_recovered"),
        ]
        rows.append(f"| {architecture} | {loss} | {group['n_seeds']} | {' | '.join(cells)} |")
    return "\n".join(rows)


def found_table() -> str:
    rows = [
        "| architecture | loss | found again, all | revived | never died | revived : never died "
        "| revived latents |",
        "|---|---|---|---|---|---|---|",
    ]
    for architecture, loss, group in groups():
        revived, never = (group["peeking"][of] for of in ("revived", "never_died"))
        cells = [_number(group, "found_again")]
        cells += [_number(of, "found_again") for of in (revived, never)]
        shares = [of["mean"]["found_again"] for of in (revived, never)]
        cells.append("–" if None in shares or not shares[1] else f"{shares[0] / shares[1]:.2f}")
        cells.append(f"{revived['mean']['n_alive']:.0f}")
        rows.append(f"| {architecture} | {loss} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _number(of: Group, key: str) -> str:
    mean, std = of["mean"].get(key), of["std"].get(key)
    if mean is None:
        return "–"
    return f"{mean:.3f}" if std is None else f"{mean:.3f} ± {std:.3f}"


def _share(of: Group, key: str) -> str:
    mean, std = of["mean"][key], of["std"][key]
    return f"{mean:.1%}" if std is None else f"{mean:.1%} ± {100 * std:.1f}"


def draw() -> None:
    """Revived latents found again beside those that never died; and dead latents."""
    import matplotlib.pyplot as plt

    rows = [row for row in groups() if row[1] != OWN_WINDOW]
    architectures = [a for a in COMPARISONS.values() if any(a == row[0] for row in rows)]
    for key, label in (("found_again", "found again by another seed"), ("dead", "dead latents")):
        size = (4.5 * len(architectures), 2.6)
        figure, axes = plt.subplots(
            1, len(architectures), figsize=size, sharey=True, sharex=True, squeeze=False,
            layout="constrained",
        )  # fmt: skip
        axes[0, 0].invert_yaxis()
        for axis, architecture in zip(axes[0], architectures, strict=True):
            own = [(loss.strip("`"), group) for a, loss, group in rows if a == architecture]
            axis.set_yticks(range(len(own)), [loss for loss, _ in own])
            axis.set_title(architecture)
            axis.set_xlabel(label)
            for y, (loss, group) in enumerate(own):
                colour = "#0072b2" if loss == "pursuit" else "#5f6368"
                if key == "dead":
                    mean, std = group["mean"]["dead_fraction"], group["std"]["dead_fraction"]
                    axis.errorbar(mean, y, xerr=std, fmt="o", color=colour)
                    continue
                for of, face in (("never_died", "white"), ("revived", colour)):
                    mean = group["peeking"][of]["mean"][key]
                    std = group["peeking"][of]["std"][key]
                    if mean is not None:
                        axis.errorbar(mean, y, xerr=std, fmt="o", color=colour, mfc=face)
            axis.set_xlim(left=0)
        figure.savefig(FIGURES / f"real_{key}.png", dpi=150)


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for name, table in (("quality", quality_table()), ("found", found_table())):
        print(table, end="\n\n")
        begin, end = f"<!-- benchmarks/real_model.py {name} -->\n", "<!-- end -->"
        before, rest = text.split(begin)
        text = f"{before}{begin}{table}\n{end}{rest.split(end, 1)[1]}"
    PAGE.write_text(text, encoding="utf-8")
    draw()


if __name__ == "__main__":
    main()
