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
        {"dead_feature_window": 10},
        {"aux_variant": "none", "resample_every_steps": 19, "dead_threshold_tokens": 64},
        {
            "aux_variant": "none",
            "resample_every_steps": 20,
            "resample_stop_step": 20,
            "dead_threshold_tokens": 64,
        },
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


@pytest.mark.parametrize(
    ("n_samples", "threshold", "is_warned"),
    [
        (10**9, 2000, False),  # 1000 steps of 2
        (4000, 2000, False),
        (3999, 199, True),
        (1280, 64, True),
        (10, 1, True),
    ],
)
def test_a_threshold_left_to_the_run_is_its_dead_window_or_a_twentieth_of_it(
    n_samples: int, threshold: int, is_warned: bool
) -> None:
    cfg = build_config("auxk-topk")
    sae = get_sae_training_class("auxk-topk")[0](cfg)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build_trainer(sae, total_training_samples=n_samples, train_batch_size_samples=2)
    messages = [str(w.message) for w in caught if "a latent is dead" in str(w.message)]
    assert messages == is_warned * [
        f"dead_feature_window=1000 is 2000 tokens, more than half of this run of {n_samples}: "
        f"a latent is dead after {threshold} silent tokens, a twentieth of the run. "
        "Set dead_threshold_tokens to choose"
    ]
    assert sae.cfg.resolved_dead_threshold_tokens == threshold
    assert sae.cfg.metadata.fitted == {"dead_threshold_tokens": threshold}
    assert sae.cfg.dead_threshold_tokens is cfg.dead_threshold_tokens is None
    assert "fitted" not in cfg.metadata
    with pytest.warns(UserWarning, match="without SAELens's SAETrainer"):
        assert cfg.resolved_dead_threshold_tokens == 10_000_000


@pytest.mark.filterwarnings("ignore:dead_feature_window=1000 is")
def test_the_next_trainer_fits_what_is_left_open_anew() -> None:
    sae: Any = build_sae("auxk-topk", resample_every_steps=4)
    for n_samples, fitted in ((1280, (64, 608)), (10**6, (2000, 499_000)), (400, (20, 190))):
        build_trainer(sae, total_training_samples=n_samples, train_batch_size_samples=2)
        cfg = sae.cfg
        resolved = (cfg.resolved_dead_threshold_tokens, cfg.resolved_resample_stop_step)
        assert resolved == (*cfg.metadata.fitted.values(),) == fitted
        assert cfg.dead_threshold_tokens is cfg.resample_stop_step is None
        again = TrainingSAE.from_dict(cfg.to_dict())
        assert (again.cfg.dead_threshold_tokens, again.cfg.resample_stop_step) == (None, None)


@pytest.mark.parametrize("fields", [{"aux_variant": "none"}, {"dead_criterion": "steps"}])
def test_a_threshold_that_decides_nothing_is_fitted_without_a_warning(
    fields: dict[str, Any],
) -> None:
    sae: Any = build_sae("auxk-topk", **fields)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_trainer(sae, total_training_samples=1280, dead_feature_window=41)
    assert sae.cfg.resolved_dead_threshold_tokens == 64


@pytest.mark.parametrize(
    ("fields", "stop"),
    [
        ({"dead_threshold_tokens": 200}, 16),
        ({"dead_threshold_tokens": 192}, 17),
        ({}, 13),
        ({"dead_feature_window": 10}, 10),
        ({"dead_feature_window": 11}, 19),
        ({"dead_criterion": "batch", "dead_threshold_tokens": 200}, 16),
        ({"dead_criterion": "steps", "dead_threshold_tokens": 200}, 13),
        ({"resample_every_steps": 16, "dead_threshold_tokens": 200}, 16),
        ({"resample_every_steps": 17, "dead_threshold_tokens": 200}, 16),
        ({"resample_stop_step": 20, "dead_threshold_tokens": 200}, 20),
        ({"resample_stop_step": 99, "dead_threshold_tokens": 200}, 99),
        ({"resample_every_steps": None}, None),
    ],
)
@pytest.mark.filterwarnings("ignore:resample_every_steps=17", "ignore:dead_feature_window=11 is")
def test_the_last_resampling_is_a_dead_window_before_the_end(
    fields: dict[str, Any], stop: int | None
) -> None:
    given = {"resample_every_steps": 4, "dead_feature_window": 7, **fields}
    window = given.pop("dead_feature_window")
    cfg = build_config("auxk-topk", **given)
    sae = get_sae_training_class("auxk-topk")[0](cfg)
    build_trainer(
        sae, total_training_samples=1280, train_batch_size_samples=64, dead_feature_window=window
    )
    assert sae.cfg.resolved_resample_stop_step == stop
    fitted = stop if sae.cfg.resample_stop_step is None else None
    assert sae.cfg.metadata.fitted.get("resample_stop_step") == fitted
    for each in (cfg, sae.cfg):
        assert each.resample_every_steps == given["resample_every_steps"]
        assert each.resample_stop_step == given.get("resample_stop_step")
    every = given["resample_every_steps"] or 99
    resampling = [step + 1 for step in range(20) if sae.cfg.resamples_after(step)]
    assert resampling == [step for step in range(every, 21, every) if step <= (stop or 0)]


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
        if output.metrics["resampled_latents"]() > 0:
            resampled_after.append(trainer.n_training_steps + 1)
        return output

    trainer.step = watched
    trainer.fit()
    assert resampled_after == [5, 10, 15]


def test_a_short_run_has_an_auxiliary_loss_without_a_flag(tmp_path: Path) -> None:
    cfg = runner_config(
        "auxk-topk", **tiny_model.run_fields(k=4, output_path=str(tmp_path / "output"))
    )
    with pytest.warns(UserWarning, match="64000 tokens, more than half of this run of 1280"):
        sae = run(cfg)
    assert int((sae.tokens_since_fired >= 64).sum()) > 0
    metadata = SAE.load_from_disk(cfg.output_path).cfg.metadata
    assert metadata.fitted == {"dead_threshold_tokens": 64}
    assert metadata.training_architecture_details["dead_threshold_tokens"] is None
