"""Every loss against the slow reference: value and every parameter's gradient."""

import math
import types
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lens_auxk import register_aux_loss
from sae_lens_auxk.losses.registry import AUX_LOSSES
from tests.helpers import (
    ARCHITECTURES,
    PAIRS,
    VARIANTS,
    aux_gradients,
    aux_loss,
    aux_value_and_gradients,
    build_config,
    build_sae,
    forward,
    gradients_of,
)
from tests.reference import Step, reference_loss

VALUE_ZERO = ("straight_through", "pursuit")
"""Variants that are a gradient only."""


def reference_step(sae: Any, x: torch.Tensor, dead: torch.Tensor) -> Step:
    """What the reference needs, from the SAE's own encoder and decoder."""
    acts, h = sae.encode_with_hidden_pre(x)
    sae_out = sae.decode(acts)
    threshold = None
    if sae.cfg.architecture() not in ("auxk-topk", "auxk-abstopk"):
        threshold = torch.zeros(sae.cfg.d_sae, dtype=torch.float64)
        if hasattr(sae, "topk_threshold"):
            threshold = threshold + sae.topk_threshold
        if hasattr(sae, "threshold"):
            threshold = threshold + sae.threshold
    scale, shift = [], []
    for row in x.tolist():
        mean = sum(row) / len(row)
        if sae.cfg.normalize_activations == "layer_norm":
            variance = sum((v - mean) ** 2 for v in row) / (len(row) - 1)
            scale.append(math.sqrt(variance))
            shift.append(mean)
        elif sae.cfg.normalize_activations == "constant_norm_rescale":
            scale.append(math.sqrt(sum(v * v for v in row)) / math.sqrt(len(row)))
            shift.append(0.0)
        else:
            scale.append(1.0)
            shift.append(0.0)
    return Step(
        x=x,
        sae_out=sae_out,
        h=h,
        a=acts,
        W_dec=sae.W_dec,
        b_dec=sae.b_dec,
        dead=dead.tolist(),
        n_latents=len(dead),
        rescaled=getattr(sae.cfg, "rescale_acts_by_decoder_norm", False),
        threshold=threshold,
        scale=scale,
        shift=shift,
        by_magnitude=sae.cfg.architecture() == "auxk-abstopk",
    )


def assert_equals_reference(sae: Any, x: torch.Tensor, dead: torch.Tensor) -> None:
    variant = sae.cfg.aux_variant
    if dead.any() or not AUX_LOSSES[variant].uses_dead_latents:
        expected = reference_loss(variant, reference_step(sae, x, dead), sae.cfg)
    else:
        expected = torch.zeros((), dtype=torch.float64)
    expected = expected * sae.cfg.resolved_aux_coefficient
    value, gradients = aux_value_and_gradients(sae, x, dead)
    assert value.dtype == torch.float64
    if variant in VALUE_ZERO:
        assert value.item() == 0.0
    else:
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    for name, gradient in gradients_of(expected, sae).items():
        torch.testing.assert_close(
            gradients[name].double(), gradient.double(), rtol=1e-6, atol=1e-9, msg=name
        )


@pytest.mark.parametrize(("architecture", "variant"), PAIRS)
@settings(max_examples=12)
@given(data=st.data())
def test_loss_and_gradients_equal_the_reference(
    architecture: str, variant: str, data: st.DataObject
) -> None:
    d_in = data.draw(st.integers(2, 9), "d_in")
    d_sae = data.draw(st.integers(5, 24), "d_sae")
    # In a single row each match is as large as usual, so pursuit's choice is a draw.
    n_rows = data.draw(st.integers(2 if variant == "pursuit" else 1, 5), "n_rows")
    fields: dict[str, Any] = {
        "k_aux": data.draw(st.one_of(st.none(), st.integers(1, 30), st.just(100)), "k_aux"),
        "aux_bias": data.draw(st.sampled_from(["decoder", "matched", "none"]), "aux_bias"),
        "aux_relu": data.draw(st.booleans(), "aux_relu"),
        "aux_normalize": data.draw(st.booleans(), "aux_normalize"),
        "apply_b_dec_to_input": data.draw(st.booleans(), "apply_b_dec_to_input"),
        "aux_loss_coefficient": data.draw(st.sampled_from([None, 0.25, 3.0])),
    }
    if "topk" in architecture:
        fields["k"] = data.draw(st.integers(1, d_sae), "k")
        fields["rescale_acts_by_decoder_norm"] = data.draw(st.booleans(), "rescale")
    cfg_class = type(build_config(architecture))
    modes = ["none", "layer_norm", "constant_norm_rescale"]
    fields["normalize_activations"] = data.draw(
        st.sampled_from([m for m in modes if m not in cfg_class.unsupported_normalizations])
    )
    torch.manual_seed(data.draw(st.integers(0, 10_000), "seed"))
    sae = build_sae(
        architecture,
        d_in=d_in,
        d_sae=d_sae,
        aux_variant=variant,
        dead_criterion="steps",
        dtype="float64",
        **fields,
    )
    if "topk" in architecture and data.draw(st.booleans(), "dense"):
        sae.may_be_sparse = False
    dead = torch.tensor(data.draw(st.lists(st.booleans(), min_size=d_sae, max_size=d_sae)))
    assert_equals_reference(sae, torch.randn(n_rows, d_in, dtype=torch.float64), dead)


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("variant", [v for v in VARIANTS if AUX_LOSSES[v].uses_dead_latents])
def test_matryoshka_levels_add_up_the_losses_of_their_own_residuals(
    variant: str, sparse: bool
) -> None:
    sae = build_sae(
        "auxk-matryoshka-batchtopk",
        d_sae=24,
        matryoshka_widths=[6, 12, 24],
        aux_variant=variant,
        use_matryoshka_aux_loss=True,
        dead_criterion="steps",
        k_aux=2,
        dtype="float64",
    )
    sae.may_be_sparse = sparse
    x = torch.randn(16, 8, dtype=torch.float64)
    dead = torch.zeros(24, dtype=torch.bool)
    dead[[0, 1, 2, 13, 20, 21]] = True  # none in the second level

    whole = reference_step(sae, x, dead)
    expected = torch.zeros((), dtype=torch.float64)
    start = 0
    for end in (6, 12, 24):
        norms = sae.W_dec.norm(dim=-1)
        decoded = sae.b_dec + (whole.a / norms)[:, :end] @ sae.W_dec[:end]
        if dead[start:end].any():
            level = Step(
                x=x,
                sae_out=decoded,
                h=whole.h[:, start:end],
                a=whole.a[:, start:end],
                W_dec=sae.W_dec[start:end],
                b_dec=sae.b_dec,
                dead=dead[start:end].tolist(),
                n_latents=24,
                rescaled=True,
                threshold=whole.threshold[start:end],
                scale=whole.scale,
                shift=whole.shift,
            )
            expected = expected + reference_loss(variant, level, sae.cfg)
        start = end
    expected = expected * sae.cfg.resolved_aux_coefficient
    value, gradients = aux_value_and_gradients(sae, x, dead)
    if variant not in VALUE_ZERO:
        torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    for name, gradient in gradients_of(expected, sae).items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-6, atol=1e-9, msg=name)


@pytest.mark.parametrize(
    ("variant", "coefficient"),
    [
        ("auxk", 1 / 32),
        ("reanimation", 1e-3),
        ("straight_through", 1 / 32),
        ("pursuit", 1 / 2),
        ("pre_activation", 3e-6),
        ("ghost_gradients", 1.0),
        ("multi_topk", 1 / 8),
        ("none", 0.0),
    ],
)
def test_default_coefficients_are_the_published_ones(variant: str, coefficient: float) -> None:
    assert build_config("auxk-topk", aux_variant=variant).resolved_aux_coefficient == coefficient


def test_matched_bias_has_the_value_of_none_and_a_gradient_of_its_own() -> None:
    dead = torch.arange(24) < 10
    x = torch.randn(6, 8)
    values, gradients = {}, {}
    for bias in ("decoder", "matched", "none"):
        torch.manual_seed(1)
        sae = build_sae(
            "auxk-topk", aux_bias=bias, dead_criterion="steps", apply_b_dec_to_input=False
        )
        values[bias] = aux_loss(sae, x, dead)
        gradients[bias] = aux_gradients(sae, x, dead)["b_dec"]
    torch.testing.assert_close(values["matched"], values["none"])
    assert not torch.allclose(values["decoder"], values["none"])
    assert gradients["none"].abs().max() == 0
    assert gradients["matched"].abs().max() > 0
    assert gradients["decoder"].abs().max() > 0


def test_ghost_gradients_have_the_main_loss_as_value_and_survive_large_pre_activations() -> None:
    sae = build_sae("auxk-topk", aux_variant="ghost_gradients", dead_criterion="steps")
    x = torch.randn(6, 8) * 1e4
    output = forward(sae, x, torch.arange(24) < 10)
    torch.testing.assert_close(output.losses["aux_loss"], output.losses["mse_loss"])
    output.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in sae.parameters())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_bound_above_zero_with_no_dead_latents(architecture: str, variant: str) -> None:
    """On CUDA the first dead latents are expected a step before they come."""
    if (architecture, variant) not in PAIRS:
        pytest.skip("not for this architecture")
    sae = build_sae(architecture, aux_variant=variant, dead_criterion="steps")
    sae._dead_bound = lambda *_: 20
    output = forward(sae, torch.randn(6, 8), torch.zeros(24, dtype=torch.bool))
    if sae.cfg.aux_loss.uses_dead_latents:
        assert output.losses["aux_loss"] == 0
    output.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in sae.parameters())


@pytest.mark.parametrize("rescaled", [True, False])
def test_columns_beyond_the_dead_latents_may_get_any_gradient(rescaled: bool) -> None:
    def squares(inputs: Any, cfg: Any) -> torch.Tensor:  # noqa: ARG001
        h = inputs.dead_columns().h
        return h.square().where(h.isfinite(), 0).sum(dim=-1).mean()

    register_aux_loss("squares", squares, sync_free=True)
    try:
        sae = build_sae(
            "auxk-topk",
            aux_variant="squares",
            dead_criterion="steps",
            rescale_acts_by_decoder_norm=rescaled,
        )
        x, dead = torch.randn(6, 8), torch.arange(24) % 3 == 1
        value, gradients = aux_value_and_gradients(sae, x, dead)
        sae.may_be_sparse = False
        expected = sae.encode_with_hidden_pre(x)[1][:, dead].square().sum(dim=-1).mean()
        torch.testing.assert_close(value, expected)
        for name, gradient in gradients_of(expected, sae).items():
            torch.testing.assert_close(gradients[name], gradient, msg=name)
    finally:
        del AUX_LOSSES["squares"]


def test_without_a_dead_latent_the_value_of_a_loss_does_not_matter() -> None:
    def mean_over_dead(inputs: Any, cfg: Any) -> torch.Tensor:  # noqa: ARG001
        return inputs.hidden_pre_sums().where(inputs.dead, 0).sum() / inputs.dead.sum()

    register_aux_loss("mean_over_dead", mean_over_dead, sync_free=True)
    try:
        sae = build_sae("auxk-topk", aux_variant="mean_over_dead", dead_criterion="steps")
        sae._dead_bound = lambda *_: 20  # as where the number is not known yet
        output = forward(sae, torch.randn(6, 8), torch.zeros(24, dtype=torch.bool))
        assert output.losses["aux_loss"] == 0
        assert output.loss.isfinite()
    finally:
        del AUX_LOSSES["mean_over_dead"]


@pytest.mark.parametrize("variant", ["auxk", "straight_through", "pursuit"])
@pytest.mark.parametrize("architecture", ["auxk-topk", "auxk-jumprelu"])
@pytest.mark.parametrize("rescaled", [True, False])
def test_a_decoder_row_of_zeros_does_no_harm(
    variant: str, architecture: str, rescaled: bool
) -> None:
    fields = {"rescale_acts_by_decoder_norm": rescaled} if "topk" in architecture else {}
    sae = build_sae(architecture, aux_variant=variant, dead_criterion="steps", k_aux=24, **fields)
    with torch.no_grad():
        sae.W_dec[[0, 5]] = 0
    gradients = aux_gradients(sae, torch.randn(6, 8), torch.arange(24) < 9)
    assert gradients["W_enc"].abs().max() > 0
    assert all(gradient.isfinite().all() for gradient in gradients.values())


@pytest.mark.parametrize("sparse", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_pursuit_never_chooses_what_matches_nothing(architecture: str, sparse: bool) -> None:
    """A decoder row of 0, in every row 0 / 0, and rows that are explained or that none matches."""
    fields = {"rescale_acts_by_decoder_norm": False} if "topk" in architecture else {}
    sae = build_sae(
        architecture, aux_variant="pursuit", dead_criterion="steps", dtype="float64", **fields
    )
    sae.may_be_sparse = sparse
    x = torch.randn(6, 8, dtype=torch.float64)
    dead = torch.arange(24) < 20
    for zeros in ([0, 5], [0, 23]):  # all dead, or one alive
        with torch.no_grad():
            sae.W_dec[zeros] = 0
        assert_equals_reference(sae, x, dead)
    with torch.no_grad():  # nothing fires
        for name, parameter in sae.named_parameters():
            if name not in ("W_dec", "threshold"):
                parameter.zero_()
        sae.W_dec.uniform_(0.1, 1)
    x[0], x[1] = 0, -x[1].abs()
    assert_equals_reference(sae, x, dead)
    gradients = aux_gradients(sae, torch.zeros_like(x), dead)
    assert all((gradient == 0).all() for gradient in gradients.values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_ties_are_no_problem(variant: str) -> None:
    sae = build_sae("auxk-topk", aux_variant=variant, dead_criterion="steps", k_aux=4)
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.b_enc.zero_()
    output = forward(sae, torch.randn(5, 8), torch.ones(24, dtype=torch.bool))
    output.loss.backward()
    assert output.loss.isfinite()


@pytest.mark.parametrize("sparse", [True, False])
def test_a_pre_activation_of_exactly_0_can_be_among_the_largest(sparse: bool) -> None:
    sae = build_sae("auxk-topk", aux_variant="auxk", dead_criterion="steps", k_aux=4)
    sae.may_be_sparse = sparse
    with torch.no_grad():
        sae.W_enc[:, :9] = 0
        sae.b_enc[:9] = 0
    gradients = aux_gradients(sae, torch.randn(6, 8), torch.arange(24) < 9)
    assert gradients["b_enc"].abs().max() > 0


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("mode", ["layer_norm", "constant_norm_rescale"])
def test_a_row_without_spread_does_no_harm(variant: str, mode: str) -> None:
    """The run-time normalisations divide by the standard deviation, or the norm, of a row."""
    sae = build_sae(
        "auxk-topk", aux_variant=variant, dead_criterion="steps", normalize_activations=mode
    )
    x = torch.randn(6, 8)
    x[1], x[2], x[3] = 0.0, 3.0, torch.nan
    with pytest.warns(UserWarning, match="NaN"):
        output = forward(sae, x, torch.arange(24) < 12)
    output.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in sae.parameters())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_none_takes_no_part_in_the_gradient(architecture: str) -> None:
    sae = build_sae(architecture, aux_variant="none", dead_criterion="steps")
    gradients = aux_gradients(sae, torch.randn(5, 8), torch.ones(24, dtype=torch.bool))
    assert all(g.abs().max() == 0 for g in gradients.values())


def test_a_loss_of_ones_own_is_an_aux_variant() -> None:
    def lift(inputs: Any, cfg: Any) -> torch.Tensor:
        return -inputs.dead_hidden_pre().mean() * cfg.resolved_k_aux

    register_aux_loss("lift", lift, default_coefficient=0.5)
    try:
        register_aux_loss("lift", lift, default_coefficient=0.5)  # again is no error
        # nor is a new version of it, as a notebook's cell makes it when it is run again
        again = types.FunctionType(lift.__code__, lift.__globals__, closure=lift.__closure__)
        again.__qualname__ = lift.__qualname__
        register_aux_loss("lift", again, default_coefficient=0.5)
        with pytest.raises(ValueError, match="'lift' is already registered"):
            register_aux_loss("lift", lambda inputs, cfg: inputs.x.sum())

        dead = torch.arange(24) < 10
        sae = build_sae("auxk-gated", aux_variant="lift", dead_criterion="steps", k_aux=7)
        output = forward(sae, torch.randn(6, 8), dead)
        expected = -0.5 * 7 * output.hidden_pre[:, :10].mean()
        torch.testing.assert_close(output.losses["aux_loss"], expected)
        assert output.metrics["k_aux_used"] == 10
    finally:
        del AUX_LOSSES["lift"]


def test_a_loss_can_be_registered_by_a_decorator() -> None:
    try:

        @register_aux_loss("everywhere", default_coefficient=2.0, uses_dead_latents=False)
        def everywhere(inputs: Any, cfg: Any) -> torch.Tensor:  # noqa: ARG001
            return inputs.residual.square().sum(dim=-1).mean()

        sae = build_sae("auxk-standard", aux_variant="everywhere")
        output = forward(sae, torch.randn(6, 8))
        torch.testing.assert_close(output.losses["aux_loss"], 2 * output.losses["mse_loss"])
    finally:
        del AUX_LOSSES["everywhere"]


@pytest.mark.parametrize("rescaled", [True, False])
def test_a_loss_may_use_all_pre_activations_twice(rescaled: bool) -> None:
    def twice(inputs: Any, cfg: Any) -> torch.Tensor:  # noqa: ARG001
        return inputs.hidden_pre.square().mean() + inputs.hidden_pre.sum()

    register_aux_loss("twice", twice)
    try:
        fields = {"dead_criterion": "steps", "rescale_acts_by_decoder_norm": rescaled}
        sae = build_sae("auxk-topk", aux_variant="twice", **fields)
        x, dead = torch.randn(6, 8), torch.arange(24) < 9
        gradients = aux_gradients(sae, x, dead)
        h = sae.encode_with_hidden_pre(x)[1]
        for name, gradient in gradients_of(h.square().mean() + h.sum(), sae).items():
            torch.testing.assert_close(gradients[name], gradient, msg=name)
    finally:
        del AUX_LOSSES["twice"]
