"""Runs a whole comparison: one pass per seed, and the results of all passes.

A finished pass is kept when a later one is interrupted. ``sae_lens_auxk.compare.files`` describes
the files.
"""

import itertools
import json
import os
import platform
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from sae_lens import SAE, TrainingSAE
from tqdm.auto import tqdm

from sae_lens_auxk.checks import require_choice
from sae_lens_auxk.compare.cases import Case, cases_of, folders_of
from sae_lens_auxk.compare.config import Resolved
from sae_lens_auxk.compare.effect import effects_of_pass
from sae_lens_auxk.compare.files import (
    FIGURES_FOLDER,
    LIVES_FILENAME,
    MARKDOWN_FILENAME,
    PAGE_FILENAME,
    PASS_FILENAME,
    RESULTS_FILENAME,
    RUNS_FOLDER,
    pass_folder,
    read_pass,
    read_results,
    write_pass,
    write_results,
)
from sae_lens_auxk.compare.locks import (
    SECONDS_BETWEEN_TRIES,
    claim,
    claim_if_free,
    is_held,
    is_lock,
)
from sae_lens_auxk.compare.measure import measure
from sae_lens_auxk.compare.plan import FirstSteps, plan_of
from sae_lens_auxk.compare.report import write_report
from sae_lens_auxk.compare.reproducibility import with_reproducibility
from sae_lens_auxk.compare.schema import VERSION, Measured, Numbers, Results, Run
from sae_lens_auxk.compare.seeds import groups_of
from sae_lens_auxk.compare.sources import Pass, Source, source_of
from sae_lens_auxk.compare.train import LockstepTrainer, TrainingLog, build_sae
from sae_lens_auxk.files import left_behind, make_folder, require_no_link, write_tensors
from sae_lens_auxk.saelens.names import SPARSITY_FILENAME
from sae_lens_auxk_cli import printable

EXTENDABLE = ("seeds", "effect")
"""Fields that may change when a comparison is continued: each pass has one seed, and effects are
measured when all passes are finished."""
NOT_MEASURED: Measured = {
    "metrics": {},
    "density": None,
    "silent_latents": None,
    "peeking": None,
}


def run_comparison(
    comparison: Resolved,
    folder: Path,
    command: str = "",
    wait: bool = False,
    say: Callable[[str], object] = lambda _: None,
) -> Path:
    """Train the passes that are missing, measure them, write the results and the report.

    Several processes may do this in one folder, each on passes that no other process is working on;
    the pass of a dead process becomes free again. Each process, when it finishes, writes the
    results of all passes finished by then, so the last one writes them all. An interrupted call
    writes them too.

    Args:
        comparison: what to compare.
        folder: where to write. Results of the same comparison in it are kept.
        command: the command line to show in the report.
        wait: whether to wait for passes that other processes are working on, and take over those of
            processes that die.
        say: what to do with the plan, before the training starts, and with an estimate of the time
            after the first steps. By default nothing.

    Returns:
        The path of the report.

    Raises:
        ValueError: the folder holds the results of another comparison, or something else.
    """
    _require_own(folder)
    with claim(folder):
        for name in (RESULTS_FILENAME, PAGE_FILENAME, MARKDOWN_FILENAME):
            for left in left_behind(folder / name):
                left.unlink()
        results = _load_or_begin(comparison, folder, command)
        comparison = _with_effect_of(results, comparison)
        for seed in comparison.seeds if not results["runs"] else ():
            runs = _runs_of(folder, seed)
            # The configuration may have been another.
            if runs and all(run["status"] == "failed" for run in runs):
                shutil.rmtree(pass_folder(folder, seed), ignore_errors=True)
        write_results(folder, results)
        say(plan_of(comparison, folder, _n_finished(comparison, folder)))
    data: dict[str, Any] = {}
    effects: dict[str, dict[str, Numbers]] = {}
    try:
        data = _train_missing(comparison, folder, wait, say)
        if comparison.effect:
            effects = _measure_effects(comparison, folder)
    finally:
        with claim(folder):
            report = _write_all(comparison, folder, data, effects)
    return report


def plan_comparison(comparison: Resolved, folder: Path) -> str:
    """What :func:`run_comparison` would say first. Raises the same errors, and writes nothing."""
    _require_own(folder)
    comparison = _with_effect_of(_load_or_begin(comparison, folder, ""), comparison)
    return plan_of(comparison, folder, _n_finished(comparison, folder))


def _train_missing(
    comparison: Resolved, folder: Path, wait: bool, say: Callable[[str], object]
) -> dict[str, Any]:
    """Train passes until none is free; return the data's description if one was trained."""
    source: Source | None = None
    data: dict[str, Any] = {}
    n_samples = comparison.training_samples
    at_start = {seed: _written(folder, seed) for seed in comparison.seeds}
    n_done = _n_finished(comparison, folder)
    make_folder(folder / RUNS_FOLDER)
    with tqdm(
        desc="comparing",
        total=len(comparison.seeds) * n_samples,
        initial=n_done * n_samples,
        unit=" samples",
        unit_scale=True,
    ) as bar:
        first_steps = FirstSteps((len(comparison.seeds) - n_done) * n_samples)

        def on_samples(n: int) -> None:
            bar.update(n)
            if estimate := first_steps.count(n):
                say(estimate)

        left = [*comparison.seeds]
        while True:
            for seed in [*left]:
                with claim_if_free(_lock_of(folder, seed)) as is_own:
                    if not is_own:
                        continue
                    left.remove(seed)
                    # What failed in another process meanwhile is not tried again by this call.
                    if _written(folder, seed) != at_start[seed] or _is_finished(folder, seed):
                        continue
                    if source is None:
                        source = source_of(comparison)
                        # Before a pass makes a synthetic model of its own: every process says the
                        # same, whichever passes it gets.
                        data = source.describe()
                    bar.set_postfix_str(f"seed {seed}")
                    _train_pass(comparison, source, seed, folder, on_samples)
                with claim(folder):
                    results = _collect(read_results(folder), comparison, folder)
                    write_results(folder, {**results, "data": data})
            if not (left and wait):
                return data
            time.sleep(SECONDS_BETWEEN_TRIES)


def _measure_effects(comparison: Resolved, folder: Path) -> dict[str, dict[str, Numbers]]:
    """The effects of single latents by the folders of runs; none before all passes are finished.

    Other processes may measure the effects of other passes at the same time.
    """
    results = _collect(read_results(folder), comparison, folder)
    runs = [run for run in results["runs"] if run["status"] == "finished"]
    effects: dict[str, dict[str, Numbers]] = {}
    if not results["finished"]:
        return effects
    source = source_of(comparison)
    cases = folders_of(cases_of(comparison))
    left = list(dict.fromkeys(run["seed"] for run in runs))
    while left:
        for seed in [*left]:
            with claim_if_free(_lock_of(folder, seed)) as is_own:
                if is_own:
                    left.remove(seed)
                    own = [run for run in runs if run["seed"] == seed]
                    # A pass is not opened without an SAE, and these could be built.
                    name = Path(own[0]["folder"] or "").name
                    require_choice(f"{pass_folder(folder, seed)}: folder", name, cases)
                    config = cases[name].sae_config(comparison, source.d_in)
                    effects |= effects_of_pass(
                        own,
                        runs if comparison.has_one_model else own,
                        source.open(seed, {"": build_sae(config, seed)}),
                        folder,
                        comparison.device,
                    )
        if left:
            time.sleep(SECONDS_BETWEEN_TRIES)
    return effects


def _write_all(
    comparison: Resolved,
    folder: Path,
    data: dict[str, Any],
    effects: Mapping[str, dict[str, Numbers]],
) -> Path:
    """Write the results of all finished passes, and the report."""
    results = _collect(read_results(folder), comparison, folder)
    results["data"] = data or results["data"]
    for run in results["runs"]:
        if (run["folder"] or "") in effects:
            run["effect"] = effects[run["folder"] or ""]
    results["groups"] = list(groups_of(results["runs"]))
    try:
        if comparison.has_one_model:
            # Not kept in a pass: a seed that is added later changes the numbers of all others.
            runs = with_reproducibility(results["runs"], folder, comparison.device)
            results["runs"], results["groups"] = runs, list(groups_of(runs))
    finally:
        write_results(folder, results)
        report = write_report(results, folder)
    return report


def _written(folder: Path, seed: int) -> int | None:
    """When the pass was written, or None."""
    path = pass_folder(folder, seed) / PASS_FILENAME
    return path.stat().st_mtime_ns if path.exists() else None


def _lock_of(folder: Path, seed: int) -> Path:
    return pass_folder(folder, seed).with_suffix(".lock")


def _is_at_work(folder: Path) -> bool:
    """Whether a process is training a pass there."""
    return any(map(is_held, (folder / RUNS_FOLDER).glob("seed-*.lock")))


# --- a pass ----------------------------------------------------------------------------------


def _train_pass(
    comparison: Resolved,
    source: Source,
    seed: int,
    folder: Path,
    on_samples: Callable[[int], None],
) -> None:
    """Train and measure all cases with one seed, or those that failed when it was trained before.

    The folder gets its name once it is complete.
    """
    final = pass_folder(folder, seed)
    partial = final.with_name(f"{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()

    cases = folders_of(cases_of(comparison))
    before = (run for run in _runs_of(folder, seed) if run["status"] == "finished")
    kept = {Path(run["folder"] or "").name: run for run in before}
    left = [slug for slug in cases if slug not in kept]
    configs = {slug: cases[slug].sae_config(comparison, source.d_in) for slug in left}
    failures: dict[str, tuple[str, str]] = {}  # the error and its traceback

    def fail(slug: str, error: Exception) -> None:
        """Note an error in one case, whatever it is: it must not cost the others."""
        trace = "".join(traceback.format_exception(error))
        failures[slug] = (f"{type(error).__name__}: {error}", trace)
        shown = printable(f"{cases[slug].title}, seed {seed}, failed. {trace}")
        tqdm.write(shown, file=sys.stderr)

    saes: dict[str, TrainingSAE[Any]] = {}
    for slug, config in configs.items():
        try:
            saes[slug] = build_sae(config, seed)
        except Exception as error:  # mostly a lack of memory
            fail(slug, error)
    logs: dict[str, TrainingLog] = {}
    measured: dict[str, Measured] = {}
    if saes:
        data = source.open(seed, saes)
        rates = {slug: lr for slug in saes if (lr := cases[slug].lr) is not None}
        logs = _train(comparison, data, saes, rates, partial, on_samples, fail)
        saes.clear()  # frees memory for the measurements
        if trained := [slug for slug in logs if slug not in failures]:
            x = data.held_out().to(comparison.device)

            def measure_one(slug: str) -> None:
                try:
                    sae = SAE.load_from_disk(partial / slug, device=comparison.device)
                    measured[slug] = measure(sae, data, x, logs[slug])
                except Exception as error:
                    fail(slug, error)

            with ThreadPoolExecutor(data.measured_at_once) as pool:
                list(pool.map(measure_one, trained))

    def run(slug: str) -> Run:
        history = logs[slug].history if slug in logs else {}
        entry: Run = {
            **_run(cases[slug], seed, "failed" if slug in failures else "finished"),
            "sae_config": configs[slug].to_dict(),
            "folder": (final / slug).relative_to(folder).as_posix(),
            "training_samples": (history.get("samples") or [0])[-1],
            "history": history,
            **measured.get(slug, NOT_MEASURED),
        }
        if slug in failures:
            entry["error"], entry["traceback"] = failures[slug]
        return entry

    write_pass(partial, [kept[slug] if slug in kept else run(slug) for slug in cases])
    if not final.exists():
        partial.rename(final)
        return
    # pass.json comes last: until then the cases count as failed.
    for path in sorted(partial.iterdir(), key=Path.is_file):
        shutil.rmtree(final / path.name, ignore_errors=True)
        path.replace(final / path.name)
    partial.rmdir()


def _train(
    comparison: Resolved,
    data: Pass,
    saes: dict[str, TrainingSAE[Any]],
    learning_rates: Mapping[str, float],
    partial: Path,
    on_samples: Callable[[int], None],
    fail: Callable[[str, Exception], None],
) -> dict[str, TrainingLog]:
    """Train the SAEs and save those that do not fail; return what was logged of each."""
    trainer = LockstepTrainer(
        cfg=data.trainer_config,
        saes=saes,
        hook_name=data.hook_name,
        data_provider=data.batches(),
        dead_after=comparison.dead_after,
        learning_rates=learning_rates,
        on_samples=on_samples,
        on_failure=fail,
    )
    for slug, sae in trainer.fit().items():
        sae.save_inference_model(partial / slug)
        sparsity = trainer.trainers[slug].log_feature_sparsity
        write_tensors(partial / slug / SPARSITY_FILENAME, {"sparsity": sparsity})
        log = trainer.logs[slug]
        lives = {"dead": log.dead, "ever_dead": log.ever_dead, "alive_since": log.alive_since}
        write_tensors(partial / slug / LIVES_FILENAME, lives)
    return trainer.logs


def _run(case: Case, seed: int, status: Literal["finished", "failed", "unfinished"]) -> Run:
    """The entry of a run that has not been measured."""
    return {
        "name": f"{case.title}, seed {seed}",
        "case": case.name,
        "architecture": case.architecture,
        "k": case.k,
        "seed": seed,
        "status": status,
        "error": None,
        "sae_config": {},
        "folder": None,
        "training_samples": 0,
        "history": {},
        **NOT_MEASURED,
    }


def _runs_of(folder: Path, seed: int) -> list[Run]:
    """The runs of the pass, if it exists. Raises a ValueError if something else has its name."""
    path = pass_folder(folder, seed)
    return read_pass(path) if path.exists() else []


def _is_finished(folder: Path, seed: int) -> bool:
    """Whether every case of the pass is trained and measured."""
    runs = _runs_of(folder, seed)
    return bool(runs) and all(run["status"] == "finished" for run in runs)


def _n_finished(comparison: Resolved, folder: Path) -> int:
    return sum(_is_finished(folder, seed) for seed in comparison.seeds)


# --- results ---------------------------------------------------------------------------------


def _require_own(folder: Path) -> None:
    """Refuse a folder that holds something else, before anything in it is touched."""
    passes = [*(folder / RUNS_FOLDER).glob("seed-*[0-9]")]
    for path in (folder / RUNS_FOLDER, folder / FIGURES_FOLDER, *passes):
        require_no_link(path)
    found = {*folder.iterdir()} if folder.exists() else set[Path]()
    if folder / RESULTS_FILENAME in found:
        try:
            if "seeds" not in read_results(folder)["comparison"]:
                raise ValueError(f"{folder / RESULTS_FILENAME} was not written by this command.")
        except ValueError as error:
            raise ValueError(f"{error} Give another --output.") from error
    # After a kill at the very first write, only our own files are here.
    elif found - {*left_behind(folder / RESULTS_FILENAME), *filter(is_lock, found)}:
        raise ValueError(f"{folder} does not hold a comparison: give another --output.")


def _load_or_begin(comparison: Resolved, folder: Path, command: str) -> Results:
    if (folder / RESULTS_FILENAME).exists():
        results = read_results(folder)
        are_there = (folder / RUNS_FOLDER).is_dir()
        if not are_there and any(run.get("status") == "finished" for run in results["runs"]):
            raise ValueError(
                f"{folder} has results whose SAEs are elsewhere, and they would be lost: give "
                "another --output."
            )
        # Without a finished pass there is nothing to lose, so the configuration may change.
        passes = (folder / RUNS_FOLDER).glob(f"seed-*[0-9]/{PASS_FILENAME}")
        runs = itertools.chain(*(read_pass(path.parent) for path in passes))
        if any(run["status"] == "finished" for run in runs) or _is_at_work(folder):
            _require_same(comparison.to_dict(), results["comparison"], folder)
            return results
    return {
        "version": VERSION,
        "name": folder.resolve().name,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "finished": False,
        "machine": _machine(comparison.device),
        "packages": {name: version(name) for name in ("sae-lens", "torch", "sae-lens-auxk")},
        "comparison": comparison.to_dict(),
        "command": command,
        "data": {},
        "runs": [],
        "groups": [],
    }


def _with_effect_of(results: Results, comparison: Resolved) -> Resolved:
    """The comparison, with effects if the results have them: they would be lost."""
    has_effect = comparison.effect or results["comparison"].get("effect", False)
    return replace(comparison, effect=has_effect)


def _require_same(new: Mapping[str, Any], old: Mapping[str, Any], folder: Path) -> None:
    """Raise a ValueError that names the fields in which two comparisons differ."""
    new = json.loads(json.dumps(new))  # JSON has no tuples
    differences = [
        f"{name} is {old.get(name)!r} there and {new.get(name)!r} now"
        for name in sorted({*new, *old} - set(EXTENDABLE))
        if new.get(name) != old.get(name)
    ]
    if differences:
        raise ValueError(
            f"{folder} holds another comparison: {'; '.join(differences)}. "
            "Give another --output, or the same configuration to continue it."
        )


def _collect(results: Results, comparison: Resolved, folder: Path) -> Results:
    """The results with the runs of all finished passes, also of those not asked for again."""
    runs: list[Run] = []
    seeds: list[int] = []
    finished = True
    for seed in dict.fromkeys([*results["comparison"]["seeds"], *comparison.seeds]):
        if of_seed := _runs_of(folder, seed):
            runs += of_seed
        elif seed in comparison.seeds:
            finished = False
            runs += [_run(case, seed, "unfinished") for case in cases_of(comparison)]
        else:
            continue
        seeds.append(seed)
    return {
        **results,
        "comparison": {**comparison.to_dict(), "seeds": seeds},
        "finished": finished,
        "runs": runs,
        "groups": list(groups_of(runs)),
    }


def _machine(device: str) -> str:
    """The hardware that the times were taken on, without the machine's name or address."""
    cpu = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores"
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {cpu}"
    return cpu
