"""Measure an SAE shared among all GPUs of a host, and write everything in one command.

    python -m benchmarks.several_gpus                # measures; 6 minutes without the losses
    python -m benchmarks.several_gpus --tables       # prints tables, docs/scale.md has some

For N = 1, 2, 4, 8, as far as there are GPUs: whole steps of ``benchmarks.scale``, whole runs of
``benchmarks.whole_run`` with GPT-2's shape, and for N > 1 ``benchmarks.shared_losses``. N = 1 is an
ordinary run, without a process group; "1, shared" is one process that is a group of its own. Jobs
that need one GPU run side by side. Results: docs/performance/several-gpus.json.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import Queue
from typing import Any, NamedTuple

import torch

from benchmarks.scale import NVLINK, RESULTS, largest_d_sae, sharded_ms, steps
from sae_lens_auxk.files import write_json

COUNTS = (1, 2, 4, 8)
SIZES = (131_072, 524_288, 1_048_576)
"""N GPUs also get N times as many latents, and with N times the last only the loss ``auxk``."""
BLOCK = 131_072
STORE = "autocast_lm"
LIMIT_S = 600


class Job(NamedTuple):
    """A module of this folder, run in ``n`` processes, and the name of its result."""

    name: str
    module: str
    n: int
    flags: list[str]


def jobs(n_gpus: int) -> Iterator[Job]:
    counts = [n for n in COUNTS if n <= n_gpus]
    whole = ["--stores", STORE, "--saes", "auxk-topk, none", "auxk-topk, auxk"]
    yield Job("steps, 1", "scale", 1, sizes(1))
    yield Job("steps, 1, shared", "scale", 1, [*sizes(1), "--shared"])
    yield Job("largest, 1", "scale", 1, largest(1))
    yield Job("run, 1", "whole_run", 1, whole)
    for n in counts[1:]:
        yield Job(f"steps, {n}", "scale", n, sizes(n))
        yield Job(f"largest, {n}", "scale", n, largest(n))
        yield Job(f"run, {n}", "scale", n, ["--whole_run", *whole])
        yield Job(f"losses, {n}", "shared_losses", n, [])


def sizes(n: int) -> list[str]:
    return ["--d_sae", *map(str, sorted({*SIZES, *(n * own for own in SIZES[:-1])}))]


def largest(n: int) -> list[str]:
    weak = [str(n * SIZES[-1])] if n > 1 else []
    return ["--d_sae", *weak, str(largest_d_sae(n) // BLOCK * BLOCK), "--variants", "auxk"]


def run(job: Job, gpus: list[int]) -> dict[str, Any]:
    """Run a job on these GPUs; its result, or what it printed last."""
    command = [sys.executable, "-m"]
    if job.n > 1:
        port = str(29_500 + gpus[0])
        command += ["torch.distributed.run", "--nproc-per-node", str(job.n), "--master-port", port]
        command += ["-m"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out.json")
        command += [f"benchmarks.{job.module}", "--device", "cuda", "--out", str(out), *job.flags]
        where = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, gpus)), "TQDM_DISABLE": "1"}
        log = Path(folder, "log.txt")
        with log.open("w") as file:
            process = subprocess.Popen(
                command, env={**os.environ, **where}, stdout=file, stderr=file
            )
            try:
                status = process.wait(timeout=LIMIT_S)
            except subprocess.TimeoutExpired:
                process.terminate()  # its ranks wait for one that ran out of memory
                status = process.wait()
        print(f"{job.name}: exit status {status}", flush=True)
        if not out.exists():
            return {"error": log.read_text()[-2000:]}
        return json.loads(out.read_text())


def measure(out: Path) -> None:
    n_gpus = torch.cuda.device_count()
    results: dict[str, Any] = {}

    def keep(job: Job, result: dict[str, Any]) -> None:
        results[job.name] = result
        write_json(out, results)

    free: Queue[int] = Queue()
    for gpu in range(n_gpus):
        free.put(gpu)

    def alone(job: Job) -> tuple[Job, dict[str, Any]]:
        gpu = free.get()
        try:
            return job, run(job, [gpu])
        finally:
            free.put(gpu)

    todo = [*jobs(n_gpus)]
    with ThreadPoolExecutor(n_gpus) as pool:
        for job, result in pool.map(alone, [job for job in todo if job.n == 1]):
            keep(job, result)
    for job in todo:
        if job.n > 1:
            keep(job, run(job, [*range(job.n)]))


# --- tables ----------------------------------------------------------------------------------


def spread(entry: dict[str, Any]) -> str:
    return f"{entry['ms']:.1f} ({entry['min']:.1f}–{entry['max']:.1f})"


def print_tables(results: dict[str, Any]) -> None:
    by_n = {
        n: {**steps(results, f"steps, {n}"), **steps(results, f"largest, {n}")}
        for n in COUNTS
        if f"steps, {n}" in results
    }
    shared = steps(results, "steps, 1, shared")
    about = results["steps, 1"]
    print(f"{about['device']}, torch {about['torch']}, commit {about['commit']}\n")
    print("| latents | loss | N | ms (minimum to maximum) | computed | GiB a GPU | NCCL, ms |")
    print("|---|---|---|---|---|---|---|")
    for d_sae, variant in sorted({key for found in by_n.values() for key in found}):
        for n, found in by_n.items():
            if (entry := found.get((d_sae, variant))) is None:
                continue
            row = f"| {d_sae:,} | `{variant}` | {n} |"
            if "ms" not in entry:
                print(row, entry["error"][:60], "| – | – | – |")
                continue
            computed = f"{sharded_ms(d_sae, n, NVLINK):.1f}" if variant == "auxk" else "–"
            nccl = f"{entry['nccl_ms']:.1f}" if n > 1 else "–"
            print(row, f"{spread(entry)} | {computed} | {entry['GiB']:.1f} | {nccl} |")
    print("\n| latents | loss | an ordinary step, ms | in a group of one process, ms |")
    print("|---|---|---|---|")
    for (d_sae, variant), entry in shared.items():
        plain = by_n[1][d_sae, variant]
        print(f"| {d_sae:,} | `{variant}` | {spread(plain)} | {spread(entry)} |")
    print("\n| loss | latents a GPU | N | ms | of N = 1 | efficiency |")
    print("|---|---|---|---|---|---|")
    for own in SIZES:
        for variant in ("none", "auxk", "pursuit"):
            for n, found in by_n.items():
                one, entry = by_n[1].get((own, variant)), found.get((n * own, variant))
                if n == 1 or one is None or entry is None or "ms" not in entry:
                    continue
                ratio = one["ms"] / entry["ms"]
                print(
                    f"| `{variant}` | {own:,} | {n} | {entry['ms']:.1f} | {one['ms']:.1f} | "
                    f"{100 * ratio:.0f}% |"
                )
    print("\n| a run with GPT-2's shape | N | tokens a second | ms a step: parts |")
    print("|---|---|---|---|")
    for n in by_n:
        for entry in results.get(f"run, {n}", {}).get("runs", []):
            parts = ", ".join(f"{name} {value:.1f}" for name, value in entry["ms"].items())
            speed = f"{entry['tokens_per_second']:,.0f}"
            print(f"| {entry['sae']} | {n} | {speed} | {parts} |")
    print("\n| precision | loss | N | first step | first ten | all 500 | all 500, other order |")
    print("|---|---|---|---|---|---|---|")
    for n in by_n:
        for entry in results.get(f"losses, {n}", {}).get("results", []):
            precision = "bfloat16 autocast" if entry["autocast"] else "float32"
            cells = [f"{value:.0e}" for value in entry["shared"].values()]
            cells.append(f"{entry['other order of the rows']['all']:.0e}")
            print(f"| {precision} | `{entry['variant']}` | {n} |", " | ".join(cells), "|")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tables", action="store_true", help="print tables, measure nothing")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.tables:
        print_tables(json.loads(args.out.read_text()))
    else:
        measure(args.out)


if __name__ == "__main__":
    main()
