"""Time and memory of a whole training step: this package, SAELens and sparsify.

All on the same random data, through SAELens's own ``SAETrainer.step`` (for sparsify its forward,
backward, the same clipping and Adam). A share of the latents is dead: their encoder biases are
so low that they do not fire, and every count says that they have not. Some are nearer to firing
than others, in all rows, as in a real run, where the means of dead latents' pre-activations differ
among each other as much as those of one latent do among rows, or more. The learning rate is next to
nothing, so that all of it stays as it is. Used by ``benchmarks/performance.py``.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer

import sae_lens_auxk  # noqa: F401  (registers the architectures)
from sae_lens_auxk.sharded.sae import sharded_sae

D_IN = 768
LEARNING_RATE = 1e-9
WARM_UP = 2


@dataclass(frozen=True)
class Case:
    """One step to measure. ``architecture`` is SAELens's name, or "sparsify"."""

    architecture: str
    d_sae: int
    fields: dict[str, Any] = field(default_factory=dict)
    batch: int = 4096
    k: int = 32
    dead: float = 0.5


def measure(case: Case, device: str) -> dict[str, float | str]:
    """Median, minimum and maximum of the step's milliseconds; on a GPU peak GiB, and ``device``.

    That is for how many of the milliseconds the GPU is at work: what a faster host cannot better.
    On a GPU, where steps run in bfloat16 autocast, each of 7 figures is the mean of 8 steps with
    one wait for the device at their end, as in a training run, which does not wait at every step;
    on a CPU it is one step.
    """
    cuda = device == "cuda"
    torch.manual_seed(0)
    batches = [torch.randn(case.batch, D_IN, device=device) for _ in range(4 if cuda else 1)]
    try:
        build = sparsify_step if case.architecture == "sparsify" else saelens_step
        step = build(case, device)
        for _ in range(WARM_UP):
            _milliseconds(step, batches)
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        times = [_milliseconds(step, batches) for _ in range(7)]
        peak = torch.cuda.max_memory_allocated() / 2**30 if cuda else 0.0
        device_ms = _device_milliseconds(step, batches) if cuda else 0.0
    except (torch.OutOfMemoryError, ImportError) as error:
        return {"error": str(error).split("\n")[0]}
    result: dict[str, float | str] = {
        "median": statistics.median(times),
        "min": min(times),
        "max": max(times),
    }
    if cuda:
        result |= {"GiB": peak, "device": device_ms}
    return result


def ratio(case: Case, base: Case, device: str, rounds: int = 11) -> dict[str, float]:
    """The ratio of a step's time for ``case`` to that for ``base``.

    The two take turns, and the median (minimum, maximum) is of the ratios of neighbours: the speed
    of a machine that others use too changes within minutes.
    """
    torch.manual_seed(0)
    batches = [torch.randn(case.batch, D_IN, device=device)]
    steps = [saelens_step(each, device) for each in (base, case)]
    for step in steps * WARM_UP:
        _milliseconds(step, batches)
    ratios: list[float] = []
    for _ in range(rounds):
        of_base, of_case = (_milliseconds(step, batches) for step in steps)
        ratios.append(of_case / of_base)
    return {
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def _milliseconds(step: Callable[[torch.Tensor], Any], batches: Sequence[torch.Tensor]) -> float:
    """Of one step: on a CPU of a single one, on a GPU the mean of 8 with a wait at their end."""
    cuda = batches[0].is_cuda
    n = 8 if cuda else 1
    if cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for i in range(n):
        step(batches[i % len(batches)])
    if cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / n * 1e3


def _device_milliseconds(
    step: Callable[[torch.Tensor], Any], batches: Sequence[torch.Tensor]
) -> float:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for x in batches:
            step(x)
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    events = [
        e for e in profile.events() if e.device_type == on_device and not e.is_user_annotation
    ]
    return sum(e.time_range.elapsed_us() for e in events) / len(batches) / 1e3


def saelens_step(case: Case, device: str, group: Any = None) -> Callable[[torch.Tensor], Any]:
    """A step of SAELens's trainer; of an SAE shared among a process group, where there is one."""
    fields = dict(case.fields)
    if "matryoshka" in case.architecture:
        fields["matryoshka_widths"] = [case.d_sae // 2**i for i in (4, 3, 2, 1, 0)]
    cls, cfg_cls = get_sae_training_class(case.architecture)
    cfg = cfg_cls(d_in=D_IN, d_sae=case.d_sae, k=case.k, device=device, **fields)
    sae: Any = cls(cfg) if group is None else sharded_sae(cfg, group)
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=10**12,
            train_batch_size_samples=case.batch,
            lr=LEARNING_RATE,
            lr_end=LEARNING_RATE,
            device=device,
            autocast=device.startswith("cuda"),
        ),
        sae,
        iter(()),
    )
    dead = _dead_latents(case, device)
    with torch.no_grad():
        is_dead = torch.zeros(case.d_sae, dtype=torch.bool, device=device)
        is_dead[dead] = True
        held = is_dead if group is None else sae.shard.local(is_dead)
        sae.b_enc -= _too_low(sae.W_enc.norm(dim=0)).where(held, 0)
        trainer.n_forward_passes_since_fired[dead] = 1e8
        if hasattr(sae, "tokens_since_fired"):
            sae.tokens_since_fired[dead] = 10**12

    def step(x: torch.Tensor) -> None:
        trainer.step(x)
        trainer.n_training_steps += 1  # as SAELens's fit() does

    return step


def sparsify_step(case: Case, device: str) -> Callable[[torch.Tensor], Any]:
    if device != "cuda":  # it would try Triton wherever it is installed
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(D_IN, SparseCoderConfig(num_latents=case.d_sae, k=case.k), device=device)
    dead = torch.zeros(case.d_sae, dtype=torch.bool, device=device)
    dead[_dead_latents(case, device)] = True
    with torch.no_grad():
        coder.encoder.bias[dead] -= _too_low(coder.encoder.weight.norm(dim=1))[dead]
    optimizer = torch.optim.Adam(coder.parameters(), lr=LEARNING_RATE)
    with_aux = case.fields.get("aux", True)

    def step(x: torch.Tensor) -> None:
        output = coder(x, dead_mask=dead if with_aux else None)
        (output.fvu + output.auxk_loss / 32).backward()
        torch.nn.utils.clip_grad_norm_(coder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _too_low(spread: torch.Tensor) -> torch.Tensor:
    """(d_sae,): how much less a latent that shall not fire gets, for each ``h``'s deviation."""
    return spread * (8 + torch.randn_like(spread))


def _dead_latents(case: Case, device: str) -> torch.Tensor:
    return torch.randperm(case.d_sae, device=device)[: int(case.d_sae * case.dead)]
