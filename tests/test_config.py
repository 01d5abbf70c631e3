"""Fields, schedule, and errors that say what is wrong."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig

from tests.helpers import (
    ARCHITECTURES,
    PAIRS,
    STOCK,
    build_config,
    build_sae,
    build_trainer,
    forward,
)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"aux_variant": "auxkk"}, r"aux_variant='auxkk' .* one of none, auxk, reanimation"),
        ({"aux_loss_coefficient": -0.1}, r"aux_loss_coefficient=-0.1 .* from 0 to 1e10"),
        ({"aux_loss_coefficient": float("nan")}, r"aux_loss_coefficient=nan .* from 0 to 1e10"),
        ({"aux_loss_coefficient": "1/32"}, r"aux_loss_coefficient='1/32'"),
        ({"aux_loss_coefficient": 10**400}, r"aux_loss_coefficient=10+ .* from 0 to 1e10"),
        ({"aux_loss_coefficient": 1e308}, r"aux_loss_coefficient=1e\+308 .* from 0 to 1e10"),
        ({"k_aux": 0}, r"k_aux=0 .* None or an integer >= 1"),
        ({"k_aux": -5}, r"k_aux=-5"),
        ({"k_aux": 2.5}, r"k_aux=2.5"),
        ({"aux_bias": "enc"}, r"aux_bias='enc' .* one of decoder, matched, none"),
        ({"aux_bias": "match"}, r"Did you mean matched\?"),
        ({"aux_bias": np.array([1, 2])}, r"aux_bias=array\(\[1, 2\]\) .* decoder, matched, none"),
        ({"aux_relu": 1}, r"aux_relu=1 .* True or False"),
        ({"aux_normalize": "residual"}, r"aux_normalize='residual' .* True or False"),
        ({"dead_criterion": "epochs"}, r"dead_criterion='epochs' .* tokens, steps, batch or None"),
        ({"dead_criterion": "token"}, r"Did you mean tokens\?"),
        ({"dead_threshold_tokens": 0}, r"dead_threshold_tokens=0 .* >= 1"),
        ({"dead_threshold_tokens": -1}, r"dead_threshold_tokens=-1"),
        ({"dead_threshold_tokens": 2**63}, r"dead_threshold_tokens=\d+ .* fits int64"),
        ({"aux_batch_fraction": 0.0}, r"aux_batch_fraction=0.0 .* more than 0 and at most 1"),
        ({"aux_batch_fraction": 1.5}, r"aux_batch_fraction=1.5 .* at most 1"),
        ({"aux_warm_up_steps": -1}, r"aux_warm_up_steps=-1"),
        ({"aux_decay_steps": 10}, r"aux_decay_steps=10 .* aux_decay_start_step is set"),
        ({"aux_decay_start_step": 10}, r"aux_decay_steps=0 .* >= 1"),
        ({"aux_decay_start_step": -1, "aux_decay_steps": 1}, r"aux_decay_start_step=-1"),
        (
            {"aux_warm_up_steps": 20, "aux_decay_start_step": 10, "aux_decay_steps": 5},
            r"aux_decay_start_step=10 .* aux_warm_up_steps \(20\)",
        ),
        ({"resample_every_steps": 0}, r"resample_every_steps=0 .* None or an integer >= 1"),
        ({"resample_every_steps": 2.5}, r"resample_every_steps=2.5 .* None or an integer >= 1"),
        ({"resample_every_steps": True}, r"resample_every_steps=True .* None or an integer >= 1"),
        ({"resample_stop_step": 5}, r"resample_stop_step=5 .* unless resample_every_steps is set"),
        (
            {"resample_every_steps": 6, "resample_stop_step": 5},
            r"resample_stop_step=5 .* >= resample_every_steps \(6\)",
        ),
        (
            {"resample_every_steps": 6, "resample_stop_step": "6"},
            r"resample_stop_step='6' .* None or an integer >= 1",
        ),
        ({"k": 25}, r"k=25 .* at most d_sae \(24\)"),
        ({"k": 0}, r"k=0 .* more than 0"),
        ({"k": 2.5}, r"k=2.5 .* an integer >= 1"),
        ({"d_sae": 0}, r"d_sae=0"),
        ({"dtype": "float16"}, r"dtype='float16' .* float32, bfloat16 or float64"),
        ({"dtype": torch.float16}, r"dtype=torch.float16 .* float32, bfloat16 or float64"),
        ({"b_dec_init": "median"}, r"b_dec_init='median' .* zeros, mean, geometric_median"),
        ({"b_dec_init": None}, r"b_dec_init=None .* zeros, mean, geometric_median"),
        ({"d_in": -8}, r"d_in=-8"),
    ],
)
def test_bad_values_are_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build_config("auxk-topk", **fields)


@pytest.mark.parametrize("architecture", ["auxk-jumprelu", "auxk-standard", "auxk-gated"])
def test_multi_topk_needs_a_k(architecture: str) -> None:
    with pytest.raises(ValueError, match="aux_variant='multi_topk' .* has no k"):
        build_config(architecture, aux_variant="multi_topk")


@pytest.mark.parametrize("architecture", ["auxk-gated", "auxk-matryoshka-batchtopk"])
@pytest.mark.parametrize("mode", ["layer_norm", "constant_norm_rescale"])
def test_normalisations_that_saelens_cannot_train_are_refused(architecture: str, mode: str) -> None:
    with pytest.raises(ValueError, match=f"normalize_activations='{mode}' .* {architecture}"):
        build_config(architecture, normalize_activations=mode)


@pytest.mark.parametrize(
    "widths", [[0, 24], [10, 5], [10, 10], [48], [12.5, 24], [True, 24], "abc", 5]
)
def test_bad_matryoshka_widths_are_refused(widths: Any) -> None:
    with pytest.raises(ValueError, match="matryoshka_widths=.* strictly increasing"):
        build_config("auxk-matryoshka-batchtopk", matryoshka_widths=widths)


def test_matryoshka_levels_have_no_part_in_multi_topk() -> None:
    with pytest.raises(ValueError, match="use_matryoshka_aux_loss=True"):
        build_config(
            "auxk-matryoshka-batchtopk", aux_variant="multi_topk", use_matryoshka_aux_loss=True
        )


def test_whether_levels_have_their_own_loss_is_yes_or_no() -> None:
    with pytest.raises(ValueError, match="use_matryoshka_aux_loss='no' .* True or False"):
        build_config("auxk-matryoshka-batchtopk", use_matryoshka_aux_loss="no")


def test_numpy_numbers_become_pythons(tmp_path: Path) -> None:
    """A config that keeps one trains, and fails when it is saved."""
    sae = build_sae(
        "auxk-matryoshka-batchtopk",
        d_sae=np.int64(24),
        k=np.float32(2.5),
        k_aux=np.int64(8),
        aux_loss_coefficient=np.float32(0.5),
        matryoshka_widths=(np.int64(12), np.int64(24)),
    )
    sae.save_model(tmp_path)
    assert TrainingSAE.load_from_disk(tmp_path).cfg.to_dict() == sae.cfg.to_dict()
    cfg = build_config("auxk-topk", k_aux=np.int64(8), aux_batch_fraction=np.float32(0.5))
    assert (type(cfg.k_aux), type(cfg.aux_batch_fraction)) == (int, float)


def test_the_coefficient_warms_up_and_decays() -> None:
    sae = build_sae(
        "auxk-topk",
        aux_loss_coefficient=2.0,
        aux_warm_up_steps=4,
        aux_decay_start_step=6,
        aux_decay_steps=4,
        dead_criterion="steps",
    )
    trainer = build_trainer(sae)
    values: list[float] = []
    for step in range(13):
        trainer.n_training_steps = step
        values.append(trainer.step(torch.randn(16, 8)).metrics["aux_coefficient"])
    assert values == [0, 0.5, 1, 1.5, 2, 2, 2, 1.5, 1, 0.5, 0, 0, 0]


def test_a_loop_without_a_scheduler_has_the_decay_only() -> None:
    fields: dict[str, Any] = {"aux_decay_start_step": 6, "aux_decay_steps": 4}
    sae = build_sae("auxk-topk", aux_loss_coefficient=2.0, aux_warm_up_steps=4, **fields)
    x = torch.randn(16, 8)
    values = [forward(sae, x, step=step).metrics["aux_coefficient"] for step in range(13)]
    assert values == [2, 2, 2, 2, 2, 2, 2, 1.5, 1, 0.5, 0, 0, 0]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_warm_up_is_that_of_saelens(architecture: str) -> None:
    from sae_lens.saes.sae import TrainCoefficientConfig

    sae = build_sae(architecture, aux_variant="pursuit", aux_warm_up_steps=7)
    ours = sae.get_coefficients()
    assert ours.pop("aux_loss") == TrainCoefficientConfig(value=0.5, warm_up_steps=7)
    stock_class, stock_cfg_class = get_sae_training_class(STOCK[architecture])
    cfg = build_config(architecture).to_dict()
    cfg.update(architecture=STOCK[architecture], aux_loss_coefficient=1.0)
    assert ours == stock_class(stock_cfg_class.from_dict(cfg)).get_coefficients()


@pytest.mark.parametrize(("architecture", "variant"), PAIRS)
def test_to_dict_from_dict_round_trip(architecture: str, variant: str) -> None:
    cfg = build_config(
        architecture,
        aux_variant=variant,
        aux_loss_coefficient=0.5,
        k_aux=None,
        aux_bias="matched",
        aux_relu=True,
        aux_normalize=True,
        dead_criterion="steps",
        dead_threshold_tokens=123,
        aux_warm_up_steps=1,
        aux_decay_start_step=2,
        aux_decay_steps=3,
        resample_every_steps=4,
        resample_stop_step=8,
        b_dec_init="mean",
    )
    again = TrainingSAEConfig.from_dict(cfg.to_dict())
    assert type(again) is type(cfg)
    assert again.to_dict() == cfg.to_dict()
    assert again == cfg


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_defaults_are_those_of_the_design(architecture: str) -> None:
    cfg = build_config(architecture)
    assert cfg.aux_variant == "auxk"
    assert cfg.aux_loss_coefficient is None
    assert cfg.k_aux is None
    assert cfg.resolved_k_aux == 4  # of d_in=8
    assert build_config(architecture, k_aux=999).resolved_k_aux == 999
    assert cfg.aux_bias == "decoder"
    assert cfg.aux_relu is False
    assert cfg.aux_normalize is False
    assert cfg.dead_criterion is None
    assert cfg.dead_threshold_tokens is None
    with pytest.warns(UserWarning, match="10 million silent tokens .* Set it"):
        assert cfg.resolved_dead_threshold_tokens == 10_000_000
    assert cfg.aux_batch_fraction == 1.0
    assert cfg.aux_warm_up_steps == 0
    assert cfg.aux_decay_start_step is None
    assert cfg.aux_decay_steps == 0
    assert cfg.resample_every_steps is None
    assert cfg.resample_stop_step is None
    assert cfg.resolved_resample_stop_step is None
    assert cfg.b_dec_init == "zeros"


def test_decay_may_start_where_the_warm_up_ends() -> None:
    cfg = build_config("auxk-topk", aux_warm_up_steps=5, aux_decay_start_step=5, aux_decay_steps=2)
    assert [cfg.aux_decay_at(step) for step in (4, 5, 6, 7)] == [1.0, 1.0, 0.5, 0.0]
