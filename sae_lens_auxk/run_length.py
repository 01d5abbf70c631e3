"""Fit dead-latent thresholds and resampling to the length of a run when its trainer is created.

SAELens does not tell a training SAE the run's length, but each of its runners creates a
``SAETrainer``. This module wraps its constructor; the only other wrappers are in
:mod:`sae_lens_auxk.fine_tuning`, :mod:`sae_lens_auxk.resampling` and
:mod:`sae_lens_auxk.sharded.clipping`.
"""

import warnings
from dataclasses import replace
from math import ceil
from typing import Any

from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

from sae_lens_auxk.aux_config import AuxConfig
from sae_lens_auxk.dead_latents import threshold_for
from sae_lens_auxk.saelens import wrap_once


def fix_dead_threshold(sae: Any, trainer_cfg: SAETrainerConfig) -> None:
    """Replace ``dead_threshold_tokens=None`` in the SAE's config with the number for this run.

    The config is copied, so that the user's own copy can start another run.
    """
    if sae.cfg.dead_threshold_tokens is None:
        threshold = threshold_for(trainer_cfg.total_training_samples)
        sae.cfg = replace(sae.cfg, dead_threshold_tokens=threshold)


def warn_if_no_latent_can_die(cfg: AuxConfig, trainer_cfg: SAETrainerConfig) -> None:
    """Warn if the dead-latent threshold is longer than the run, naming both numbers."""
    criterion = cfg.resolved_dead_criterion
    in_vain: list[str] = []
    if cfg.aux_variant != "none" and cfg.aux_loss.uses_dead_latents and criterion != "batch":
        in_vain.append(f"the auxiliary loss {cfg.aux_variant!r} will stay 0")
    if cfg.resample_every_steps is not None:
        in_vain.append("none will be resampled")
    n_samples, n_steps = trainer_cfg.total_training_samples, _n_steps(trainer_cfg)
    if criterion == "steps":
        threshold = f"dead_feature_window={trainer_cfg.dead_feature_window}"
        length = f"{n_steps} training steps"
        is_longer = trainer_cfg.dead_feature_window >= n_steps - 1
    else:
        threshold = f"dead_threshold_tokens={cfg.dead_threshold_tokens}"
        length = f"{n_samples} training tokens"
        is_longer = cfg.resolved_dead_threshold_tokens > n_samples
    if is_longer and in_vain:
        warnings.warn(
            f"{threshold} is longer than this run of {length}: no latent can be dead, so "
            f"{' and '.join(in_vain)}",
            stacklevel=4,
        )


def fix_last_resampling(sae: Any, trainer_cfg: SAETrainerConfig) -> None:
    """Replace ``resample_stop_step=None`` in the SAE's config with the number for this run.

    The stop step is one dead window before the run's last step. A latent that is resampled later
    would be saved before it could be seen to be dead again, at worst without a single step of
    training. If the stop step is before the first resampling, resampling is turned off
    (``resample_every_steps=None``) with a warning that names both numbers. A given
    ``resample_stop_step`` is kept.

    The config is copied, as in :func:`fix_dead_threshold`, which has to come first.
    """
    cfg: Any = sae.cfg
    every, n_steps = cfg.resample_every_steps, _n_steps(trainer_cfg)
    if every is None:
        return
    window = _dead_window(cfg, trainer_cfg) if cfg.resample_stop_step is None else 0
    last = max(0, n_steps - window)
    if every > last:
        less = f", less the dead window of {window}" if window else ""
        warnings.warn(
            f"resample_every_steps={every} is more than {last}, the last step of this run after "
            f"which latents may be resampled ({n_steps} training steps{less}): no latent will be "
            "resampled",
            stacklevel=4,
        )
    if cfg.resample_stop_step is None:
        fitted = {"resample_stop_step": last} if every <= last else {"resample_every_steps": None}
        sae.cfg = replace(cfg, **fitted)


def _dead_window(cfg: AuxConfig, trainer_cfg: SAETrainerConfig) -> int:
    """Training steps of silence after which a latent may be resampled."""
    if cfg.resolved_dead_criterion == "steps":
        return trainer_cfg.dead_feature_window
    return ceil(cfg.resolved_dead_threshold_tokens / trainer_cfg.train_batch_size_samples)


def _n_steps(trainer_cfg: SAETrainerConfig) -> int:
    """Training steps of a run; SAELens may fill the last one up with extra samples."""
    return ceil(trainer_cfg.total_training_samples / trainer_cfg.train_batch_size_samples)


def fit_to_run(sae: Any, trainer_cfg: SAETrainerConfig) -> None:
    """Adapt one of this package's SAEs to a new trainer's run; leave other SAEs alone."""
    if isinstance(sae.cfg, AuxConfig):
        fix_dead_threshold(sae, trainer_cfg)
        warn_if_no_latent_can_die(sae.cfg, trainer_cfg)
        fix_last_resampling(sae, trainer_cfg)


def fit_in_every_trainer() -> None:
    """Make SAELens's ``SAETrainer`` call :func:`fit_to_run` when it is created."""

    def init(made: Any, self: Any, cfg: SAETrainerConfig, sae: Any, *args: Any, **kw: Any) -> None:
        made(self, cfg, sae, *args, **kw)
        fit_to_run(sae, cfg)

    wrap_once(SAETrainer, "__init__", init)
