"""The sparse step runs only where it is SAELens's step: nothing that it would call is ignored."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from sae_lens import BatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAE, TrainingSAE
from sae_lens.registry import get_sae_training_class

from sae_lens_auxk.step.sparse import HOOK_POINTS, REPLACED
from tests import fresh
from tests.helpers import TOPK_ARCHITECTURES, build_config, build_sae, build_trainer, forward

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


class Counting(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.called: list[str] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.called.append("")
        return x


@pytest.mark.parametrize("name", HOOK_POINTS)
@pytest.mark.parametrize("how", ["module", "instance", "class"])
@pytest.mark.parametrize("architecture", TOPK_ARCHITECTURES)
def test_what_stands_in_place_of_a_hook_point_is_called(
    architecture: str, how: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae, counting = build_sae(architecture), Counting()
    if how == "module":
        setattr(sae, name, counting)
    elif how == "instance":
        getattr(sae, name).forward = lambda x: counting(x)
    else:
        monkeypatch.setattr(type(getattr(sae, name)), "forward", lambda _, x: counting(x))
    assert not is_sparse(sae)
    forward(sae, torch.randn(16, 8))
    assert counting.called


@pytest.mark.parametrize("of", ["instance", "class"])
@pytest.mark.parametrize("architecture", TOPK_ARCHITECTURES)
def test_another_forward_of_the_activation_function_is_called(
    architecture: str, of: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = build_sae(architecture)
    select = sae.activation_fn
    target: Any = select if of == "instance" else type(select)
    monkeypatch.setattr(target, "forward", lambda *args: args[-1] * 0)
    assert not forward(sae, torch.randn(16, 8)).feature_acts.any()


@pytest.mark.parametrize(
    "owner", [TrainingSAE, BatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAE]
)
def test_a_patch_of_saelens_own_step_is_called(owner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    theirs = owner.training_forward_pass

    def own(self: Any, step_input: Any) -> Any:
        called.append(1)
        return theirs(self, step_input)

    sae = build_sae("auxk-matryoshka-batchtopk")
    monkeypatch.setattr(owner, "training_forward_pass", own)
    forward(sae, torch.randn(16, 8))
    assert called


def test_a_patch_from_before_the_import_is_called() -> None:
    fresh.run("""
import warnings
warnings.simplefilter("ignore")
import torch
from sae_lens import TopKTrainingSAE
theirs, called = TopKTrainingSAE.encode_with_hidden_pre, []
TopKTrainingSAE.encode_with_hidden_pre = lambda *args: called.append(1) or theirs(*args)
from tests.helpers import build_sae, forward
forward(build_sae("auxk-topk"), torch.randn(16, 8))
assert called
""")


@pytest.mark.parametrize("result", [{}, torch.ones(())])
def test_a_loss_of_ones_own_may_take_the_place_of_all(result: Any) -> None:
    """SAELens allows a dict of any losses, or one tensor."""
    sae = subclass("auxk-topk", "calculate_aux_loss", lambda *args, **kwargs: result)
    output = forward(sae, torch.randn(16, 8), torch.arange(24) < 9)
    extra = 0 if isinstance(result, dict) else 1
    torch.testing.assert_close(output.loss, output.losses["mse_loss"] + extra)


def test_a_step_that_leaves_out_this_packages_is_told_what_to_call() -> None:
    sae = subclass("auxk-topk", "training_forward_pass", TrainingSAE.training_forward_pass)
    with pytest.raises(TypeError, match=r"must call super\(\).training_forward_pass"):
        forward(sae, torch.randn(16, 8))


def test_coefficients_of_ones_own_may_leave_out_that_of_the_loss() -> None:
    sae = subclass("auxk-topk", "get_coefficients", lambda self: {})
    output = build_trainer(sae, dead_feature_window=1).step(torch.randn(16, 8))
    assert output.metrics["aux_coefficient"] == 1 / 32
