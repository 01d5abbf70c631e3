"""Agreement with the AuxK of SAELens and of EleutherAI's sparsify, where they must agree."""

from typing import Any

import pytest
import torch
from sae_lens.registry import get_sae_training_class
from sparsify import SparseCoder, SparseCoderConfig

from tests.helpers import (
    STOCK,
    aux_value_and_gradients,
    build_sae,
    forward,
    gradients_of,
)

D_IN, D_SAE = 8, 64
SAME_AS_SAELENS: dict[str, Any] = {
    "aux_variant": "auxk",
    "aux_bias": "none",
    "k_aux": None,
    "dead_criterion": "steps",
    "aux_loss_coefficient": 1.0,
}


def saelens_twin(sae: Any) -> Any:
    cfg = sae.cfg.to_dict()
    cfg["architecture"] = STOCK[sae.cfg.architecture()]
    cls, cfg_cls = get_sae_training_class(cfg["architecture"])
    twin = cls(cfg_cls.from_dict(cfg))
    state = sae.state_dict()
    twin.load_state_dict({name: state[name] for name in twin.state_dict()})
    return twin


@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize(
    ("architecture", "fields"),
    [
        ("auxk-topk", {}),
        ("auxk-abstopk", {}),
        ("auxk-batchtopk", {}),
        ("auxk-matryoshka-batchtopk", {"use_matryoshka_aux_loss": False}),
        ("auxk-matryoshka-batchtopk", {"use_matryoshka_aux_loss": True}),
    ],
)
def test_equals_saelens_with_enough_dead_latents(
    architecture: str, fields: dict[str, Any], rescale: bool
) -> None:
    sae = build_sae(
        architecture,
        d_in=D_IN,
        d_sae=D_SAE,
        rescale_acts_by_decoder_norm=rescale,
        **SAME_AS_SAELENS,
        **fields,
    )
    twin = saelens_twin(sae)
    x = torch.randn(32, D_IN)
    dead = torch.arange(D_SAE) % 3 == 0  # more than d_in // 2 in every level
    theirs = forward(twin, x, dead).losses["auxiliary_reconstruction_loss"]
    value, gradients = aux_value_and_gradients(sae, x, dead)
    torch.testing.assert_close(value, theirs, rtol=1e-5, atol=1e-5)
    for name, gradient in gradients_of(theirs, twin).items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def test_differs_from_saelens_by_its_scale_with_fewer_dead_latents_than_k_aux() -> None:
    sae = build_sae("auxk-topk", d_in=D_IN, d_sae=D_SAE, **SAME_AS_SAELENS)
    x = torch.randn(32, D_IN)
    dead = torch.arange(D_SAE) < 3
    theirs = forward(saelens_twin(sae), x, dead).losses["auxiliary_reconstruction_loss"]
    ours = forward(sae, x, dead).losses["aux_loss"]
    torch.testing.assert_close(ours * 3 / (D_IN // 2), theirs)


@pytest.mark.parametrize("variant", ["auxk", "multi_topk"])
def test_equals_sparsify(variant: str) -> None:
    sae = build_sae(
        "auxk-topk",
        d_in=D_IN,
        d_sae=D_SAE,
        k=5,
        rescale_acts_by_decoder_norm=False,
        aux_relu=True,  # sparsify's encoder ends with a ReLU
        **{**SAME_AS_SAELENS, "aux_variant": variant},
    )
    coder = SparseCoder(
        D_IN, SparseCoderConfig(num_latents=D_SAE, k=5, multi_topk=variant == "multi_topk")
    )
    with torch.no_grad():
        coder.encoder.weight.copy_(sae.W_enc.T)
        coder.encoder.bias.copy_(sae.b_enc)
        coder.W_dec.copy_(sae.W_dec)
        coder.b_dec.copy_(sae.b_dec)
    x = torch.randn(32, D_IN)
    dead = torch.arange(D_SAE) % 2 == 0
    theirs = coder(x, dead_mask=dead)
    # sparsify divides by the batch's total variance, SAELens takes a mean over the batch
    total_variance = (x - x.mean(dim=0)).square().sum()
    expected = theirs.auxk_loss if variant == "auxk" else theirs.multi_topk_fvu
    value, gradients = aux_value_and_gradients(sae, x, dead)
    torch.testing.assert_close(value * len(x) / total_variance, expected, rtol=1e-5, atol=1e-6)

    gradient = torch.autograd.grad(expected, coder.W_dec)[0] * total_variance / len(x)
    torch.testing.assert_close(gradients["W_dec"], gradient, rtol=1e-4, atol=1e-5)


def test_equals_the_published_code_of_gao_et_al() -> None:
    """Its sum of two normalised losses, times the batch's variance, is SAELens's MSE and ours."""
    sae = build_sae(
        "auxk-topk",
        d_in=D_IN,
        d_sae=D_SAE,
        aux_bias="matched",
        aux_relu=True,
        aux_normalize=True,
        k_aux=4,
        dead_criterion="steps",
        rescale_acts_by_decoder_norm=False,
    )
    x, dead = torch.randn(32, D_IN), torch.arange(D_SAE) % 3 == 0
    output = forward(sae, x, dead)
    h = (x - sae.b_dec) @ sae.W_enc + sae.b_enc
    auxk_vals, auxk_inds = h.masked_fill(~dead, -torch.inf).topk(4)
    auxk_recons = (auxk_vals.relu().unsqueeze(2) * sae.W_dec[auxk_inds]).sum(dim=1) + sae.b_dec
    mse = torch.nn.functional.mse_loss
    xs = x - output.sae_out.detach() + sae.b_dec.detach()
    normalized_mse = mse(auxk_recons, xs) / mse(xs.mean(dim=0).expand_as(xs), xs)
    mse_scale = 1 / mse(x.mean(dim=0).expand_as(x), x)
    theirs = (mse_scale * mse(output.sae_out, x) + 1 / 32 * normalized_mse) * D_IN / mse_scale
    torch.testing.assert_close(output.loss, theirs)
    expected = gradients_of(theirs, sae)
    for name, gradient in gradients_of(forward(sae, x, dead).loss, sae).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)
