"""What a report says in sentences: settings, which case is best at what, and what went wrong."""

from collections.abc import Sequence
from typing import Any

from sae_lens_auxk.compare.report.groups import (
    QUESTIONS,
    columns,
    compared,
    first_question,
    label,
    number,
    one_of_several_k,
)
from sae_lens_auxk.compare.report.tables import main_table
from sae_lens_auxk.compare.schema import ACROSS_SEEDS, METRICS, PEEKING, Group, Metric, Results
from sae_lens_auxk.compare.seeds import (
    MIN_LATENTS,
    MIN_SEEDS,
    best_of,
    is_beyond_chance,
    numbers_of,
    of_one_l0,
    too_few_found,
    unbeaten,
)

REVIVED_OR_NOT = ("revived", "never_died")
WORSE = {
    "junk_share": (
        "Latents that came back match no true feature more often than",
        "Less often",
    ),
    "direction_spread": (
        "Latents that came back are less specific (more samples vary along them; along noise, a "
        "third) than",
        "More specific",
    ),
}
"""What speaks for residual peeking, in the order of its weight, and what speaks against it."""


def settings(results: Results) -> list[tuple[str, str]]:
    """What every number depends on."""
    given = results["comparison"]
    configs = [run["sae_config"] for run in results["runs"]]
    return [
        ("d_sae", _values([config.get("d_sae") for config in configs] + [given.get("d_sae")])),
        ("d_in", _values([config.get("d_in") for config in configs] + [given.get("d_in")])),
        ("k", _values([run["k"] for run in results["runs"]])),
        ("training samples", _values([given.get("training_samples")])),
        ("batch size", _values([given.get("batch_size")])),
        ("learning rate", _values([given.get("lr")])),
        ("held-out samples", _values([given.get("eval_samples")])),
        ("dead after", f"{_values([given.get('dead_after')])} silent samples"),
        ("seeds", _values(given.get("seeds", []))),
        ("architectures", _values([run["architecture"] for run in results["runs"]])),
    ]


def _values(values: Sequence[Any]) -> str:
    known = dict.fromkeys(value for value in values if value is not None)
    texts = [f"{value:,}" if isinstance(value, int) else str(value) for value in known]
    return ", ".join(texts) or "none"


def answer(results: Results) -> list[tuple[str, str]]:
    """Questions and answers; ``seeds.is_better`` has the rule."""
    if not results["groups"]:
        return [("No answer yet", "no run has finished.")]
    metrics = columns(results)
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
        l0, dead = (METRICS[part].show(number(group, part)[0]) for part in ("l0", "dead_fraction"))
        d_sae = _values([run["sae_config"].get("d_sae") for run in group["runs"]])
        what = f"L0 {l0}, {dead} of {d_sae} latents dead"
        return f"{named(group)}, {metric.show(*number(group, key))} ({what}),"

    if len(rivals) < 2:
        why = "It is the only case" if len(known) == 1 else "No two cases have about the same L0"
        return [f"{why}: {_list([in_full(group).strip(',') for group in known])}."]
    best = best_of(compared(results), key, metric)
    if best is not None:
        others = [group for group in rivals if group is not best]
        than = "each of the others" if len(others) > 1 else "the other"
        sentences = [f"{in_full(best)} is better than {than}.", f"Next is {said(others[0])}."]
    elif max(group["n_seeds"] for group in rivals) < MIN_SEEDS:
        reason = f"Not told apart, as that takes {MIN_SEEDS} seeds; by their means"
        sentences = [f"{reason}: {_list([*map(said, rivals)])}."]
    elif too_few_found(rivals[0], key):
        reason = f"Not told apart, as fewer than {MIN_LATENTS} latents are found again"
        sentences = [f"{reason}: {_list([*map(said, rivals)])}."]
    else:
        top = unbeaten(rivals, key, metric)
        sentences = [f"Not told apart: {_list([*map(said, top)])}."]
        if rest := len(rivals) - len(top):
            each = f"Each of the other {rest}" if rest > 1 else "The other case"
            sentences.append(f"{each} is worse than one of these.")
    apart = [
        f"{named(group)} ({METRICS['l0'].show(number(group, 'l0')[0])})"
        for group in known
        if group not in near
    ]
    if apart:
        sentences.append(f"Not compared, as the L0 is more than 10% away: {_list(apart)}.")
    return sentences


def _peeking(results: Results) -> str:
    """In which cases revived latents are worse than those that never died and fire as often."""
    for key, (more, fewer) in WORSE.items():
        found: dict[str, list[str]] = {"more": []}
        for group in compared(results):
            values = [number(group, key, latents)[0] for latents in REVIVED_OR_NOT]
            if None not in values:
                revived, never = map(PEEKING[key].show, values)
                said = f'"{label(group, results)}" ({revived} and {never})'
                found.setdefault(_revived_are(group, key), []).append(said)
        heads = {
            "more": f"{more} latents that never died and fire as often",
            "fewer": fewer,
            "level": "Not told apart",
            "few": f"On fewer than {MIN_LATENTS} latents",
        }
        if any(found.values()):
            return " ".join(
                f"{head}: {_list(found[which]) or 'in no case'}."
                for which, head in heads.items()
                if which in found
            )
    return "Not measured, or on too few latents that were dead and came back."


def _revived_are(group: Group, key: str) -> str:
    both = [
        [numbers_of(run, latents).get(key) for latents in REVIVED_OR_NOT] for run in group["runs"]
    ]
    differences = [a - b for a, b in both if a is not None and b is not None]
    if min(number(group, "n_latents", which)[0] or 0 for which in REVIVED_OR_NOT) < MIN_LATENTS:
        return "few"
    if is_beyond_chance(differences):
        return "more"
    return "fewer" if is_beyond_chance([-less for less in differences]) else "level"


def _list(texts: Sequence[str]) -> str:
    if len(texts) > 3:
        return f"{', '.join(texts[:2])} and {len(texts) - 2} more"
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
            f"outside a 95% t interval around 0. That takes {MIN_SEEDS} seeds, L0 within 10% of "
            f"each other and, for latents found again, at least {MIN_LATENTS} of them.",
        ]
        if results["data"].get("kind") == "language_model":
            parts.append("The seeds share the text, so no interval speaks of other text.")
    table = main_table(results)
    if any(cell.best for row in table.rows for cell in row):
        parts.append("Bold: better than every other case of its k and L0.")
    if asked := first_question(metrics):
        head = metrics[asked].label
        parts.append(
            f"A row stands below all that are better at {head}; otherwise rows keep the order of "
            "the comparison."
        )
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
