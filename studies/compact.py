"""Make the results of a finished comparison small enough for the repository.

    python studies/compact.py studies/pursuit/heldout

Rewrites results.json in these folders. What was measured keeps five significant digits, or as many
more as the report needs to say the same. Histories keep 50 points, settings stay as they are.
"""

import argparse
from pathlib import Path
from typing import Any

from sae_lens_auxk.compare.files import read_results, write_results
from sae_lens_auxk.compare.report.figures import figures_of
from sae_lens_auxk.compare.report.markdown import markdown_of
from sae_lens_auxk.compare.schema import Results, Run
from sae_lens_auxk.compare.seeds import groups_of

POINTS = 50
DIGITS = 5
MEASURED = ("metrics", "peeking", "found_again_by_age", "pairs")


def compact(results: Results) -> Results:
    """The same results with fewer digits and points."""
    given: Results = {**results, "groups": list(groups_of(results["runs"]))}
    digits, report = DIGITS, ""
    while True:
        runs = [rounded(run, digits) for run in results["runs"]]
        small: Results = {**results, "runs": runs, "groups": list(groups_of(runs))}
        if small == given:
            return small
        report = report or _report(given)
        if _report(small) == report:
            return small
        digits += 1


def _report(results: Results) -> str:
    return markdown_of(results, figures_of(results))


def rounded(run: Run, digits: int) -> Run:
    small: Any = {
        **run,
        "history": _rounded(run["history"], DIGITS),
        "density": _rounded(run["density"], DIGITS),
        **{part: _rounded(run[part], digits) for part in MEASURED if part in run},
    }
    if run["status"] == "finished":
        small["history"] = {name: _thinned(points) for name, points in small["history"].items()}
    return small


def _rounded(value: Any, digits: int) -> Any:
    """Whole numbers, which may be counts, stay as they are."""
    if isinstance(value, dict):
        return {key: _rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item, digits) for item in value]
    if isinstance(value, float) and not value.is_integer():
        return float(f"{value:.{digits}g}")
    return value


def _thinned(points: list[Any]) -> list[Any]:
    """Evenly spaced points, with the first and the last."""
    if len(points) <= POINTS:
        return points
    return [points[round(i * (len(points) - 1) / (POINTS - 1))] for i in range(POINTS)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="+")
    for folder in parser.parse_args().folder:
        write_results(folder, compact(read_results(folder)))


if __name__ == "__main__":
    main()
