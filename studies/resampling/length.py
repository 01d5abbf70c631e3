"""How long must a resampled latent's encoder vector be in the TopK family?

Bricken et al. 2023 gave it 0.2 times the mean length of the living latents'. This tries other
lengths, with no auxiliary loss, otherwise as in config.yaml beside it:

    python studies/resampling/length.py --output resampled-length
"""

import argparse
from dataclasses import replace
from pathlib import Path

from sae_lens_auxk.compare.checks import resolve
from sae_lens_auxk.compare.config import Comparison
from sae_lens_auxk.compare.run import run_comparison
from sae_lens_auxk.step.sparse import SparseTopK


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("resampled-length"))
    parser.add_argument("--lengths", type=float, nargs="+", default=[0.2, 0.5, 1.0, 2.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    comparison = Comparison.from_file(Path(__file__).with_name("config.yaml"))
    cases = [case for case in comparison.cases if case["name"] == "none, resampled"]
    for length in args.lengths:
        SparseTopK.resampled_length = length
        folder = args.output / f"{length:g}"
        folder.mkdir(parents=True, exist_ok=True)
        print(run_comparison(resolve(replace(comparison, cases=cases, seeds=args.seeds)), folder))


if __name__ == "__main__":
    main()
