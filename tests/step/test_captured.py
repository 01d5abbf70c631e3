"""Captured steps, on a GPU: the same training, and nothing that a graph could break in silence."""

import copy
import gc
import pickle
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from sae_lens import TrainingSAE

from sae_lens_auxk.losses.registry import AUX_LOSSES, register_aux_loss
from sae_lens_auxk.saelens.names import InterruptedException
from sae_lens_auxk.step import captured
from tests.helpers import (
    TOPK_ARCHITECTURES,
    VARIANTS,
    build_sae,
    build_trainer,
    forward,
    kill_latents,
)

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

D_IN, D_SAE, BATCH = 32, 512, 128
CASES = [("auxk-topk", variant) for variant in VARIANTS]
CASES += [(name, v) for name in TOPK_ARCHITECTURES[1:] for v in ("none", "auxk", "pursuit")]


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is captured when one like it was taken, however busy the device is."""
    monkeypatch.setattr(captured, "CLOSE_STEPS", 1)
    monkeypatch.setattr(captured.CapturedStep, "_device_is_close", lambda *_: True)
    monkeypatch.delenv("SAE_LENS_AUXK_GRAPH", raising=False)


def new_sae(architecture: str = "auxk-topk", graph: bool = True, **fields: Any) -> Any:
    defaults: dict[str, Any] = {"aux_variant": "auxk", "k": 8, "dead_threshold_tokens": 1000}
    torch.manual_seed(0)
    sae = build_sae(architecture, randomize=False, d_in=D_IN, d_sae=D_SAE, **{**defaults, **fields})
    with patch.dict("os.environ", {"SAE_LENS_AUXK_GRAPH": str(int(graph))}):
        sae._captured = captured.CapturedStep()
    return sae.to("cuda")


def batches(n: int, rows: int = BATCH, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    directions = torch.randn(3 * D_SAE, D_IN, device="cuda", generator=generator)
    chosen = torch.randint(3 * D_SAE, (n, rows, 5), device="cuda", generator=generator)
    sizes = torch.rand(n, rows, 5, 1, device="cuda", generator=generator)
    return (directions[chosen] * sizes).sum(dim=2)


def train(sae: Any, xs: Any, **fields: Any) -> Any:
    trainer = build_trainer(sae, lr=1e-3, train_batch_size_samples=BATCH, device="cuda", **fields)
    for x in xs:
        trainer.step(x)
        trainer.n_training_steps += 1
    return trainer


def weights(sae: Any) -> torch.Tensor:
    return torch.cat([p.detach().flatten().double() for p in sae.parameters()])


def n_graphs(sae: Any) -> int:
    return len(sae._captured._graphs)


def assert_trains_the_same(run: Callable[[bool], Any], n: int = 3, rounding: float = 1e-6) -> None:
    """``n`` ordinary and ``n`` captured runs: no further apart than twice the ordinary ones are.

    Relative to how far the weights moved, and but for ``rounding``.
    """
    ordinary, graphs = [run(False) for _ in range(n)], [run(True) for _ in range(n)]
    assert all(n_graphs(sae) == 0 for sae in ordinary)
    assert all(n_graphs(sae) > 0 for sae in graphs)
    a, b = torch.stack([*map(weights, ordinary)]), torch.stack([*map(weights, graphs)])
    scale = (a[0] - weights(new_sae(ordinary[0].cfg.architecture()))).norm()
    spread = max((x - y).norm() for x in a for y in a) / scale
    apart = max((x - y).norm() for x in a for y in b) / scale
    assert apart <= 2 * spread + rounding, (float(apart), float(spread))


# --- the same training -----------------------------------------------------------------------


SCHEDULE = {"aux_warm_up_steps": 20, "aux_decay_start_step": 100, "aux_decay_steps": 80}


def run_of_200_steps(architecture: str, **fields: Any) -> Callable[[bool], Any]:
    """Latents die and are revived, with warm-up and decay."""
    xs = batches(200)

    def run(graph: bool) -> Any:
        sae = new_sae(architecture, graph, **SCHEDULE, **fields)
        seen = []
        trainer = build_trainer(
            sae,
            lr=1e-2,
            train_batch_size_samples=BATCH,
            device="cuda",
            autocast=sae.dtype == torch.float32,
        )
        for x in xs.to(sae.dtype):
            output = trainer.step(x)
            seen.append(output.metrics["dead_latents"])
            trainer.n_training_steps += 1
        dead = torch.stack(seen)
        assert (dead > 0).any()
        assert (dead.diff() < 0).any()
        return sae

    return run


@pytest.mark.parametrize(("architecture", "variant"), CASES)
def test_200_steps(architecture: str, variant: str) -> None:
    """In float64, where a rounding does not become another selection."""
    run = run_of_200_steps(architecture, aux_variant=variant, dtype="float64")
    assert_trains_the_same(run, rounding=1e-9)


@pytest.mark.parametrize("architecture", TOPK_ARCHITECTURES)
@pytest.mark.parametrize("variant", ["auxk", "pursuit"])
def test_200_steps_in_autocast(architecture: str, variant: str) -> None:
    """With the Triton kernels. A latent selected for another by a rounding is in the spread."""
    assert_trains_the_same(run_of_200_steps(architecture, aux_variant=variant), n=5)


@pytest.mark.parametrize("n_dead", [0, D_SAE])
def test_none_or_all_are_dead(n_dead: int) -> None:
    xs = batches(30)

    def run(graph: bool) -> Any:
        sae = new_sae(graph=graph, dead_threshold_tokens=10**6)
        sae.tokens_since_fired[:n_dead] = 10**9
        kill_latents(sae, n_dead)
        train(sae, xs)
        return sae

    assert_trains_the_same(run)


@pytest.mark.parametrize(
    "fields",
    [
        {"aux_batch_fraction": 0.5},
        {"resample_every_steps": 20, "resample_stop_step": 60},
        {"dead_criterion": "batch"},
        {"b_dec_init": "mean"},
        {"dtype": "float64"},
        {"rescale_acts_by_decoder_norm": True},
        {"normalize_activations": "layer_norm"},
    ],
    ids=str,
)
def test_fields(fields: dict[str, Any]) -> None:
    xs = batches(80)

    def run(graph: bool) -> Any:
        sae = new_sae(graph=graph, aux_variant="pursuit", **fields)
        train(sae, xs.to(sae.dtype))
        return sae

    assert_trains_the_same(run)


def test_bad_rows_and_batches() -> None:
    xs = batches(40)
    xs[10, :5], xs[20], xs[30, 3] = torch.nan, torch.inf, 1e30
    bad: list[list[int]] = []

    def run(graph: bool) -> Any:
        sae = new_sae("auxk-batchtopk", graph)
        trainer, counts = build_trainer(sae, device="cuda"), list[int]()
        for x in xs:
            counts.append(int(trainer.step(x).metrics["nonfinite_rows"]))
            trainer.n_training_steps += 1
        bad.append(counts)
        assert weights(sae).isfinite().all()
        return sae

    assert_trains_the_same(run)
    assert all(counts == bad[0] for counts in bad)
    assert (bad[0][10], bad[0][20], bad[0][30]) == (5, BATCH, 1)


def test_a_short_last_batch_and_a_resume_in_the_middle(tmp_path: Path) -> None:
    xs = batches(60)

    def run(graph: bool) -> Any:
        sae = new_sae(graph=graph)
        trainer = train(sae, xs[:30])
        trainer.save_checkpoint("half", base_path=tmp_path)
        resumed = new_sae(graph=graph)
        resumed.load_weights_from_checkpoint(tmp_path / "half")
        with patch.dict("os.environ", {"SAE_LENS_AUXK_GRAPH": str(int(graph))}):
            resumed._captured = captured.CapturedStep()
        again = build_trainer(resumed, lr=1e-3, train_batch_size_samples=BATCH, device="cuda")
        again.load_trainer_state(tmp_path / "half")
        for x in [*xs[30:], *xs[:3, : BATCH // 2]]:
            again.step(x)
            again.n_training_steps += 1
        return resumed

    assert_trains_the_same(run)


def test_equal_to_the_bit_under_deterministic_algorithms() -> None:
    code = """
import torch, sae_lens_auxk
from tests.step import test_captured as t
t.captured.CLOSE_STEPS, t.captured.CapturedStep._device_is_close = 1, lambda *_: True
torch.use_deterministic_algorithms(True, warn_only=True)
for architecture, variant in (("auxk-topk", "none"), ("auxk-topk", "pursuit")):
    saes = [t.new_sae(architecture, graph, aux_variant=variant) for graph in (False, True)]
    for sae in saes:
        t.train(sae, t.batches(60))
    assert t.n_graphs(saes[1]) > 0
    assert torch.equal(t.weights(saes[0]), t.weights(saes[1])), (architecture, variant)
"""
    env = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "SAE_LENS_AUXK_OPS": "torch"}
    with patch.dict("os.environ", env):
        root = Path(__file__).parents[2]
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False
        )
    assert done.returncode == 0, done.stderr[-2000:]


# --- what a step returns ---------------------------------------------------------------------


def two_steps(**fields: Any) -> tuple[Any, Any, Any, torch.Tensor]:
    """An ordinary and a captured SAE with the same weights, and a batch for the next step."""
    xs = batches(5)
    sae = new_sae(**{"dead_threshold_tokens": 10**6, **fields})
    n_dead = D_SAE // 2
    sae.tokens_since_fired[:n_dead] = 10**9
    kill_latents(sae, n_dead)
    for step, x in enumerate(xs[:4]):
        forward(sae, x, step=step).loss.backward()
        sae.zero_grad()
    ordinary = copy.deepcopy(sae)
    ordinary._captured._off = True
    assert n_graphs(sae) == 1
    return ordinary, sae, xs, xs[4]


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    a, b = (x.to_dense() if x.is_sparse else x for x in (a, b))
    return bool((a - b).norm() <= 1e-5 * b.norm() + 1e-12)


@pytest.mark.parametrize("architecture", TOPK_ARCHITECTURES)
def test_the_output_is_that_of_an_ordinary_step_and_the_callers_own(architecture: str) -> None:
    ordinary, sae, xs, x = two_steps(architecture=architecture)
    a, b = forward(ordinary, x, step=4), forward(sae, x, step=4)
    assert type(b) is not type(a)
    hidden_pre = b.hidden_pre
    b.loss.backward()
    sae.zero_grad()
    forward(sae, xs[0], step=5).loss.backward()  # overwrites what was not copied
    assert close(hidden_pre, a.hidden_pre)
    for name in ("sae_in", "sae_out", "feature_acts", "loss"):
        assert close(getattr(b, name), getattr(a, name)), name
    assert a.losses.keys() == b.losses.keys()
    assert a.metrics.keys() == b.metrics.keys()
    for name, value in {**a.losses, **a.metrics}.items():
        got = {**b.losses, **b.metrics}[name]
        assert close(torch.as_tensor(got).double().cpu(), torch.as_tensor(value).double().cpu())
    with pytest.raises(RuntimeError, match="hidden_pre can be read until the next step only"):
        _ = b.hidden_pre


def test_the_log_of_a_step() -> None:
    logs = []
    for graph in (False, True):
        trainer = train(new_sae(graph=graph), batches(6))
        output = trainer.step(batches(7)[6])
        logs.append(trainer.build_train_step_log_dict(output, 1000))
    assert logs[0].keys() == logs[1].keys()
    for name, value in logs[0].items():
        assert logs[1][name] == pytest.approx(value, rel=1e-4, abs=1e-6), name


@pytest.mark.parametrize("name", ["sae_out", "feature_acts", "hidden_pre", "mse_loss", "aux_loss"])
def test_a_term_of_something_else_than_the_loss_is_refused(name: str) -> None:
    _, sae, _, x = two_steps()
    output = forward(sae, x, step=4)
    assert type(output) is captured._Output
    part = output.losses[name] if "loss" in name else getattr(output, name)
    with pytest.raises(RuntimeError, match="only the step's loss has a gradient"):
        (output.loss + part.sum()).backward()


# --- gradients -------------------------------------------------------------------------------


def gradients(sae: Any) -> list[torch.Tensor]:
    return [p.grad.clone() for p in sae.parameters()]


def test_a_scaled_loss() -> None:
    ordinary, sae, _, x = two_steps()
    for each in (ordinary, sae):
        (forward(each, x, step=4).loss * 3).backward()
    assert all(map(close, gradients(sae), gradients(ordinary)))


def test_accumulation() -> None:
    ordinary, sae, xs, _ = two_steps()
    for each in (ordinary, sae):
        for step in range(3):
            output = forward(each, xs[step], step=4 + step)
            output.loss.backward()
    assert type(output) is captured._Output
    assert all(map(close, gradients(sae), gradients(ordinary)))


def test_gradients_that_are_kept() -> None:
    _, sae, xs, x = two_steps()
    kept = torch.autograd.grad(forward(sae, x, step=4).loss, [*sae.parameters()])
    before = [grad.clone() for grad in kept]
    assert type(forward(sae, xs[0], step=5)) is not captured._Output
    assert all(map(torch.equal, kept, before))
    del kept
    assert type(forward(sae, xs[0], step=6)) is captured._Output


def test_hooks_on_parameters() -> None:
    ordinary, sae, _, x = two_steps()
    for each in (ordinary, sae):
        each.W_dec.register_hook(lambda grad: grad * 2)
        forward(each, x, step=4).loss.backward()
    assert all(map(close, gradients(sae), gradients(ordinary)))


def test_a_second_backward_and_a_second_derivative() -> None:
    _, sae, xs, x = two_steps()
    loss = forward(sae, x, step=4).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward pass must come once"):
        loss.backward()
    sae.zero_grad()
    with pytest.raises(RuntimeError, match="no second derivatives"):
        forward(sae, xs[0], step=5).loss.backward(create_graph=True)


def test_two_forward_passes_before_a_backward_pass() -> None:
    ordinary, sae, xs, x = two_steps()
    for each in (ordinary, sae):
        first, second = forward(each, x, step=4), forward(each, xs[0], step=5)
        (first.loss + second.loss).backward()
    assert type(first) is captured._Output
    assert type(second) is not captured._Output
    assert all(map(close, gradients(sae), gradients(ordinary)))
    sae.zero_grad()
    del first, second
    assert type(forward(sae, x, step=6)) is captured._Output


def test_gradients_are_not_copied() -> None:
    _, sae, _, x = two_steps()
    forward(sae, x, step=4).loss.backward()
    (graph,) = sae._captured._graphs.values()
    places = {place.interface["data"][0] for place in graph.grads if place is not None}
    assert {p.grad.data_ptr() for p in sae.parameters()} == places


# --- what must not matter --------------------------------------------------------------------


def test_an_exception_in_a_step() -> None:
    ordinary, sae, xs, x = two_steps()
    for each in (ordinary, sae):
        forward(each, xs[0], step=4)  # and whoever called it failed before the backward pass
        with pytest.raises(ValueError, match="no row to train on"):
            forward(each, xs[0, :0], step=5)
        forward(each, x, step=6).loss.backward()
    assert all(map(close, gradients(sae), gradients(ordinary)))


def test_ten_saes_in_lockstep() -> None:
    xs = batches(40)
    runs = []
    for graph in (False, False, True):
        saes = [new_sae(graph=graph, aux_variant=v) for v in ("auxk", "pursuit") * 5]
        trainers = [build_trainer(sae, lr=1e-3, device="cuda") for sae in saes]
        for x in [*xs, xs[0, :50]]:
            for trainer in trainers:
                trainer.step(x)
                trainer.n_training_steps += 1
        runs.append(torch.stack([weights(sae) for sae in saes]))
    assert all(n_graphs(sae) > 0 for sae in saes)
    spread = (runs[0] - runs[1]).norm(dim=1)
    assert ((runs[2] - runs[0]).norm(dim=1) <= 2 * spread.max() + 1e-6 * runs[0].norm(dim=1)).all()


def test_copy_and_pickle() -> None:
    _, sae, _, x = two_steps()
    other = copy.deepcopy(sae)
    assert n_graphs(sae) == 1
    assert n_graphs(other) == 0
    expected = forward(sae, x, step=4).loss
    for step in (4, 5, 6):
        assert close(forward(other, x, step=step).loss, expected)
    # SAELens's SAEs cannot be pickled; what this package adds to one can.
    assert not pickle.loads(pickle.dumps(sae._captured))._graphs


def test_evaluation_between_steps() -> None:
    ordinary, sae, xs, x = two_steps()
    for each in (ordinary, sae):
        each.eval()
        with torch.no_grad():
            forward(each, xs[0], step=4)
            each(xs[1])
        each.train()
        forward(each, x, step=4).loss.backward()
    assert torch.equal(sae.tokens_since_fired, ordinary.tokens_since_fired)
    assert all(map(close, gradients(sae), gradients(ordinary)))


def test_hooks_that_are_added_later_are_called() -> None:
    _, sae, _, x = two_steps()
    called: list[int] = []
    hook = sae.hook_sae_acts_post.register_forward_hook(lambda *_: called.append(1))
    assert type(forward(sae, x, step=4)) is not captured._Output
    assert called
    hook.remove()
    assert type(forward(sae, x, step=5)) is captured._Output
    every = torch.nn.modules.module.register_module_forward_hook(lambda *_: called.append(2))
    forward(sae, x, step=6)
    every.remove()
    assert 2 in called


@pytest.mark.parametrize(
    "change",
    [
        lambda sae: setattr(sae.cfg, "k_aux", 3),
        lambda sae: sae.W_dec.requires_grad_(False),
        lambda sae: setattr(sae.W_enc, "data", sae.W_enc.data * 2),
        lambda sae: torch.set_float32_matmul_precision("high"),
        lambda sae: sae.load_state_dict(sae.state_dict()),
        lambda sae: setattr(sae, "W_dec", torch.nn.Parameter(sae.W_dec.data)),
    ],
    ids=[
        *("a field", "a frozen weight", "new weights", "precision", "a load"),
        "a new parameter on the same memory",
    ],
)
def test_a_new_setting_is_another_graph(change: Callable[[Any], Any]) -> None:
    _, sae, _, x = two_steps()
    try:
        change(sae)
        other = copy.deepcopy(sae)
        output = forward(sae, x, step=4)
        assert type(output) is not captured._Output
        assert close(output.loss, forward(other, x, step=4).loss)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_losses_of_your_own() -> None:
    def waits(inputs: Any, cfg: Any) -> torch.Tensor:
        return inputs.hidden_pre.square().mean() * float(inputs.x.sum() > 0)

    def does_not(inputs: Any, cfg: Any) -> torch.Tensor:
        return inputs.nearest_dead(4).decode().square().sum(dim=-1).mean()

    xs = batches(8)
    with patch.dict(AUX_LOSSES):
        register_aux_loss("ordinary", waits)
        register_aux_loss("capturable", does_not, sync_free=True, capturable=True)
        register_aux_loss("a lie", waits, uses_dead_latents=False, capturable=True)
        for name, expected in (("ordinary", 0), ("capturable", 1), ("a lie", 0)):
            sae = new_sae(aux_variant=name)
            train(sae, xs)
            assert n_graphs(sae) == expected, name
            assert sae._captured._off == (name == "a lie")
            assert weights(sae).isfinite().all()
    assert torch.rand(3, device="cuda").isfinite().all()  # the generator draws again


def test_a_class_of_your_own_is_left_alone() -> None:
    class Own(type(new_sae())):
        def firing_threshold(self, feature_acts: torch.Tensor) -> torch.Tensor:
            return super().firing_threshold(feature_acts) * 2

    xs, sae = batches(8), Own(new_sae().cfg).to("cuda")
    train(sae, xs)
    assert n_graphs(sae) == 0


@pytest.mark.parametrize("error", [KeyboardInterrupt, InterruptedException])
def test_who_wants_to_end_the_run_may(error: type[BaseException]) -> None:
    xs, sae = batches(8), new_sae()
    with patch.object(captured.Graph, "_keep", side_effect=error), pytest.raises(error):
        train(sae, xs)
    other = new_sae()
    train(other, xs)
    assert n_graphs(other) == 1


def test_a_capture_without_memory_goes_on_ordinary(monkeypatch: pytest.MonkeyPatch) -> None:
    xs, sae, said = batches(8), new_sae(), list[str]()
    monkeypatch.setattr(captured.logger, "warning", said.append)
    forward(sae, xs[0], step=0)
    with patch.object(torch.cuda, "CUDAGraph", side_effect=torch.OutOfMemoryError("no memory")):
        train(sae, xs)
    assert n_graphs(sae) == 0
    assert len(said) == 1
    assert "no memory" in said[0]
    assert gc.isenabled()


def test_another_thread_uses_the_gpu_meanwhile() -> None:
    xs, stop = batches(40), threading.Event()
    a = torch.randn(256, 256, device="cuda")

    def work() -> None:
        while not stop.is_set():
            (a @ a).sum().item()

    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work)
        try:
            saes = [new_sae() for _ in range(5)]
            for sae in saes:
                train(sae, xs)
        finally:
            stop.set()
        working.result()
    assert all(n_graphs(sae) > 0 for sae in saes)
    sae = saes[0]
    ordinary = new_sae(graph=False)
    train(ordinary, xs)
    assert (weights(sae) - weights(ordinary)).norm() <= 1e-3 * weights(ordinary).norm()


def test_threads_do_not_share_an_arena() -> None:
    xs, saes = batches(40), [new_sae(), new_sae()]
    with ThreadPoolExecutor(2) as pool:
        for _ in pool.map(lambda sae: train(sae, xs), saes):
            pass
    assert all(n_graphs(sae) > 0 for sae in saes)
    assert (weights(saes[0]) - weights(saes[1])).norm() <= 1e-3 * weights(saes[0]).norm()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_a_device_that_is_not_the_current_one() -> None:
    xs = batches(20)
    first, second = new_sae(), new_sae().to("cuda:1")
    train(first, xs)
    trainer = build_trainer(second, lr=1e-3, train_batch_size_samples=BATCH, device="cuda:1")
    for x in xs:
        trainer.step(x.to("cuda:1"))
        trainer.n_training_steps += 1
    assert n_graphs(second) > 0
    assert (weights(first) - weights(second).to("cuda:0")).norm() <= 1e-3 * weights(first).norm()


def test_off_by_its_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAE_LENS_AUXK_GRAPH", "0")
    sae = TrainingSAE.from_dict(new_sae().cfg.to_dict()).to("cuda")
    train(sae, batches(8))
    assert n_graphs(sae) == 0


def test_a_busy_device_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    # Long enough for a number of dead latents that stays the same.
    xs, saes = batches(80), [new_sae(aux_variant=v) for v in ("auxk", "auxk", "none", "none")]
    for i, sae in enumerate(saes):
        trainer = build_trainer(sae, train_batch_size_samples=BATCH, device="cuda")
        for x in xs:
            if i % 2:  # longer than the host needs for two steps
                torch.cuda._sleep(10**8)
            trainer.step(x)
            trainer.n_training_steps += 1
        torch.cuda.synchronize()
        assert (n_graphs(sae) > 0) == (i % 2 == 0), i


def test_the_host_does_not_wait() -> None:
    """Of the step before, that is: what it counted is asked for by the step after the next one."""
    xs, sae = batches(12), new_sae()
    trainer = train(sae, xs[:6])
    torch.cuda.synchronize()
    for cycles in (2 * 10**8, 8 * 10**8, 32 * 10**8):  # a busy host is slow, but not that slow
        torch.cuda._sleep(cycles)
        busy = torch.cuda.Event()
        busy.record()
        output = trainer.step(xs[6])
        outran = not busy.query()
        trainer.n_training_steps += 1
        torch.cuda.synchronize()
        if outran:
            break
    assert outran
    assert type(output) is captured._Output


# --- memory ----------------------------------------------------------------------------------


def test_a_deleted_sae_gives_its_memory_back() -> None:
    def reserved() -> int:
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved()

    xs = torch.randn(8, 2048, D_IN, device="cuda")
    left = []
    for is_captured in (False, True):  # an ordinary one leaves cuBLAS's workspaces
        sae = build_sae("auxk-topk", d_in=D_IN, d_sae=8192, k=8, aux_variant="auxk").to("cuda")
        sae._captured._off = not is_captured
        train(sae, xs)
        graphs = [weakref.ref(graph) for graph in sae._captured._graphs.values()]
        assert len(graphs) == is_captured
        del sae
        left.append(reserved())
        assert all(graph() is None for graph in graphs)
    assert left[1] <= left[0]


MEMORY = """
import sys, torch, sae_lens_auxk
from tests.helpers import build_sae, build_trainer
from sae_lens_auxk.step import captured
n, variant = int(sys.argv[1]), sys.argv[2]
saes = [build_sae("auxk-topk", randomize=False, d_in=768, d_sae=24576, k=32, aux_variant=variant,
                  dead_threshold_tokens=10**6).to("cuda") for _ in range(n)]
trainers = []
for sae in saes:
    with torch.no_grad():
        sae.b_enc[: 24576 // 2] -= 2
    sae.tokens_since_fired[: 24576 // 2] = 10**9
    trainers.append(build_trainer(sae, lr=1e-4, device="cuda", autocast=True))
x = torch.randn(4096, 768, device="cuda")
for batch in [x] * 25 + [x[:1000]] * (n > 1):
    for trainer in trainers:
        trainer.step(batch)
        trainer.n_training_steps += 1
assert captured.CapturedStep()._off or all(len(sae._captured._graphs) for sae in saes)
print(torch.cuda.max_memory_reserved())
"""


@pytest.mark.parametrize(("n", "variant"), [(1, "none"), (1, "auxk"), (1, "pursuit"), (10, "auxk")])
def test_memory_is_that_of_ordinary_steps(n: int, variant: str) -> None:
    peaks = []
    for graph in ("0", "1"):
        with patch.dict("os.environ", {"SAE_LENS_AUXK_GRAPH": graph}):
            done = subprocess.run(
                [sys.executable, "-c", MEMORY, str(n), variant],
                cwd=Path(__file__).parents[2],
                capture_output=True,
                text=True,
                check=False,
            )
        assert done.returncode == 0, done.stderr[-2000:]
        peaks.append(int(done.stdout))
    assert peaks[1] <= 1.1 * peaks[0], peaks
