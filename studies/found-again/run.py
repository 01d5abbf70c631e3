"""Does a good cosine with another seed tell a true feature from junk? On synthetic models.

    python studies/found-again/run.py FOLDER    # 7 minutes on 2 busy CPU cores

Trains SAEs in FOLDER, on a model that is hard for them and on one that is easy. Of every alive
latent it takes the best cosine with each other seed, which ``found_again`` thresholds, and the best
cosine with a true feature; one of JUNK or more makes it a true latent. Prints the tables of
tables.md and writes FOLDER/found_again.json.
"""

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from sae_lens import logger as sae_lens_logger
from sae_lens.saes.sae import SAE
from sae_lens.synthetic import SyntheticModel
from sae_lens.util import cosine_similarities

from sae_lens_auxk.compare.checks import resolve
from sae_lens_auxk.compare.config import Comparison, Resolved
from sae_lens_auxk.compare.files import read_results
from sae_lens_auxk.compare.reproducibility import alive_latents, best_cosines
from sae_lens_auxk.compare.run import run_comparison
from sae_lens_auxk.compare.schema import FOUND_AGAIN, JUNK, Run
from sae_lens_auxk.files import write_json

TRAININGS: dict[str, dict[str, Any]] = {
    "hard": {"n_features": 512, "d_sae": 512, "training_samples": 160_000},
    "easy": {"n_features": 256, "d_sae": 256, "training_samples": 300_000},
}
SEEDS = [0, 1]
QUARTERS = ("rarest", "rare", "frequent", "most frequent")
N_PLANTED, N_MISSING = 8, 6
"""Planted correctors, and the number of missing features whose error each corrects."""
N_ROWS = 10_000
MIN_LATENTS = 10
"""Fewer, over all pairs of seeds, give no number."""
Numbers = dict[str, float | None]


def comparison_of(training: str) -> Resolved:
    return resolve(
        Comparison(
            preset=["saelens"],
            aux_variant=["none", "auxk", "pursuit"],
            sae={"k_aux": 512},
            architecture=["auxk-topk", "auxk-batchtopk"],
            k=[8],
            d_in=64,
            eval_samples=N_ROWS,
            seeds=SEEDS,
            synthetic_model={"seed": 0},
            **TRAININGS[training],
        )
    )


def auc(true: torch.Tensor, junk: torch.Tensor) -> float | None:
    """Probability that one of ``true`` (n,) has a larger value than one of ``junk`` (m,)."""
    if min(len(true), len(junk)) < MIN_LATENTS:
        return None
    difference = true[:, None] - junk
    return ((difference > 0).float() + 0.5 * (difference == 0).float()).mean().item()


def share(values: torch.Tensor) -> float | None:
    return values.float().mean().item() if len(values) >= MIN_LATENTS else None


@torch.no_grad()
def of_case(runs: Sequence[Run], folder: Path, model: SyntheticModel) -> dict[str, Any]:
    """How well the best cosine tells true latents from junk, over all pairs of a case's seeds."""
    features = model.feature_dict.feature_vectors.detach()
    alive = [alive for run in runs if (alive := alive_latents(run, folder, "cpu")) is not None]
    with_feature = [cosine_similarities(run.decoder, features).max(dim=1) for run in alive]
    pairs = [(i, j) for i in range(len(alive)) for j in range(len(alive)) if i != j]
    score = torch.cat([best_cosines(alive[i].decoder, alive[j].decoder)[0] for i, j in pairs])
    cosine = torch.cat([with_feature[i].values for i, _ in pairs])
    feature = torch.cat([with_feature[i].indices for i, _ in pairs])

    rank = model.activation_generator.firing_probabilities.argsort().argsort()
    quarter = (4 * rank // len(rank))[feature]
    true, found = cosine >= JUNK, score > FOUND_AGAIN
    in_quarter = [true & (quarter == q) for q in range(4)]
    return {
        "alive": len(score) / len(pairs),
        "junk": share(~true),
        "found_again": share(found),
        "auc": auc(score[true], score[~true]),
        "precision": share(true[found]),
        "recall": share(found[true]),
        "recall_cosine_above_0.84": share(found[cosine > FOUND_AGAIN**0.5]),
        "junk_found_again": int((found & ~true).sum()) / len(pairs),
        "auc_by_rate": [auc(score[here], score[~true]) for here in in_quarter],
        "recall_by_rate": [share(found[here]) for here in in_quarter],
        "planted": planted(runs, folder, model),
    }


def planted(runs: Sequence[Run], folder: Path, model: SyntheticModel) -> Numbers:
    """Reproducible error correctors: each is the mean error of the rows with one of some features.

    The features are missing in every seed, so that all seeds have the same errors on these rows.
    Shares of the correctors that are junk, and for which that of another seed has a cosine above
    FOUND_AGAIN; None if fewer than N_PLANTED * N_MISSING features are missing.
    """
    torch.manual_seed(0)
    acts = model.activation_generator.sample(N_ROWS)
    x = model.feature_dict(acts)
    features = model.feature_dict.feature_vectors.detach()
    saes = [SAE.load_from_disk(folder / str(run["folder"])) for run in runs]
    best = torch.stack([cosine_similarities(features, sae.W_dec).amax(dim=1) for sae in saes])
    missing = (best.amax(dim=0) < JUNK).nonzero().flatten()
    if len(missing) < N_PLANTED * N_MISSING:
        return {"junk": None, "found_again": None}
    groups = missing[: N_PLANTED * N_MISSING].view(N_PLANTED, N_MISSING)
    directions: list[torch.Tensor] = []
    for sae in saes:
        error = x - sae.decode(sae.encode(x))
        where = [(acts[:, group] > 0).any(dim=1) for group in groups]
        directions.append(torch.stack([error[rows].mean(dim=0) for rows in where]))
    junk = torch.cat([cosine_similarities(own, features).amax(dim=1) < JUNK for own in directions])
    found = [
        best_cosines(own, other)[0] > FOUND_AGAIN
        for own in directions
        for other in directions
        if other is not own
    ]
    return {
        "junk": junk.float().mean().item(),
        "found_again": torch.cat(found).float().mean().item(),
    }


def print_tables(training: str, cases: dict[str, dict[str, Any]]) -> None:
    def cell(value: float | None) -> str:
        return "–" if value is None else f"{value:.2f}"

    def table(columns: Sequence[str], rows: dict[str, list[str]]) -> None:
        print(f"| {training} | {' | '.join(columns)} |\n|---{'|---' * len(columns)}|")
        for name, cells in rows.items():
            print(f"| {name} | {' | '.join(cells)} |")
        print()

    shown = ("junk", "found_again", "auc", "precision", "recall", "recall_cosine_above_0.84")
    columns = ["alive", "junk", "found again", "AUC", "precision", "recall", "recall above 0.84"]
    table(
        [*columns, "junk found again", "correctors: junk", "correctors: found again"],
        {
            name: [
                f"{case['alive']:.0f}",
                *(cell(case[key]) for key in shown),
                f"{case['junk_found_again']:.1f}",
                cell(case["planted"]["junk"]),
                cell(case["planted"]["found_again"]),
            ]
            for name, case in cases.items()
        },
    )
    table(
        [f"{what}, {quarter}" for what in ("AUC", "recall") for quarter in QUARTERS],
        {
            name: [cell(value) for key in ("auc_by_rate", "recall_by_rate") for value in case[key]]
            for name, case in cases.items()
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    folder: Path = parser.parse_args().folder
    warnings.simplefilter("ignore")
    sae_lens_logger.setLevel("ERROR")
    torch.set_num_threads(1)  # more are slower on steps as small as these
    measured: dict[str, dict[str, Any]] = {}
    for training in TRAININGS:
        comparison = comparison_of(training)
        (folder / training).mkdir(parents=True, exist_ok=True)
        run_comparison(comparison, folder / training)
        results = read_results(folder / training)
        model = SyntheticModel.load_from_source(comparison.synthetic_model_config(0))
        cases: dict[str, list[Run]] = {}
        for run in results["runs"]:
            name = run["case"]  # SAELens's own cases have their architecture in it
            if run["architecture"].startswith("auxk-"):
                name += f", {run['architecture'].removeprefix('auxk-')}"
            cases.setdefault(name, []).append(run)
        measured[training] = {
            name: of_case(runs, folder / training, model) for name, runs in cases.items()
        }
        print_tables(training, measured[training])
    write_json(folder / "found_again.json", measured)


if __name__ == "__main__":
    main()
