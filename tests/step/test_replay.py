"""Python's part of a captured step, without a GPU: what a replay returns, lends and refuses.

A graph is stood in for by nothing: what it was captured from lies in its memory, so that a replay
on the same batch and weights gives what an ordinary step does. test_captured.py has the rest.
"""

import gc
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sae_lens_auxk.step import arena, captured
from tests.helpers import TOPK_ARCHITECTURES, VARIANTS, build_sae, kill_latents, step_input


class Place(arena.Place):
    def __init__(self, x: torch.Tensor):
        self.x, self.interface = x, {"data": (x.data_ptr(), False)}

    def tensor(self, owner: Any) -> tuple[torch.Tensor, Any]:
        loan, x = arena._Loan(self.interface, owner), self.x.detach()
        x.loan = loan  # type: ignore[attr-defined]  # it lives as long as the tensor
        return x, loan


@contextmanager
def no_capture(graph: Any, shared: Any) -> Generator[None]:
    yield


@pytest.fixture(autouse=True)
def _without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins: dict[str, Any] = {
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: None),
        "graph_pool_handle": lambda: (0, 1),
        "Stream": lambda *_: object(),
        "current_stream": lambda *_: "stream",
        "device": lambda _: nullcontext(),
        "is_current_stream_capturing": lambda: False,
        "get_allocator_backend": lambda: "native",
    }
    for name, function in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(captured, "Place", Place)
    monkeypatch.setattr(captured, "capture", no_capture)
    monkeypatch.setattr(captured, "CLOSE_STEPS", 0)
    monkeypatch.setattr(captured.CapturedStep, "_device_is_close", lambda *_: True)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())


def new_sae(architecture: str = "auxk-topk", variant: str = "pursuit") -> Any:
    sae = build_sae(architecture, aux_variant=variant, dead_threshold_tokens=10**6)
    sae.tokens_since_fired[:8] = 10**9
    kill_latents(sae, 8)
    return sae


X = torch.randn(16, 8, generator=torch.Generator().manual_seed(0))


def step(sae: Any, n: int = 3, is_captured: bool = True) -> Any:
    batch = sae._prepare(step_input(X, step=n))
    batch.dead_bound = sae.cfg.d_sae if sae.cfg.resolved_aux_coefficient else 0
    if not is_captured:
        return sae._finish(batch, sae._step(batch))
    # At first none like it was taken.
    output = sae._captured.step(sae, batch) or sae._captured.step(sae, batch)
    return None if output is None else sae._finish(batch, output)


@pytest.fixture
def sae(monkeypatch: pytest.MonkeyPatch) -> Any:
    return captured_sae(monkeypatch, "auxk-topk", "pursuit")


def captured_sae(monkeypatch: pytest.MonkeyPatch, architecture: str, variant: str) -> Any:
    sae = new_sae(architecture, variant)
    given = {"sae_in": X, "grad_loss": torch.ones(())}
    given["coefficient"] = torch.tensor(sae.cfg.resolved_aux_coefficient)
    # A capture computes nothing; this one computes, so the inputs must be there before the replay.
    monkeypatch.setattr(
        arena.Arena, "input_like", lambda _, name, x: given[name].to(x.dtype).clone()
    )
    return sae


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = (x.to_dense() if x.is_sparse else x for x in (a, b))
    return bool((a - b).norm() <= 1e-6 * b.norm() + 1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("architecture", TOPK_ARCHITECTURES)
def test_a_replay_gives_what_an_ordinary_step_does(
    architecture: str, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sae = captured_sae(monkeypatch, architecture, variant)
    expected = step(sae, is_captured=False)
    expected.loss.backward()
    gradients = [p.grad.clone() for p in sae.parameters()]
    sae.zero_grad()
    output = step(sae)
    assert type(output) is captured._Output
    for name in ("sae_in", "sae_out", "feature_acts", "hidden_pre", "loss"):
        assert close(getattr(output, name), getattr(expected, name)), name
    assert output.losses.keys() == expected.losses.keys()
    assert output.metrics.keys() == expected.metrics.keys()
    output.loss.backward()
    assert all(close(p.grad, g) for p, g in zip(sae.parameters(), gradients, strict=True))


def test_what_waits_for_its_backward_pass_is_not_overwritten(sae: Any) -> None:
    output = step(sae)
    assert step(sae, 4) is None, "the first waits for its backward pass"
    output.loss.backward()
    places = {place.interface["data"][0] for place in graph_of(sae).grads if place is not None}
    assert {p.grad.data_ptr() for p in sae.parameters()} == places, "gradients are not copied"
    assert step(sae, 5) is not None


def test_a_class_of_ones_own_is_not_captured(sae: Any) -> None:
    """It may decide in Python. One made by a call says that it is of the module ``abc``."""
    base = type(sae)

    class Own(base):
        pass

    for cls in (Own, type("Own", (base,), {})):
        sae.__class__ = cls
        assert step(sae) is None
    sae.__class__ = base
    assert step(sae) is not None


def graph_of(sae: Any) -> Any:
    (graph,) = sae._captured._graphs.values()
    return graph


def test_hidden_pre_is_readable_until_the_next_step(sae: Any) -> None:
    output = step(sae)
    _ = output.hidden_pre
    output.loss.backward()
    _ = output.hidden_pre
    step(sae, 4)
    with pytest.raises(RuntimeError, match="until the next step"):
        _ = output.hidden_pre
    assert repr(output)


def test_what_would_vanish_in_silence_is_refused(sae: Any) -> None:
    only_the_loss = "only the step's loss has a gradient"
    for name in ("sae_out", "feature_acts"):
        output = step(sae)
        with pytest.raises(RuntimeError, match=only_the_loss):
            (output.loss + getattr(output, name).sum()).backward()
        del output
        gc.collect()
    output = step(sae)
    output.sae_out.register_hook(lambda grad: grad)
    with pytest.raises(RuntimeError, match=only_the_loss):
        output.loss.backward()
    del output
    gc.collect()
    output = step(sae)
    with torch.no_grad():
        sae.W_dec.mul_(1)
    with pytest.raises(RuntimeError, match="a weight was changed"):
        output.loss.backward()
    del output
    gc.collect()
    output = step(sae)
    with pytest.raises(RuntimeError, match=only_the_loss):
        (output.loss + output.hidden_pre.sum()).backward()


@pytest.mark.parametrize(
    "change",
    [
        lambda sae: setattr(sae.cfg, "dead_criterion", "steps"),
        lambda sae: setattr(sae, "fire", torch.relu),
        lambda sae: setattr(sae, "mse_loss_fn", lambda a, b: (a - b) ** 2),
        lambda sae: sae.eval(),
        lambda sae: sae.hook_sae_input.register_forward_hook(lambda *_: None),
        lambda sae: torch.nn.utils.parametrizations.weight_norm(sae, "W_dec"),
    ],
    ids=["SAELens's mask", "a method", "another loss", "eval", "a hook", "a parametrisation"],
)
def test_what_a_graph_cannot_know_is_ordinary(sae: Any, change: Any) -> None:
    assert step(sae) is not None
    change(sae)
    with torch.no_grad():
        assert step(sae, 4) is None
    assert step(sae, 5) is None


def test_another_setting_is_another_graph(sae: Any) -> None:
    step(sae)
    first = graph_of(sae)
    sae.W_dec = torch.nn.Parameter(sae.W_dec.data)  # on the same memory
    step(sae, 4).loss.backward()
    assert graph_of(sae) is not first
    assert sae.W_dec.grad is not None


def test_what_fails_before_a_replay_ends_the_captures_not_the_run(
    sae: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(captured.logger, "warning", said.append)
    monkeypatch.setattr(captured, "_setting", lambda _: 1 / 0)
    assert step(sae) is None
    assert step(sae, 4) is None
    assert said == [
        "Training steps are not captured as CUDA graphs: ZeroDivisionError: division by zero"
    ]
    other = new_sae()
    monkeypatch.setattr(captured, "_setting", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        step(other)


def test_a_step_is_captured_once_one_like_it_was_taken_and_the_device_is_close(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A number of dead latents that goes to and fro between none and one is two graphs."""
    monkeypatch.setattr(captured, "CLOSE_STEPS", 3)
    close = iter([False, True, True, False, True, True, True])
    monkeypatch.setattr(captured.CapturedStep, "_device_is_close", lambda *_: next(close))
    sae = captured_sae(monkeypatch, "auxk-topk", "pursuit")
    taken = list[bool]()
    for bound in (0, 24) * 5:
        batch = sae._prepare(step_input(X, step=3))
        batch.dead_bound = bound
        output = sae._captured.step(sae, batch)
        taken.append(output is not None)
        if output is not None:
            output.loss.backward()
    assert taken == [False] * 7 + [True] * 3
    assert len(sae._captured._graphs) == 2
