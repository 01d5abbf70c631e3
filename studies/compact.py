"""Make the results of a finished comparison small enough for the repository.

    python studies/compact.py studies/pursuit/heldout

Rewrites results.json in these folders. What was measured keeps five significant digits, histories
keep 50 points; settings stay as they are. The report and the tables say the same: a number that
they would show differently keeps all its digits, and so do found_again_by_age, of which they show
means, and all means of cases that the report would rank differently.
"""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sae_lens_auxk.compare.files import read_results, write_results
from sae_lens_auxk.compare.report.figures import figures_of
from sae_lens_auxk.compare.report.markdown import markdown_of
from sae_lens_auxk.compare.schema import METRICS, PEEKING, Group, Metric, Numbers, Results, Run

POINTS = 50


def compact(results: Results) -> Results:
    """The same results with fewer digits and points."""
    small: Results = {
        **results,
        "runs": [_run(run) for run in results["runs"]],
        "groups": [_group(group) for group in results["groups"]],
    }
    if _report(small) != _report(results):
        small["groups"] = results["groups"]
    return small


def _report(results: Results) -> str:
    return markdown_of(results, figures_of(results))


def _run(run: Run) -> Run:
    small: Any = {
        key: _rounded(value) if key in ("history", "density") else value
        for key, value in run.items()
    }
    small["metrics"] = _numbers(run["metrics"], METRICS)
    if run["peeking"]:
        small["peeking"] = {name: _numbers(n, PEEKING) for name, n in run["peeking"].items()}
    if run["status"] == "finished":
        small["history"] = {name: _thinned(points) for name, points in small["history"].items()}
    return small


def _group(group: Group) -> Group:
    def both(of: Any, table: Mapping[str, Metric]) -> Any:
        return {part: _numbers(of[part], table) for part in ("mean", "std")}

    peeking = {name: both(part, PEEKING) for name, part in group["peeking"].items()}
    return {**group, **both(group, METRICS), "peeking": peeking}


def _numbers(numbers: Numbers, table: Mapping[str, Metric]) -> Numbers:
    """Rounded, where the report shows the rounded number as it shows the number."""
    return {
        key: short if table[key].show(short := _rounded(value)) == table[key].show(value) else value
        for key, value in numbers.items()
    }


def _rounded(value: Any) -> Any:
    """Five significant digits; whole numbers, which may be counts, stay as they are."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    if isinstance(value, float) and not value.is_integer():
        return float(f"{value:.5g}")
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
