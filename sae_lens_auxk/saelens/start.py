"""What a run needs that SAELens asks for late: after the model is loaded, or at the end."""

from typing import Any

import torch

from sae_lens_auxk.files import require_writable_folder


def require_startable(cfg: Any, n_processes: int = 1) -> None:
    """Raise a ValueError that names what would stop a run of this config later on.

    Args:
        cfg: the run's config.
        n_processes: how many processes share a training batch.
    """
    # A run without planned checkpoints writes one only if it is interrupted. It may have no place
    # for that: SAELens's default is in the working directory.
    has_checkpoints = cfg.n_checkpoints > 0 or cfg.save_final_checkpoint
    for name in ("output_path", "checkpoint_path")[: 1 + has_checkpoints]:
        if (folder := getattr(cfg, name)) is not None:
            require_writable_folder(name, folder)
    n_tokens = len(range(cfg.context_size)[slice(*cfg.seqpos_slice)])
    smallest = -(-cfg.train_batch_size_tokens // n_processes // n_tokens)
    if cfg.n_batches_in_buffer < smallest:
        raise ValueError(
            f"n_batches_in_buffer={cfg.n_batches_in_buffer} is not allowed: it must be at least "
            f"{smallest}, so that the buffer holds train_batch_size_tokens="
            f"{cfg.train_batch_size_tokens} (it has {n_tokens} tokens for each)."
        )


def require_activations(runner: Any) -> None:
    """Raise a ValueError if the model has no activations of the width and place in the config."""
    store, cfg = runner.activations_store, runner.cfg
    if store.cached_activation_dataset is not None:
        return
    # Two prompts: those of one would be broadcast where they have another shape.
    tokens = torch.zeros((2, cfg.context_size), dtype=torch.long, device=cfg.llm_device)
    try:
        store.get_activations(tokens)
    except (KeyError, IndexError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "must match the" not in str(error):
            return  # another one, which the training will meet as well
        raise ValueError(
            f"the model has no activations of d_in={cfg.sae.d_in}, hook_name={cfg.hook_name!r}, "
            f"hook_head_index={cfg.hook_head_index} and context_size={cfg.context_size}: {error}"
        ) from error
