"""Are revived latents worse than others, or only younger?

A latent that came back at sample s of a training of T samples has had T - s samples to learn. The
control has had as many and was never dead: the latents that never died in a training of T - s
samples, with the same weights and data to begin with. Those of the full training are the level to
reach.

    for n in 50000 100000 200000 400000; do
        sae-lens-auxk compare --config studies/peeking/comparison.yaml \\
            --training_samples $n --output peeking/$n
    done
    python -m studies.peeking.age peeking/400000 peeking/50000 peeking/100000 peeking/200000

Prints, for each case and each short training's length, the revived latents of the full training
whose age is within a factor of sqrt(2) of it, and in brackets the never-dead latents of the short
training that fire as often; each number is over the latents of all seeds.
"""

import argparse
import warnings
from pathlib import Path

import torch

from sae_lens_auxk.compare.peeking import nearest_in_rate
from sae_lens_auxk.compare.schema import Run
from studies.peeking.trained import Comparison, measure_all

MEASURES = ("firing_rate", "junk_share", "duplicate_share", "features_hurt", "direction_spread")
WITHIN = 2**0.5


def of_never_died(comparison: Comparison, run: Run) -> dict[str, torch.Tensor]:
    """Each measure (n,) of the latents of an SAE that fire and never died."""
    measured, latents = measure_all(comparison.sae(run), comparison.data(run))
    never_died = ~comparison.lives(run)["ever_dead"][latents]
    return {key: values[never_died] for key, values in measured.items()}


def of_revived(comparison: Comparison, run: Run) -> dict[str, torch.Tensor]:
    """Each measure (n,) of the latents of an SAE that fire and came back, and their age."""
    measured, latents = measure_all(comparison.sae(run), comparison.data(run))
    lives = comparison.lives(run)
    revived = (lives["ever_dead"] & ~lives["dead"])[latents]
    age = comparison.plan.training_samples - lives["alive_since"][latents]
    return {key: values[revived] for key, values in (measured | {"age": age}).items()}


def row(revived: list[dict[str, torch.Tensor]], never_died: list[dict[str, torch.Tensor]]) -> str:
    """Cells: the number of latents and the mean of each measure, control in brackets."""
    matched: list[dict[str, torch.Tensor]] = []
    distinct = 0
    for ours, theirs in zip(revived, never_died, strict=True):
        rates = torch.cat([ours["firing_rate"], theirs["firing_rate"]])
        n = len(ours["firing_rate"])
        chosen = nearest_in_rate(rates, torch.arange(n), torch.arange(n, len(rates))) - n
        matched.append({key: values[chosen] for key, values in theirs.items()})
        distinct += chosen.unique().numel()
    n_revived = sum(len(ours["firing_rate"]) for ours in revived)
    cells = [f"{n_revived} ({distinct})"]
    for key in MEASURES:
        a, b = (torch.cat([of_seed[key] for of_seed in group]) for group in (revived, matched))
        middle = torch.median if key == "firing_rate" else torch.mean
        cells.append(f"{middle(a):.3f} ({middle(b):.3f})" if n_revived and distinct else "–")
    return " | ".join(cells)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("full", type=Path)
    parser.add_argument("short", type=Path, nargs="+")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    full = Comparison(args.full, args.device)
    shorts = [Comparison(path, args.device) for path in args.short]
    print(f"| | age | latents | {' | '.join(MEASURES)} |")
    print(f"|---{'|---' * (len(MEASURES) + 2)}|")
    for (name, runs), *short_runs in zip(
        full.cases(), *(short.cases() for short in shorts), strict=True
    ):
        revived = [of_revived(full, run) for run in runs]
        for short, (_, runs_there) in zip(shorts, short_runs, strict=True):
            n = short.plan.training_samples
            of_age = [
                {key: values[in_bin] for key, values in of_seed.items()}
                for of_seed in revived
                for in_bin in [(of_seed["age"] > n / WITHIN) & (of_seed["age"] <= n * WITHIN)]
            ]
            never_died = [of_never_died(short, run) for run in runs_there]
            print(f"| {name} | {n} | {row(of_age, never_died)} |", flush=True)
        at_the_end = [of_never_died(full, run) for run in runs]
        print(f"| {name} | any; end | {row(revived, at_the_end)} |", flush=True)


if __name__ == "__main__":
    main()
