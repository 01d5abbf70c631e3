"""Fit an SAE of this package to the run of a new ``SAETrainer``.

SAELens does not tell a training SAE the run's length, but each of its runners creates a
``SAETrainer``. What a config leaves open is fitted there, anew for each trainer, and the trainer's
own optimizer gets the hooks that resampling and older checkpoints need.
"""

import warnings
from math import ceil
from typing import Any

import torch
from sae_lens import SAETrainer

from sae_lens_auxk.saelens.names import SAETrainerConfig
from sae_lens_auxk.step.adam import fuse
from sae_lens_auxk.step.resampling import resample_with
from sae_lens_auxk.step.training import AUX_LOSS_KEY


def fit_to_run(trainer: SAETrainer[Any, Any]) -> None:
    """Adapt this package's SAE of a new trainer to its run.

    The SAE gets a copy of its config with the fitted numbers, so that the user's own copy can start
    another run.
    """
    sae, run = trainer.sae, trainer.cfg
    if (own := sae.trainer_class) is not None:
        theirs = type(trainer)
        if theirs is not SAETrainer:  # a subclass of the user's
            own = type(theirs.__name__, (own, theirs), {})
        trainer.__class__ = own
    numbers = {"dead_threshold_tokens": fitted_threshold(sae.cfg, run)}
    cfg: Any = sae.cfg.fitted_to_run(**numbers)
    warn_if_no_latent_can_die(cfg, run)
    if cfg.resample_every_steps is not None:
        numbers["resample_stop_step"] = fitted_stop_step(cfg, run)
        cfg = sae.cfg.fitted_to_run(**numbers)
        resample_with(sae, trainer.optimizer)
    sae.cfg = cfg
    if torch.device(run.device).type == "cuda":
        fuse(trainer.optimizer)
    _resume_schedules(trainer)


def fitted_threshold(cfg: Any, run: SAETrainerConfig) -> int:
    """Tokens of silence that make a latent dead in this run.

    The config's own; else the run's ``dead_feature_window`` in tokens, where that is at most half
    of the run; else a twentieth of the run, with a warning that names both.
    """
    if cfg.dead_threshold_tokens is not None:
        return cfg.dead_threshold_tokens
    window = run.dead_feature_window * run.train_batch_size_samples
    if 2 * window <= run.total_training_samples:
        return max(1, window)
    twentieth = max(1, run.total_training_samples // 20)
    if cfg.resolved_dead_criterion == "tokens" and _counts_dead(cfg):
        warnings.warn(
            f"dead_feature_window={run.dead_feature_window} is {window} tokens, more than half of "
            f"this run of {run.total_training_samples}: a latent is dead after {twentieth} silent "
            "tokens, a twentieth of the run. Set dead_threshold_tokens to choose",
            stacklevel=5,
        )
    return twentieth


def _counts_dead(cfg: Any) -> bool:
    uses = cfg.aux_variant != "none" and cfg.aux_loss.uses_dead_latents
    return uses or cfg.resample_every_steps is not None


def warn_if_no_latent_can_die(cfg: Any, run: SAETrainerConfig) -> None:
    """Warn if the dead-latent threshold is longer than the run, naming both numbers."""
    criterion = cfg.resolved_dead_criterion
    in_vain: list[str] = []
    if cfg.aux_variant != "none" and cfg.aux_loss.uses_dead_latents and criterion != "batch":
        in_vain.append(f"the auxiliary loss {cfg.aux_variant!r} will stay 0")
    if cfg.resample_every_steps is not None:
        in_vain.append("none will be resampled")
    n_samples, n_steps = run.total_training_samples, _n_steps(run)
    if criterion == "steps":
        threshold = f"dead_feature_window={run.dead_feature_window}"
        length = f"{n_steps} training steps"
        is_longer = run.dead_feature_window >= n_steps - 1
    else:
        threshold = f"dead_threshold_tokens={cfg.resolved_dead_threshold_tokens}"
        length = f"{n_samples} training tokens"
        is_longer = cfg.resolved_dead_threshold_tokens > n_samples
    if is_longer and in_vain:
        warnings.warn(
            f"{threshold} is longer than this run of {length}: no latent can be dead, so "
            f"{' and '.join(in_vain)}",
            stacklevel=5,
        )


def fitted_stop_step(cfg: Any, run: SAETrainerConfig) -> int:
    """The last step of a run after which dead latents may be resampled.

    The config's own, else one dead window before the run's last step. A latent that is resampled
    later would be saved before it could be seen to be dead again, at worst without a single step of
    training. Where that is before the first resampling, a warning names both numbers.
    """
    every, n_steps = cfg.resample_every_steps, _n_steps(run)
    window = _dead_window(cfg, run) if cfg.resample_stop_step is None else 0
    last = max(0, n_steps - window)
    if every > last:
        less = f", less the dead window of {window}" if window else ""
        warnings.warn(
            f"resample_every_steps={every} is more than {last}, the last step of this run after "
            f"which latents may be resampled ({n_steps} training steps{less}): no latent will be "
            "resampled",
            stacklevel=5,
        )
    return last if cfg.resample_stop_step is None else cfg.resample_stop_step


def _dead_window(cfg: Any, run: SAETrainerConfig) -> int:
    """Training steps of silence after which a latent may be resampled."""
    if cfg.resolved_dead_criterion == "steps":
        return run.dead_feature_window
    return ceil(cfg.resolved_dead_threshold_tokens / run.train_batch_size_samples)


def _n_steps(run: SAETrainerConfig) -> int:
    """Training steps of a run; SAELens may fill the last one up with extra samples."""
    return ceil(run.total_training_samples / run.train_batch_size_samples)


def _resume_schedules(trainer: SAETrainer[Any, Any]) -> None:
    """Let a checkpoint without the schedules of the auxiliary loss go on where it was.

    Those of SAELens's own architectures have none, and those that this package saved before
    SAELens's scheduler warmed the coefficient up have no scheduler. SAELens loads the schedulers
    and the weights after the optimizer, so what a checkpoint does have counts.
    """
    scheduler = trainer.coefficient_schedulers.get(AUX_LOSS_KEY)

    def after_load(optimizer: Any) -> None:
        steps = [int(state["step"]) for state in optimizer.state.values() if "step" in state]
        if steps:
            trainer.sae.training_steps.fill_(max(steps))
            if scheduler is not None:  # else a subclass with coefficients of its own
                scheduler.load_state_dict({"current_step": max(steps)})

    trainer.optimizer.register_load_state_dict_post_hook(after_load)
