"""Kill comparisons at random times and check that the same command still gets the results.

Each round starts a small comparison, kills it, and starts the same command twice at once. The two
share the remaining passes, and both must finish. results.json must then equal that of an
undisturbed comparison, apart from the step times and the start time.
"""

import itertools
import json
import multiprocessing
import os
import time
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from sae_lens_auxk.cli.compare import compare
from sae_lens_auxk.compare import report
from sae_lens_auxk.compare.files import read_results
from sae_lens_auxk.compare.report import page
from tests.fuzz import LENGTH, some_random

COMMAND = (
    "--aux_variant none auxk --k 2 --seeds 0 1 2 --d_sae 24 --training_samples 1600 "
    "--batch_size 32 --dead_after 128 --eval_samples 256 --n_features 32 --d_in 12 --output out"
)


def start(folder: Path, command: str = COMMAND) -> BaseProcess:
    """A process that runs the command in the folder."""
    # Imports take longer than a comparison.
    process = multiprocessing.get_context("fork").Process(target=_run, args=(folder, command))
    process.start()
    return process


def _run(folder: Path, command: str) -> None:
    os.chdir(folder)
    said = os.open(f"{os.getpid()}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(said, 1)
    os.dup2(said, 2)
    # Drawing takes most of the time of so small a comparison.
    report.png = lambda figure, file: file.write(figure.name.encode())  # type: ignore[assignment]
    page.svg = lambda figure: figure.name
    os._exit(compare(command.split()))


def comparable(folder: Path) -> Any:
    """results.json without what differs from one undisturbed run to the next."""
    results: Any = read_results(folder / "out")
    del results["created"]
    for numbers in (
        *(run["metrics"] for run in results["runs"]),
        *(group[which] for group in results["groups"] for which in ("mean", "std")),
    ):
        del numbers["ms_per_step"]
    return json.dumps(results, sort_keys=True)


def test_a_killed_comparison_is_finished_by_the_same_command(tmp_path: Path) -> None:
    rng = some_random()
    counts = dict.fromkeys(("killed", "with a pass done", "equal"), 0)
    whole = tmp_path / "whole"
    whole.mkdir()
    begin = time.perf_counter()
    undisturbed = start(whole)
    undisturbed.join()
    assert undisturbed.exitcode == 0
    seconds = time.perf_counter() - begin
    expected = comparable(whole)
    for i in itertools.count():
        folder = tmp_path / str(i)
        folder.mkdir()
        victim = start(folder)
        victim.join(rng.uniform(0, seconds))
        victim.kill()
        victim.join()
        if victim.exitcode == 0:  # it was faster
            continue
        assert victim.exitcode == -9
        counts["killed"] += 1
        counts["with a pass done"] += any(folder.glob("out/runs/*[0-9]/pass.json"))
        both = [start(folder), start(folder)]
        for process in both:
            process.join()
        statuses = sorted(process.exitcode or 0 for process in both)
        assert statuses == [0, 0], statuses
        counts["equal"] += comparable(folder) == expected
        if counts["killed"] == 2 * LENGTH:
            break
    print("\n" + ", ".join(f"{n} {what}" for what, n in counts.items()))
    assert counts["equal"] == counts["killed"]
    assert counts["with a pass done"]


def test_reports_beside_a_running_comparison(tmp_path: Path) -> None:
    statuses: list[int | None] = []
    for i in range(LENGTH):
        folder = tmp_path / str(i)
        folder.mkdir()
        running = start(folder)
        while not (folder / "out" / "results.json").exists():
            time.sleep(0.01)
        while running.is_alive():
            both = [start(folder, "--report_only out") for _ in range(2)]
            for process in both:
                process.join()
                statuses.append(process.exitcode)
        running.join()
        statuses.append(running.exitcode)
    print(f"\n{statuses.count(0)} of {len(statuses)} ended well")
    assert {*statuses} == {0}
