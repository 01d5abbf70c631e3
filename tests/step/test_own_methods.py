"""The sparse step runs only where it is SAELens's step: nothing that it would call is ignored."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sae_lens.registry import get_sae_training_class

from sae_lens_auxk.step.sparse import REPLACED
from tests.helpers import TOPK_ARCHITECTURES, build_config, build_sae, forward

OVERRIDES = [name for name in REPLACED if name != "_iterable_decode"]


def is_sparse(sae: Any) -> bool:
    return sae._can_be_sparse(torch.randn(4, 8))


def subclass(architecture: str, name: str, method: Callable[..., Any]) -> Any:
    """An SAE of a subclass of one's own."""
    own = type("Own", (get_sae_training_class(architecture)[0],), {name: method})
    return own(build_config(architecture, dead_criterion="steps"))


def extra_loss(self: Any, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
    losses = super(type(self), self).calculate_aux_loss(*args, **kwargs)
    return {**losses, "extra": self.W_enc.square().sum()}


@pytest.mark.parametrize("architecture", TOPK_ARCHITECTURES)
def test_an_added_loss_of_a_subclass_is_part_of_the_loss(architecture: str) -> None:
    sae = subclass(architecture, "calculate_aux_loss", extra_loss)
    output = forward(sae, torch.randn(16, 8), torch.arange(24) < 9)
    torch.testing.assert_close(output.losses["extra"], sae.W_enc.square().sum())
    counted = {k: v for k, v in output.losses.items() if k != "auxiliary_reconstruction_loss"}
    torch.testing.assert_close(output.loss, sum(counted.values()))


@pytest.mark.parametrize("name", OVERRIDES)
@pytest.mark.parametrize("of", ["subclass", "instance", "class"])
@pytest.mark.parametrize("architecture", TOPK_ARCHITECTURES)
def test_a_method_of_ones_own_is_called(
    architecture: str, of: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []
    base = get_sae_training_class(architecture)[0]
    theirs = getattr(base, name)

    def own(self: Any, *args: Any, **kwargs: Any) -> Any:
        called.append(name)
        return theirs(self, *args, **kwargs)

    if of == "subclass":
        sae = subclass(architecture, name, own)
    else:
        sae = build_sae(architecture, dead_criterion="steps")
        assert is_sparse(sae)
        if of == "instance":
            monkeypatch.setattr(sae, name, own.__get__(sae))
        else:
            monkeypatch.setattr(base, name, own)
    assert not is_sparse(sae)
    forward(sae, torch.randn(16, 8), torch.arange(24) < 9)
    assert called


def test_an_own_decoding_of_levels_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    sae = build_sae("auxk-matryoshka-batchtopk")
    called: list[int] = []
    theirs = sae._iterable_decode
    monkeypatch.setattr(
        sae, "_iterable_decode", lambda *a, **k: called.append(1) or theirs(*a, **k)
    )
    forward(sae, torch.randn(16, 8))
    assert called


@pytest.mark.parametrize("architecture", TOPK_ARCHITECTURES)
def test_a_function_set_on_an_sae_is_called(architecture: str) -> None:
    """``reshape_fn_in`` and the others are attributes of an instance."""
    x = torch.randn(16, 8)
    for name in (
        "reshape_fn_in",
        "reshape_fn_out",
        "mse_loss_fn",
        "run_time_activation_norm_fn_in",
    ):
        called: list[str] = []
        sae = build_sae(architecture)
        theirs = getattr(sae, name)

        def own(*args: Any, f: Any = theirs, to: list[str] = called) -> Any:
            to.append("")
            return f(*args)

        setattr(sae, name, own)
        forward(sae, x)
        assert called, name


@pytest.mark.parametrize("architecture", TOPK_ARCHITECTURES)
def test_an_own_activation_function_is_called(architecture: str) -> None:
    sae = build_sae(architecture)
    sae.activation_fn = torch.nn.ReLU()
    output = forward(sae, torch.randn(16, 8))
    assert (output.feature_acts > 0).sum() > 3 * 16


@pytest.mark.parametrize("architecture", TOPK_ARCHITECTURES)
def test_another_k_of_the_activation_function_counts(architecture: str) -> None:
    """SAELens's step does not look at the config's after the SAE is made."""
    sae = build_sae(architecture)
    sae.activation_fn.k = 5
    output = forward(sae, torch.randn(16, 8) + 3)
    assert (output.feature_acts != 0).sum() > 3 * 16


def test_a_hook_of_all_modules_is_called() -> None:
    called: list[Any] = []
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: called.append(1))
    try:
        forward(build_sae("auxk-topk"), torch.randn(16, 8))
    finally:
        handle.remove()
    assert called


@pytest.mark.parametrize("architecture", TOPK_ARCHITECTURES)
def test_a_subclass_without_changes_is_sparse(architecture: str) -> None:
    assert is_sparse(subclass(architecture, "note", lambda self: None))
