"""What a report says in sentences: settings, which case is best at what, and what went wrong."""

from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from itertools import combinations
from typing import Any

from sae_lens_auxk.compare.report.groups import (
    QUESTIONS,
    columns,
    compared,
    first_question,
    label,
    measured,
    number,
    one_of_several_k,
)
from sae_lens_auxk.compare.report.tables import main_table
from sae_lens_auxk.compare.schema import ACROSS_SEEDS, METRICS, PEEKING, Group, Metric, Results
from sae_lens_auxk.compare.seeds import (
    MIN_LATENTS,
    MIN_SEEDS,
    best_of,
    differences,
    interval,
    is_beyond_chance,
    n_latents,
    numbers_of,
    of_one_l0,
    unbeaten,
)
from sae_lens_auxk.saelens.names import get_sae_training_class

REVIVED_OR_NOT = ("revived", "never_died")
WORSE = {
    "junk_share": "Junk is what no true feature is near",
    "direction_spread": "Spread is larger where latents are less specific (0.333: at random)",
}
"""What speaks for residual peeking, in the order of its weight."""
MAX_RATE_RATIO = 2.0
"""Groups whose median firing rates differ by more cannot be compared."""
MAX_NAMED = 6
"""So many cases are named in one list."""


def settings(results: Results) -> list[tuple[str, str]]:
    """What every number depends on."""
    given = results["comparison"]
    configs = [run["sae_config"] for run in results["runs"]]
    longest = given.get("max_norm_multiple")
    return [
        ("d_sae", _values([config.get("d_sae") for config in configs] + [given.get("d_sae")])),
        ("d_in", _values([config.get("d_in") for config in configs] + [given.get("d_in")])),
        ("k", _values([run["k"] for run in results["runs"]])),
        ("training samples", _values([given.get("training_samples")])),
        ("batch size", _values([given.get("batch_size")])),
        ("learning rate", _values([given.get("lr")])),
        ("held-out samples", _values([given.get("eval_samples")])),
        *([("left out", f"rows above {longest:g} times the median norm")] if longest else []),
        ("dead after", f"{_values([given.get('dead_after')])} silent samples"),
        ("seeds", _values(given.get("seeds", []))),
        ("cases", "; ".join(_cases(results))),
    ]


def _cases(results: Results) -> Iterator[str]:
    """Each case with its architecture and what it set, unless all others that can set the same."""
    configs: dict[tuple[str, str], dict[str, Any]] = {}
    for run in results["runs"]:
        key = (run["case"], run["architecture"])
        # A run that is not finished has none.
        configs[key] = run["sae_config"] or configs.get(key, {})
    rates = {case.get("name"): case.get("lr") for case in results["comparison"].get("cases") or []}
    for (case, architecture), config in configs.items():
        by_itself = _defaults(architecture)
        own = [
            f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in config.items()
            if name in by_itself and value != by_itself[name]
            if any(other.get(name, value) != value for other in configs.values())
        ]
        if (lr := rates.get(case)) is not None:
            own.append(f"lr {lr:g}")
        yield f'"{case}" ({", ".join([architecture, *own])})'


def _defaults(architecture: str) -> dict[str, Any]:
    """Of the fields that a case may set: what they are by themselves."""
    try:
        _, config_class = get_sae_training_class(architecture)
    except KeyError:  # one of a package that is not here
        return {}
    known = {field.name: field.default for field in fields(config_class)}
    shared = ("d_in", "d_sae", "k", "device", "metadata")
    return {name: value for name, value in known.items() if name not in shared}


def _values(values: Sequence[Any]) -> str:
    known = dict.fromkeys(value for value in values if value is not None)
    texts = [f"{value:,}" if isinstance(value, int) else str(value) for value in known]
    return ", ".join(texts) or "none"


def answer(results: Results) -> list[tuple[str, str]]:
    """Questions and answers; ``seeds.is_better`` has the rule."""
    if not results["groups"]:
        return [("No answer yet", "no run has finished.")]
    metrics = {
        # Where hardly any latent is dead, one decimal is not enough.
        key: replace(metric, digits=2) if key == "dead_fraction" else metric
        for key, metric in measured(compared(results), METRICS).items()
    }
    lines = [
        (question, " ".join(_answer(results, key, metrics[key])))
        for key, question in QUESTIONS.items()
        if key in metrics
    ]
    return [*lines, ("Residual peeking (are latents that came back worse?)", _peeking(results))]


def _answer(results: Results, key: str, metric: Metric) -> list[str]:
    known = [group for group in compared(results) if number(group, key)[0] is not None]
    near = of_one_l0(known)
    known.sort(key=lambda group: number(group, key)[0] or 0.0, reverse=metric.better == "up")
    rivals = [group for group in known if group in near]

    def named(group: Group) -> str:
        return f'"{label(group, results)}"'  # it may have commas

    def said(group: Group) -> str:
        return f"{named(group)} ({metric.show(*number(group, key))})"

    def in_full(group: Group) -> str:
        """As much as a sentence that names a winner must say."""
        shown = METRICS | {key: metric}  # the same digits
        l0, dead = (shown[part].show(number(group, part)[0]) for part in ("l0", "dead_fraction"))
        d_sae = _values([run["sae_config"].get("d_sae") for run in group["runs"]])
        return f"{metric.show(*number(group, key))} (L0 {l0}, {dead} of {d_sae} latents dead)"

    if len(known) == 1:
        return [f"Only {named(known[0])} has this number: {in_full(known[0])}."]
    if len(rivals) < 2:
        cases = [f"{named(group)}, {in_full(group)}" for group in known]
        return [f"No two cases have about the same L0: {_list(cases)}."]
    by_their_means = f"by their means: {_list([*map(said, rivals)])}."
    best = best_of(compared(results), key, metric)
    if best is not None:
        others = [group for group in rivals if group is not best]
        than = "each of the others, and than the next" if len(others) > 1 else "the other"
        low, high = interval(differences(best, others[0], key))
        low, high = (low, high) if metric.better == "up" else (-high, -low)
        sentences = [
            f"{named(best)}, {in_full(best)}, is better than {than}, {said(others[0])}, by "
            f"{metric.difference(low, high)} (95% interval)."
        ]
    elif all(len(differences(a, b, key)) < MIN_SEEDS for a, b in combinations(rivals, 2)):
        pairs = " whose pairs are all known" if key in ACROSS_SEEDS else ""
        reason = f"Not told apart, as no two have {MIN_SEEDS} seeds in common{pairs}"
        sentences = [f"{reason}; {by_their_means}"]
    elif key == "found_again" and n_latents(rivals[0], key) < MIN_LATENTS:
        reason = f"Not told apart, as no case has {MIN_LATENTS} latents that are found again"
        sentences = [f"{reason}; {by_their_means}"]
    else:
        top = unbeaten(rivals, key, metric)
        heads = {
            "Not told apart" if len(top) > 1 else "Not worse than any other": top,
            "Worse than at least one other": [group for group in rivals if group not in top],
        }
        sentences = [f"{head}: {_list([*map(said, of)])}." for head, of in heads.items() if of]
    apart = [
        f"{named(group)} ({METRICS['l0'].show(number(group, 'l0')[0])})"
        for group in known
        if group not in near
    ]
    if apart:
        sentences.append(f"Not compared, as some L0 are more than 10% away: {_list(apart)}.")
    return sentences


def _peeking(results: Results) -> str:
    """In which cases revived latents are worse than those that never died and fire as often."""

    def said(group: Group, key: str) -> str:
        values = (PEEKING[key].show(number(group, key, latents)[0]) for latents in REVIVED_OR_NOT)
        return f'"{label(group, results)}" {" and ".join(values)}'

    def having(key: str) -> list[Group]:
        return [
            group
            for group in compared(results)
            if all(number(group, key, latents)[0] is not None for latents in REVIVED_OR_NOT)
        ]

    for key, name in WORSE.items():
        heads: dict[str, list[str]] = {}
        for group in having(key):
            heads.setdefault(_revived_are(group, key), []).append(said(group, key))
        if heads:
            found = [f"{name}; given of those that came back, and of others that fire as often."]
            found += [f"{head}: {_list(cases)}." for head, cases in sorted(heads.items())]
            if again := [said(group, "found_again") for group in having("found_again")]:
                found.append(
                    "Found again of those that came back, and of all that never died: "
                    f"{_list(again)}."
                )
            return " ".join(found)
    return "Not measured, or on too few latents that were dead and came back."


def _revived_are(group: Group, key: str) -> str:
    def both(key: str) -> list[float]:
        return [number(group, key, which)[0] or 0.0 for which in REVIVED_OR_NOT]

    values = [
        [numbers_of(run, latents).get(key) for latents in REVIVED_OR_NOT] for run in group["runs"]
    ]
    more = [a - b for a, b in values if a is not None and b is not None]
    low, high = sorted(both("firing_rate"))
    if min(both("n_latents")) < MIN_LATENTS:
        return f"Too few, less than {MIN_LATENTS}"
    if high > MAX_RATE_RATIO * low:
        return "Not comparable, as no others fire about as often"
    if len(more) < MIN_SEEDS:
        return f"Not told apart with fewer than {MIN_SEEDS} seeds"
    if is_beyond_chance(more):
        return "Larger"
    return "Smaller" if is_beyond_chance([-less for less in more]) else "Not told apart"


def _list(texts: Sequence[str]) -> str:
    if len(texts) > MAX_NAMED:
        texts = [*texts[: MAX_NAMED - 1], f"{len(texts) - MAX_NAMED + 1} more"]
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if texts[1:] else texts)


def footnote(results: Results) -> str:
    """What the numbers are means of, when one is better, and the k at which cases are compared."""
    seeds = sorted({group["n_seeds"] for group in results["groups"]})
    metrics = columns(results)
    parts: list[str] = []
    if seeds == [1]:
        parts.append("One seed: no spread is known. To tell cases apart takes three.")
    elif seeds:
        count = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        across = _list([metrics[key].label for key in ACROSS_SEEDS if key in metrics])
        pairs = f" (of {across}: over pairs of seeds)" if across else ""
        parts += [
            f"Mean ± sample standard deviation over {count} seeds{pairs}.",
            "A case is better than another if the mean of their differences, paired by seed, is "
            "outside a 95% t interval around 0, which is not corrected for the number of "
            f"comparisons. Cases are compared from {MIN_SEEDS} seeds on, if their L0 differ by at "
            f"most 10%. By latents found again the better has at least {MIN_LATENTS}, by dead ones "
            "at least so many fewer.",
        ]
        if results["data"].get("kind") == "language_model":
            parts.append("The seeds share the text, so no interval speaks of other text.")
    table = main_table(results)
    if any(cell.best for row in table.rows for cell in row):
        parts.append("Bold: better than every other case of about its L0.")
    if asked := first_question(metrics):
        head = metrics[asked].label
        parts.append(f"Rows are sorted by {head}: each stands below all that are better.")
    parts += _about_other_seeds(results, seeds)
    if k := one_of_several_k(results):
        parts.append(f"The answers compare at k {k}; the table has every k.")
    return " ".join(parts)


def _about_other_seeds(results: Results, seeds: Sequence[int]) -> list[str]:
    """Why there are no measures that compare a run with other seeds."""
    if "found_again" in columns(results):
        return []
    if seeds == [1]:
        return ["Whether latents are found again can be measured from two seeds on."]
    if seeds and _every_seed_has_a_model(results):
        return [
            "Each seed has a synthetic model of its own, in which no latent can be found again; "
            "with synthetic_model: {seed: 0} all seeds share one."
        ]
    return []


def _every_seed_has_a_model(results: Results) -> bool:
    given = results["comparison"].get("synthetic_model") or {}
    is_synthetic = results["data"].get("kind") == "synthetic"
    return is_synthetic and isinstance(given, dict) and given.get("seed") is None


def troubles(results: Results) -> list[str]:
    """The runs that failed, each with its error, and the runs that are not finished."""
    failed = [
        f"Failed: {run['name']}: {run.get('error') or 'no error was recorded'}"
        for run in results["runs"]
        if run["status"] == "failed"
    ]
    names = [run["name"] for run in results["runs"] if run["status"] == "unfinished"]
    return failed + ([f"Not finished: {'; '.join(names)}"] if names else [])
