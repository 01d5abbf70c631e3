"""Time and memory of a whole training step: this package, SAELens and sparsify.

All on the same random data, through SAELens's own ``SAETrainer.step`` (for sparsify its forward,
backward, the same clipping and Adam). A share of the latents is dead: their encoder biases are
so low that they do not fire, and every count says that they have not. Some are nearer to firing
than others, in all rows, as in a real run, where the means of dead latents' pre-activations differ
among each other as much as those of one latent do among rows, or more. The learning rate is next to
nothing, so that all of it stays as it is. Used by ``benchmarks.performance``.
"""

import gc
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer

import sae_lens_auxk  # noqa: F401  (registers the architectures)
from sae_lens_auxk.sharded.sae import sharded_sae

D_IN = 768
LEARNING_RATE = 1e-9
WARM_UP = 4


@dataclass(frozen=True)
class Case:
    """One step to measure.

    Attributes:
        architecture: SAELens's name, or "sparsify".
        fused: whether Adam is fused. SAELens does not ask for it by itself.
        captured: whether a step of this package may be captured as a CUDA graph.
        only_trainer: whether the SAE's own part, forward and backward, is left out.
    """

    architecture: str
    d_sae: int
    fields: dict[str, Any] = field(default_factory=dict)
    batch: int = 4096
    k: int = 32
    dead: float = 0.5
    fused: bool = False
    captured: bool = False
    only_trainer: bool = False


def measure(case: Case, device: str) -> dict[str, float | str]:
    """Median, minimum and maximum of the step's milliseconds; on a GPU peak GiB, as reserved.

    On a GPU, where steps run in bfloat16 autocast, each of 7 figures is the mean of 8 steps with
    one wait for the device at their end, as in a training run, which does not wait at every step;
    on a CPU it is one step.
    """
    cuda = device == "cuda"
    try:
        if cuda:
            gc.collect()  # of the case before
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        step, batches = _step_and_batches(case, device)
        for _ in range(WARM_UP if cuda else 2):
            _milliseconds(step, batches)
        times = [_milliseconds(step, batches) for _ in range(7)]
    except (torch.OutOfMemoryError, ImportError) as error:
        return {"error": str(error).split("\n")[0]}
    result: dict[str, float | str] = {
        "median": statistics.median(times),
        "min": min(times),
        "max": max(times),
    }
    return result | ({"GiB": torch.cuda.max_memory_reserved() / 2**30} if cuda else {})


def device_milliseconds(case: Case) -> float:
    """For how many of a step's milliseconds a GPU is at work: what a faster host cannot better."""
    gc.collect()
    torch.cuda.empty_cache()
    step, batches = _step_and_batches(case, "cuda")
    for _ in range(WARM_UP):
        _milliseconds(step, batches)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for x in batches:
            step(x)
        torch.cuda.synchronize()
    on_device = torch.autograd.DeviceType.CUDA
    events = [
        e for e in profile.events() if e.device_type == on_device and not e.is_user_annotation
    ]
    return sum(e.time_range.elapsed_us() for e in events) / len(batches) / 1e3


def _step_and_batches(
    case: Case, device: str
) -> tuple[Callable[[torch.Tensor], Any], list[torch.Tensor]]:
    torch.manual_seed(0)
    n = 4 if device == "cuda" else 1
    batches = [torch.randn(case.batch, D_IN, device=device) for _ in range(n)]
    build = sparsify_step if case.architecture == "sparsify" else saelens_step
    return build(case, device), batches


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


def saelens_step(case: Case, device: str, group: Any = None) -> Callable[[torch.Tensor], Any]:
    """A step of SAELens's trainer; of an SAE shared among a process group, where there is one."""
    fields = dict(case.fields)
    if "matryoshka" in case.architecture:
        fields["matryoshka_widths"] = [case.d_sae // 2**i for i in (4, 3, 2, 1, 0)]
    cls, cfg_cls = get_sae_training_class(case.architecture)
    cfg = cfg_cls(d_in=D_IN, d_sae=case.d_sae, k=case.k, device=device, **fields)
    for name, is_on in (("GRAPH", case.captured), ("FUSED", case.fused)):
        os.environ[f"SAE_LENS_AUXK_{name}"] = str(int(is_on))
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

    if case.fused and not case.architecture.startswith("auxk"):
        _fuse(trainer.optimizer)
    if case.only_trainer:
        sae.training_forward_pass = _nothing_new(sae)

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


def _fuse(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        group["fused"], group["foreach"] = True, False


class _GradientsAtHand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grads: list[torch.Tensor], *parameters: torch.Tensor) -> torch.Tensor:
        ctx.grads = grads
        return parameters[0].new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        return None, *ctx.grads


def _nothing_new(sae: Any) -> Callable[[Any], TrainStepOutput]:
    """The first step's output again and again, with a loss whose gradients are at hand."""
    forward, outputs = sae.training_forward_pass, list[TrainStepOutput]()
    grads = [torch.zeros_like(p) for p in sae.parameters()]

    def again(step_input: Any) -> TrainStepOutput:
        if not outputs:
            with torch.no_grad():
                outputs.append(forward(step_input))
        return replace(outputs[0], loss=_GradientsAtHand.apply(grads, *sae.parameters()))

    return again


def _too_low(spread: torch.Tensor) -> torch.Tensor:
    """(d_sae,): how much less a latent that shall not fire gets, for each ``h``'s deviation."""
    return spread * (8 + torch.randn_like(spread))


def _dead_latents(case: Case, device: str) -> torch.Tensor:
    return torch.randperm(case.d_sae, device=device)[: int(case.d_sae * case.dead)]
