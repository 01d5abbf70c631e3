"""Adam's fused kernel, set for the time of a step. A CPU has one too, so it can be tried here."""

import copy
from typing import Any

import pytest
import torch

from sae_lens_auxk.step.adam import fuse
from tests.helpers import build_sae, build_trainer


def parameters() -> list[torch.nn.Parameter]:
    torch.manual_seed(0)
    return [torch.nn.Parameter(torch.randn(n)) for n in (5, 3)]


def steps(optimizer: torch.optim.Optimizer, n: int, seed: int = 1) -> list[torch.Tensor]:
    torch.manual_seed(seed)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    for _ in range(n):
        for parameter in held:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return [parameter.detach().clone() for parameter in held]


def seen_fused(optimizer: torch.optim.Optimizer) -> list[Any]:
    """What the groups say while a step runs."""
    seen: list[Any] = []
    optimizer.register_step_pre_hook(lambda o, *_: seen.extend(g["fused"] for g in o.param_groups))
    steps(optimizer, 1)
    return seen


def test_it_computes_the_same_and_leaves_the_groups_as_they_are() -> None:
    plain, fused = (torch.optim.Adam(parameters()) for _ in range(2))
    fuse(fused)
    torch.testing.assert_close(steps(fused, 20), steps(plain, 20))
    assert seen_fused(fused) == [True]
    assert fused.param_groups[0]["fused"] is None


def test_a_checkpoint_is_that_of_a_plain_adam_and_either_goes_on_from_either() -> None:
    plain, fused = (torch.optim.Adam(parameters()) for _ in range(2))
    fuse(fused)
    steps(plain, 5)
    steps(fused, 5)
    a, b = copy.deepcopy(plain.state_dict()), copy.deepcopy(fused.state_dict())
    assert a["param_groups"] == b["param_groups"]
    for key, state in a["state"].items():
        assert state.keys() == b["state"][key].keys()
        assert b["state"][key]["step"].device.type == "cpu"
    weights = []
    for saved in (a, b):
        for is_fused in (False, True):
            again = torch.optim.Adam(parameters())
            if is_fused:
                fuse(again)
            steps(again, 1)  # a state to be replaced
            again.load_state_dict(copy.deepcopy(saved))
            with torch.no_grad():
                for mine, theirs in zip(again.param_groups[0]["params"], parameters(), strict=True):
                    mine.copy_(theirs)
            weights.append(steps(again, 5))
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0])


@pytest.mark.parametrize("field", ["foreach", "fused"])
def test_what_a_user_has_set_stays(field: str) -> None:
    optimizer = torch.optim.Adam(parameters(), **{field: True})
    fuse(optimizer)
    assert seen_fused(optimizer) == [True if field == "fused" else None]
    assert optimizer.param_groups[0][field] is True


def test_after_an_error_in_a_step_the_groups_are_as_they_were() -> None:
    optimizer = torch.optim.Adam(parameters())
    fuse(optimizer)
    optimizer.param_groups[0]["params"][0].grad = torch.randn(5).to_sparse()
    with pytest.raises(RuntimeError, match="sparse"):
        optimizer.step()
    steps(optimizer, 1)
    assert optimizer.param_groups[0]["fused"] is None


def test_the_switch_and_other_optimizers(monkeypatch: pytest.MonkeyPatch) -> None:
    sgd = torch.optim.SGD(parameters(), lr=0.1)
    fuse(sgd)
    assert not sgd._optimizer_step_pre_hooks
    monkeypatch.setenv("SAE_LENS_AUXK_FUSED", "0")
    adam = torch.optim.Adam(parameters())
    fuse(adam)
    assert not adam._optimizer_step_pre_hooks


def test_a_run_on_the_cpu_has_none() -> None:
    assert not build_trainer(build_sae("auxk-topk")).optimizer._optimizer_step_pre_hooks
