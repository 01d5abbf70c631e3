"""How many latents are neither dead nor useful: alive, but firing on hardly any sample.

    python studies/pursuit/rare_latents.py studies/pursuit/heldout

For each case of a comparison the number of latents that fire on a smaller share of the held-out
samples than ``--rate``, from the histogram of firing rates in results.json: mean and standard
deviation over the seeds. Latents that never fire on them are not in it.
"""

import argparse
import math
from pathlib import Path
from statistics import mean, stdev

from sae_lens_auxk.compare.files import read_results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rate", type=float, default=1e-3)
    args = parser.parse_args()
    counts: dict[tuple[str, str], list[float]] = {}
    for run in read_results(args.folder)["runs"]:
        if run["status"] == "finished":
            density = run["density"]
            bins = zip(density["log10_edges"][1:], density["counts"], strict=True)
            # The edges are quarters of a power of ten, so a bin is below the rate or it is not.
            rare = sum(n for upper, n in bins if upper <= math.log10(args.rate) + 1e-9)
            counts.setdefault((run["architecture"], run["case"]), []).append(rare)
    for (architecture, case), values in counts.items():
        spread = f" ± {stdev(values):.0f}" if len(values) > 1 else ""
        print(f"{architecture:28} {case:28} {mean(values):.0f}{spread}")


if __name__ == "__main__":
    main()
