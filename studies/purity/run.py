"""Does each latent hold one true feature, or parts of several?

    python -m studies.purity.run FOLDER --out purity.json
    python -m studies.purity.run --table purity.json

FOLDER is a comparison on a synthetic model, with its SAEs. For each latent that is alive, the table
has its best cosine and its second best cosine with a true feature (means over the latents), and
the share of latents whose second best is above 0.3: those that mix features. True features
have small cosines with each other. *Revived* latents were dead once.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from sae_lens.util import cosine_similarities

from benchmarks.made_by import commit
from sae_lens_auxk.compare.config import Resolved
from sae_lens_auxk.compare.files import read_results
from sae_lens_auxk.compare.reproducibility import Alive, alive_latents
from sae_lens_auxk.compare.schema import Metric
from sae_lens_auxk.compare.sources import Synthetic
from sae_lens_auxk.files import write_json
from studies.over_seeds import cells, over_seeds
from studies.tables import ARCHITECTURES, LOSSES, architecture_of, case_of, markdown

MIXED = 0.3
"""A latent whose second best cosine is above this holds a part of a second feature."""
GROUPS = ("", ", revived", ", never died")
BEST = Metric("best cosine", 3, "Largest cosine of a latent with a true feature.")
SHARE = Metric("mixed", 1, "Share of the latents that mix features.", percent=True)
COLUMNS = {
    "best": BEST,
    "second": Metric("second best cosine", 3, "Second largest cosine with a true feature."),
    "mixed": SHARE,
    "best, revived": replace(BEST, label="best cosine, revived"),
    "best, never died": replace(BEST, label="best cosine, never died"),
    "mixed, revived": replace(SHARE, label="mixed, revived"),
    "mixed, never died": replace(SHARE, label="mixed, never died"),
}
"""Of the table, by the number that each column shows."""


def purity(latents: Alive, features: torch.Tensor) -> dict[str, float]:
    """Of the alive latents of a run; ``features`` is (n_features, d_in)."""
    cosines = cosine_similarities(latents.decoder, features)
    best, second = cosines.topk(2, dim=1).values.unbind(dim=1)
    measured = {"best": best, "second": second, "mixed": (second > MIXED).float()}
    every = torch.ones_like(latents.ever_dead)
    members = dict(zip(GROUPS, (every, latents.ever_dead, ~latents.ever_dead), strict=True))
    return {
        f"{key}{group}": values[own].mean().item()
        for key, values in measured.items()
        for group, own in members.items()
    }


def of_folder(folder: Path, device: str) -> list[dict[str, Any]]:
    results = read_results(folder)
    comparison = Resolved(**results["comparison"] | {"device": device})
    if comparison.model_name or not comparison.has_one_model:
        raise SystemExit(f"{folder} is not a comparison on one synthetic model for all seeds.")
    features = Synthetic(comparison).model.feature_dict.feature_vectors.detach()
    of_runs: dict[tuple[str, str], dict[int, dict[str, float]]] = {}
    for run in results["runs"]:
        latents = alive_latents(run, folder, device) if run["status"] == "finished" else None
        if latents is not None:
            of_run = purity(latents, features)
            of_runs.setdefault((architecture_of(run), case_of(run)), {})[run["seed"]] = of_run
    return [
        {
            "architecture": architecture,
            "case": case,
            "seeds": [*of_seeds],
            **over_seeds([*of_seeds.values()]),
        }
        for (architecture, case), of_seeds in of_runs.items()
    ]


def table(results: list[dict[str, Any]]) -> str:
    heads = ["architecture", "loss", *(metric.label for metric in COLUMNS.values())]
    rows = [
        [ARCHITECTURES[r["architecture"]], LOSSES[r["case"]], *cells(r, COLUMNS)] for r in results
    ]
    return markdown(heads, rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", help="a comparison with its SAEs")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("purity.json"))
    parser.add_argument("--table", type=Path, help="print such a file, compute nothing")
    args = parser.parse_args()
    if args.table is None:
        results = of_folder(args.folder, args.device)
        write_json(args.out, {"commit": commit(), "folder": args.folder.name, "results": results})
        args.table = args.out
    print(table(json.loads(args.table.read_text())["results"]))


if __name__ == "__main__":
    main()
