"""A training step inside what people put around it: hooks, checkpointing, several processes."""

from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.helpers import (
    ARCHITECTURES,
    TOPK_ARCHITECTURES,
    build_sae,
    gradients_of,
    step_input,
)
from tests.sharded.processes import in_processes


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize("module", ["activation_fn", "hook_sae_acts_post", "hook_sae_recons"])
def test_a_hook_brings_the_dense_step_back(module: str, register: str) -> None:
    sae = build_sae("auxk-topk")
    called: list[int] = []
    getattr(getattr(sae, module), register)(lambda *_: called.append(1))
    sae.training_forward_pass(step_input(torch.randn(4, 8)))
    assert called


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradient_checkpointing_counts_a_step_once(architecture: str, late: bool) -> None:
    """``late``: as on CUDA, where a bound is known instead of the number of dead latents."""
    x = torch.randn(16, 8)
    saes = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        sae = build_sae(architecture, d_sae=240, dead_threshold_tokens=40)
        sae._knows_late = lambda: late
        for step in range(6):
            given = step_input(x + step, step=step)
            if checkpointed:
                loss = checkpoint(
                    lambda g, s=sae: s.training_forward_pass(g).loss, given, use_reentrant=False
                )
            else:
                loss = sae.training_forward_pass(given).loss
            loss.backward()
        saes.append(sae)
    for (name, plain), again in zip(
        saes[0].named_buffers(), (b for _, b in saes[1].named_buffers()), strict=True
    ):
        assert torch.equal(plain, again), name
    for plain, again in zip(saes[0].parameters(), saes[1].parameters(), strict=True):
        torch.testing.assert_close(again.grad, plain.grad)


class Loss(torch.nn.Module):
    """What DistributedDataParallel wraps: its forward is the training step."""

    def __init__(self, sae: Any):
        super().__init__()
        self.sae = sae

    def forward(self, x: torch.Tensor, step: int) -> torch.Tensor:
        return self.sae.training_forward_pass(step_input(x, step=step)).loss


def counts_on_a_rank(architecture: str) -> torch.Tensor:
    torch.manual_seed(0)
    sae = build_sae(architecture, d_sae=96, k=2, dead_threshold_tokens=20)
    model = torch.nn.parallel.DistributedDataParallel(Loss(sae), find_unused_parameters=True)
    n_ranks = torch.distributed.get_world_size()
    for step, x in enumerate(torch.randn(3, 8 * n_ranks, 8)):
        model(x.chunk(n_ranks)[torch.distributed.get_rank()], step).backward()
    return sae.tokens_since_fired


def test_ranks_count_each_others_tokens() -> None:
    counts_by_rank = in_processes(2, counts_on_a_rank, "auxk-topk")
    torch.manual_seed(0)
    sae = build_sae("auxk-topk", d_sae=96, k=2, dead_threshold_tokens=20)
    for step, x in enumerate(torch.randn(3, 16, 8)):
        sae.training_forward_pass(step_input(x, step=step))
    for counts in counts_by_rank:
        assert torch.equal(counts, sae.tokens_since_fired)
    assert sae.tokens_since_fired.max() == 48


def test_a_hook_free_step_is_sparse() -> None:
    """What the hooks' test is about would not be there otherwise."""
    for architecture in TOPK_ARCHITECTURES:
        assert build_sae(architecture)._can_be_sparse(torch.randn(4, 8))


@pytest.mark.parametrize("use_sparse_activations", [False, True])
@pytest.mark.parametrize("rescaled", [True, False])
@pytest.mark.parametrize("architecture", TOPK_ARCHITECTURES)
def test_a_loss_on_the_activations_has_the_dense_steps_gradient(
    architecture: str, rescaled: bool, use_sparse_activations: bool
) -> None:
    """An own penalty, and the reconstruction from changed activations."""
    gradients = []
    x = torch.randn(6, 8, dtype=torch.float64)
    for sparse in (True, False):
        torch.manual_seed(0)
        sae = build_sae(
            architecture,
            dtype="float64",
            rescale_acts_by_decoder_norm=rescaled,
            use_sparse_activations=use_sparse_activations and sparse,
        )
        if not sparse:
            sae._can_be_sparse = lambda sae_in: False
        output = sae.training_forward_pass(step_input(x))
        assert output.feature_acts.is_sparse == (use_sparse_activations and sparse)
        halved = sae.decode(output.feature_acts * 0.5)
        penalty = output.feature_acts.sum() + (halved - x).square().sum()
        gradients.append(gradients_of(output.loss + penalty, sae))
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], msg=name)


@pytest.mark.parametrize("parameter", ["W_enc", "W_dec", "b_enc", "b_dec"])
@pytest.mark.parametrize("architecture", TOPK_ARCHITECTURES)
def test_a_second_derivative_is_refused(architecture: str, parameter: str) -> None:
    sae = build_sae(architecture, aux_variant="auxk", dead_criterion="batch")
    loss = sae.training_forward_pass(step_input(torch.randn(6, 8))).loss
    with pytest.raises(RuntimeError, match="no second derivatives .* SAE_LENS_AUXK_OPS=dense"):
        torch.autograd.grad(loss, getattr(sae, parameter), create_graph=True)
