"""On a GPU, where there is one: the same numbers, and every dtype."""

import copy
from typing import Any

import pytest
import torch

from tests.helpers import (
    PAIRS,
    TOPK_ARCHITECTURES,
    VARIANTS,
    aux_value_and_gradients,
    build_sae,
    build_trainer,
    forward,
    kill_latents,
)

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)


@pytest.mark.parametrize("dtype", ["float64", "float32"])  # the kernels are for float32
@pytest.mark.parametrize(("architecture", "variant"), PAIRS)
def test_equals_cpu(architecture: str, variant: str, dtype: str) -> None:
    sae = build_sae(
        architecture,
        d_in=32,
        d_sae=128,
        aux_variant=variant,
        dead_criterion="steps",
        dtype=dtype,
    )
    x, dead = torch.randn(64, 32, dtype=getattr(torch, dtype)), torch.arange(128) < 50
    on_gpu = copy.deepcopy(sae).to("cuda")
    value, gradients = aux_value_and_gradients(sae, x, dead)
    gpu_value, gpu_gradients = aux_value_and_gradients(on_gpu, x.cuda(), dead.cuda())
    # Sums of float32 round to their largest terms, so that small entries of a large gradient have
    # no relative precision of their own: its norm has.
    bound = 1e-5 if dtype == "float32" else 1e-9
    for name, expected in {"value": value, **gradients}.items():
        got = (gpu_value if name == "value" else gpu_gradients[name]).cpu()
        assert got.isfinite().all(), name
        assert (got - expected).norm() <= bound * expected.norm(), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
@pytest.mark.parametrize("variant", VARIANTS)
def test_trains_on_a_device_that_is_not_the_current_one(variant: str) -> None:
    weights = []
    for device in ("cuda:0", "cuda:1"):
        torch.manual_seed(0)
        sae: Any = build_sae("auxk-topk", d_in=32, d_sae=128, aux_variant=variant, randomize=False)
        sae.cfg.dead_threshold_tokens = 128
        kill_latents(sae, 40)
        sae.to(device)
        trainer = build_trainer(sae, device=device, lr=1e-3)
        for x in torch.randn(4, 64, 32):
            trainer.step(x.to(device))
        weights.append([p.detach().cpu() for p in sae.parameters()])
    assert torch.cuda.current_device() == 0
    for there, here in zip(*weights, strict=True):
        torch.testing.assert_close(there, here, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["float32", "bfloat16", "float64", "autocast", "compile"])
@pytest.mark.parametrize(("architecture", "variant"), PAIRS)
def test_trains(architecture: str, variant: str, mode: str) -> None:
    dtype = mode if mode in ("float32", "bfloat16", "float64") else "float32"
    sae: Any = build_sae(
        architecture,
        d_in=32,
        d_sae=128,
        aux_variant=variant,
        dtype=dtype,
        dead_threshold_tokens=128,
        randomize=False,
    )
    kill_latents(sae, 40)
    sae.to("cuda")
    trainer = build_trainer(sae, device="cuda", autocast=mode == "autocast", lr=1e-3)
    if mode == "compile":
        if architecture not in ("auxk-topk", "auxk-jumprelu") or variant not in ("auxk", "none"):
            pytest.skip("compiled for two architectures and variants, for time")
        sae.training_forward_pass = torch.compile(sae.training_forward_pass)
    for _ in range(6):
        output = trainer.step(torch.randn(64, 32, device="cuda", dtype=getattr(torch, dtype)))
    assert output.metrics["dead_latents"] >= 20
    assert all(p.isfinite().all() for p in sae.parameters())
    if variant not in ("none", "straight_through", "pursuit", "reanimation"):
        assert output.losses["aux_loss"] > 0


@pytest.mark.parametrize("dead_threshold_tokens", [128, 10**9])
@pytest.mark.parametrize("fraction", [1.0, 1 / 8])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("architecture", TOPK_ARCHITECTURES)
def test_a_step_does_not_wait_for_the_device(
    architecture: str, variant: str, fraction: float, dead_threshold_tokens: int
) -> None:
    """All of SAELens's ``SAETrainer.step``, from the third on.

    Torch reports its own waits, but not those in a library that it calls. A step with such a wait
    ends after the sleep that is queued before it, however long that is. So does a step on a busy
    host, but not after a sleep that is long enough.
    """

    def outruns_the_device(cycles: int) -> bool:
        torch.manual_seed(0)
        sae: Any = build_sae(
            architecture,
            d_in=32,
            d_sae=8192,
            k=4,
            aux_variant=variant,
            aux_batch_fraction=fraction,
            dead_threshold_tokens=dead_threshold_tokens,
            dead_criterion="tokens",
            resample_every_steps=1000,  # steps between two resamplings
            randomize=False,
        )
        kill_latents(sae, 5000)
        sae.to("cuda")
        trainer = build_trainer(sae, device="cuda", autocast=True, lr=1e-3)
        x = torch.randn(2048, 32, device="cuda")
        for step in range(6):
            torch.cuda.synchronize()
            known = step > 1  # The first two know no number of dead latents yet.
            torch.cuda.set_sync_debug_mode("error" if known else "default")
            busy = torch.cuda.Event()
            torch.cuda._sleep(cycles if known else 0)
            busy.record()
            try:
                output = trainer.step(x)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            if known and busy.query():
                return False
            assert output.feature_acts.is_sparse
            trainer.n_training_steps += 1
        return True

    # From a tenth of a second to nearly two.
    assert any(outruns_the_device(cycles) for cycles in (2 * 10**8, 8 * 10**8, 32 * 10**8))


def test_the_count_ahead_is_a_bound() -> None:
    sae: Any = build_sae("auxk-topk", d_in=8, d_sae=256, k=2, dead_threshold_tokens=300).cuda()
    bounds, counts, bound = list[Any](), [], sae._dead_count_ahead.bound
    sae._dead_count_ahead.bound = lambda *args: (bounds.append(bound(*args)), bounds[-1])[1]
    for n_rows in (64, 64, 50, 64, 64, 80, 10, 64):
        output = forward(sae, torch.randn(n_rows, 8, device="cuda"))
        counts.append(int(output.metrics["dead_latents"]))
    assert [b is None for b in bounds] == [True, True, False, False, True, True, True, False]
    assert all(b is None or b >= n for b, n in zip(bounds, counts, strict=True))
    assert counts[-1] > 0
    # nothing dead within reach is known to be nothing
    assert bounds[2] == 0
    assert copy.deepcopy(sae)._dead_count_ahead.bound(300, 1, 256) is None
