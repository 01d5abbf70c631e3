"""``sae-lens-auxk train`` under torchrun."""

import os
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sae_lens import LanguageModelSAERunnerConfig

from sae_lens_auxk import processes
from sae_lens_auxk.saelens.checkpoints import open_sae
from sae_lens_auxk.saelens.evaluation import measure
from sae_lens_auxk.saelens.interruption import how_to_go_on, interrupted, is_for_a_file
from sae_lens_auxk.saelens.names import InterruptedException
from sae_lens_auxk.saelens.resume import require_resumable
from sae_lens_auxk.saelens.start import require_activations, require_startable
from sae_lens_auxk.sharded.runner import ShardedTrainingRunner, require_same_run
from sae_lens_auxk_cli import refuse


def train_shared(cfg: LanguageModelSAERunnerConfig[Any] | None, error: Exception | None) -> int:
    """Train one SAE in all processes; only rank 0 prints. Return the exit status.

    Args:
        cfg: the config of the run; None if this process's flags are not allowed.
        error: what is wrong with them.
    """
    start, is_first = time.perf_counter(), processes.rank() == 0
    end: Callable[[], None] = partial(os._exit, 1)
    if not is_first:
        processes.be_quiet()
    elif cfg is not None:
        end = processes.end_with(lambda: how_to_go_on(cfg))
    runner: ShardedTrainingRunner | None = None
    try:
        with processes.process_group() as group:
            runner = _runner(cfg, error, group)
            runner.run()
    except processes.Refused as refused:
        then = "" if runner is None else f" {how_to_go_on(cfg)}."
        return processes.refuse_once(f"{refused}{then}")
    except (KeyboardInterrupt, InterruptedException) as raised:
        return interrupted(raised, how_to_go_on(cfg))
    except Exception as error:
        if processes.is_for_a_dead_process(error):
            end()
        if is_for_a_file(error):
            status = refuse(f"rank {processes.rank()}: {error}. {how_to_go_on(cfg)}.")
            os._exit(status)  # the others wait for this process
        raise
    if is_first:
        print(f"trained in {time.perf_counter() - start:.0f} s, model loading included")
        if runner.cfg.output_path is not None:  # where alone the whole SAE is
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # it tells of no dead process any more
            path, device = Path(runner.cfg.output_path), runner.cfg.device
            return measure(runner, lambda: open_sae(path, device))
    if runner.noted:  # in the last step or later
        return interrupted(InterruptedException(*runner.noted), "Its training was complete")
    return 0


def _runner(cfg: Any, error: Exception | None, group: Any) -> ShardedTrainingRunner:
    """The run; every process refuses it where one of them cannot make it."""
    processes.agree(error, group)
    require_same_run(cfg, group)
    processes.agree(_error_of(lambda: _prepare(cfg)), group)
    if processes.rank() == 0:
        print(f"{group.size()} processes share {cfg.sae.d_sae} latents", flush=True)
    runners: list[ShardedTrainingRunner] = []

    def make() -> None:
        runners.append(ShardedTrainingRunner(cfg, group=group))
        require_activations(runners[0])

    processes.agree(_error_of(make), group)
    return runners[0]


def _error_of(do: Callable[[], Any]) -> Exception | None:
    """The error of what a person can change: a field, a path, a model or data set."""
    try:
        do()
    except (ValueError, OSError) as error:
        return error
    return None


def _prepare(cfg: LanguageModelSAERunnerConfig[Any]) -> None:
    """Refuse a run that cannot start; choose this process's device, and seed it."""
    require_resumable(cfg, cfg.sae)
    if processes.rank() == 0:  # which alone writes
        require_startable(cfg, processes.n_processes())
    device = processes.own_device(cfg.device)
    for owner in (cfg, cfg.sae):
        owner.device = device
    for name in ("llm_device", "act_store_device"):
        if torch.device(getattr(cfg, name)).type == "cuda":
            setattr(cfg, name, device)
    torch.manual_seed(cfg.seed)
