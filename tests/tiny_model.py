"""A small randomly initialised GPT-2 and a tokenised data set, for SAELens's runners."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, LoggingConfig
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunnerConfig
from sae_lens.saes.sae import TrainingSAE
from transformer_lens import HookedTransformer, HookedTransformerConfig

from tests.helpers import kill_latents

D_MODEL = 16
CONTEXT_SIZE = 16
SHORT_RUN: dict[str, Any] = {
    "context_size": CONTEXT_SIZE,
    "streaming": False,
    "prepend_bos": False,
    "training_tokens": 20 * 64,
    "train_batch_size_tokens": 64,
    "store_batch_size_prompts": 4,
    "checkpoint_path": None,
}


def gpt2(seed: int = 0, **fields: Any) -> HookedTransformer:
    """GPT-2's architecture with 2 layers of width 16 and a vocabulary of 50.

    ``fields`` are further ones of its config.
    """
    torch.manual_seed(seed)
    return HookedTransformer(
        HookedTransformerConfig(
            n_layers=2,
            d_model=D_MODEL,
            n_ctx=CONTEXT_SIZE,
            n_heads=2,
            d_head=8,
            d_vocab=50,
            act_fn="gelu_new",
            model_name="gpt2",
            seed=seed,
            **fields,
        )
    )


def tokens(n_rows: int = 200, seed: int = 0) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, 50, (n_rows, CONTEXT_SIZE), generator=generator)
    return Dataset.from_list([{"tokens": row} for row in rows.tolist()])


def run_fields(**fields: Any) -> dict[str, Any]:
    """Fields of a short run of SAELens's on the tiny model, in which nothing is shuffled.

    One batch of prompts is one training batch, so that a resumed run, which starts with an
    empty buffer, sees the same batches as one that was never interrupted.
    """
    defaults: dict[str, Any] = {
        **SHORT_RUN,
        "model_name": "tiny",
        "hook_name": "blocks.1.hook_resid_pre",
        "n_batches_in_buffer": 4,
        "activations_mixing_fraction": 0.0,
        "lr": 1e-2,
        "n_eval_batches": 1,
        "output_path": None,
        "log_to_wandb": False,
        "verbose": False,
        "d_in": D_MODEL,
        "d_sae": 48,
    }
    return {**defaults, **fields}


def run(cfg: LanguageModelSAERunnerConfig[Any], **overrides: Any) -> Any:
    """Train by SAELens's own runner on the tiny model."""
    runner = LanguageModelSAETrainingRunner(
        cfg, override_model=gpt2(), override_dataset=tokens(), **overrides
    )
    return runner.run()


def run_to_resume(config: Callable[..., Any], folder: Path) -> tuple[Any, Path, Callable[[], Any]]:
    """A run that begins with 15 latents kept from firing and leaves a checkpoint in ``folder``.

    Args:
        config: makes the run's config, of fields that change.
        folder: an empty folder.

    Returns:
        The run's SAE, the checkpoint, and what resumes from there and returns that SAE.
    """
    torch.manual_seed(1)
    sae = TrainingSAE.from_dict(config().sae.to_dict())
    kill_latents(sae, 15)
    start = {name: value.clone() for name, value in sae.state_dict().items()}
    whole = run(config(n_checkpoints=1, checkpoint_path=str(folder)), override_sae=sae)
    checkpoint = next(folder.glob("*/*"))
    other = copy.deepcopy(whole)
    other.load_state_dict(start)

    def resume() -> Any:
        return run(config(resume_from_checkpoint=str(checkpoint)), override_sae=other)

    return whole, checkpoint, resume


def multi_sae_config(saes: dict[str, Any], **fields: Any) -> MultiSAETrainingRunnerConfig:
    """SAELens's config of a short run of several SAEs on the tiny model."""
    defaults: dict[str, Any] = {
        **SHORT_RUN,
        "hook_names": "blocks.1.hook_resid_pre",
        "n_batches_in_buffer": 8,
        "logger": LoggingConfig(log_to_wandb=False),
    }
    return MultiSAETrainingRunnerConfig(saes=saes, **{**defaults, **fields})
