"""A whole comparison: one pass a seed, each kept when it is done, and the results of all.

A folder of results:

    results.json               every number and the whole configuration
    report.html, ...           see report.py
    runs/seed-0/pass.json      the runs of a finished pass
    runs/seed-0/<case>/        an SAE as SAELens saves one for inference, with its sparsity
    runs/seed-0.partial/       the pass that is running, or was when it was killed
"""

import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from sae_lens.constants import SPARSITY_FILENAME
from sae_lens.saes.sae import SAE
from safetensors.torch import save_file
from tqdm.auto import tqdm

from sae_lens_auxk.compare.cases import Case, cases_of
from sae_lens_auxk.compare.measure import measure
from sae_lens_auxk.compare.plan import Resolved
from sae_lens_auxk.compare.report import write_report
from sae_lens_auxk.compare.sources import Source, source_of
from sae_lens_auxk.compare.train import LockstepTrainer, build_sae

RESULTS_FILENAME = "results.json"
PASS_FILENAME = "pass.json"
EXTENDABLE = ("seeds",)
"""Fields that may differ from those of the results that a folder has: a pass is one seed."""


def run_comparison(comparison: Resolved, folder: Path, command: str = "") -> Path:
    """Train what has not been trained yet, measure it, write results and report.

    Args:
        comparison: what is compared, resolved.
        folder: where to; may hold results of the same comparison, which are kept.
        command: the command line that asked for it, to be shown in the report.

    Returns:
        The path of the report. It is written, of what is finished, also when this is
        interrupted.

    Raises:
        ValueError: the folder holds the results of another comparison.
    """
    results = _load_or_begin(comparison, folder, command)
    _write_json(folder / RESULTS_FILENAME, results)
    left = [seed for seed in comparison.seeds if not _pass_file(folder, seed).exists()]
    n_done = len(comparison.seeds) - len(left)
    n_samples = comparison.training_samples
    try:
        if left:
            source = source_of(comparison)
            results["data"] = source.describe()
            with tqdm(
                desc="comparing",
                total=len(comparison.seeds) * n_samples,
                initial=n_done * n_samples,
                unit=" samples",
                unit_scale=True,
            ) as bar:
                for seed in left:
                    bar.set_postfix_str(f"seed {seed}")
                    _train_pass(comparison, source, seed, folder, bar)
                    _write_json(folder / RESULTS_FILENAME, _collect(results, comparison, folder))
    finally:
        results = _collect(results, comparison, folder)
        _write_json(folder / RESULTS_FILENAME, results)
        report = write_report(results, folder)
    return report


def load_results(folder: Path) -> dict[str, Any]:
    """``results.json`` of a folder; a ValueError if it has none."""
    path = folder / RESULTS_FILENAME
    if not path.is_file():
        raise ValueError(f"{folder} holds no comparison: there is no {RESULTS_FILENAME} in it.")
    return json.loads(path.read_text(encoding="utf-8"))


# --- a pass ----------------------------------------------------------------------------------


def _train_pass(
    comparison: Resolved, source: Source, seed: int, folder: Path, bar: "tqdm[Any]"
) -> None:
    """Train and measure all cases with one seed; the folder gets its name when all is in it."""
    final = _pass_file(folder, seed).parent
    partial = final.with_name(f"{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)

    cases = {case.slug: case for case in cases_of(comparison)}
    configs = {slug: case.sae_config(comparison, source.d_in) for slug, case in cases.items()}
    saes = {slug: build_sae(config, seed) for slug, config in configs.items()}
    data = source.open(seed, saes)
    trainer = LockstepTrainer(
        cfg=data.trainer_config,
        saes=saes,
        hook_name=data.hook_name,
        data_provider=data.batches(),
        dead_after=comparison.dead_after,
        on_samples=bar.update,
    )
    for slug, sae in trainer.fit().items():
        sae.save_inference_model(partial / slug)
        sparsity = trainer.trainers[slug].log_feature_sparsity
        save_file({"sparsity": sparsity}, partial / slug / SPARSITY_FILENAME)
    records = trainer.records
    del trainer, saes  # with the optimizers: measuring needs room too

    x = data.held_out().to(comparison.device)

    def run(slug: str) -> dict[str, Any]:
        record = records[slug]
        measured: dict[str, Any] = {}
        if record.error is None:
            try:
                sae = SAE.load_from_disk(partial / slug, device=comparison.device)
                measured = measure(sae, data, x, record)
            # One that cannot be measured is no reason to lose the others.
            except Exception as error:
                record.error = f"{type(error).__name__}: {error}"
        return {
            **_run(cases[slug], seed, "finished" if record.error is None else "failed"),
            "error": record.error,
            "sae_config": configs[slug].to_dict(),
            "folder": (final / slug).relative_to(folder).as_posix(),
            "training_samples": (record.history["samples"] or [0])[-1],
            "history": record.history,
            **measured,
        }

    with ThreadPoolExecutor(data.measured_at_once) as pool:
        runs = list(pool.map(run, cases))
    _write_json(partial / PASS_FILENAME, runs)
    partial.rename(final)


def _run(case: Case, seed: int, status: str) -> dict[str, Any]:
    """The entry of a run in results.json, with nothing measured yet."""
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
        "metrics": {},
        "density": None,
        "silent_latents": None,
        "peeking": None,
    }


def _pass_file(folder: Path, seed: int) -> Path:
    return folder / "runs" / f"seed-{seed}" / PASS_FILENAME


# --- results ---------------------------------------------------------------------------------


def _load_or_begin(comparison: Resolved, folder: Path, command: str) -> dict[str, Any]:
    if (folder / RESULTS_FILENAME).exists():
        results = load_results(folder)
        # One that has come to nothing yet, over a misspelt data set say, binds nobody.
        if any(folder.glob(f"runs/seed-*[0-9]/{PASS_FILENAME}")):
            _require_same(comparison.to_dict(), results["comparison"], folder)
            return results
    elif folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds something else than a comparison: give another --output.")
    folder.mkdir(parents=True, exist_ok=True)
    return {
        "version": 1,
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


def _require_same(new: Mapping[str, Any], old: Mapping[str, Any], folder: Path) -> None:
    """A ValueError that names the fields in which a comparison differs from a folder's."""
    new = json.loads(json.dumps(new))  # as it looks when it has been a file
    differences = [
        f"{name} is {old.get(name)!r} there and {new.get(name)!r} now"
        for name in sorted({*new, *old} - set(EXTENDABLE))
        if new.get(name) != old.get(name)
    ]
    if differences:
        raise ValueError(
            f"{folder} holds another comparison: {'; '.join(differences)}. "
            "Give another --output, or the same configuration to go on with it."
        )


def _collect(results: dict[str, Any], comparison: Resolved, folder: Path) -> dict[str, Any]:
    """The results with all passes that are finished."""
    runs: list[dict[str, Any]] = []
    finished = True
    for seed in comparison.seeds:
        path = _pass_file(folder, seed)
        if path.exists():
            runs += json.loads(path.read_text(encoding="utf-8"))
        else:
            finished = False
            runs += [_run(case, seed, "unfinished") for case in cases_of(comparison)]
    return {
        **results,
        "comparison": comparison.to_dict(),
        "finished": finished,
        "runs": runs,
        "groups": list(groups_of(runs)),
    }


def groups_of(runs: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Mean and standard deviation over seeds of the finished runs, a group a case.

    A number that some of the runs do not have is averaged over the others; the standard
    deviation is that of a sample, so None for a single run.
    """
    grouped: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs:
        if run["status"] == "finished":
            key = (run["case"], run["architecture"], run["k"])
            grouped.setdefault(key, []).append(run)
    for (case, architecture, k), members in grouped.items():
        peeking = [run["peeking"] for run in members if run["peeking"]]
        yield {
            "case": case,
            "architecture": architecture,
            "k": k,
            "n_seeds": len(members),
            **_mean_and_std([run["metrics"] for run in members]),
            "peeking": {
                which: _mean_and_std([measured[which] for measured in peeking])
                for which in ("revived", "never_died")
            },
        }


def _mean_and_std(rows: list[dict[str, float | None]]) -> dict[str, dict[str, float | None]]:
    means: dict[str, float | None] = {}
    stds: dict[str, float | None] = {}
    for name in dict.fromkeys(name for row in rows for name in row):
        values = [value for row in rows if (value := row.get(name)) is not None]
        means[name] = mean(values) if values else None
        stds[name] = stdev(values) if len(values) > 1 else None
    return {"mean": means, "std": stds}


def _write_json(path: Path, content: Any) -> None:
    """Write as JSON, NaN and infinity as null; a crash leaves the old file or the new one."""
    partial = path.with_name(f"{path.name}.partial")
    text = json.dumps(_plain(content), indent=1, allow_nan=False)
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not (abs(value) < float("inf")):
        return None
    return value


def _machine(device: str) -> str:
    """What the times were taken on, without a name or address of it."""
    cpu = f"{platform.system()} {platform.machine()}, {os.cpu_count()} CPU cores"
    if torch.device(device).type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {cpu}"
    return cpu
