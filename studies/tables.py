"""The tables of the pages in docs that show committed results.

python studies/tables.py    # writes them into the pages
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from sae_lens_auxk.compare.files import read_results
from sae_lens_auxk.compare.report.groups import found_again_by_age, number
from sae_lens_auxk.compare.schema import AGES, METRICS, PEEKING, Group, Results, Run

STUDIES = Path(__file__).parent
DOCS = STUDIES.parent / "docs"
LOSSES = {
    "SAELens": "SAELens's loss",
    "SAELens, pre_act_loss": "SAELens's loss, `pre_act_loss_coefficient` 3e-6",
    "none": "none",
    "auxk": "`auxk`",
    "auxk, bias matched": "`auxk`, bias matched",
    "auxk, bias none": "`auxk`, bias none",
    "auxk, k_aux 64": "`auxk`, `k_aux` 64",
    "auxk, times 4": "`auxk`, coefficient 0.125",
    "auxk, alpha 0.25": "`auxk`, coefficient 0.25",
    "auxk, alpha 1": "`auxk`, coefficient 1",
    "straight_through": "`straight_through`",
    "resampling, input": "resampling alone, input's direction",
    "resampling": "resampling alone",
    "pursuit, up only": "`pursuit`, up only",
    "pursuit": "`pursuit`",
    "pursuit, resampling": "`pursuit`, resampling",
    "pursuit, late resampling": "`pursuit`, late resampling",
    "reanimation": "`reanimation`",
    "pre_activation": "`pre_activation`",
    "ghost_gradients": "`ghost_gradients`",
    "multi_topk": "`multi_topk`",
}
"""Losses by case, in the order of the rows. Other cases are not shown."""
ARCHITECTURES = {
    "topk": "TopK",
    "batchtopk": "BatchTopK",
    "matryoshka-batchtopk": "Matryoshka",
    "jumprelu": "JumpReLU",
}
BEGIN, END = "<!-- studies/tables.py -->\n", "<!-- end -->"

Column = tuple[str, Callable[[Results, Group], str]]
"""The head of a column, and what it says of a group."""


# --- columns ---------------------------------------------------------------------------------


def of_all(key: str) -> Column:
    """A metric of all latents."""
    metric = METRICS[key]
    return metric.label, lambda _, group: metric.show(*number(group, key))


def of_group(key: str, latents: str) -> Column:
    """A measure of the latents that were "revived", or that "never_died"."""
    metric = PEEKING[key]
    head = f"{metric.label}, {latents.replace('_', ' ')}"
    return head, lambda _, group: metric.show(*number(group, key, latents))


def of_both(key: str) -> Column:
    """A measure of the revived latents, in brackets the mean of those that never died."""
    metric = PEEKING[key]

    def cell(_: Results, group: Group) -> str:
        revived = metric.show(*number(group, key, "revived"))
        return f"{revived} ({metric.show(number(group, key, 'never_died')[0])})"

    return f"{metric.label}: revived (never died)", cell


def of_part(part: int) -> Column:
    """The share found again of the latents that last came alive in this part of training."""

    def cell(_: Results, group: Group) -> str:
        return METRICS["found_again"].show(*found_again_by_age(group)[part])

    return f"{100 * part // AGES}–{100 * (part + 1) // AGES}%", cell


def setting(key: str, head: str) -> Column:
    """A field of the comparison."""
    return head, lambda results, _: _setting(results, key)


def _setting(results: Results, key: str) -> str:
    value = results["comparison"][key]
    if key == "k" and all(group["k"] is None for group in results["groups"]):
        value = "–"  # JumpReLU: the comparison has the default, which nothing reads
    values = value if isinstance(value, list) else [value]
    return ", ".join(f"{v:,}" if isinstance(v, int) else str(v) for v in values)


# --- tables ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """A row for each architecture and loss: mean ± standard deviation over the seeds.

    Attributes:
        results: folders of comparisons, in studies. Those in a tuple are shown as one
            comparison.
        columns: those after architecture and loss.
        hidden: cases that are not shown.
        ending: only cases whose names end so are shown, without it.
    """

    results: tuple[str | tuple[str, ...], ...]
    columns: tuple[Column, ...]
    hidden: tuple[str, ...] = ()
    ending: str = ""

    def markdown(self) -> str:
        return markdown(
            ["architecture", "loss", *(head for head, _ in self.columns)],
            [row for names in self.results for row in self._rows(names)],
        )

    def _rows(self, names: str | tuple[str, ...]) -> Iterator[list[str]]:
        comparisons = [_read(name) for name in ([names] if isinstance(names, str) else names)]
        groups = {
            (architecture_of(g), case_of(g)): (r, g) for r in comparisons for g in r["groups"]
        }
        for name, architecture in ARCHITECTURES.items():
            for case, loss in LOSSES.items():
                found = groups.get((name, case + self.ending))
                if found is not None and case not in self.hidden:
                    yield [architecture, loss, *(cell(*found) for _, cell in self.columns)]


@dataclass(frozen=True)
class Settings:
    """A row for each comparison.

    Attributes:
        results: folders of comparisons, in studies.
    """

    results: tuple[str, ...]

    HEADS = {
        "d_sae": "latents",
        "k": "k",
        "training_samples": "samples",
        "dead_after": "dead after",
        "batch_size": "batch",
        "lr": "learning rate",
        "seeds": "seeds",
        "eval_samples": "held-out samples",
    }

    def markdown(self) -> str:
        heads = ["results", "data", *self.HEADS.values(), "form of `pursuit`", "date"]
        return markdown(heads, [self._row(name) for name in self.results])

    def _row(self, name: str) -> list[str]:
        results = _read(name)
        return [
            f"[{name}](../studies/{name}/results.json)",
            results["data"]["description"],
            *(_setting(results, key) for key in self.HEADS),
            form_of_pursuit(results),
            results["created"][:10],
        ]


def form_of_pursuit(results: Results) -> str:
    """Which halves of pursuit its cases have."""
    cases = {case_of(group) for group in results["groups"]}
    if "pursuit, up only" in cases:
        return "up only"
    return "both halves" if any(case.startswith("pursuit") for case in cases) else "–"


def _read(name: str) -> Results:
    return read_results(STUDIES / name)


def architecture_of(group: Group | Run) -> str:
    """Its name without prefix, the same for SAELens's own architecture and ours."""
    return group["architecture"].removeprefix("auxk-").replace("_", "-")


def case_of(group: Group | Run) -> str:
    """SAELens's own loss has the architecture in its name where a preset made the case."""
    case = group["case"]
    return "SAELens" if case.startswith("SAELens ") else case


def markdown(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table with these heads, without a line break at its end."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (heads, *rows)]
    return "\n".join([lines[0], "|---" * len(heads) + "|", *lines[1:]])


FOUND_AGAIN = (of_group("found_again", "revived"), of_group("found_again", "never_died"))
COUNTED = (of_both("n_alive"), of_both("n_firing"))
COMPARED = (of_both("n_latents"), of_both("firing_rate"))
OUTCOME = tuple(map(of_all, ("dead_fraction", "explained_variance", "f1", "mcc", "uniqueness")))
JUNK = of_all("junk_share")
OUTCOME_BY_GROUP = (*OUTCOME, JUNK, of_all("found_again"), *FOUND_AGAIN)
PARTS = tuple(map(of_part, range(AGES)))
PEEKED = (of_both("junk_share"), of_both("features_hurt"))
LAYER_15 = ("smollm2/layer15/topk", "smollm2/layer15/batchtopk")
LAYER_15_OUTCOME = Table(
    LAYER_15,
    (
        *map(of_all, ("dead_fraction", "explained_variance", "ce_loss_recovered", "found_again")),
        *FOUND_AGAIN,
        of_group("age", "revived"),
    ),
)
OWN_WINDOW = ("smollm2/layer15/topk-own-window",)
LAYER_7 = ("smollm2/layer7/topk-long",)
BATCHTOPK_LONG = ("smollm2/layer15/batchtopk-long",)
TOPK_LONG = (("smollm2/layer15/topk-long", "smollm2/layer15/topk-long-more"),)
MATRYOSHKA = ("smollm2/layer15/matryoshka",)
MATRYOSHKA_LONG = ("smollm2/layer15/matryoshka-long",)
LONGEST = ("smollm2/layer15/topk-longest",)
TOPK_WIDE = ("smollm2/layer7/topk-wide",)
JUMPRELU_ON_LM = ("smollm2/layer7/jumprelu", "smollm2/layer7/jumprelu-sparse")
JUMPRELU_OUTCOME = tuple(
    map(
        of_all,
        ("dead_fraction", "explained_variance", "l0", "ce_loss_recovered", "found_again"),
    )
)
THREE_K = tuple(f"smollm2/layer7/k{k}" for k in (16, 32, 64))
FIRST_POSITION = ("smollm2/layer7/first-position",)
KNOWN = (("pursuit/heldout", "pursuit/resampling"),)
JUMPRELU = tuple(
    Table(
        (name,),
        (
            *map(of_all, ("dead_fraction", "explained_variance", "l0", "f1", "uniqueness")),
            of_all("found_again"),
            *FOUND_AGAIN,
        ),
        ending=f", {ending}",
    )
    for name, ending in (
        ("jumprelu/short", "l0_coefficient 1"),
        ("jumprelu/short", "l0_coefficient 2"),
        ("jumprelu/warm-up", "l0_coefficient 2"),
        ("jumprelu/warm-up", "l0_coefficient 4"),
        ("jumprelu/long", "the whole training"),
        ("jumprelu/long", "a sixth"),
    )
)
BOTH_HALVES = tuple(
    f"synthsaebench/both-halves-{name}" for name in ("topk", "batchtopk", "matryoshka")
)
BOTH_HALVES_LONGEST = tuple(f"synthsaebench/longest-{name}" for name in ("batchtopk", "matryoshka"))
OTHER_SETTINGS = (
    *(f"learning-rate/{name}" for name in ("slow", "fast", "faster")),
    *(f"other-models/{name}" for name in ("seeds", "size", "no-bias")),
    *(f"learning-rate/{name}" for name in ("narrow", "long", "long-fast")),
)
LATENTS_PER_FEATURE = tuple(
    f"latents-per-feature/{d_sae}-{length}"
    for length in ("short", "long")
    for d_sae in (256, 512, 1024)
)
NARROW = tuple(f"synthsaebench/{name}" for name in ("topk", "batchtopk", "matryoshka", "k20"))
LONG = ("synthsaebench/long-topk",)
WIDE = tuple(
    f"synthsaebench/{name}"
    for name in ("wide-topk", "long-wide-topk", "longer-wide-topk", "wide-batchtopk")
)
LONGEST_WIDE = ("synthsaebench/longest-wide-topk",)
NAME: Column = ("results", lambda results, _: results["name"])
K, D_SAE, SAMPLES = (
    setting(key, Settings.HEADS[key]) for key in ("k", "d_sae", "training_samples")
)
TABLES = {
    "choosing.md": (
        Table(
            KNOWN,
            (
                *map(of_all, ("dead_fraction", "explained_variance", "f1", "uniqueness")),
                *FOUND_AGAIN,
            ),
            hidden=("resampling, input",),
        ),
        *JUMPRELU[-2:],
    ),
    "issue-666.md": (
        LAYER_15_OUTCOME,
        Table(LAYER_7, LAYER_15_OUTCOME.columns),
        Table(TOPK_LONG, LAYER_15_OUTCOME.columns),
        Table(BATCHTOPK_LONG, LAYER_15_OUTCOME.columns),
        Table(MATRYOSHKA_LONG, LAYER_15_OUTCOME.columns),
        Table(LONGEST, LAYER_15_OUTCOME.columns),
        Table(TOPK_WIDE, LAYER_15_OUTCOME.columns),
    ),
    "evidence.md": (
        Settings(
            (
                *LAYER_15,
                *LAYER_7,
                *BATCHTOPK_LONG,
                *TOPK_LONG[0],
                *LONGEST,
                *TOPK_WIDE,
                *MATRYOSHKA,
                *MATRYOSHKA_LONG,
                *JUMPRELU_ON_LM,
                "smollm2/layer7/jumprelu-sparsity",
                *THREE_K,
                *FIRST_POSITION,
                *OWN_WINDOW,
                "pursuit/heldout",
                "pursuit/resampling",
                "pursuit-candidates/exchange",
                "jumprelu/short",
                "jumprelu/warm-up",
                "jumprelu/long",
                "long-training",
                *LATENTS_PER_FEATURE,
                *OTHER_SETTINGS,
                *BOTH_HALVES,
                *BOTH_HALVES_LONGEST,
                *NARROW,
                *LONG,
                *WIDE,
                *LONGEST_WIDE,
                "smollm2/layer6",
            )
        ),
        LAYER_15_OUTCOME,
        Table(LAYER_15, PARTS),
        Table(LAYER_15, (*COUNTED, *COMPARED)),
        Table(LAYER_7, LAYER_15_OUTCOME.columns),
        Table(LAYER_7, PARTS),
        Table(LAYER_7, (*COUNTED, *COMPARED)),
        Table(BATCHTOPK_LONG, LAYER_15_OUTCOME.columns),
        Table(BATCHTOPK_LONG, PARTS),
        Table(TOPK_LONG, LAYER_15_OUTCOME.columns),
        Table(TOPK_LONG, PARTS),
        Table(MATRYOSHKA_LONG, LAYER_15_OUTCOME.columns),
        Table(MATRYOSHKA_LONG, PARTS),
        Table(LONGEST, LAYER_15_OUTCOME.columns),
        Table(LONGEST, PARTS),
        Table(TOPK_WIDE, LAYER_15_OUTCOME.columns),
        Table(TOPK_WIDE, PARTS),
        Table(MATRYOSHKA, LAYER_15_OUTCOME.columns),
        Table(THREE_K, (K, *LAYER_15_OUTCOME.columns)),
        Table(FIRST_POSITION, LAYER_15_OUTCOME.columns),
        Table(JUMPRELU_ON_LM[:1], JUMPRELU_OUTCOME),
        Table(
            JUMPRELU_ON_LM[1:],
            (*JUMPRELU_OUTCOME, *FOUND_AGAIN, of_group("age", "revived"), of_both("n_alive")),
        ),
        Table(OWN_WINDOW, LAYER_15_OUTCOME.columns),
        Table(OWN_WINDOW, PARTS),
        Table(KNOWN, (*OUTCOME, JUNK, *FOUND_AGAIN, of_group("age", "revived"))),
        Table(KNOWN, PARTS),
        Table(KNOWN, (of_both("n_alive"), *COMPARED, *PEEKED)),
        *JUMPRELU,
        Table(
            ("long-training",),
            (*OUTCOME_BY_GROUP, of_group("age", "revived")),
        ),
        Table(LATENTS_PER_FEATURE, (D_SAE, SAMPLES, *OUTCOME_BY_GROUP)),
        Table(OTHER_SETTINGS, (NAME, *OUTCOME, JUNK, of_all("found_again"))),
        Table(BOTH_HALVES, OUTCOME_BY_GROUP),
        Table(BOTH_HALVES_LONGEST, OUTCOME_BY_GROUP),
        Table(NARROW, (K, *OUTCOME, JUNK)),
        Table(NARROW, (K, *COMPARED, *PEEKED)),
        Table(LONG, (*OUTCOME, JUNK, *COMPARED, *PEEKED)),
        Table(WIDE, (SAMPLES, *OUTCOME, JUNK)),
        Table(WIDE, (SAMPLES, *COMPARED, *PEEKED)),
        Table(LONGEST_WIDE, OUTCOME_BY_GROUP),
        Table(LONGEST_WIDE, PARTS),
        Table(LONGEST_WIDE, (*COUNTED, *COMPARED, *PEEKED)),
        Table(
            ("smollm2/layer6",),
            tuple(map(of_all, ("dead_fraction", "explained_variance", "ce_loss_recovered"))),
        ),
    ),
}
"""By the page in docs that shows them, in its order."""


def with_tables(text: str, tables: Sequence[Table | Settings]) -> str:
    """A page's text with the tables between its pairs of marks."""
    before, *parts = text.split(BEGIN)
    for table, part in zip(tables, parts, strict=True):
        before += f"{BEGIN}{table.markdown()}\n{END}{part.split(END, 1)[1]}"
    return before


def main() -> None:
    for page, tables in TABLES.items():
        path = DOCS / page
        path.write_text(with_tables(path.read_text(encoding="utf-8"), tables), encoding="utf-8")


if __name__ == "__main__":
    main()
