"""Dead latents fitted to the length of a run, and the warning where none can die."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainingSAE

from sae_lens_auxk import runner_config
from tests import tiny_model
from tests.helpers import build_config, build_sae, build_trainer, kill_latents
from tests.tiny_model import run


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dead_threshold_tokens": 5000}, r"dead_threshold_tokens=5000 .* 1280 training tokens"),
        (
            {"dead_criterion": "steps", "dead_feature_window": 19},
            r"dead_feature_window=19 .* 20 training steps",
        ),
        (
            {"aux_variant": "none", "dead_threshold_tokens": 5000, "resample_every_steps": 5},
            r"dead_threshold_tokens=5000 .* 1280 training tokens.* so none will be resampled",
        ),
        (
            {"resample_every_steps": 20},
            r"resample_every_steps=20 is more than 19, .* \(20 training steps, less .* of 1\)",
        ),
        (
            {"resample_every_steps": 21, "resample_stop_step": 30},
            r"resample_every_steps=21 is more than 20, .*\(20 training steps\): no latent",
        ),
    ],
)
def test_a_threshold_longer_than_the_run_is_warned_about(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.warns(UserWarning, match=message):
        run(runner_config("auxk-topk", **tiny_model.run_fields(k=4, **fields)))


@pytest.mark.parametrize(
    "fields",
    [
        {"dead_threshold_tokens": 1280},
        {"aux_variant": "none"},
        {"aux_variant": "multi_topk"},
        {"aux_variant": "reanimation"},
        {"dead_criterion": "steps", "dead_feature_window": 10},
        {"aux_variant": "none", "resample_every_steps": 19},
        {"aux_variant": "none", "resample_every_steps": 20, "resample_stop_step": 20},
    ],
)
def test_other_runs_are_not_warned_about(fields: dict[str, Any]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(is longer than|of) this run.*")
        build_trainer(
            build_sae("auxk-topk", **{k: v for k, v in fields.items() if "window" not in k}),
            total_training_samples=1280,
            train_batch_size_samples=64,
            dead_feature_window=fields.get("dead_feature_window", 1000),
        )


@pytest.mark.parametrize(("n_samples", "threshold"), [(1280, 64), (10, 1), (10**9, 10_000_000)])
def test_a_threshold_left_to_the_run_is_a_twentieth_of_it(n_samples: int, threshold: int) -> None:
    cfg = build_config("auxk-topk")
    for _ in range(2):  # one config can start two runs
        sae = TrainingSAE.from_dict(cfg.to_dict())
        build_trainer(sae, total_training_samples=n_samples, train_batch_size_samples=2)
        assert sae.cfg.dead_threshold_tokens == threshold
    sae = get_sae_training_class("auxk-topk")[0](cfg)
    build_trainer(sae, total_training_samples=n_samples, train_batch_size_samples=2)
    assert cfg.dead_threshold_tokens is None


@pytest.mark.parametrize(
    ("fields", "steps"),
    [
        ({"dead_threshold_tokens": 200}, (4, 16)),
        ({"dead_threshold_tokens": 192}, (4, 17)),
        ({}, (4, 19)),
        ({"dead_criterion": "batch", "dead_threshold_tokens": 200}, (4, 16)),
        ({"dead_criterion": "steps", "dead_threshold_tokens": 200}, (4, 13)),
        ({"resample_every_steps": 16, "dead_threshold_tokens": 200}, (16, 16)),
        ({"resample_every_steps": 17, "dead_threshold_tokens": 200}, (None, None)),
        ({"resample_stop_step": 20, "dead_threshold_tokens": 200}, (4, 20)),
        ({"resample_stop_step": 99, "dead_threshold_tokens": 200}, (4, 99)),
        ({"resample_every_steps": None}, (None, None)),
    ],
)
@pytest.mark.filterwarnings("ignore:resample_every_steps=17")
def test_the_last_resampling_is_a_dead_window_before_the_end(
    fields: dict[str, Any], steps: tuple[int | None, int | None]
) -> None:
    cfg = build_config("auxk-topk", **{"resample_every_steps": 4, **fields})
    sae = get_sae_training_class("auxk-topk")[0](cfg)
    build_trainer(
        sae, total_training_samples=1280, train_batch_size_samples=64, dead_feature_window=7
    )
    assert (sae.cfg.resample_every_steps, sae.cfg.resample_stop_step) == steps
    assert cfg.resample_every_steps == fields.get("resample_every_steps", 4)
    assert cfg.resample_stop_step == fields.get("resample_stop_step")


def test_no_latent_is_resampled_after_the_last_step() -> None:
    """The run's number of steps is a multiple of ``resample_every_steps``."""
    torch.manual_seed(0)
    sae = build_sae("auxk-topk", dead_threshold_tokens=64, resample_every_steps=5)
    kill_latents(sae, 9)
    trainer = build_trainer(sae, total_training_samples=1280, train_batch_size_samples=64)
    trainer.data_provider = iter(torch.randn(20, 64, 8))
    step, resampled_after = trainer.step, []

    def watched(batch: torch.Tensor) -> Any:
        kill_latents(sae, 9)
        output = step(batch)
        if "resampled_latents" in output.metrics:
            resampled_after.append(trainer.n_training_steps + 1)
        return output

    trainer.step = watched
    trainer.fit()
    assert resampled_after == [5, 10, 15]


def test_a_short_run_has_an_auxiliary_loss_without_a_flag(tmp_path: Path) -> None:
    cfg = runner_config(
        "auxk-topk", **tiny_model.run_fields(k=4, output_path=str(tmp_path / "output"))
    )
    sae = run(cfg)
    assert int((sae.tokens_since_fired >= 64).sum()) > 0
    details = SAE.load_from_disk(cfg.output_path).cfg.metadata.training_architecture_details
    assert details["dead_threshold_tokens"] == 64
