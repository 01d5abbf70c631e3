"""``sae-lens-auxk train``."""

import time
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

import torch
from sae_lens.evals import EvalConfig, run_evals
from sae_lens.llm_sae_training_runner import (
    LanguageModelSAETrainingRunner,
    _parse_cfg_args,  # pyright: ignore[reportPrivateUsage]
)
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.activation_scaler import ActivationScaler

from sae_lens_auxk.cli.refuse import refuse
from sae_lens_auxk.saved_sae import silent_latents


def train(args: Sequence[str]) -> int:
    """SAELens's own training command, with a summary at the end; see ``--help``."""
    try:
        cfg = _parse_cfg_args(args)
    # simple-parsing raises argparse's errors, and passes on those of the configs.
    except Exception as error:
        return refuse(str(error))
    # SAELens seeds nothing with its own field; a command should give the same twice.
    torch.manual_seed(cfg.seed)
    start = time.perf_counter()
    runner = LanguageModelSAETrainingRunner(cfg)
    sae = runner.run()
    print(f"trained in {time.perf_counter() - start:.0f} s, model loading included")
    if cfg.n_eval_batches > 0:
        print(summary(runner, sae))
    return 0


@torch.no_grad()
def summary(runner: LanguageModelSAETrainingRunner, sae: TrainingSAE[Any]) -> str:
    """What a finished run is about in a few lines, measured by SAELens's own evaluator.

    Explained variance, L0 and the latents that stay silent are over ``n_eval_batches`` batches
    of prompts that follow the training text; the latents silent in training are over its
    last ``feature_sampling_window`` steps, from SAELens's saved sparsity.
    """
    cfg = runner.cfg
    excluded = runner.activations_store.exclude_special_tokens
    metrics, features = run_evals(
        sae,
        runner.activations_store,
        runner.model,
        ActivationScaler(),  # the runner has folded any scaling into the weights
        EvalConfig(
            batch_size_prompts=cfg.eval_batch_size_prompts,
            n_eval_sparsity_variance_batches=cfg.n_eval_batches,
            compute_sparsity_metrics=True,
            compute_variance_metrics=True,
            compute_featurewise_density_statistics=True,
        ),
        model_kwargs=cfg.model_kwargs,
        exclude_special_tokens=False if excluded is None else excluded.tolist(),
    )
    n_tokens = metrics["token_stats"]["total_tokens_eval_sparsity_variance"]
    silent = sum(density == 0 for density in features["feature_density"])
    lines = [
        f"explained variance  {metrics['reconstruction_quality']['explained_variance']:.3f}",
        f"L0                  {metrics['sparsity']['l0']:.1f}",
        f"silent latents      {silent} of {sae.cfg.d_sae} in {n_tokens} evaluated tokens",
    ]
    if cfg.output_path is not None:
        n_silent = silent_latents(Path(cfg.output_path))
        n_steps = ceil(cfg.training_tokens / cfg.train_batch_size_tokens)
        n_steps %= cfg.feature_sampling_window
        n_train = (n_steps or cfg.feature_sampling_window) * cfg.train_batch_size_tokens
        lines[-1] += f", {n_silent} in the last {n_train} of training"
    return "\n".join(lines)
