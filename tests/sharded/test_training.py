"""A training of many steps by SAELens's trainer is that of one process."""

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sae_lens.training.sae_trainer import SAETrainer

from sae_lens_auxk.sharded.trainer import ShardedTrainer
from tests.helpers import build_trainer
from tests.sharded.helpers import D_IN, both, part
from tests.sharded.processes import COUNTS, SEVERAL, device, in_processes

N_STEPS = 60


def _batch(step: int, dtype: torch.dtype) -> torch.Tensor:
    """Sums of a few of 64 directions, some of them rare."""
    generator = torch.Generator().manual_seed(step)
    directions = torch.randn(64, D_IN, generator=torch.Generator().manual_seed(0), dtype=dtype)
    fires = torch.rand(16, 64, generator=generator) < torch.linspace(0.2, 0.01, 64)
    return (fires.to(dtype) @ directions).to(device())


def _equal_trainings(architecture: str, cases: list[dict[str, Any]], tolerance: float) -> None:
    warnings.simplefilter("ignore")
    for given in cases:
        fields: dict[str, Any] = {
            "dtype": "float64",
            "dead_threshold_tokens": 64,
            "k_aux": 4,
            **given,
        }
        saes = both(architecture, **fields)
        trainers: list[Any] = []
        for sae in saes:
            trainers.append(
                build_trainer(sae, device=device(), lr=3e-3, lr_end=3e-4, dead_feature_window=3)
            )
        # SAELens's own would clip by the norm of a process's part.
        assert [type(trainer) for trainer in trainers] == [SAETrainer, ShardedTrainer]
        whole, shared = trainers
        seen = n_resampled = 0
        for step in range(N_STEPS):
            x = _batch(step, whole.sae.dtype)
            a, b = whole.step(x), shared.step(x)
            for trainer in trainers:
                trainer.n_training_steps += 1
            seen += int(a.metrics["dead_latents"])
            if "resample_every_steps" in given:
                n = a.metrics["resampled_latents"]()
                assert n == b.metrics["resampled_latents"]()
                n_resampled += n
        assert seen > 0, "no latent was ever dead"
        assert (n_resampled > 0) == ("resample_every_steps" in given)
        _assert_equal(whole, shared, f"{architecture} {given}", tolerance)


def _assert_equal(whole: Any, shared: Any, what: str, tolerance: float) -> None:
    for name, weights in whole.sae.named_parameters():
        torch.testing.assert_close(
            dict(shared.sae.named_parameters())[name],
            part(name, weights, shared.sae),
            rtol=tolerance,
            atol=tolerance,
            msg=lambda m, n=name: f"{what} {n}: {m}",
        )
    for name in ("act_freq_scores", "n_forward_passes_since_fired"):
        assert torch.equal(getattr(whole, name), getattr(shared, name)), what
    assert torch.equal(whole.sae.tokens_since_fired, shared.sae.tokens_since_fired), what


# More processes than cores are slow: only Matryoshka has them, and an odd number.
CASES = [
    *[("auxk-topk", n) for n in COUNTS if n < 3],
    *[(name, min(2, COUNTS[-1])) for name in ("auxk-batchtopk", "auxk-abstopk")],
    ("auxk-matryoshka-batchtopk", SEVERAL),
]


@pytest.mark.parametrize(("architecture", "n"), CASES)
def test_60_steps_give_the_weights_of_one_process(architecture: str, n: int) -> None:
    cases = [
        {"aux_variant": "auxk"},
        {"aux_variant": "pursuit", "resample_every_steps": 20},
    ]
    in_processes(n, _equal_trainings, architecture, cases, 1e-9)


def test_60_steps_in_float32_stay_within_a_tolerance() -> None:
    """Rounding grows over the steps: Adam divides small gradients by their own size."""
    in_processes(2, _equal_trainings, "auxk-topk", [{"dtype": "float32"}], 1e-3)


def _replicated() -> None:
    _, shared = both("auxk-topk", aux_variant="pursuit", dead_threshold_tokens=64)
    trainer = build_trainer(shared, device=device())
    for step in range(50):
        trainer.step(_batch(step, torch.float32))
        trainer.n_training_steps += 1
    for name in ("b_dec", "tokens_since_fired"):
        mine = getattr(shared, name).detach()
        first = mine.clone()
        dist.broadcast(first, src=0)
        assert torch.equal(mine, first), name


def test_what_all_processes_hold_stays_equal_bit_for_bit() -> None:
    in_processes(2, _replicated)
