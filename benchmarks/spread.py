"""One comparison as many processes, a seed and a few cases each, on all GPUs of a machine.

    python benchmarks/spread.py --config A.yaml B.yaml --output FOLDER [--cases_each 4]

Each process is a ``sae-lens-auxk compare`` with its own folder in FOLDER/parts. Processes take the
GPUs in turn; without a GPU they all take the CPU. What they have finished is joined in FOLDER/A,
FOLDER/B, as one process would have written it, but for the times a step, which were taken beside
other processes. A part that failed is named and left out. Begun again, it trains what is missing.
"""

import argparse
import importlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import yaml

from sae_lens_auxk.compare.plan import Comparison
from sae_lens_auxk.compare.resolve import resolve
from sae_lens_auxk.compare.run import run_comparison
from sae_lens_auxk.result_files import (
    pass_folder,
    read_pass,
    read_results,
    write_pass,
    write_results,
)


@dataclass(frozen=True)
class Part:
    """One seed and some cases of the comparison ``whole``, and their folder."""

    whole: str
    comparison: Comparison
    folder: Path

    @property
    def seed(self) -> int:
        return self.comparison.seeds[0]

    @property
    def is_finished(self) -> bool:
        return pass_folder(self.folder, self.seed).exists()

    def start(self, imports: list[str], device: int | None) -> "subprocess.Popen[bytes]":
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        config = self.folder.with_suffix(".yaml")
        config.write_text(yaml.safe_dump(self.comparison.to_dict()), encoding="utf-8")
        command = [sys.executable, "-m", "sae_lens_auxk", "compare", "--config", str(config)]
        command += ["--output", str(self.folder)]
        if imports:
            command += ["--import", *imports]
        environment = dict(os.environ)
        if device is not None:
            environment["CUDA_VISIBLE_DEVICES"] = str(device)
        with self.folder.with_suffix(".log").open("wb") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def parts_of(name: str, whole: Comparison, cases_each: int, folder: Path) -> Iterator[Part]:
    for first in range(0, len(whole.cases), cases_each):
        cases = whole.cases[first : first + cases_each]
        for seed in whole.seeds:
            own = folder / "parts" / f"{name}-cases-{first}-seed-{seed}"
            yield Part(name, replace(whole, cases=cases, seeds=[seed]), own)


def join(whole: Comparison, parts: list[Part], folder: Path) -> None:
    """Put the finished passes of the parts together, and measure what needs all seeds."""
    finished = [part for part in parts if part.is_finished]
    if not finished:
        return
    shutil.rmtree(folder, ignore_errors=True)
    for seed in dict.fromkeys(part.seed for part in finished):
        joined = pass_folder(folder, seed)
        runs = []
        for part in finished:
            if part.seed == seed:
                shutil.copytree(pass_folder(part.folder, seed), joined, dirs_exist_ok=True)
                runs += read_pass(pass_folder(part.folder, seed))
        write_pass(joined, runs)
    seeds = [seed for seed in whole.seeds if pass_folder(folder, seed).exists()]
    comparison = resolve(replace(whole, seeds=seeds))
    begun = read_results(finished[0].folder)
    write_results(folder, {**begun, "name": folder.name, "comparison": comparison.to_dict()})
    run_comparison(comparison, folder, command=begun["command"])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, nargs="+", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cases_each", type=int, default=4)
    parser.add_argument("--import", dest="imports", nargs="+", default=[])
    parser.add_argument("--training_samples", type=int, help="instead of the configs' own")
    parser.add_argument("--join_only", action="store_true", help="join what is finished")
    args = parser.parse_args()
    for module in args.imports:  # joining resolves the cases in this process
        importlib.import_module(module)
    wholes = {path.stem: Comparison.from_file(path) for path in args.config}
    if args.training_samples:
        samples = args.training_samples
        wholes = {n: replace(whole, training_samples=samples) for n, whole in wholes.items()}
    parts = [
        part
        for name, whole in wholes.items()
        for part in parts_of(name, whole, args.cases_each, args.output)
    ]
    missing = [] if args.join_only else [part for part in parts if not part.is_finished]
    n_gpus = torch.cuda.device_count()
    processes = [
        part.start(args.imports, i % n_gpus if n_gpus else None) for i, part in enumerate(missing)
    ]
    for part, process in zip(missing, processes, strict=True):
        if process.wait():
            print(f"{part.folder.name} failed: see {part.folder.with_suffix('.log')}")
    for name, whole in wholes.items():
        join(whole, [part for part in parts if part.whole == name], args.output / name)


if __name__ == "__main__":
    main()
