"""The auxiliary loss on a share of the rows: the same loss, of a sample."""

from typing import Any

import pytest
import torch

from sae_lens_auxk import register_aux_loss
from sae_lens_auxk.losses.registry import AUX_LOSSES
from tests.helpers import (
    ARCHITECTURES,
    PAIRS,
    aux_gradients,
    aux_loss,
    aux_value_and_gradients,
    build_sae,
    forward,
)

DEAD = torch.arange(24) < 10


def pair_of(architecture: str, variant: str, fraction: float, **fields: Any) -> list[Any]:
    """The same SAE on all rows and on some."""
    saes = []
    for share in (1.0, fraction):
        torch.manual_seed(0)
        saes.append(
            build_sae(
                architecture,
                aux_variant=variant,
                aux_batch_fraction=share,
                dead_criterion="steps",
                dtype="float64",
                **fields,
            )
        )
    return saes


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("sparse", [True, False])
def test_a_loss_sees_the_sampled_rows(architecture: str, sparse: bool) -> None:
    seen: list[Any] = []

    def look(inputs: Any, cfg: Any) -> torch.Tensor:
        seen.append((inputs, inputs.firing_threshold().expand(len(inputs.x), 24)))
        return inputs.hidden_pre.sum()

    register_aux_loss("look", look)
    try:
        whole, some = pair_of(architecture, "look", 0.25)
        whole.may_be_sparse = some.may_be_sparse = sparse
        x = torch.randn(16, 8, dtype=torch.float64)
        rows = some._aux_rows(16, 3)
        assert len(set(rows.tolist())) == 4
        for sae in (whole, some):
            forward(sae, x, DEAD, step=3).losses["aux_loss"].backward()
    finally:
        del AUX_LOSSES["look"]
    (all_rows, thresholds), (sampled, sampled_thresholds) = seen
    for name in ("x", "residual", "hidden_pre"):
        torch.testing.assert_close(getattr(sampled, name), getattr(all_rows, name)[rows])
    torch.testing.assert_close(sampled_thresholds, thresholds[rows])
    assert some.W_enc.grad.abs().max() > 0


def test_its_mean_over_the_samples_is_the_loss_of_all_rows() -> None:
    """Over all steps each row is as often in the sample as any other: no bias."""
    whole, some = pair_of("auxk-topk", "auxk", 0.25, k_aux=3)
    x = torch.randn(8, 8, dtype=torch.float64)
    n = 4000
    losses = torch.stack([forward(some, x, DEAD, step=s).losses["aux_loss"] for s in range(n)])
    error = losses.std() / n**0.5
    assert (losses.mean() - aux_loss(whole, x, DEAD)).abs() < 4 * error
    counts = torch.zeros(8)
    for step in range(n):
        counts[some._aux_rows(8, step)] += 1
    assert (counts / n - 0.25).abs().max() < 0.03


@pytest.mark.parametrize(("architecture", "variant"), PAIRS)
def test_samples_that_make_up_the_batch_have_its_gradient(architecture: str, variant: str) -> None:
    if variant == "ghost_gradients":
        pytest.skip("its scale is a ratio of two means: not a mean over rows")
    if variant == "pursuit":
        pytest.skip("it compares a match with those of the other rows")
    # A step moves the threshold, and there is one step more with samples.
    still = {"topk_threshold_lr": 0.0} if "batchtopk" in architecture else {}
    whole, some = pair_of(architecture, variant, 0.5, k_aux=3, **still)
    x = torch.randn(6, 8, dtype=torch.float64)
    expected = aux_gradients(whole, x, DEAD)
    total = {name: torch.zeros_like(gradient) for name, gradient in expected.items()}
    for rows in (torch.tensor([4, 0, 3]), torch.tensor([1, 2, 5])):
        some._aux_rows = lambda n_rows, step, rows=rows: rows
        for name, gradient in aux_gradients(some, x, DEAD).items():
            total[name] += gradient / 2
    for name, gradient in expected.items():
        torch.testing.assert_close(total[name], gradient, msg=name)


@pytest.mark.parametrize(("architecture", "variant"), PAIRS)
def test_the_loss_of_a_sample_is_that_of_a_batch_of_its_rows(
    architecture: str, variant: str
) -> None:
    # BatchTopK chooses in all rows together, unless it can choose everything.
    fields = {"k": 24} if "batchtopk" in architecture else {}
    whole, some = pair_of(architecture, variant, 0.5, k_aux=3, **fields)
    x, rows = torch.randn(6, 8, dtype=torch.float64), torch.tensor([4, 0, 3])
    some._aux_rows = lambda n_rows, step: rows  # noqa: ARG005
    value, gradients = aux_value_and_gradients(some, x, DEAD)
    expected, expected_gradients = aux_value_and_gradients(whole, x[rows], DEAD)
    torch.testing.assert_close(value, expected)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, msg=name)


def test_the_sample_is_the_same_again_after_resuming_and_another_at_the_next_step() -> None:
    _, some = pair_of("auxk-topk", "auxk", 0.5)
    assert torch.equal(some._aux_rows(100, 7), some._aux_rows(100, 7))
    assert not torch.equal(some._aux_rows(100, 7), some._aux_rows(100, 8))
    state = torch.get_rng_state()
    some._aux_rows(100, 9)
    assert torch.equal(torch.get_rng_state(), state), "the data's random numbers are left alone"


def test_at_least_one_row_is_seen() -> None:
    _, some = pair_of("auxk-topk", "auxk", 0.001)
    assert some._aux_rows(16, 0).shape == (1,)
