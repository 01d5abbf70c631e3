"""What a report says in sentences: which case is best at what, and what went wrong."""

from collections.abc import Sequence

from sae_lens_auxk.compare.report.groups import (
    are_level,
    columns,
    compared,
    label,
    number,
    one_of_several_k,
)
from sae_lens_auxk.compare.report.tables import main_table
from sae_lens_auxk.compare.schema import PEEKING, Group, Metric, Results

QUESTIONS = {
    "found_again": "Most latents found again by other seeds",
    "dead_fraction": "Fewest dead latents",
    "explained_variance": "Best explained variance",
    "ce_loss_recovered": "Best CE loss recovered",
    "f1": "Best F1 with true features",
}
Entry = tuple[str, float, float | None]
"""A group and its number as text, the number, and its spread."""


def answer(results: Results) -> list[tuple[str, str]]:
    """Questions and answers. Cases whose spreads overlap are level: ``|a - b| <= s_a + s_b``."""
    if not results["groups"]:
        return [("No answer yet", "no run has finished.")]
    lines = [
        (QUESTIONS[key], _ranking(entries, metric))
        for key, metric in columns(results).items()
        if key in QUESTIONS and (entries := _best_first(results, key, metric))
    ]
    return [*lines, ("Residual peeking", _peeking(results))]


def _best_first(results: Results, key: str, metric: Metric) -> list[Entry]:
    entries: list[Entry] = []
    for group in compared(results):
        value, spread = number(group, key)
        if value is not None:
            said = f"{label(group, results)} ({metric.show(value, spread)})"
            entries.append((said, value, spread))
    return sorted(entries, key=lambda entry: entry[1], reverse=metric.better == "up")


def _by_difference(results: Results, key: str) -> list[Entry]:
    """Revived latents less those that never died and fire as often: the smallest first."""

    def said(group: Group, latents: str) -> str:
        n_latents, _ = number(group, "n_latents", latents)
        return f"{PEEKING[key].show(*number(group, key, latents))} of {n_latents:.0f}"

    entries: list[Entry] = []
    for group in compared(results):
        value, spread = number(group, key, "revived")
        never, never_spread = number(group, key, "never_died")
        if value is None or never is None:
            continue
        both = f"{said(group, 'revived')}; never died {said(group, 'never_died')}"
        spreads = None if spread is None or never_spread is None else spread + never_spread
        entries.append((f"{label(group, results)} ({both})", value - never, spreads))
    return sorted(entries, key=lambda entry: entry[1])


def _ranking(entries: Sequence[Entry], metric: Metric) -> str:
    first, *others = entries
    level = [entry for entry in others if _level(first, entry)]
    text = first[0]
    if level:
        text += f", level with {_list(level)}"
    if len(others) > len(level):
        last = "most" if metric.better == "down" else "worst"
        text += f"; {last} {entries[-1][0]}"
    return text + "."


def _peeking(results: Results) -> str:
    for key, what in (
        ("junk_share", "revived latents that match no true feature"),
        ("direction_spread", "share of samples that vary along a revived latent (noise: 1/3)"),
    ):
        entries = _by_difference(results, key)
        if not entries:
            continue
        least, most = entries[0], entries[-1]
        if len(entries) == 1:
            return f"{what}: {least[0]}."
        what += ", above latents that never died"
        if _level(least, most):
            return f"{what}: all level, {_list(entries)}."
        level = sum(_level(least, entry) for entry in entries[1:])
        also = f" and {level} level with it" if level else ""
        return f"{what}: least {least[0]}{also}; most {most[0]}."
    return "not measured, or on too few latents that were dead and came back."


def _level(a: Entry, b: Entry) -> bool:
    return are_level(a[1:], b[1:])


def _list(entries: Sequence[Entry]) -> str:
    texts = [said for said, *_ in entries]
    if len(texts) > 3:
        return f"{', '.join(texts[:2])} and {len(texts) - 2} more"
    return " and ".join([", ".join(texts[:-1]), texts[-1]] if texts[1:] else texts)


def footnote(results: Results) -> str:
    """What the numbers are means of, and the k at which cases are compared."""
    seeds = sorted({group["n_seeds"] for group in results["groups"]})
    parts: list[str] = []
    if seeds == [1]:
        parts.append("One seed: no spread is known, and a small lead may be chance.")
    elif seeds:
        count = str(seeds[0]) if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]}"
        spread = "Mean ± sample standard deviation over"
        parts.append(f"{spread} {count} seeds; level: spreads overlap.")
    if any(cell.best for row in main_table(results).rows for cell in row):
        parts.append("Bold: the best of its k, level with no other.")
    parts += _about_other_seeds(results, seeds)
    if k := one_of_several_k(results):
        parts.append(f"The answer compares at k {k}; the table has every k.")
    return " ".join(parts)


def _about_other_seeds(results: Results, seeds: Sequence[int]) -> list[str]:
    """What to know of the measures that compare a run with other seeds, or why there are none."""
    if "found_again" in columns(results):
        said = "Two seeds are one pair, so the spread of latents found again says nothing."
        return [said] if seeds == [2] else []
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
