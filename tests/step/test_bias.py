"""``b_dec_init``: the first value of ``b_dec``."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_lens_auxk.step.bias import initial_b_dec
from tests.helpers import ARCHITECTURES, build_config, build_sae, build_trainer, forward


def batch(n_rows: int = 64, seed: int = 0) -> torch.Tensor:
    """Rows around (3, 3, ...), one of them an attention sink."""
    x = torch.randn(n_rows, 8, generator=torch.Generator().manual_seed(seed)) + 3
    x[5] *= 1000
    return x


def ordinary(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x[:5], x[6:]])


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_first_step_sets_it_to_the_mean_of_ordinary_rows(architecture: str) -> None:
    sae = build_sae(architecture, randomize=False, b_dec_init="mean", dead_threshold_tokens=99)
    assert not sae.b_dec.any()
    x = batch()
    output = forward(sae, x)
    torch.testing.assert_close(sae.b_dec.detach(), ordinary(x).mean(dim=0))
    assert output.sae_out.mean() > 2, "the step itself must see it"
    before = sae.b_dec.detach().clone()
    forward(sae, batch(seed=1), step=0)  # a second part of an accumulated batch
    forward(sae, batch(seed=1), step=1)
    assert torch.equal(sae.b_dec, before)


def test_the_geometric_median_has_the_least_sum_of_distances() -> None:
    x = ordinary(batch()).double()
    x[:10] += 20  # which moves the mean
    median = initial_b_dec(x, "geometric_median")
    directions = (x - median) / (x - median).norm(dim=-1, keepdim=True)
    assert directions.sum(dim=0).norm() < 1e-3  # the gradient of the sum
    distances = (x - median).norm(dim=-1).sum()
    for other in (x.mean(dim=0), x.median(dim=0).values, median + 0.01):
        assert distances < (x - other).norm(dim=-1).sum()


def test_a_row_at_the_geometric_median_does_no_harm() -> None:
    x = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    torch.testing.assert_close(initial_b_dec(x, "geometric_median"), torch.zeros(2))


@pytest.mark.parametrize("mode", ["layer_norm", "constant_norm_rescale"])
def test_it_is_in_the_units_that_the_sae_sees(mode: str) -> None:
    sae = build_sae("auxk-topk", randomize=False, b_dec_init="mean", normalize_activations=mode)
    x = batch() + torch.arange(8.0)
    forward(sae, x)
    rows = x - x.mean(dim=-1, keepdim=True)
    rows = rows / (rows.std(dim=-1, keepdim=True) + 1e-5)
    if mode == "constant_norm_rescale":
        rows = x / x.norm(dim=-1, keepdim=True) * 8**0.5
    torch.testing.assert_close(sae.b_dec.detach(), rows.mean(dim=0), rtol=1e-4, atol=1e-4)


def test_scaled_activations_count_as_they_are_scaled() -> None:
    sae = build_sae("auxk-topk", randomize=False, b_dec_init="mean", dead_threshold_tokens=99)
    trainer = build_trainer(sae, lr=1e-9, lr_end=1e-9)
    trainer.activation_scaler.scaling_factor = 0.5
    trainer.step(batch())
    torch.testing.assert_close(sae.b_dec.detach(), 0.5 * ordinary(batch()).mean(dim=0))


def test_neither_a_loaded_sae_nor_an_evaluation_nor_a_run_that_goes_on_is_changed(
    tmp_path: Path,
) -> None:
    fields: dict[str, Any] = {"b_dec_init": "mean", "dead_threshold_tokens": 99}
    sae = build_sae("auxk-topk", **fields)
    before = sae.b_dec.detach().clone()
    sae.eval()
    with torch.no_grad():
        forward(sae, batch())
    assert torch.equal(sae.b_dec, before)
    sae.train()
    sae.save_model(tmp_path)
    loaded, going_on = copy.deepcopy(sae), copy.deepcopy(sae)
    loaded.load_weights_from_checkpoint(tmp_path)
    forward(loaded, batch())
    forward(going_on, batch(), step=17)
    for other in (loaded, going_on):
        assert torch.equal(other.b_dec, before)
    forward(sae, batch())
    assert not torch.equal(sae.b_dec, before)


def test_bad_rows_do_not_count() -> None:
    sae = build_sae("auxk-topk", randomize=False, b_dec_init="mean", dead_threshold_tokens=99)
    x = batch()
    x[7, 2] = torch.nan
    with pytest.warns(UserWarning, match="1 rows"):
        forward(sae, x)
    assert sae.b_dec.isfinite().all()
    assert (sae.b_dec - 3).abs().max() < 0.5


@pytest.mark.parametrize("value", ["median", None, 0])
def test_other_values_are_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="b_dec_init=.* must be one of zeros, mean, geometric"):
        build_config("auxk-topk", b_dec_init=value)


def test_weights_that_were_copied_in_count_as_loaded() -> None:
    fields: dict[str, Any] = {"b_dec_init": "mean", "dead_threshold_tokens": 99}
    trained, sae = build_sae("auxk-topk", **fields), build_sae("auxk-topk", **fields)
    sae.load_state_dict(trained.state_dict())
    forward(sae, batch())
    assert torch.equal(sae.b_dec, trained.b_dec)


@pytest.mark.parametrize("how", ["zeros", "mean"])
def test_the_field_counts_as_it_is_at_the_first_step(how: str) -> None:
    sae = build_sae("auxk-topk", randomize=False, dead_threshold_tokens=99)
    sae.cfg.b_dec_init = how
    forward(sae, batch())
    assert bool(sae.b_dec.any()) == (how == "mean")


def test_heads_are_one_row() -> None:
    """With hook_z SAELens joins the heads before it normalises."""
    values = []
    for heads in (False, True):
        sae = build_sae(
            "auxk-topk", randomize=False, b_dec_init="mean", normalize_activations="layer_norm"
        )
        if heads:
            sae.turn_on_forward_pass_hook_z_reshaping()
        x = batch() + torch.arange(8.0)
        forward(sae, x.view(-1, 2, 4) if heads else x)
        values.append(sae.b_dec.detach())
    torch.testing.assert_close(*values)
