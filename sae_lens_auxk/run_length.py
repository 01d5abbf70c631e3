"""Fits dead latents to the length of a run, when its trainer is made.

SAELens gives a training SAE no view of the run's length, but every one of its runners makes a
``SAETrainer``. What it is made by is wrapped here; the only other wrap is in
:mod:`sae_lens_auxk.fine_tuning`.
"""

import functools
import warnings
from dataclasses import replace
from math import ceil
from typing import Any

from sae_lens.config import SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

from sae_lens_auxk.aux_config import AuxConfig
from sae_lens_auxk.dead_latents import threshold_for


def fix_dead_threshold(sae: Any, trainer_cfg: SAETrainerConfig) -> None:
    """Replace ``dead_threshold_tokens=None`` in the SAE's config by the number for this run.

    The config is copied, so that the one that the user holds can start another run.
    """
    if sae.cfg.dead_threshold_tokens is None:
        threshold = threshold_for(trainer_cfg.total_training_samples)
        sae.cfg = replace(sae.cfg, dead_threshold_tokens=threshold)


def warn_if_no_latent_can_die(cfg: AuxConfig, trainer_cfg: SAETrainerConfig) -> None:
    """Warn if the dead-latent threshold is longer than the run, naming both numbers."""
    if cfg.aux_variant == "none" or not cfg.aux_loss.uses_dead_latents:
        return
    n_samples = trainer_cfg.total_training_samples
    # SAELens's trainer goes on until it has them all, so its last step may be one more.
    n_steps = ceil(n_samples / trainer_cfg.train_batch_size_samples)
    match cfg.resolved_dead_criterion:
        case "tokens" if cfg.resolved_dead_threshold_tokens > n_samples:
            threshold = f"dead_threshold_tokens={cfg.dead_threshold_tokens}"
            length = f"{n_samples} training tokens"
        case "steps" if trainer_cfg.dead_feature_window >= n_steps - 1:
            threshold = f"dead_feature_window={trainer_cfg.dead_feature_window}"
            length = f"{n_steps} training steps"
        case _:
            return
    warnings.warn(
        f"{threshold} is longer than this run of {length}: no latent can be dead, so the "
        f"auxiliary loss {cfg.aux_variant!r} will stay 0",
        stacklevel=4,
    )


def fit_to_run(sae: Any, trainer_cfg: SAETrainerConfig) -> None:
    """What a new trainer does to one of this package's SAEs; nothing to others."""
    if isinstance(sae.cfg, AuxConfig):
        fix_dead_threshold(sae, trainer_cfg)
        warn_if_no_latent_can_die(sae.cfg, trainer_cfg)


def fit_in_every_trainer() -> None:
    """Make SAELens's ``SAETrainer`` call :func:`fit_to_run` when it is made."""
    trainer_init = SAETrainer.__init__
    if hasattr(trainer_init, "fits_to_run"):
        return

    @functools.wraps(trainer_init)
    def init(self: Any, cfg: SAETrainerConfig, sae: Any, *args: Any, **kwargs: Any) -> None:
        trainer_init(self, cfg, sae, *args, **kwargs)
        fit_to_run(sae, cfg)

    init.fits_to_run = True  # type: ignore[attr-defined]
    SAETrainer.__init__ = init
