"""NaN and infinity in the activations."""

import warnings

import pytest
import torch

from sae_lens_auxk.finite_rows import replace_nonfinite_rows
from tests.helpers import ARCHITECTURES, build_sae, build_trainer, forward


def test_rows_are_replaced_by_the_finite_row_above() -> None:
    x = torch.arange(5.0).unsqueeze(1).repeat(1, 3)
    x[0, 1] = torch.nan
    x[2, 0] = torch.inf
    x[3, 2] = -torch.inf
    replaced, n_finite = replace_nonfinite_rows(x)
    assert replaced[:, 0].tolist() == [4, 1, 1, 1, 4]
    assert n_finite == 2


def test_finite_batches_are_left_alone() -> None:
    x = torch.randn(6, 4)
    replaced, n_finite = replace_nonfinite_rows(x)
    assert torch.equal(replaced, x)
    assert n_finite == 6


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bad_rows_do_not_reach_weights_or_counts(architecture: str) -> None:
    sae = build_sae(architecture, dead_threshold_tokens=5)
    trainer = build_trainer(sae)
    for _ in range(3):
        trainer.step(torch.randn(16, 8))
    before = sae.tokens_since_fired.clone()
    x = torch.randn(16, 8)
    x[3, 2], x[7, 0] = torch.nan, torch.inf
    with pytest.warns(UserWarning, match="2 rows of activations with a NaN or infinity"):
        output = trainer.step(x)
    assert output.metrics["nonfinite_rows"] == 2
    assert all(p.isfinite().all() for p in sae.parameters())
    still_silent = sae.tokens_since_fired > 0
    assert torch.equal(sae.tokens_since_fired[still_silent], before[still_silent] + 14)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_batch_without_a_finite_row_changes_nothing(architecture: str) -> None:
    sae = build_sae(architecture, dead_threshold_tokens=5)
    forward(sae, torch.randn(16, 8))
    before = {name: buffer.clone() for name, buffer in sae.named_buffers()}
    with pytest.warns(UserWarning, match="4 rows"):
        output = forward(sae, torch.full((4, 8), torch.nan))
    output.loss.backward()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in sae.parameters())
    for name, buffer in sae.named_buffers():
        assert name == "training_steps" or torch.equal(buffer, before[name])


def test_finite_batches_do_not_warn() -> None:
    sae = build_sae("auxk-topk")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        forward(sae, torch.randn(16, 8))
