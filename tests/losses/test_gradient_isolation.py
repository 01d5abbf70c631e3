"""Which parameters an auxiliary loss may move."""

from typing import Any

import pytest
import torch

from sae_lens_auxk.losses.registry import AUX_LOSSES
from tests.helpers import (
    ARCHITECTURES,
    TOPK_ARCHITECTURES,
    VARIANTS,
    aux_gradients,
    build_sae,
    kill_latents,
)

D_SAE, N_DEAD = 24, 9
DEAD = torch.arange(D_SAE) < N_DEAD
DEAD_ONLY = [v for v in VARIANTS if v != "none" and AUX_LOSSES[v].uses_dead_latents]


def moved_latents(gradients: dict[str, torch.Tensor]) -> dict[str, set[int]]:
    """For each parameter with a latent dimension, the latents whose gradient is not 0."""
    moved = {}
    for name, gradient in gradients.items():
        if name == "b_dec":
            continue
        per_latent = gradient.T if name == "W_enc" else gradient.view(D_SAE, -1)
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
def test_pursuit_moves_the_best_latent_as_if_it_had_fired(sparse: bool, rescaled: bool) -> None:
    fields = {"dtype": "float64", "rescale_acts_by_decoder_norm": rescaled}
    sae = build("auxk-topk", aux_variant="pursuit", **fields)
    sae.may_be_sparse = sparse
    kill_latents(sae, N_DEAD)  # none is near to firing, so none is pushed down
    directions = torch.nn.functional.normalize(sae.W_dec.detach(), dim=1)
    n_moved = n_still = 0
    for _ in range(40):
        x = torch.randn(2, 8, dtype=torch.float64)
        acts, h = sae.encode_with_hidden_pre(x)
        residuals = (x - sae.decode(acts)).detach()
        matches = residuals @ directions.T
        winners = (matches / matches.norm(dim=0)).argmax(dim=1)
        gradients = aux_gradients(sae, x, DEAD)
        moved = moved_latents(gradients)
        rows = (winners < N_DEAD).nonzero().flatten()
        if len(rows) == 0:  # both rows suit a live latent better
            assert not any(moved.values())
            n_still += 1
        if len(rows) != 1:
            continue
        n_moved += 1
        row = int(rows)
        best, residual = int(winners[row]), residuals[row]
        alpha = sae.cfg.resolved_aux_coefficient / 2  # a mean over two rows
        assert moved["W_enc"] == moved["W_dec"] == moved["b_enc"] == {best}
        # The gradients that the main loss would have if this latent fired at its best value.
        length = 1.0 if rescaled else sae.W_dec[best].detach().norm()
        projection = directions[best] @ residual
        torch.testing.assert_close(
            gradients["b_enc"][best],
            -alpha * 2 * projection * length * (sae.W_dec[best].norm() if rescaled else 1.0),
        )
        of_fired = gradients["W_dec"][best]
        if rescaled:  # h is multiplied by the norm, by which it has a gradient of its own
            pre = h[row, best] / sae.W_dec[best].norm()
            of_fired = of_fired + (alpha * 2 * projection * pre * directions[best]).detach()
        norm = sae.W_dec[best].detach().norm() if rescaled else 1.0
        expected = -alpha * 2 * projection / length / norm * residual
        torch.testing.assert_close(of_fired, expected)
    assert min(n_moved, n_still) > 0, "the test would see nothing"


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("rescaled", [True, False])
def test_pursuit_pushes_down_what_is_near_to_firing_where_it_should_not(
    sparse: bool, rescaled: bool
) -> None:
    """As the main loss would if one latent fired alone, on top of the reconstruction."""
    sae = build("auxk-topk", aux_variant="pursuit", k_aux=3, rescale_acts_by_decoder_norm=rescaled)
    sae.may_be_sparse = sparse
    alpha = sae.cfg.resolved_aux_coefficient
    n_pushed = n_left = 0
    for _ in range(20):
        x = torch.randn(2, 8)
        acts, h = sae.encode_with_hidden_pre(x)
        sae_out = sae.decode(acts).detach()
        matches = (x - sae_out) @ sae.W_dec.T.detach()
        winners = (matches / matches.norm(dim=0)).argmax(dim=1).tolist()
        gradient = aux_gradients(sae, x, DEAD)["b_enc"]
        expected = torch.zeros_like(gradient)
        for b in range(2):
            for latent in h[b, :N_DEAD].topk(3).indices.tolist():
                h_alone = h[b, latent].detach().relu().requires_grad_()
                row = sae.W_dec[latent].detach()
                norm = row.norm() if rescaled else 1.0
                error = (x[b] - sae_out[b] - h_alone * row / norm).square().sum()
                (main,) = torch.autograd.grad(error, h_alone)
                pushed = bool(h_alone > 0 and main > 0)
                n_pushed, n_left = n_pushed + pushed, n_left + (not pushed)
                expected[latent] += alpha / 2 * main * norm if pushed else 0.0
        others = [i for i in range(N_DEAD) if i not in winners]
        torch.testing.assert_close(gradient[others], expected[others], atol=1e-6, rtol=1e-4)
    assert min(n_pushed, n_left) >= 5, "the test would see nothing"


@pytest.mark.parametrize("sparse", [True, False])
def test_pursuit_teaches_dead_latents_where_the_residual_is_mostly_in_one_direction(
    sparse: bool,
) -> None:
    """Live latents in that direction match each row best, and each row as well as any other."""
    sae = build("auxk-topk", aux_variant="pursuit", rescale_acts_by_decoder_norm=False)
    sae.may_be_sparse = sparse
    kill_latents(sae, D_SAE)  # no latent fires
    with torch.no_grad():
        sae.b_dec.zero_()
        sae.W_dec.zero_()
        sae.W_dec[:7, 1:] = torch.eye(7)
        sae.W_dec[N_DEAD:, 0] = 1.0
    scales = torch.tensor([0.0, 1.0, 0.1, 1.0, 0.5, 1.0, 0.1, 1.0])
    x = torch.randn(64, 8) * scales
    x[:, 0] = 10 + 0.01 * torch.randn(64)
    assert (x.argmax(dim=1) == 0).all(), "live latents match best"
    shares = x / x.norm(dim=0)
    won = torch.nn.functional.one_hot(shares.argmax(dim=1), 8)[:, 1:]
    assert (won.sum(dim=0) > 0).all()
    expected = -2 / 64 * sae.cfg.resolved_aux_coefficient * (won * x[:, 1:]).sum(dim=0)
    gradient = aux_gradients(sae, x, DEAD)["b_enc"]
    torch.testing.assert_close(gradient[:7], expected)
    assert (gradient[7:] == 0).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_pursuit_does_not_depend_on_the_length_of_dead_rows(architecture: str) -> None:
    """Where decoder rows keep their lengths, those of dead latents stay short while others grow."""
    fields = {"rescale_acts_by_decoder_norm": False} if "topk" in architecture else {}
    sae = build(architecture, aux_variant="pursuit", dtype="float64", **fields)
    kill_latents(sae, N_DEAD)
    if architecture == "auxk-abstopk":
        with torch.no_grad():  # none is pushed down where h is 0: h does not get shorter with W
            sae.W_enc[:, :N_DEAD] = sae.b_enc[:N_DEAD] = 0.0
    x = torch.randn(64, 8, dtype=torch.float64)
    before = aux_gradients(sae, x, DEAD)
    with torch.no_grad():
        sae.W_dec[:N_DEAD] /= 100
    after = aux_gradients(sae, x, DEAD)
    assert moved_latents(before)["W_dec"] == moved_latents(after)["W_dec"] != set()
    # Firing at a = p / |W| takes 100 times the activation to explain the same.
    torch.testing.assert_close(after["W_dec"], before["W_dec"] * 100)
    bias = "b_mag" if architecture == "auxk-gated" else "b_enc"
    torch.testing.assert_close(after[bias] * 100, before[bias])


@pytest.mark.parametrize("sparse", [True, False])
def test_straight_through_passes_the_main_gradient_to_the_latents_nearest_to_firing(
    sparse: bool,
) -> None:
    sae = build("auxk-topk", aux_variant="straight_through", k_aux=2)
    sae.may_be_sparse = sparse
    x = torch.randn(1, 8)
    acts, h = sae.encode_with_hidden_pre(x)
    acts = acts.detach().requires_grad_()
    mse = (sae.decode(acts) - x).square().sum()
    (main,) = torch.autograd.grad(mse, acts)
    gradients = aux_gradients(sae, x, DEAD)
    nearest = h[0, :N_DEAD].topk(2).indices
    assert moved_latents(gradients)["b_enc"] == set(nearest.tolist())
    expected = sae.cfg.resolved_aux_coefficient * main[0] * sae.W_dec.norm(dim=1)
    torch.testing.assert_close(gradients["b_enc"][nearest], expected[nearest])


@pytest.mark.parametrize("variant", ["reanimation", "straight_through", "pre_activation"])
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
        ("pursuit", "decoder", False),
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
