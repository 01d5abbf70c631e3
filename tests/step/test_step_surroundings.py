"""A training step inside what people put around it: hooks, losses, half precision."""

import pytest
import torch

from tests.helpers import (
    ARCHITECTURES,
    STOCK,
    TOPK_ARCHITECTURES,
    build_sae,
    gradients_of,
    step_input,
)


@pytest.mark.parametrize(
    "register",
    [
        *["register_forward_hook", "register_forward_pre_hook"],
        *["register_full_backward_hook", "register_full_backward_pre_hook"],
    ],
)
@pytest.mark.parametrize("module", ["activation_fn", "hook_sae_acts_post", "hook_sae_recons"])
def test_a_hook_brings_the_dense_step_back(module: str, register: str) -> None:
    sae = build_sae("auxk-topk")
    called: list[int] = []
    handle = getattr(getattr(sae, module), register)(lambda *_: called.append(1))
    sae.training_forward_pass(step_input(torch.randn(4, 8))).loss.backward()
    assert called
    assert not sae._can_be_sparse(torch.randn(4, 8))
    handle.remove()
    assert sae._can_be_sparse(torch.randn(4, 8))


def test_a_hook_free_step_is_sparse() -> None:
    """What the hooks' test is about would not be there otherwise."""
    for architecture in TOPK_ARCHITECTURES:
        assert build_sae(architecture)._can_be_sparse(torch.randn(4, 8))


def test_half_precision_parameters_are_refused_by_the_step() -> None:
    sae = build_sae("auxk-topk").to(torch.float16)
    with pytest.raises(ValueError, match="dtype='float16' is not allowed: .* bfloat16 or float64"):
        sae.training_forward_pass(step_input(torch.randn(4, 8).half()))


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
        sae.may_be_sparse = sparse
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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_input_with_a_gradient_gets_that_of_saelens_step(architecture: str) -> None:
    """As where the SAE stands behind something that is trained with it."""
    gradients = []
    for name, fields in ((architecture, {"aux_variant": "none"}), (STOCK[architecture], {})):
        torch.manual_seed(0)
        sae = build_sae(name, dtype="float64", **fields)
        x = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)
        (gradient,) = torch.autograd.grad(sae.training_forward_pass(step_input(x)).loss, x)
        gradients.append(gradient)
    assert gradients[1].abs().min() > 0
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_bad_row_of_such_an_input_has_no_gradient() -> None:
    sae = build_sae("auxk-topk")
    x = torch.randn(6, 8)
    x[2, 3] = torch.nan
    x.requires_grad_()
    with pytest.warns(UserWarning, match="1 rows"):
        (gradient,) = torch.autograd.grad(sae.training_forward_pass(step_input(x)).loss, x)
    assert gradient.isfinite().all()
    assert gradient[2].abs().max() == 0
    assert gradient[1].abs().max() > 0
