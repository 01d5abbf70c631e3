"""The files of a comparison, and how its results are read and written.

A comparison's folder:

    results.json               every number and the whole configuration
    report.html, report.md     the report, and figures/*.png
    runs/seed-0/pass.json      the runs of a finished pass
    runs/seed-0/<case>/        an SAE as SAELens saves it for inference, with its sparsity and
                               the lives of its latents and the effects of some
    runs/seed-0.partial/       a pass that is running or was interrupted
    runs/seed-0.lock           the process that is working on the pass
    .lock                      the process that is writing the results

:mod:`sae_lens_auxk.compare.schema` has the format of the results.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, cast

import torch

from sae_lens_auxk.checks import require_type
from sae_lens_auxk.compare.earlier import upgraded
from sae_lens_auxk.compare.schema import (
    AGES,
    METRICS,
    PEEKING,
    VERSION,
    Metric,
    Numbers,
    Results,
    Run,
    require_in_table,
)
from sae_lens_auxk.compare.seeds import groups_of
from sae_lens_auxk.files import read_json, require_no_link, write_json

RESULTS_FILENAME = "results.json"
PASS_FILENAME = "pass.json"
LIVES_FILENAME = "lives.safetensors"
LIVES = {"dead": torch.bool, "ever_dead": torch.bool, "alive_since": torch.int64}
"""Of an SAE's latents, each (d_sae,). ``alive_since`` is the training sample at which one last came
back to life, 0 for one that never died."""
EFFECTS_FILENAME = "effects.safetensors"
"""Of ``latents``, (n,) int64 ascending: ``mse_rise``; on a language model ``ce_rise``, (n,)."""
PAGE_FILENAME = "report.html"
MARKDOWN_FILENAME = "report.md"
FIGURES_FOLDER = "figures"
RUNS_FOLDER = "runs"
REPORT_FILES = (RESULTS_FILENAME, PAGE_FILENAME, MARKDOWN_FILENAME, f"{FIGURES_FOLDER}/*.png")
"""Glob patterns for all files of a comparison except the SAEs."""


def pass_folder(folder: Path, seed: int) -> Path:
    """The folder of the pass with this seed, in the folder of a comparison."""
    return folder / RUNS_FOLDER / f"seed-{seed}"


def read_results(folder: Path) -> Results:
    """Read results.json.

    Raises:
        ValueError: the folder has no results.json, or it cannot be read, or it is not the
            results of a comparison in this version.
    """
    path = folder / RESULTS_FILENAME
    if not path.is_file():
        raise ValueError(f"{folder} holds no comparison: there is no {RESULTS_FILENAME} in it.")
    content = read_json(path)
    values = content if isinstance(content, dict) else {}
    if values.get("version") not in (1, VERSION):
        raise ValueError(f"{path} is not the results of a comparison, version {VERSION}.")
    _require_format(path, "results", {**values, "groups": []}, Results)
    runs = upgraded(values["runs"]) if values["version"] == 1 else values["runs"]
    made = {"version": VERSION, "runs": runs, "groups": [*groups_of(runs)]}
    return cast(Results, {**values, **made})


def write_results(folder: Path, results: Results) -> None:
    """Write results.json.

    Raises:
        ValueError: a run has a metric that is not in the table.
    """
    _require_rows_of(results["runs"])
    kept = {key: value for key, value in results.items() if key != "groups"}
    write_json(folder / RESULTS_FILENAME, kept)


def read_pass(folder: Path) -> list[Run]:
    """The runs of a finished pass.

    Raises:
        ValueError: the folder has no pass.json, or it cannot be read, or it is not the runs of this
            pass, with their SAEs in it.
    """
    path = folder / PASS_FILENAME
    try:
        runs = read_json(path)
        _require_format(path, "runs", runs, list[Run])
        if not runs:
            raise ValueError(f"{path} is damaged: it has no runs.")
        for run in runs:
            own = pass_folder(Path(), run["seed"]) / PurePosixPath(run["folder"] or "").name
            is_in_it = own.parent.name == folder.name and own.name != ".."
            if run["folder"] != own.as_posix() or not is_in_it:
                raise ValueError(f"{path} is damaged: the SAE of {run['name']!r} is elsewhere.")
            require_no_link(folder / own.name)
    except ValueError as error:
        raise ValueError(f"{error} Move {folder} away to train the pass again.") from error
    # An earlier version may have measured a metric that is no longer in the table.
    for run in runs:
        run["metrics"] = _in_table(run["metrics"], METRICS)
        if run["peeking"]:
            groups = run["peeking"].items()
            run["peeking"] = {name: _in_table(group, PEEKING) for name, group in groups}
    return runs


def _in_table(numbers: Numbers, table: Mapping[str, Metric]) -> Numbers:
    return {key: value for key, value in numbers.items() if key in table}


def _require_format(path: Path, name: str, content: Any, kind: Any) -> None:
    """Raise a ValueError unless the file holds what it should, in lists of fitting lengths."""
    try:
        require_type(name, content, kind)
        for run in content if isinstance(content, list) else content["runs"]:
            history, density = run["history"], run["density"]
            for of in (run, *run.get("pairs", {}).values()):
                if len(of.get("found_again_by_age", range(AGES))) != AGES:
                    raise ValueError(
                        f"found_again_by_age of {run['name']!r} must have {AGES} entries."
                    )
            if len({len(points) for points in history.values()}) > 1:
                raise ValueError(f"the lists in history of {run['name']!r} are not equally long.")
            if density and len(density["log10_edges"]) != len(density["counts"]) + 1:
                raise ValueError(f"density of {run['name']!r} must have one edge more than counts.")
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def write_pass(folder: Path, runs: list[Run]) -> None:
    """Write the runs of a finished pass; raises the same errors as :func:`write_results`."""
    _require_rows_of(runs)
    write_json(folder / PASS_FILENAME, runs)


def _require_rows_of(runs: Iterable[Run]) -> None:
    for run in runs:
        groups = (run["peeking"] or {}).values()
        require_in_table(run["metrics"], (key for group in groups for key in group))
