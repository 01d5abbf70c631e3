"""Results of version 1, read as the present one.

It had ``found_again`` as a share of the alive latents, and of each run only the mean over the other
seeds. The means of three seeds give the three pairs, if of two seeds each finds about as much in
the other.
"""

from collections.abc import Sequence

from sae_lens_auxk.compare.schema import ACROSS_SEEDS, Numbers, Pair, Run
from sae_lens_auxk.compare.seeds import Case, case_of, numbers_of


def upgraded(runs: Sequence[Run]) -> list[Run]:
    """Runs of version 1 in the present format.

    From more than three seeds the pairs cannot be had, and there is no spread.
    """
    cases: dict[Case, list[Run]] = {}
    made: list[Run] = []
    for run in runs:
        numbers = dict(run["metrics"])
        found, dead = numbers.get("found_again"), numbers.get("dead_fraction")
        if found is not None and dead is not None:
            numbers["found_again"] = found * (1 - dead)
        made.append({**run, "metrics": numbers})
        if "found_again_by_age" in run:
            cases.setdefault(case_of(run), []).append(made[-1])
    for members in cases.values():
        for run in members:
            others = [other for other in members if other is not run]
            if len(others) in (1, 2):
                run["pairs"] = {
                    str(other["seed"]): _pair(run, other, *(o for o in others if o is not other))
                    for other in others
                }
    return made


def _pair(run: Run, other: Run, *third: Run) -> Pair:
    """With one other seed the run's own numbers; with two, a pair's from three runs' means.

    The means are (ab + ac) / 2, (ab + bc) / 2 and (ac + bc) / 2, and the first two less the third
    are ab.
    """

    def of(*values: float | None) -> float | None:
        a, b, c = values if third else (values[0], 0.0, 0.0)
        return None if a is None or b is None or c is None else a + b - c

    def numbers(latents: str = "") -> Numbers:
        rows = [numbers_of(member, latents) for member in (run, other, *third)]
        return {key: of(*(row.get(key) for row in rows)) for key in ACROSS_SEEDS if key in rows[0]}

    ages = (member.get("found_again_by_age", []) for member in (run, other, *third))
    return {
        "metrics": numbers(),
        "peeking": {name: numbers(name) for name in ("revived", "never_died")},
        "found_again_by_age": [of(*values) for values in zip(*ages, strict=True)],
    }
