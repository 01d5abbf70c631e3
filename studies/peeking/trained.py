"""Do the measures of a latent tell junk and duplicates from features? On the SAEs of a comparison.

    sae-lens-auxk compare --config studies/peeking/comparison.yaml --output peeking/400000
    python -m studies.peeking.trained peeking/400000

Takes any comparison on a synthetic model whose SAEs are there. For each case: how many latents
fire, are junk and are duplicates, and for each measure the AUC, the probability that it is larger
for a junk latent than for another, and for a duplicate than for a feature (a latent that is
neither). "As often" is the same for junk within quarters of the latents by firing rate, since junk
fires rarely and rare directions are spread. The last column is split without the true features: the
target of a latent is the activation of the nearest latent of the next seed's SAE, on the same
samples. It has the AUC and the rank correlation with split. All are means over seeds.
"""

import argparse
import warnings
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from sae_lens.saes.sae import SAE
from safetensors.torch import load_file

import sae_lens_auxk  # noqa: F401  (registers the architectures)
from sae_lens_auxk.compare.config import Resolved
from sae_lens_auxk.compare.files import LIVES_FILENAME, read_results
from sae_lens_auxk.compare.latents import count_firings, measure_latents
from sae_lens_auxk.compare.schema import Run
from sae_lens_auxk.compare.sources import Pass, source_of
from sae_lens_auxk.compare.split import split_gain
from studies.peeking.planted import auc

MEASURES = ("firing_rate", "features_hurt", "direction_spread", "nearest_cosine", "split")


class Comparison:
    """A finished comparison on a synthetic model, and its data again."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.folder = folder
        results = read_results(folder)
        self.plan = Resolved(**results["comparison"] | {"device": device})
        self.runs = [run for run in results["runs"] if run["status"] == "finished"]
        self.source = source_of(self.plan)

    def sae(self, run: Run) -> SAE[Any]:
        return SAE.load_from_disk(self.folder / (run["folder"] or ""), device=self.plan.device)

    def lives(self, run: Run) -> dict[str, torch.Tensor]:
        return load_file(self.folder / (run["folder"] or "") / LIVES_FILENAME)

    def data(self, run: Run) -> Pass:
        """The pass of the run, with the held-out samples that it was measured on."""
        return self.source.open(run["seed"], {"": self.sae(run)})  # type: ignore[dict-item]

    def cases(self) -> Iterator[tuple[str, list[Run]]]:
        """The runs of each case."""
        names = dict.fromkeys((run["case"], run["architecture"], run["k"]) for run in self.runs)
        for key in names:
            yield (
                f"{key[0]} ({key[1]})" if key[1].startswith("auxk") else key[0],
                [r for r in self.runs if (r["case"], r["architecture"], r["k"]) == key],
            )


@torch.no_grad()
def measure_all(sae: SAE[Any], data: Pass) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Each measure (n,) of all latents that fire, and these latents (n,)."""
    x = data.held_out()
    firings = count_firings(sae, x)
    latents = (firings > 0).nonzero().flatten()
    measured = measure_latents(sae, x, latents, firings, data.true_features, data.held_out_features)
    return measured | {"firing_rate": firings[latents] / len(x)}, latents


@torch.no_grad()
def split_by_other(
    sae: SAE[Any], other: SAE[Any], x: torch.Tensor, latents: torch.Tensor
) -> torch.Tensor:
    """(n,): the split of ``latents`` with the nearest latents of another SAE for features."""
    rows, of_other = (torch.nn.functional.normalize(s.W_dec.float(), dim=-1) for s in (sae, other))
    alive = (count_firings(other, x) > 0).nonzero().flatten()
    nearest = alive[(rows[latents] @ of_other[alive].T).argmax(dim=1)]
    batches = ((sae.encode(b), other.encode(b)[:, nearest]) for b in x.split(2048))
    return split_gain(batches, latents)


def auc_as_often(values: torch.Tensor, of: torch.Tensor, firing_rate: torch.Tensor) -> float | None:
    """Mean AUC within quarters of the latents (n,) by firing rate that have both sides."""
    quarter = firing_rate.argsort().argsort() * 4 // len(firing_rate)
    areas = [auc(values[quarter == q], of[quarter == q]) for q in range(4)]
    known = [area for area in areas if area is not None]
    return mean(known) if known else None


def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Spearman's, over pairs without NaN."""
    known = ~(a.isnan() | b.isnan())
    ranks = torch.stack([a[known], b[known]]).argsort(dim=1).argsort(dim=1).float()
    return torch.corrcoef(ranks)[0, 1].item()


def cell(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{mean(known):.2f}" if known else "–"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    comparison = Comparison(args.folder, args.device)
    heads = [f"{key}: junk, duplicate" for key in MEASURES]
    heads += ["direction_spread, as often: junk", "other seed: duplicate, r"]
    print(f"| | fire | junk | duplicates | {' | '.join(heads)} |")
    print(f"|---{'|---' * (len(heads) + 3)}|")
    for name, runs in comparison.cases():
        counts: list[torch.Tensor] = []
        aucs: dict[str, list[float | None]] = {}
        measured_of: list[tuple[SAE[Any], Pass, torch.Tensor, dict[str, torch.Tensor]]] = []
        for run in runs:
            sae, data = comparison.sae(run), comparison.data(run)
            measured, latents = measure_all(sae, data)
            measured_of.append((sae, data, latents, measured))
            junk, duplicate = (measured[f"{what}_share"] > 0 for what in ("junk", "duplicate"))
            counts.append(torch.tensor([len(latents), junk.sum(), duplicate.sum()]).float())
            for key in MEASURES:
                values = measured[key]
                aucs.setdefault(f"{key} junk", []).append(auc(values, junk))
                aucs.setdefault(f"{key} duplicate", []).append(auc(values[~junk], duplicate[~junk]))
            spread, rates = measured["direction_spread"], measured["firing_rate"]
            aucs.setdefault("as often", []).append(auc_as_often(spread, junk, rates))
        for (sae, data, latents, measured), (other, *_) in pairwise(measured_of):
            by_other = split_by_other(sae, other, data.held_out(), latents)
            not_junk, duplicate = measured["junk_share"] == 0, measured["duplicate_share"] > 0
            aucs.setdefault("other", []).append(auc(by_other[not_junk], duplicate[not_junk]))
            aucs.setdefault("r", []).append(correlation(by_other, measured["split"]))
        numbers = [f"{value:.0f}" for value in torch.stack(counts).mean(dim=0)]
        numbers += [
            f"{cell(aucs[f'{key} junk'])}, {cell(aucs[f'{key} duplicate'])}" for key in MEASURES
        ]
        numbers.append(cell(aucs["as often"]))
        numbers.append(f"{cell(aucs.get('other', []))}, {cell(aucs.get('r', []))}")
        print(f"| {name} | {' | '.join(numbers)} |", flush=True)


if __name__ == "__main__":
    main()
