"""A step in eval mode measures: it changes nothing of what a training goes on from."""

import copy
import warnings
from typing import Any

import pytest
import torch

from tests.helpers import ARCHITECTURES, PAIRS, build_config, build_sae, build_trainer, forward

ELSEWHERE = torch.randn(16, 8, generator=torch.Generator().manual_seed(7)) * 3 + 2
"""Data of another kind, on which other latents fire."""


def sae_of(architecture: str, **fields: Any) -> Any:
    fields = {"dead_threshold_tokens": 30, "k_aux": 4, **fields}
    return build_sae(architecture, **fields)


@torch.no_grad()
def validate(sae: Any, step: int = 0) -> Any:
    sae.eval()
    output = forward(sae, ELSEWHERE, torch.arange(24) < 9, step)
    sae.train()
    return output


@pytest.mark.parametrize("may_be_sparse", [True, False])
@pytest.mark.parametrize(("architecture", "variant"), PAIRS)
def test_evaluation_leaves_the_state_as_it_was(
    architecture: str, variant: str, may_be_sparse: bool
) -> None:
    sae = sae_of(architecture, aux_variant=variant, resample_every_steps=1)
    sae.may_be_sparse = may_be_sparse
    forward(sae, torch.randn(16, 8))
    sae.tokens_since_fired[:9] = 1000  # which an evaluation would draw new latents for
    if architecture == "auxk-jumprelu":
        sae.threshold.data[3] = -0.25  # as an optimizer's step may leave it
    before = copy.deepcopy(sae.state_dict())
    drawn = sae.drawn
    for step in (0, 1, 5):
        output = validate(sae, step)
        assert output.losses["aux_loss"].isfinite()
    for name, value in sae.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert sae.drawn is drawn
    assert sae.training


@pytest.mark.parametrize("mode", ["none", "layer_norm"])
@pytest.mark.parametrize("criterion", ["tokens", "steps", "batch"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_training_with_validation_is_bit_equal_to_one_without(
    architecture: str, criterion: str, mode: str
) -> None:
    """Counts, thresholds, schedules, draws, samples of rows: all go on as if nothing had been."""
    if mode in type(build_config(architecture)).unsupported_normalizations:
        return
    fields: dict[str, Any] = {
        "dead_criterion": criterion,
        "normalize_activations": mode,
        "aux_warm_up_steps": 4,
        "aux_decay_start_step": 8,
        "aux_decay_steps": 9,
        "aux_batch_fraction": 0.5,
        "resample_every_steps": 3,
        "b_dec_init": "mean",
    }
    states = []
    for validates in (False, True):
        torch.manual_seed(0)
        sae = sae_of(architecture, **fields)
        trainer = build_trainer(sae, total_training_samples=16 * 12, dead_feature_window=2)
        generator = torch.Generator().manual_seed(1)
        for _ in range(12):
            if validates:
                validate(sae, trainer.n_training_steps)
                validate(sae, 0)
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                trainer.step(torch.randn(16, 8, generator=generator))
            trainer.n_training_steps += 1
        states.append(sae.state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def test_the_first_steps_of_a_resumed_run_may_be_evaluations(tmp_path: Any) -> None:
    """The first training step after a load finds out at which step the run is."""
    coefficients = []
    for validates in (False, True):
        sae = sae_of("auxk-topk", aux_decay_start_step=2, aux_decay_steps=10)
        for step in range(5):
            forward(sae, torch.randn(16, 8), step=step)
        sae.save_model(tmp_path)
        sae.load_weights_from_checkpoint(tmp_path)
        if validates:
            validate(sae, step=0)
            validate(sae, step=4)
        output = forward(sae, torch.randn(16, 8), step=4)
        coefficients.append(output.metrics["aux_coefficient"])
    assert coefficients[0] == coefficients[1] == pytest.approx(1 / 32 * 0.7)


def test_a_step_in_eval_mode_with_gradients_warns_once() -> None:
    sae = sae_of("auxk-topk")
    sae.eval()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for step in range(3):
            forward(sae, torch.randn(16, 8), step=step)
        with torch.no_grad():
            forward(sae, torch.randn(16, 8))
    assert len([w for w in caught if "in eval mode, with gradients on" in str(w.message)]) == 1
    assert sae.tokens_since_fired.max() == 0


def test_a_bad_row_of_an_evaluation_is_not_one_of_the_run() -> None:
    sae = sae_of("auxk-topk")
    sae.eval()
    bad = torch.randn(4, 8)
    bad[0] = torch.nan
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert forward(sae, bad, step=3).metrics["nonfinite_rows"] == 1
    sae.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forward(sae, torch.randn(4, 8), step=100)


def test_an_evaluation_does_not_take_the_count_of_resampled_latents() -> None:
    sae = sae_of("auxk-topk", resample_every_steps=1)
    trainer = build_trainer(sae)
    sae.tokens_since_fired[:9] = 1000
    sae.b_enc.data[:9] = -100
    output = trainer.step(torch.randn(16, 8))
    assert "resampled_latents" not in validate(sae).metrics
    assert output.metrics["resampled_latents"]() == 9
