"""The tables of this folder's pages and the figures of docs/figures, from the committed results.

python -m studies.rivals.tables
"""

import json
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from benchmarks.pages import table, with_blocks
from sae_lens_auxk.compare.effect import CONTRASTS
from sae_lens_auxk.compare.files import read_results
from sae_lens_auxk.compare.report.groups import PALETTE, number
from sae_lens_auxk.compare.report.summary import MAX_RATE_RATIO, REVIVED_OR_NOT
from sae_lens_auxk.compare.schema import METRICS, Group
from sae_lens_auxk.compare.seeds import by_seed, differences, groups_of, have_one_l0, interval

HERE = Path(__file__).parent
PAGES = (HERE / "README.md", HERE / "tables.md")
FIGURES = HERE.parents[1] / "docs" / "figures"
ARMS = (
    "SAELens",
    "unit rows, no loss",
    "unit rows, mean, no loss",
    "auxk",
    "resampling",
    "pursuit",
    "pursuit, mean",
    "pursuit, largest match, whitened",
    "unit rows, pursuit",
    "unit rows, mean, pursuit",
    "unit rows, mean, auxk",
)
CHOICES = ("pursuit, largest match", "pursuit, only dead", "pursuit")
"""How pursuit may choose the latent that it teaches."""
REVIVING = ("SAELens", "auxk", "pursuit", "pursuit, mean")
COMPARED = ("found_again", "explained_variance", "ce_loss_recovered")
PAIRS_HEAD = ["setting", "minus", "found again", "EV", "CE recovered"]
DRAWN = ("SAELens", "unit rows, mean, no loss", "auxk", "pursuit", "pursuit, mean")
SMOLLM2 = {
    "smollm2-7-topk": "layer 7, TopK",
    "smollm2-7-batchtopk": "layer 7, BatchTopK",
    "smollm2-15-topk": "layer 15, TopK",
    "smollm2-15-batchtopk": "layer 15, BatchTopK",
}
GEMMA = {
    "gemma3-6-topk": "layer 6, TopK",
    "gemma3-6-batchtopk": "layer 6, BatchTopK",
    "gemma3-12-topk": "layer 12, TopK",
    "gemma3-12-batchtopk": "layer 12, BatchTopK",
}
LONGER = {
    "smollm2-15-topk-40m": "SmolLM2, layer 15, TopK, 40M",
    "gemma3-12-topk-40m": "Gemma 3, layer 12, TopK, 40M",
}
OTHERS = {
    "smollm2-15-matryoshka": "Matryoshka",
    "smollm2-15-topk-36864": "TopK, 36,864 latents",
    "smollm2-15-jumprelu-0.3": "JumpReLU, 0.3",
    "smollm2-15-jumprelu-0.003": "JumpReLU, 0.003",
}
EFFECTS = {
    "smollm2-15-topk": "SmolLM2, layer 15",
    "gemma3-12-topk-effects": "Gemma 3, layer 12",
}
KNOWN = {
    "synthetic-0-topk": "small, TopK",
    "synthetic-0-batchtopk": "small, BatchTopK",
    "synthetic-0-matryoshka": "small, Matryoshka",
    "synthsaebench-0-topk": "SynthSAEBench, TopK",
    "synthsaebench-0-batchtopk": "SynthSAEBench, BatchTopK",
}
"""Synthetic models, whose features are known."""
KNOWN_LONGER = {
    "synthetic-0-topk-2.4m": "small, TopK, 2.4M",
    "synthetic-0-batchtopk-2.4m": "small, BatchTopK, 2.4M",
}
"""The same with four times as many samples, at one rate."""
SLOW = {"gemma3-12-topk-slow": "Gemma 3, layer 12, TopK, 3e-4"}
SETTINGS = {folder: f"SmolLM2, {name}" for folder, name in SMOLLM2.items()} | {
    folder: f"Gemma 3, {name}" for folder, name in GEMMA.items()
}
Groups = dict[str, Group]


def read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


@cache
def groups_in(folder: str) -> Groups:
    """The seeds of each arm, by its name."""
    return {group["case"]: group for group in read_results(HERE / folder)["groups"]}


def _cell(groups: Groups, arm: str) -> str:
    """Explained variance, latents found again and dead latents."""
    if arm not in groups:
        return "–"
    group = groups[arm]
    ev, dead = number(group, "explained_variance")[0], number(group, "dead_fraction")[0]
    found = METRICS["found_again"].show(*number(group, "found_again"))
    return f"{ev:.4f}, {found}, {100 * (dead or 0):.0f}%"


def of_other_text() -> str:
    """A row for each arm: one text for all seeds, and a third of it for each."""
    same = groups_in("smollm2-15-topk")
    runs = read_json(HERE / "other_text.json")["runs"]
    other = {group["case"]: group for group in groups_of(runs)}
    rows = [[arm, _cell(same, arm), _cell(other, arm)] for arm in other]
    return table(["arm", "one text", "other text for each seed"], rows)


def of_arms(settings: dict[str, str]) -> str:
    """A row for each arm, a column for each setting."""
    groups = {name: groups_in(folder) for folder, name in settings.items()}
    arms = [arm for arm in ARMS if any(arm in found for found in groups.values())]
    rows = [[arm, *(_cell(found, arm) for found in groups.values())] for arm in arms]
    return table(["arm", *groups], rows)


def of_choices() -> str:
    """A row for each setting, a column for each choice."""
    rows = [
        [name, *(_cell(groups_in(folder), arm) for arm in CHOICES)]
        for folder, name in SETTINGS.items()
    ]
    return table(["setting", "largest match", "only dead compete", "relative: `pursuit`"], rows)


def _difference(groups: Groups, a: str, b: str, key: str) -> str:
    if not have_one_l0(groups[a], groups[b]):
        return "–"
    values = differences(groups[a], groups[b], key)
    if key == "found_again":
        return _with_interval([100 * value for value in values], 1)
    return _with_interval(values, 4)


def _with_interval(values: list[float], digits: int) -> str:
    """The mean of differences, with its 95% interval."""
    low, high = interval(values)
    return f"{mean(values):+.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def of_pairs(a: str, rivals: tuple[str, ...], settings: dict[str, str] = SETTINGS) -> str:
    """What ``a`` is ahead of others, found again in points: mean and 95% interval."""
    return table(PAIRS_HEAD, _pairs(settings, a, rivals, COMPARED))


def of_unit_rows() -> str:
    """What a loss adds to unit rows, and what ``pursuit`` loses on them."""
    pairs = {
        "unit rows, pursuit": ("unit rows, no loss", "pursuit"),
        "unit rows, mean, pursuit": (START, "pursuit, mean"),
        "unit rows, mean, auxk": (START,),
    }
    rows = [
        [at, a, *rest]
        for a, rivals in pairs.items()
        for at, *rest in _pairs(SETTINGS, a, rivals, COMPARED)
    ]
    return table([PAIRS_HEAD[0], "arm", *PAIRS_HEAD[1:]], rows)


def _pairs(
    settings: dict[str, str], a: str, rivals: Iterable[str], keys: Sequence[str]
) -> list[list[str]]:
    """A row for each setting and rival that has both arms."""
    return [
        [name, b, *(_difference(groups_in(folder), a, b, key) for key in keys)]
        for folder, name in settings.items()
        for b in rivals
        if {a, b} <= groups_in(folder).keys()
    ]


def _spread(values: list[float]) -> str:
    return f"{mean(values):.3f} ± {stdev(values):.3f}"


def _by_seed(group: Group, latents: str) -> list[float]:
    """The jackknife's values of the latents found again, in percent; their mean is over pairs."""
    return [100 * value for value in by_seed(group["runs"], "found_again", latents)]


def _ahead(group: Group) -> list[float]:
    """Of revived latents less of those that never died."""
    both = (_by_seed(group, latents) for latents in REVIVED_OR_NOT)
    return [revived - never_died for revived, never_died in zip(*both, strict=True)]


def of_revived() -> str:
    """How far revived latents are ahead: mean and 95% t interval of the jackknife's values."""
    rows = [
        [name, *(_revived_cell(groups_in(folder).get(arm)) for arm in REVIVING)]
        for folder, name in (SETTINGS | LONGER | KNOWN | KNOWN_LONGER).items()
    ]
    return table(["setting", *REVIVING], rows)


def _revived_cell(group: Group | None) -> str:
    """A dash where the arm was not run, or a seed has too few of them."""
    if group is None:
        return "–"
    both = [_by_seed(group, latents) for latents in REVIVED_OR_NOT]
    if not all(both):
        return "–"
    shares = ", ".join(f"{mean(values):.1f}%" for values in both)
    return f"{shares}: {_with_interval(_ahead(group), 1)}"


def _less(both: Iterable[list[float]], digits: int) -> str:
    """Two means, and their difference with its 95% interval."""
    a, b = both
    less = [x - y for x, y in zip(a, b, strict=True)]
    return f"{mean(a):.{digits}f}, {mean(b):.{digits}f}: {_with_interval(less, digits)}"


def of_effects() -> str:
    """What is lost where a latent is taken out, of two groups of like latents."""
    rows = []
    groups = [(name, group) for of, name in EFFECTS.items() for group in groups_in(of).values()]
    for name, group in groups:
        effects: list[Any] = [run.get("effect") for run in group["runs"] if "effect" in run]
        for pair in CONTRASTS:
            if not any(pair[0] in effect for effect in effects):
                continue
            first, second = ([effect[name] for effect in effects] for name in pair)
            latents = ", ".join(pair).replace("_", " ")
            columns = (("ce_rise", 1000, 1), ("mse_rise", 100, 2), ("ce_per_mse", 1, 2))
            cells = [
                _less(([scale * of[key] for of in part] for part in (first, second)), digits)
                for key, scale, digits in columns
            ]
            n_pairs = f"{mean(of['n_pairs'] for of in first):.0f}"
            rows.append([name, group["case"], latents, n_pairs, *cells])
    head = ["setting", "arm", "latents", "pairs", "CE rise, thousandths", "MSE rise, %", "CE / MSE"]
    return table(head, rows)


def of_equal_age() -> str:
    """What became of replaced latents, and of as many others: means over the seeds."""
    paths = (HERE / "smollm2-15-topk").glob("equal_age-*.json")
    by_seed = [read_json(path)["arms"] for path in sorted(paths)]
    rows = []
    for arm in by_seed[0]:
        of_seeds = [arms[arm] for arms in by_seed]
        replaced, untouched = ([of[name] for of in of_seeds] for name in ("replaced", "untouched"))
        alive = [of["alive"] for of in replaced]
        found = [of["found_again_of_alive"] for of in replaced]
        others = [of["found_again_of_alive"] for of in untouched]
        explained = [of["explained_variance"] for of in of_seeds]
        back = f"{mean(of['tokens_to_first'] for of in of_seeds) / 1e6:.2f}"
        shown = (_share(values) for values in (alive, found, others))
        rows.append([arm, back, *shown, _spread(explained)])
    head = ["arm", "fire after, millions", "alive", "found again", "the others", "EV"]
    return table(head, rows)


def _share(values: list[float | None]) -> str:
    """In percent; a dash where there is nothing that it is a share of."""
    known = [100 * value for value in values if value is not None]
    return f"{mean(known):.1f} ± {stdev(known):.1f}%" if known else "–"


def of_probes() -> str:
    """Mean areas of each arm, over the seeds, and how far those of five are ahead of auxk's."""
    found: dict[str, list[list[float]]] = {}
    for run in read_json(HERE / "smollm2-15-topk" / "probes.json")["runs"]:
        found.setdefault(run["case"], []).append([mean(run[f"k{k}"]) for k in (1, 5)])
    rows = []
    for arm, of_seeds in found.items():
        one, five = (list(areas) for areas in zip(*of_seeds, strict=True))
        less = [a - b[1] for a, b in zip(five, found["auxk"], strict=True)]
        ahead = "" if arm == "auxk" else _with_interval(less, 3)
        rows.append([arm, _spread(one), _spread(five), ahead])
    return table(["arm", "one latent", "five latents", "five, minus `auxk`"], rows)


def of_known_features() -> str:
    """A row for each setting and arm: its learning rate, and the means over the seeds."""
    metrics = ("explained_variance", "f1", "mcc", "found_again", "dead_fraction")
    rows = []
    for folder, name in (KNOWN | KNOWN_LONGER).items():
        groups = groups_in(folder)
        cases = read_results(HERE / folder)["comparison"]["cases"]
        rates = {case["name"]: case["lr"] for case in cases}
        for arm in (arm for arm in ARMS if arm in groups):
            shown = (METRICS[key].show(*number(groups[arm], key)) for key in metrics)
            rows.append([name, arm, f"{rates[arm]:g}", *shown])
    return table(["setting", "arm", "rate", "EV", "F1", "MCC", "found again", "dead"], rows)


def of_known_pairs() -> str:
    """What pursuit is ahead of the others on the synthetic model."""
    keys = ("f1", "mcc", "explained_variance", "found_again")
    rows = []
    for folder, name in (KNOWN | KNOWN_LONGER).items():
        pairs = {"pursuit": (*RIVALS, *OTHER_RIVALS), "pursuit, mean": (*RIVALS, "pursuit")}
        for a, rivals in pairs.items():
            rows += [[at, a, *rest] for at, *rest in _pairs({folder: name}, a, rivals, keys)]
    return table(["setting", "arm", "minus", "F1", "MCC", "EV", "found again"], rows)


def of_junk() -> str:
    """How many latents came back, the shares of junk of these and of others, and the difference.

    None where the others do not fire about as often.
    """
    rows = []
    for folder, name in KNOWN.items():
        for arm in REVIVING:
            group = groups_in(folder)[arm]
            rates = [number(group, "firing_rate", latents)[0] or 0.0 for latents in REVIVED_OR_NOT]
            shares = [number(group, "junk_share", latents)[0] or 0.0 for latents in REVIVED_OR_NOT]
            difference = "–"
            if max(rates) <= MAX_RATE_RATIO * min(rates):
                by_run: list[Any] = [run["peeking"] for run in group["runs"]]
                junk = [[100 * of[name]["junk_share"] for name in REVIVED_OR_NOT] for of in by_run]
                difference = _with_interval([revived - others for revived, others in junk], 1)
            came_back = f"{number(group, 'n_alive', 'revived')[0]:.0f}"
            shown = (f"{100 * share:.1f}%" for share in shares)
            rows.append([name, arm, came_back, *shown, difference])
    head = ["setting", "arm", "came back", "junk of these", "of never-died", "difference"]
    return table(head, rows)


START = "unit rows, mean, no loss"
RIVALS = ("SAELens", START, "auxk")
OTHER_RIVALS = ("unit rows, mean, auxk", "unit rows, no loss", "resampling")
TABLES = {
    "smollm2": lambda: of_arms(SMOLLM2),
    "gemma3": lambda: of_arms(GEMMA | SLOW),
    "longer": lambda: of_arms(LONGER),
    "others": lambda: of_arms(OTHERS),
    "longer pairs": lambda: of_pairs("pursuit", RIVALS, LONGER),
    "other pairs": lambda: of_pairs("pursuit", RIVALS, OTHERS | SLOW),
    "other text": of_other_text,
    "choices": of_choices,
    "pursuit": lambda: of_pairs("pursuit", RIVALS),
    "pursuit, mean": lambda: of_pairs("pursuit, mean", (*RIVALS, "pursuit")),
    "pursuit, others": lambda: of_pairs("pursuit", OTHER_RIVALS),
    "unit rows": lambda: of_pairs(START, ("SAELens", "auxk")),
    "on unit rows": of_unit_rows,
    "revived": of_revived,
    "effects": of_effects,
    "equal age": of_equal_age,
    "probes": of_probes,
    "known features": of_known_features,
    "known pairs": of_known_pairs,
    "junk": of_junk,
}


def with_tables(text: str) -> str:
    """The page with each of its tables between its markers."""
    of_page = {name: of for name, of in TABLES.items() if f"<!-- {name} -->" in text}
    return with_blocks(text, {name: of() for name, of in of_page.items()})


def _found_again(group: Group) -> float:
    return 100 * (number(group, "found_again")[0] or 0.0)


def _revived(group: Group) -> float:
    return mean(_ahead(group))


def draw(path: Path, label: str, value: Callable[[Group], float], arms: Sequence[str]) -> None:
    """A dot for each arm and setting; most spreads are smaller than a dot."""
    settings = SETTINGS | LONGER
    figure, axes = plt.subplots(figsize=(4.5, 6.3), layout="constrained")
    for arm in arms:
        place = DRAWN.index(arm)
        rows = {of: row for row, of in enumerate(settings) if arm in groups_in(of)}
        x = [value(groups_in(folder)[arm]) for folder in rows]
        y = [row + 0.08 * (place - 2) for row in rows.values()]
        marker = "oDsv^"[place]
        axes.plot(x, y, marker, color=PALETTE[place], label=arm, markersize=8, clip_on=False)
    axes.set_yticks(
        range(len(settings)),
        [name.replace(", layer", ",\nlayer") for name in settings.values()],
        fontsize=11,
    )
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel(label, fontsize=11)
    axes.tick_params(axis="x", labelsize=11)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2, fontsize=11, frameon=False)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    for page in PAGES:
        page.write_text(with_tables(page.read_text(encoding="utf-8")), encoding="utf-8")
    draw(FIGURES / "rivals.png", "found again, % of all latents",
         _found_again, DRAWN)  # fmt: skip
    draw(FIGURES / "revived.png", "revived minus never died, points",
         _revived, REVIVING)  # fmt: skip


if __name__ == "__main__":
    main()
