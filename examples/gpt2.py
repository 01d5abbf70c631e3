"""AuxK on GPT-2 small: a SAELens run with one of this package's architectures.

    python examples/gpt2.py

The same run from the shell:

    sae-lens-auxk train --architecture auxk-topk --aux_variant auxk --k 32 --d_in 768 \
        --d_sae 24576 --model_name gpt2 --hook_name blocks.6.hook_resid_pre \
        --dataset_path Skylion007/openwebtext --is_dataset_tokenized false ...

It needs the Hugging Face Hub for the model and the text, and a GPU to finish within hours.
"""

from typing import Any

import torch
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner

from sae_lens_auxk import runner_config


def config(**changes: Any) -> LanguageModelSAERunnerConfig[Any]:
    """The run's config; ``changes`` are fields of the SAE's, the run's or the logger's config."""
    fields: dict[str, Any] = {
        # the model and where its activations are read
        "model_name": "gpt2",
        "hook_name": "blocks.6.hook_resid_pre",
        "dataset_path": "Skylion007/openwebtext",
        "is_dataset_tokenized": False,
        "context_size": 128,
        "exclude_special_tokens": True,
        # the SAE and its auxiliary loss
        "d_in": 768,
        "d_sae": 24_576,
        "k": 32,
        "aux_variant": "auxk",
        "aux_bias": "none",
        "dead_threshold_tokens": 10_000_000,
        # training
        "training_tokens": 200_000_000,
        "train_batch_size_tokens": 4096,
        "n_batches_in_buffer": 64,
        "lr": 3e-4,
        "lr_warm_up_steps": 1000,
        "lr_decay_steps": 10_000,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "autocast": True,
        # what is kept
        "n_checkpoints": 4,
        "checkpoint_path": "checkpoints",
        "output_path": "output/gpt2-auxk-topk",
        "log_to_wandb": False,
    }
    return runner_config("auxk-topk", **{**fields, **changes})


if __name__ == "__main__":
    LanguageModelSAETrainingRunner(config()).run()
