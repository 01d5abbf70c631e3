"""NaN and infinity in the activations."""

import warnings
from pathlib import Path

import pytest
import torch

from sae_lens_auxk.step.inputs import largest_norm, replace_rows, usable_rows
from tests.helpers import ARCHITECTURES, build_config, build_sae, build_trainer, forward


def test_rows_are_replaced_by_a_finite_row() -> None:
    x = torch.arange(5.0).unsqueeze(1).repeat(1, 3)
    x[0, 1] = torch.nan
    x[2, 0] = torch.inf
    x[3, 2] = -torch.inf
    usable = usable_rows(x, "none", torch.float32)
    assert usable.tolist() == [False, True, False, False, True]
    assert replace_rows(x, usable)[:, 0].tolist() == [1, 1, 1, 1, 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_batch_without_a_usable_row_becomes_ones(dtype: torch.dtype) -> None:
    x = torch.tensor([[torch.nan, 0.0], [torch.inf, -torch.inf]], dtype=dtype)
    usable = usable_rows(x, "none", torch.float32)
    assert not usable.any()
    assert torch.equal(replace_rows(x, usable), torch.ones_like(x))


def test_a_row_of_zeros_has_no_norm_to_rescale_by() -> None:
    x = torch.tensor([[0.0, 0.0], [0.0, 1.0]])
    assert usable_rows(x, "none", torch.float32).tolist() == [True, True]
    assert usable_rows(x, "constant_norm_rescale", torch.float32).tolist() == [False, True]


def test_finite_batches_are_left_alone() -> None:
    x = torch.randn(6, 4)
    assert torch.equal(replace_rows(x, usable_rows(x, "layer_norm", torch.float32)), x)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bad_rows_do_not_reach_weights_or_counts(architecture: str) -> None:
    sae = build_sae(architecture, dead_threshold_tokens=5)
    trainer = build_trainer(sae)
    for _ in range(3):
        trainer.step(torch.randn(16, 8))
    before = sae.tokens_since_fired.clone()
    x = torch.randn(16, 8)
    x[3, 2], x[7, 0] = torch.nan, torch.inf
    with pytest.warns(UserWarning, match="2 rows of activations with a NaN, infinity"):
        output = trainer.step(x)
    assert output.metrics["nonfinite_rows"] == 2
    assert all(p.isfinite().all() for p in sae.parameters())
    still_silent = sae.tokens_since_fired > 0
    assert torch.equal(sae.tokens_since_fired[still_silent], before[still_silent] + 14)


@pytest.mark.parametrize("mode", ["none", "layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_batch_without_a_finite_row_has_no_gradient_and_no_count(
    architecture: str, mode: str
) -> None:
    if mode in type(build_config(architecture)).unsupported_normalizations:
        return
    sae = build_sae(architecture, dead_threshold_tokens=5, normalize_activations=mode)
    forward(sae, torch.randn(16, 8))
    before = {name: buffer.clone() for name, buffer in sae.named_buffers()}
    unusable = [torch.full((4, 8), torch.nan), torch.full((4, 8), 1e30)]
    unusable[1][:, 3] = torch.inf
    if mode == "constant_norm_rescale":
        unusable.append(torch.zeros(4, 8))
    for step, x in enumerate(unusable, start=1):
        with pytest.warns(UserWarning, match=f"{4 * step} rows"):
            output = forward(sae, x, step=100 * step)
        assert output.loss == 0
        output.loss.backward()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in sae.parameters())
    for name, buffer in sae.named_buffers():
        assert name == "training_steps" or torch.equal(buffer, before[name])


def test_a_run_that_starts_without_a_finite_row_is_stopped() -> None:
    sae = build_sae("auxk-topk", normalize_activations="expected_average_only_in")
    with pytest.raises(ValueError, match="no row .* normalize_activations='expected_average"):
        forward(sae, torch.full((4, 8), torch.nan))


def test_reports_are_100_steps_apart_and_the_rest_comes_with_the_checkpoint(
    tmp_path: Path,
) -> None:
    sae = build_sae("auxk-topk", dead_threshold_tokens=1000)
    bad = torch.randn(4, 8)
    bad[0] = torch.nan
    with pytest.warns(UserWarning, match="^1 rows"):
        forward(sae, bad, step=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forward(sae, bad, step=1)
    with pytest.warns(UserWarning, match="^2 rows"):
        sae.save_model(tmp_path)
    with pytest.warns(UserWarning, match="^3 rows"):
        forward(sae, bad, step=100)


def test_a_bad_row_after_a_clean_step_is_reported_at_once() -> None:
    sae = build_sae("auxk-topk")
    forward(sae, torch.randn(4, 8), step=0)
    bad = torch.randn(4, 8)
    bad[0] = torch.inf
    with pytest.warns(UserWarning, match="^1 rows"):
        forward(sae, bad, step=1)


def test_finite_batches_do_not_warn() -> None:
    sae = build_sae("auxk-topk", dead_threshold_tokens=1000)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forward(sae, torch.randn(16, 8))


@pytest.mark.parametrize("value", [1e15, 1e20, 1e38, 1e200])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_finite_row_that_is_too_large_does_no_harm(architecture: str, value: float) -> None:
    if value > 1e38 and architecture == "auxk-gated":
        pytest.skip("SAELens's gated loss takes activations of its own precision only")
    sae = build_sae(architecture)
    trainer = build_trainer(sae)
    x = torch.randn(16, 8, dtype=torch.float64 if value > 1e38 else torch.float32)
    x[3, 2] = value
    with pytest.warns(UserWarning, match="1 rows .* norm out of range"):
        output = trainer.step(x)
    assert output.metrics["nonfinite_rows"] == 1
    before = sae.W_enc.detach().clone()
    assert all(p.isfinite().all() for p in sae.parameters())
    trainer.step(torch.randn(16, 8))
    assert not torch.equal(sae.W_enc, before)


def test_the_largest_row_that_counts_still_trains() -> None:
    sae = build_sae("auxk-topk")
    trainer = build_trainer(sae)
    x = torch.randn(16, 8)
    x[3] = torch.full((8,), 0.99 * largest_norm(torch.float32) / 8**0.5)
    before = sae.W_enc.detach().clone()
    assert trainer.step(x).metrics["nonfinite_rows"] == 0
    assert sae.W_enc.isfinite().all()
    assert not torch.equal(sae.W_enc, before)


def test_a_row_whose_norm_underflows_has_none_to_rescale_by() -> None:
    sae = build_sae("auxk-topk", normalize_activations="constant_norm_rescale")
    x = torch.randn(16, 8)
    x[3] = 1e-30
    with pytest.warns(UserWarning, match="1 rows"):
        forward(sae, x).loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in sae.parameters())


def test_an_empty_batch_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sae_in of shape \(0, 8\) has no row"):
        forward(build_sae("auxk-topk"), torch.empty(0, 8))
