"""Where should a resampled latent point? On a language model, in miniature.

    python -m studies.resampling.on_lm smollm2/model smollm2/text --out resampling-lm.json

studies/smollm2/README.md says how to get the model and the text. The activations are kept in
activations.npy beside the text, for the next call. On 300,000 activations of
SmolLM2's layer 15, without the first position of each row, SAEs of 1,024 latents with k 16 are
trained for 700 steps of 1,024 rows. A latent is dead after 50 silent steps, and dead latents are
resampled after steps 100, 200, 300 and 400. ``input`` takes the direction of x - b_dec, as in
Bricken et al. 2023; ``residual`` that of what the SAE does not reconstruct, as this package does.

A few rows have a norm over a hundred times the others' even after the first position. They hold
most of the variance, so explained variance (EV) is given over all held-out rows and over *ordinary*
ones, whose norm is below 5 times the median.
"""

import argparse
import json
import math
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import mean, stdev
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from datasets import load_dataset
from sae_lens.config import SAETrainerConfig
from sae_lens.evals import ExplainedVarianceCalculator
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer
from tqdm import tqdm
from transformers import AutoModelForCausalLM

import sae_lens_auxk  # noqa: F401  (registers the architectures)
from benchmarks.made_by import commit
from sae_lens_auxk.files import replace_file, write_json
from sae_lens_auxk.step.inputs import Targets, targets_of
from sae_lens_auxk.step.resampling import NewLatents

LAYER, N_HELD_OUT = 15, 8192
STEPS, BATCH, D_SAE, K, K_AUX, LR = 700, 1024, 1024, 16, 512, 1e-3
FIRST = 100
RESAMPLED = {"aux_variant": "none", "resample_every_steps": FIRST, "resample_stop_step": 400}
PURSUIT = {"aux_variant": "pursuit", "k_aux": K_AUX}
CASES: dict[str, dict[str, Any]] = {
    "none": {"fields": {"aux_variant": "none"}},
    "auxk": {"fields": {"aux_variant": "auxk", "k_aux": K_AUX}},
    "pursuit": {"fields": PURSUIT},
    "input": {"fields": RESAMPLED, "input": True},
    "input, ordinary rows only": {"fields": RESAMPLED, "input": True, "ordinary": True},
    "input, b_dec starts at the mean": {"fields": RESAMPLED, "input": True, "centred": True},
    "input, encoder length 0.2": {"fields": RESAMPLED, "input": True, "length": 0.2},
    "residual": {"fields": RESAMPLED},
    "residual, b_dec starts at the mean": {"fields": RESAMPLED, "centred": True},
    "pursuit, b_dec starts at the mean": {"fields": PURSUIT, "centred": True},
}


@torch.no_grad()
def activations(model_folder: Path, text: Path, n: int) -> torch.Tensor:
    """(n, d_in) in the order of the text."""
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder)
    model.model.layers = model.model.layers[: LAYER + 1]
    rows: list[torch.Tensor] = []

    def keep(_module: Any, _input: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        rows.append(hidden[:, 1:].flatten(0, 1))

    model.model.layers[LAYER].register_forward_hook(keep)
    dataset = load_dataset(str(text), split="train").with_format("torch")
    n_texts = math.ceil(n / (len(dataset[0]["input_ids"]) - 1))
    for batch in tqdm(dataset.select(range(n_texts)).batch(32), desc="activations"):
        model.model(batch["input_ids"])
    return torch.cat(rows)[:n]


def is_ordinary(x: torch.Tensor) -> torch.Tensor:
    norms = x.norm(dim=1)
    return norms < 5 * norms.median()


def about(x: torch.Tensor) -> dict[str, float]:
    """How few rows hold how much of the variance."""
    ordinary = is_ordinary(x)
    squares = (x - x.mean(0)).square().sum(dim=1)
    return {
        "rows": len(x),
        "rows that are not ordinary": (~ordinary).sum().item(),
        "their share of the variance": (squares[~ordinary].sum() / squares.sum()).item(),
        "their mean norm over the median": (
            x[~ordinary].norm(dim=1).mean() / x.norm(dim=1).median()
        ).item(),
    }


def explained(x: torch.Tensor, out: torch.Tensor) -> float:
    calculator = ExplainedVarianceCalculator()
    calculator.add_batch(out, x)
    return calculator.compute()


@torch.no_grad()
def from_inputs(sae: Any, *args: Any) -> Targets:
    """``targets_of`` with the directions of the inputs instead of the residuals."""
    length = torch.linalg.vector_norm
    target = targets_of(*args)
    rows = target.x - sae.b_dec
    # Times the length of the residual, by whose square a row is drawn.
    inputs = rows * (length(target.residual, dim=1) / length(rows, dim=1)).unsqueeze(1)
    return target._replace(residual=inputs)


def mean_cosine(rows: torch.Tensor) -> float:
    rows = torch.nn.functional.normalize(rows, dim=1)
    n = len(rows)
    return ((rows.sum(0).square().sum() - n) / (n * (n - 1))).item()


def train(x: torch.Tensor, architecture: str, case: dict[str, Any], seed: int) -> dict[str, float]:
    held_out, rows = x[:N_HELD_OUT], x[N_HELD_OUT:]
    ordinary = is_ordinary(held_out)
    if case.get("ordinary"):
        rows = rows[is_ordinary(rows)]
    torch.manual_seed(seed)
    cls, cfg_cls = get_sae_training_class(architecture)
    sae: Any = cls(
        cfg_cls(
            d_in=x.shape[1], d_sae=D_SAE, k=K, dead_threshold_tokens=50 * BATCH, **case["fields"]
        )
    )
    if case.get("centred"):
        sae.b_dec.data.copy_(rows[is_ordinary(rows)].mean(0))
    config = SAETrainerConfig(
        total_training_samples=STEPS * BATCH,
        train_batch_size_samples=BATCH,
        lr=LR,
        lr_end=LR / 10,
        device="cpu",
        autocast=False,
    )
    trainer = SAETrainer(config, sae, iter(()))
    drawn: list[NewLatents] = []

    def note_drawn(*_: Any) -> None:
        if sae.drawn is not None:
            drawn.append(sae.drawn)

    trainer.optimizer.register_step_pre_hook(note_drawn)
    generator = torch.Generator().manual_seed(seed)
    batches = chain.from_iterable(
        torch.randperm(len(rows), generator=generator).split(BATCH) for _ in iter(int, 1)
    )
    result: dict[str, float] = {}
    with ExitStack() as patches:
        if case.get("input"):
            targets = partial(from_inputs, sae)
            patches.enter_context(patch("sae_lens_auxk.step.resampling.targets_of", targets))
        if "length" in case:
            patches.enter_context(patch.object(cls, "resampled_length", case["length"]))
        for step in range(STEPS):
            batch = rows[next(batches)]
            if step + 1 == FIRST and "resample_every_steps" in case["fields"]:
                result |= before_resampling(sae, batch)
            trainer.step(batch)
            trainer.n_training_steps += 1
            if step + 1 == FIRST and drawn:
                result |= after_resampling(sae, held_out, ordinary, drawn[0].latents)
    with torch.no_grad():
        out = sae.eval()(held_out)
    dead = (sae.tokens_since_fired >= 50 * BATCH).float().mean().item()
    return result | {
        "dead": dead,
        "EV": explained(held_out, out),
        "EV, ordinary": explained(held_out[ordinary], out[ordinary]),
    }


@torch.no_grad()
def before_resampling(sae: Any, batch: torch.Tensor) -> dict[str, float]:
    residual = batch - sae.eval()(batch)
    sae.train()
    cosines = {"input": mean_cosine(batch - sae.b_dec), "residual": mean_cosine(residual)}
    return {f"cosine of two rows' {name}s": value for name, value in cosines.items()}


@torch.no_grad()
def after_resampling(
    sae: Any, held_out: torch.Tensor, ordinary: torch.Tensor, latents: torch.Tensor
) -> dict[str, float]:
    x = held_out[ordinary]
    acts = sae.eval().encode(x)
    out = sae.decode(acts)
    sae.train()
    fires = acts > 0
    return {
        "resampled": len(latents) / sae.cfg.d_sae,
        "their share of the activations": (fires[:, latents].sum() / fires.sum()).item(),
        "EV, ordinary, right after": explained(x, out),
    }


def kept_activations(args: argparse.Namespace) -> torch.Tensor:
    """(n, d_in), made once, and scaled to a mean norm of sqrt(d_in) as SAELens's trainer does."""
    kept = args.text / "activations.npy"
    if not kept.exists():
        x = activations(args.model, args.text, args.activations)
        with replace_file(kept) as file:
            np.save(file, x.numpy())
    x = torch.from_numpy(np.load(kept))[: args.activations]
    return x * x.shape[1] ** 0.5 / x.norm(dim=1).mean()


def over_seeds(results: list[dict[str, float]]) -> dict[str, dict[str, float | None]]:
    """Of each number in the results of the seeds; ``std`` is None for a single seed."""
    return {
        key: {"mean": mean(values), "std": stdev(values) if len(values) > 1 else None}
        for key in results[0]
        for values in [[result[key] for result in results]]
    }


def runs(args: argparse.Namespace, x: torch.Tensor) -> Iterator[dict[str, Any]]:
    for architecture in args.architecture:
        for name in args.cases:
            results = [train(x, architecture, CASES[name], seed) for seed in args.seeds]
            yield {
                "architecture": architecture,
                "case": name,
                **over_seeds(results),
            }


def print_table(results: list[dict[str, Any]]) -> None:
    names = {key: None for result in results for key in result}
    columns = [key for key in names if key not in ("architecture", "case")]
    print("| architecture | case |", " | ".join(columns), "|")
    print("|---" * (2 + len(columns)) + "|")
    for result in results:
        found = (result.get(column) for column in columns)
        cells = [f"{v['mean']:.3f} ± {v['std'] or 0:.3f}" if v else "–" for v in found]
        print(f"| {result['architecture']} | {result['case']} |", " | ".join(cells), "|")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, nargs="?", help="SmolLM2's folder")
    parser.add_argument("text", type=Path, nargs="?", help="the folder of its tokens")
    parser.add_argument("--out", type=Path, default=Path("resampling-lm.json"))
    parser.add_argument("--activations", type=int, default=300_000)
    parser.add_argument("--architecture", nargs="+", default=["auxk-topk", "auxk-batchtopk"])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--table", type=Path, nargs="+", help="print such files, run nothing")
    args = parser.parse_args()
    if args.table is not None:
        print_table([r for path in args.table for r in json.loads(path.read_text())["results"]])
        return
    x = kept_activations(args)
    settings = {key: str(value) for key, value in vars(args).items()}
    report = {"commit": commit(), "settings": settings, "activations": about(x)}
    results: list[dict[str, Any]] = []
    for result in runs(args, x):
        results.append(result)
        write_json(args.out, {**report, "results": results})
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
