"""Where do the features go that never-died latents hold with one loss and not with another?

    python -m studies.never-died.run FOLDER --losses auxk pursuit --out never-died.json
    python -m studies.never-died.run --table never-died.json

FOLDER is a comparison with its SAEs. With equal seeds and sizes, its cases start from the same
weights and see the same data, so latent i of one is latent i of the other. The table has the
latents that never died with either loss, and how many of them another seed finds again with each.
*lost* are those found again with the first loss only. The columns after it say who holds their
direction (cosine above 0.7 with the decoder row of the first loss) with the second loss in the same
seed: the first of *itself*, a *revived* latent, another that *never died*, or *nobody*.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from sae_lens.constants import SAE_WEIGHTS_FILENAME
from safetensors.torch import load_file

from benchmarks.made_by import commit
from sae_lens_auxk.compare.files import LIVES_FILENAME, read_results
from sae_lens_auxk.compare.latents import has_signed_rows
from sae_lens_auxk.compare.reproducibility import best_cosines
from sae_lens_auxk.compare.schema import FOUND_AGAIN, Metric, Run
from sae_lens_auxk.files import write_json
from studies.over_seeds import cells, over_seeds
from studies.tables import architecture_of, markdown

Numbers = dict[str, float]
HOLDERS = ("itself", "revived", "never died", "nobody")
COLUMNS = {
    "never died with both": Metric("never died with both", 0, "Their number."),
    "found again, first": Metric("found again, first", 1, "Share of them.", percent=True),
    "found again, second": Metric("found again, second", 1, "Share of them.", percent=True),
    "lost": Metric("lost", 0, "Number of those found again with the first loss only."),
    "gained": Metric("gained", 0, "Number of those found again with the second loss only."),
    "itself": Metric("lost: held by itself", 1, "Share of the lost.", percent=True),
    "revived": Metric("a revived latent", 1, "Share of the lost.", percent=True),
    "never died": Metric("one that never died", 1, "Share of the lost.", percent=True),
    "nobody": Metric("nobody", 1, "Share of the lost.", percent=True),
}
"""Of the table, by the number that each column shows."""


@dataclass(frozen=True)
class Latents:
    """All latents of a run: decoder rows (d_sae, d_in); alive and ever_dead are (d_sae,)."""

    decoder: torch.Tensor
    alive: torch.Tensor
    ever_dead: torch.Tensor


def load(run: Run, folder: Path, device: str) -> Latents:
    sae = folder / (run["folder"] or "")
    lives = load_file(sae / LIVES_FILENAME, device=device)
    decoder = load_file(sae / SAE_WEIGHTS_FILENAME, device=device)["W_dec"].float()
    return Latents(decoder, ~lives["dead"], lives["ever_dead"])


def found_again(runs: dict[int, Latents], seed: int, signed: bool) -> torch.Tensor:
    """(d_sae,): the share of the other seeds in which a latent has a good match."""
    own = runs[seed].decoder
    others = [run.decoder[run.alive] for other, run in runs.items() if other != seed]
    found = [best_cosines(own, other, signed)[0] > FOUND_AGAIN for other in others]
    return torch.stack(found).float().mean(dim=0)


def of_seed(
    first: dict[int, Latents], second: dict[int, Latents], seed: int, signed: bool
) -> Numbers:
    a, b = first[seed], second[seed]
    both = ~a.ever_dead & ~b.ever_dead
    with_a, with_b = (found_again(runs, seed, signed) for runs in (first, second))
    lost = both & (with_a == 1) & (with_b == 0)
    own = torch.nn.functional.cosine_similarity(a.decoder, b.decoder, dim=1)
    held = {"itself": (own if signed else own.abs()) > FOUND_AGAIN}
    for name, group in (("revived", b.ever_dead & b.alive), ("never died", ~b.ever_dead)):
        held[name] = best_cosines(a.decoder, b.decoder[group], signed)[0] > FOUND_AGAIN
    held["nobody"] = torch.ones_like(lost)
    left = lost.clone()
    shares: Numbers = {}
    for name in HOLDERS:
        shares[name] = (left & held[name]).sum().item() / max(int(lost.sum()), 1)
        left &= ~held[name]
    return {
        "never died with both": int(both.sum()),
        "found again, first": with_a[both].mean().item(),
        "found again, second": with_b[both].mean().item(),
        "lost": int(lost.sum()),
        "gained": int((both & (with_a == 0) & (with_b == 1)).sum()),
        **shares,
    }


def of_folder(folder: Path, losses: list[str], device: str) -> list[dict[str, Any]]:
    cases: dict[tuple[str, float | None], dict[str, list[Run]]] = {}
    for run in read_results(folder)["runs"]:
        if run["status"] == "finished" and run["case"] in losses:
            key = (architecture_of(run), run["k"])
            cases.setdefault(key, {}).setdefault(run["case"], []).append(run)
    results: list[dict[str, Any]] = []
    for (architecture, k), runs in cases.items():
        if len(runs) < len(losses):
            continue
        first, second = (
            {run["seed"]: load(run, folder, device) for run in runs[name]} for name in losses
        )
        seeds = [*first]
        each = [of_seed(first, second, seed, has_signed_rows(architecture)) for seed in seeds]
        results.append(
            {
                "architecture": architecture,
                "k": k,
                "losses": losses,
                "seeds": seeds,
                **over_seeds(each),
            }
        )
    if not results:
        raise SystemExit(f"{folder} has no architecture with finished runs of both {losses}.")
    return results


def table(results: list[dict[str, Any]]) -> str:
    heads = ["architecture", "losses", *(metric.label for metric in COLUMNS.values())]
    rows = [[r["architecture"], ", ".join(r["losses"]), *cells(r, COLUMNS)] for r in results]
    return markdown(heads, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", help="a comparison with its SAEs")
    parser.add_argument("--losses", nargs=2, default=["auxk", "pursuit"], metavar="CASE")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("never-died.json"))
    parser.add_argument("--table", type=Path, nargs="+", help="print such files, compute nothing")
    args = parser.parse_args()
    if args.table is None:
        results = of_folder(args.folder, args.losses, args.device)
        write_json(args.out, {"commit": commit(), "folder": args.folder.name, "results": results})
        args.table = [args.out]
    print(table([r for path in args.table for r in json.loads(path.read_text())["results"]]))


if __name__ == "__main__":
    main()
