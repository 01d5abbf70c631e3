"""``sae-lens-auxk train`` under torchrun."""

import os
import shlex
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sae_lens import LanguageModelSAERunnerConfig

from sae_lens_auxk import processes
from sae_lens_auxk.sharded.runner import (
    ShardedTrainingRunner,
    newest_checkpoint,
    require_shared_run,
)
from sae_lens_auxk_cli import printable


def train_shared(cfg: LanguageModelSAERunnerConfig[Any]) -> int:
    """Train one SAE in all processes; only rank 0 prints. Return the exit status."""
    start, is_first = time.perf_counter(), processes.rank() == 0
    if not is_first:
        processes.be_quiet()
    try:
        require_shared_run(cfg, processes.n_processes())
        device = processes.own_device(cfg.device)
    except ValueError as error:
        return processes.refuse_once(error)
    for owner in (cfg, cfg.sae):
        owner.device = device
    for name in ("llm_device", "act_store_device"):
        if torch.device(getattr(cfg, name)).type == "cuda":
            setattr(cfg, name, device)
    torch.manual_seed(cfg.seed)
    end: Callable[[], None] = partial(os._exit, 1)
    if is_first:
        end = processes.end_with(lambda: _farewell(cfg))
        n = processes.n_processes()
        print(f"{n} processes share {cfg.sae.d_sae} latents", flush=True)
    try:
        with processes.process_group(device) as group:
            try:
                runner = _runner(cfg, group)
            except ValueError as error:
                return processes.refuse_once(error)
            runner.run()
    except Exception as error:
        if processes.is_for_a_dead_process(error):
            end()
        raise
    if is_first:
        print(f"trained in {time.perf_counter() - start:.0f} s, model loading included")
    return 0


def _runner(cfg: LanguageModelSAERunnerConfig[Any], group: Any) -> ShardedTrainingRunner:
    """The run; the same ValueError in every process where one of them cannot be made."""
    processes.require_same_versions(group)
    try:
        runner, error = ShardedTrainingRunner(cfg, group=group), None
    # Raised for a model or data set that cannot be found.
    except (ValueError, OSError) as raised:
        runner, error = None, raised
    processes.agree(error, group)
    assert runner is not None
    return runner


def _farewell(cfg: LanguageModelSAERunnerConfig[Any]) -> str:
    folder = None if cfg.checkpoint_path is None else Path(cfg.checkpoint_path)
    checkpoint = None if folder is None else newest_checkpoint(folder)
    if checkpoint is None:
        how = "It had no checkpoint yet: start it again"
    else:
        path = printable(shlex.quote(str(checkpoint)))
        how = f"Resume from its last checkpoint with --resume_from_checkpoint {path}"
    what = "another process of this run has died; torchrun's report below says which"
    return f"sae-lens-auxk: error: {what}. {how}."
