"""results.json as a comparison writes it, with made-up numbers."""

import math
import random
from collections.abc import Sequence
from statistics import mean
from typing import Any

from sae_lens_auxk.compare.schema import VERSION
from sae_lens_auxk.compare.seeds import groups_of

CASES = ("none", "SAELens topk", "auxk", "auxk, bias none", "straight_through", "reanimation")
PEEKING = {
    "junk_share": 0.2, "duplicate_share": 0.05, "features_hurt": 8, "split": 0.02,
    "direction_spread": 0.2, "nearest_cosine": 0.3,
}  # fmt: skip
WITH_TRUTH = ("junk_share", "duplicate_share", "features_hurt", "split")


def fake_results(
    cases: Sequence[str] = CASES,
    architectures: Sequence[str] = ("auxk-topk",),
    ks: Sequence[int | None] = (16, 25, 50),
    seeds: Sequence[int] = (0, 1, 2),
    ground_truth: bool = True,
    peeking: bool = True,
) -> dict[str, Any]:
    runs = [
        _run(case, i / max(len(cases) - 1, 1), architecture, k, seed, ground_truth, peeking)
        for i, case in enumerate(cases)
        for architecture in architectures
        for k in ks
        for seed in seeds
    ]
    if len(seeds) > 1:
        for run in runs:
            others = [seed for seed in seeds if seed != run["seed"]]
            shares = {seed: _share_found(run["case"], run["k"], seed, run["seed"])
                      for seed in others}  # fmt: skip
            run["pairs"] = {str(seed): _pair(run["case"], share) for seed, share in shares.items()}
            whole = _pair(run["case"], mean(shares.values()))
            run["metrics"] |= whole["metrics"]
            run["found_again_by_age"] = whole["found_again_by_age"]
            for name, group in (run["peeking"] or {}).items():
                group |= whole["peeking"]["revived" if "revived" in name else "never_died"]
    kind = "synthetic" if ground_truth else "language_model"
    return {
        "version": VERSION,
        "name": "SynthSAEBench, 4,096 latents",
        "created": "2026-11-22T01:00:00+00:00",
        "finished": True,
        "machine": "NVIDIA H100 80GB HBM3, Linux x86_64, 16 CPU cores",
        "packages": {"sae-lens": "6.54.12", "torch": "2.11.0", "sae-lens-auxk": "0.1.0"},
        "comparison": {
            "cases": [{"name": case} for case in cases],
            "ks": list(ks),
            "seeds": list(seeds),
        },
        "command": "sae-lens-auxk compare --preset published",
        "data": {"kind": kind, "description": "16,384 known features in 768 dimensions"},
        "runs": runs,
        "groups": list(groups_of(runs)),
    }


def _run(
    case: str,
    badness: float,
    architecture: str,
    k: int | None,
    seed: int,
    ground_truth: bool,
    peeking: bool,
) -> dict[str, Any]:
    rng = random.Random(f"{case} {architecture} {k} {seed}")
    dead = min(max(0.9 - badness + rng.gauss(0, 0.02), 0.0), 1.0)
    k_or = k or 30
    metrics = {
        "explained_variance": 0.5 + 0.1 * math.log10(k_or) + 0.1 * badness + rng.gauss(0, 0.003),
        "l0": k_or + (0.0 if "topk" in architecture else rng.gauss(0, 1)),
        "dead_fraction": dead,
        "dense_latents": abs(rng.gauss(0.01, 0.004)),
        "mse": 3.2 - badness,
        "ms_per_step": 6 + rng.random(),
    }
    if ground_truth:
        metrics |= {"f1": 0.3 + 0.4 * badness + rng.gauss(0, 0.01), "mcc": 0.7, "precision": 0.7,
                    "recall": 0.65, "uniqueness": 0.95, "features_covered": 0.2,
                    "junk_share": 0.05}  # fmt: skip
    else:
        metrics["ce_loss_recovered"] = 0.9 + 0.05 * badness
    samples = list(range(0, 8_000_001, 100_000))
    edges = [-6 + i / 4 for i in range(25)]
    measured = None
    if peeking:
        measured = {
            f"{which}{part}": {
                "n_latents": 0 if case == "none" else rng.randint(100, 900),
                "firing_rate": None if case == "none" else 0.004,
                "age": None if case == "none" else 0.5 if which == "revived" else 1.0,
                **{
                    key: None
                    if case == "none" or (not ground_truth and key in WITH_TRUTH)
                    else abs(base * (1.5 - badness) + rng.gauss(0, base / 20)) * share
                    for key, base in PEEKING.items()
                },
            }
            for which, share in (("revived", 1.0), ("never_died", 0.6))
            for part in ("", "_young", "_old")
        }
    return {
        "name": f"{case}, {architecture}, k={k}, seed {seed}",
        "case": case,
        "architecture": architecture,
        "k": k,
        "seed": seed,
        "status": "finished",
        "error": None,
        "folder": None,
        "sae_config": {"d_in": 768, "d_sae": 4096, "k": k, "architecture": architecture},
        "training_samples": samples[-1],
        "history": {
            "samples": samples,
            "dead_fraction": [
                None if at == 0 else dead * (1 - math.exp(-at / 1e6)) + rng.random() / 100
                for at in samples
            ],
            "explained_variance": [0.5] * len(samples),
            "l0": [k_or] * len(samples),
            "aux_loss": [0.1] * len(samples),
        },
        "metrics": metrics,
        "density": {
            "log10_edges": edges,
            "counts": [round(500 * math.exp(-((e + 2.5 + badness) ** 2))) for e in edges[:-1]],
        },
        "silent_latents": round(dead * 4096),
        "peeking": measured,
    }


def _share_found(case: str, k: int | None, seed: int, other: int) -> float:
    noise = random.Random(f"{case} {k} {sorted((seed, other))}").gauss(0, 0.01)
    return 0.2 + 0.05 * len(case) + noise


def _pair(case: str, share: float) -> dict[str, Any]:
    found = {"found_again": None if case == "none" else share}
    return {
        "metrics": {"found_again": share, "mean_best_cosine": 0.3 + share / 2,
                    "matched_cosine": 0.2 + share / 2},
        "peeking": {"revived": found, "never_died": found},
        "found_again_by_age": [share * (1 - i / 12) for i in range(9)] + [None],
    }  # fmt: skip


def failed(run: dict[str, Any], status: str, error: str | None) -> None:
    run.update(status=status, error=error, sae_config={}, history={}, metrics={}, density=None,
               silent_latents=None, peeking=None, training_samples=0)  # fmt: skip
    for key in ("found_again_by_age", "pairs"):
        run.pop(key, None)
