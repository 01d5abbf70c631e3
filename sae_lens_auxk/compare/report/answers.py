"""What a report says in sentences: which case is best at what, and what went wrong."""

from collections.abc import Sequence

from sae_lens_auxk.compare.report.vocabulary import (
    compared,
    label,
    number,
    one_of_several_k,
)
from sae_lens_auxk.results import METRICS, PEEKING, Group, Metric, Results

Entry = tuple[str, float, float | None]
"""A group and its number as text, the number, and its spread."""


def answer(results: Results) -> list[tuple[str, str]]:
    """Questions and answers. Cases whose spreads overlap are level: ``|a - b| <= s_a + s_b``."""
    if not results["groups"]:
        return [("No answer yet", "no run has finished.")]
    lines = [
        (question, _ranking(entries, METRICS[key]))
        for question, key in (
            ("Fewest dead latents", "dead_fraction"),
            ("Best explained variance", "explained_variance"),
            ("Best CE loss recovered", "ce_loss_recovered"),
            ("Best F1 with true features", "f1"),
        )
        if (entries := _best_first(results, key))
    ]
    return [*lines, ("Residual peeking", _peeking(results))]


def _best_first(results: Results, key: str) -> list[Entry]:
    metric = METRICS[key]
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
    return abs(a[1] - b[1]) <= (a[2] or 0.0) + (b[2] or 0.0)


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
    if k := one_of_several_k(results):
        parts.append(f"The answer compares at k {k}; the table has every k.")
    return " ".join(parts)


def troubles(results: Results) -> list[str]:
    """The runs that failed, each with its error, and the runs that are not finished."""
    failed = [
        f"Failed: {run['name']}: {run.get('error') or 'no error was written down'}"
        for run in results["runs"]
        if run["status"] == "failed"
    ]
    names = [run["name"] for run in results["runs"] if run["status"] == "unfinished"]
    return failed + ([f"Not finished: {'; '.join(names)}"] if names else [])
