"""Time and memory of a whole training step: this package, SAELens and sparsify.

All in one run on the same random data, through SAELens's own ``SAETrainer.step`` (for sparsify
its forward, backward, the same clipping and Adam). A share of the latents is dead: their
encoder biases are so low that they cannot fire, and every count says that they have not.

    python benchmarks/step.py --device cuda --autocast --latents 24576 131072 --out results.json
    python benchmarks/step.py --device cpu --latents 12288 --batch 1024
"""

import argparse
import json
import os
import platform
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from sae_lens import __version__ as sae_lens_version
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer

import sae_lens_auxk  # noqa: F401  (registers the architectures)

D_IN = 768


def saelens_step(
    architecture: str, fields: dict[str, Any], args: argparse.Namespace, d_sae: int
) -> Callable[[torch.Tensor], Any]:
    if "matryoshka" in architecture:
        fields = {**fields, "matryoshka_widths": [d_sae // 2**i for i in (4, 3, 2, 1, 0)]}
    cls, cfg_cls = get_sae_training_class(architecture)
    sae = cls(cfg_cls(d_in=D_IN, d_sae=d_sae, k=args.k, device=args.device, **fields))
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=10**12,
            train_batch_size_samples=args.batch,
            lr_end=3e-5,
            device=args.device,
            autocast=args.autocast,
        ),
        sae,
        iter(()),
    )
    n_dead = int(d_sae * args.dead)
    with torch.no_grad():
        dead = torch.randperm(d_sae, device=args.device)[:n_dead]
        sae.b_enc[dead] -= 1e3
        trainer.n_forward_passes_since_fired[dead] = 1e8
        if hasattr(sae, "tokens_since_fired"):
            sae.tokens_since_fired[dead] = 10**12
    return trainer.step


def sparsify_step(
    with_aux: bool, args: argparse.Namespace, d_sae: int
) -> Callable[[torch.Tensor], Any]:
    if not args.device.startswith("cuda"):  # it would try Triton wherever it is installed
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
    from sparsify import SparseCoder, SparseCoderConfig

    coder = SparseCoder(D_IN, SparseCoderConfig(num_latents=d_sae, k=args.k), device=args.device)
    dead = torch.zeros(d_sae, dtype=torch.bool, device=args.device)
    dead[torch.randperm(d_sae, device=args.device)[: int(d_sae * args.dead)]] = True
    with torch.no_grad():
        coder.encoder.bias[dead] -= 1e3
    optimizer = torch.optim.Adam(coder.parameters(), lr=3e-4)

    def step(x: torch.Tensor) -> None:
        output = coder(x, dead_mask=dead if with_aux else None)
        (output.fvu + output.auxk_loss / 32).backward()
        torch.nn.utils.clip_grad_norm_(coder.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(
    step: Callable[[torch.Tensor], Any], batches: list[torch.Tensor], args: argparse.Namespace
) -> dict[str, float]:
    """Median, minimum and maximum of the step's milliseconds; peak GiB on a GPU."""
    cuda = args.device.startswith("cuda")
    for i in range(args.warm_up):
        step(batches[i % len(batches)])
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    times: list[float] = []
    for i in range(args.steps):
        start = time.perf_counter()
        step(batches[i % len(batches)])
        if cuda:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    result = {"median": statistics.median(times), "min": min(times), "max": max(times)}
    if cuda:
        result["GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return result


def cases(args: argparse.Namespace) -> dict[str, tuple[str, dict[str, Any]] | bool]:
    ours = {
        f"{architecture} {variant}": (
            architecture,
            {"aux_variant": variant, "aux_bias": "none", "k_aux": 512},
        )
        for architecture in args.architectures
        for variant in args.variants
    }
    theirs: dict[str, Any] = {}
    if not args.ours_only:
        for architecture in args.architectures:
            stock = architecture.removeprefix("auxk-").replace("-", "_")
            theirs[f"SAELens {stock}"] = (stock, {})
        theirs |= {"sparsify": True, "sparsify, no aux": False}
    return {**ours, **theirs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--autocast", action="store_true")
    parser.add_argument("--latents", type=int, nargs="+", default=[24_576, 131_072])
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--dead", type=float, default=0.5)
    parser.add_argument("--architectures", nargs="+", default=["auxk-topk"])
    parser.add_argument("--variants", nargs="+", default=["none", "auxk"])
    parser.add_argument("--ours-only", action="store_true")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--out")
    args = parser.parse_args()

    warnings.simplefilter("ignore")
    results: dict[str, Any] = {
        "machine": torch.cuda.get_device_name() if args.device == "cuda" else platform.processor(),
        "torch": torch.__version__,
        "sae-lens": sae_lens_version,
        "settings": vars(args),
        "ms": {},
    }
    for d_sae in args.latents:
        torch.manual_seed(0)
        batches = [torch.randn(args.batch, D_IN, device=args.device) for _ in range(4)]
        for name, case in cases(args).items():
            torch.manual_seed(0)
            try:
                step = (
                    sparsify_step(case, args, d_sae)
                    if isinstance(case, bool)
                    else saelens_step(*case, args, d_sae)
                )
                result = measure(step, batches, args)
            except (torch.OutOfMemoryError, ImportError) as error:
                result = {"error": str(error).split("\n")[0]}
            results["ms"][f"{name} {d_sae}"] = result
            print(
                d_sae,
                name,
                {k: v if isinstance(v, str) else round(v, 2) for k, v in result.items()},
                flush=True,
            )
            step = None
            if args.device == "cuda":
                torch.cuda.empty_cache()
    if args.out:
        with open(args.out, "w") as file:
            json.dump(results, file, indent=2)


if __name__ == "__main__":
    main()
