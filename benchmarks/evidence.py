"""One of the comparisons in docs/results, with the candidates of straight_through.py.

    python benchmarks/evidence.py docs/results/synthsaebench/topk.yaml --device cuda --output topk

The same as ``sae-lens-auxk compare --config ... --autocast true``, but that the names of the
candidates are known. Each seed may be trained by a process of its own, with an ``--output`` of its
own; their folders ``runs/seed-N`` put into one, this command makes the report of all of them.
"""

import argparse
import shlex
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import straight_through  # noqa: F401  (registers the candidates)

from sae_lens_auxk.compare.plan import Comparison
from sae_lens_auxk.compare.resolve import resolve
from sae_lens_auxk.compare.run import run_comparison


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--training_samples", type=int)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    given = {
        name: getattr(args, name)
        for name in ("seeds", "training_samples")
        if getattr(args, name) is not None
    }
    comparison = Comparison.from_file(args.config)
    comparison = replace(comparison, device=args.device, autocast=True, **given)
    command = shlex.join(["python", "benchmarks/evidence.py", *sys.argv[1:]])
    print(run_comparison(resolve(comparison), args.output, command))


if __name__ == "__main__":
    main()
