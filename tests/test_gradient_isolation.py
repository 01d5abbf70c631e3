"""Which parameters an auxiliary loss may move."""

from typing import Any

import pytest
import torch

from tests.helpers import ARCHITECTURES, TOPK_ARCHITECTURES, aux_gradients, build_sae

D_SAE, N_DEAD = 24, 9
DEAD = torch.arange(D_SAE) < N_DEAD
DEAD_ONLY = ["auxk", "reanimation", "straight_through", "pre_activation", "ghost_gradients"]


def moved_latents(gradients: dict[str, torch.Tensor]) -> dict[str, set[int]]:
    """For each parameter with a latent dimension, the latents whose gradient is not 0."""
    moved = {}
    for name, gradient in gradients.items():
        if name == "b_dec":
            continue
        per_latent = {"W_enc": gradient.T, "W_dec": gradient}.get(name, gradient.unsqueeze(1))
        moved[name] = set(per_latent.abs().amax(dim=1).nonzero().flatten().tolist())
    return moved


def build(architecture: str, **fields: Any) -> Any:
    return build_sae(architecture, d_sae=D_SAE, dead_criterion="steps", **fields)


@pytest.mark.parametrize("variant", DEAD_ONLY)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_live_latent_moves(architecture: str, variant: str) -> None:
    sae = build(architecture, aux_variant=variant)
    moved = moved_latents(aux_gradients(sae, torch.randn(16, 8), DEAD))
    assert set.union(*moved.values()) <= set(range(N_DEAD))
    assert moved["W_enc"], "the dead latents' encoder must move"


def test_only_the_k_aux_latents_nearest_to_firing_move() -> None:
    sae = build("auxk-topk", aux_variant="auxk", k_aux=2)
    x = torch.randn(1, 8)
    h = sae.encode_with_hidden_pre(x)[1]
    nearest = set(h[0, :N_DEAD].topk(2).indices.tolist())
    assert moved_latents(aux_gradients(sae, x, DEAD))["b_enc"] == nearest


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("rescaled", [True, False])
def test_straight_through_moves_the_best_latent_as_if_it_had_fired(
    sparse: bool, rescaled: bool
) -> None:
    sae = build("auxk-topk", aux_variant="straight_through", rescale_acts_by_decoder_norm=rescaled)
    sae._can_be_sparse = lambda sae_in: sparse
    with torch.no_grad():
        sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
    of_all = 0
    for _ in range(20):
        x = torch.randn(1, 8)
        acts, h = sae.encode_with_hidden_pre(x)
        residual = (x - sae.decode(acts))[0].detach()
        pulls = sae.W_dec @ residual
        best = int(pulls.argmax())
        gradients = aux_gradients(sae, x, DEAD)
        moved = moved_latents(gradients)
        if best >= N_DEAD:  # a live latent would explain the row better
            assert not any(moved.values())
            continue
        of_all += 1
        assert moved["W_enc"] == moved["W_dec"] == moved["b_enc"] == {best}
        # What the main loss's gradient would be if this latent fired at r.W.
        alpha, pull = sae.cfg.aux_coefficient_at(0), pulls.max().detach()
        torch.testing.assert_close(gradients["b_enc"][best], -alpha * 2 * pull)
        of_fired = gradients["W_dec"][best]
        if rescaled:  # h is multiplied by the norm, by which it has a gradient of its own
            through_norm = -alpha * 2 * pull * h[0, best] * sae.W_dec[best]
            of_fired = of_fired - through_norm.detach()
        torch.testing.assert_close(of_fired, -alpha * 2 * pull * residual)
    assert 0 < of_all < 20


@pytest.mark.parametrize("variant", ["reanimation", "pre_activation"])
def test_decoder_moves_only_through_the_norm_factor_of_h(variant: str) -> None:
    x = torch.randn(16, 8)
    plain = build("auxk-topk", aux_variant=variant, rescale_acts_by_decoder_norm=False)
    assert aux_gradients(plain, x, DEAD)["W_dec"].abs().max() == 0

    rescaled = build("auxk-topk", aux_variant=variant, rescale_acts_by_decoder_norm=True)
    gradient = aux_gradients(rescaled, x, DEAD)["W_dec"][:N_DEAD]
    directions = torch.nn.functional.normalize(rescaled.W_dec[:N_DEAD].detach(), dim=1)
    along = (gradient * directions).sum(dim=1, keepdim=True) * directions
    torch.testing.assert_close(gradient, along, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize(
    ("variant", "aux_bias", "moves"),
    [
        ("auxk", "decoder", True),
        ("auxk", "matched", True),
        ("auxk", "none", False),
        ("straight_through", "decoder", False),
        ("reanimation", "decoder", False),
        ("pre_activation", "decoder", False),
        ("ghost_gradients", "decoder", False),
        ("multi_topk", "none", True),
    ],
)
def test_decoder_bias(variant: str, aux_bias: Any, moves: bool) -> None:
    sae = build("auxk-topk", aux_variant=variant, aux_bias=aux_bias, apply_b_dec_to_input=False)
    gradient = aux_gradients(sae, torch.randn(16, 8), DEAD)["b_dec"]
    assert (gradient.abs().max() > 0) == moves


def test_decoder_bias_moves_through_the_encoder_where_it_is_applied_to_the_input() -> None:
    sae = build("auxk-topk", aux_bias="none", apply_b_dec_to_input=True)
    assert aux_gradients(sae, torch.randn(16, 8), DEAD)["b_dec"].abs().max() > 0


def test_multi_topk_moves_live_latents_too() -> None:
    sae = build("auxk-topk", aux_variant="multi_topk")
    moved = moved_latents(aux_gradients(sae, torch.randn(16, 8), DEAD))
    assert moved["W_dec"] - set(range(N_DEAD))


def test_learned_thresholds_move_under_the_pre_activation_loss_only() -> None:
    for variant in DEAD_ONLY:
        sae = build("auxk-jumprelu", aux_variant=variant)
        gradient = aux_gradients(sae, torch.randn(16, 8), DEAD)["threshold"]
        assert (gradient.abs().max() > 0) == (variant == "pre_activation")


# With so large a k much of what is selected is negative, and neither fires nor has a gradient.
MANY = {"k": D_SAE - 1}
UNSCALED = {**MANY, "rescale_acts_by_decoder_norm": False}
SELECTIONS = [(architecture, {}) for architecture in ARCHITECTURES] + [
    (architecture, fields) for architecture in TOPK_ARCHITECTURES for fields in (MANY, UNSCALED)
]


@pytest.mark.parametrize(("architecture", "fields"), SELECTIONS)
def test_the_main_loss_is_that_of_saelens(architecture: str, fields: dict[str, Any]) -> None:
    """With the auxiliary loss off, a step has SAELens's own losses and gradients."""
    from sae_lens.registry import get_sae_training_class

    from tests.helpers import STOCK, build_config, forward, randomize_parameters

    ours = build(architecture, aux_variant="none", **fields)
    cfg = build_config(architecture, d_sae=D_SAE, **fields).to_dict()
    cfg.update(architecture=STOCK[architecture], aux_loss_coefficient=0.0)
    stock_class, stock_cfg_class = get_sae_training_class(STOCK[architecture])
    stock = stock_class(stock_cfg_class.from_dict(cfg))
    randomize_parameters(stock)
    state = ours.state_dict()
    stock.load_state_dict({name: state[name] for name in stock.state_dict()})

    x = torch.randn(16, 8)
    a, b = forward(ours, x), forward(stock, x)
    torch.testing.assert_close(a.loss, b.loss)
    for name, loss in b.losses.items():
        if not (name == "auxiliary_reconstruction_loss" and "topk" in architecture):
            torch.testing.assert_close(a.losses[name], loss)
    a.loss.backward()
    b.loss.backward()
    for (name, p), q in zip(ours.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
