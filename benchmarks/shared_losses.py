"""Are the losses of an SAE that GPUs share those of one GPU?

    torchrun --nproc-per-node 2 -m benchmarks.shared_losses --device cuda --out losses.json
    python -m benchmarks.shared_losses    # one process: trained again, and the other order of rows

Rank 0 trains an SAE alone, by SAELens's trainer; then all ranks train one together, from the same
weights on the same batches. For comparison rank 0 also trains alone with the rows of each batch in
another order, which changes nothing but rounding. Printed are relative differences of the losses.
The samples are sums of 32 of 16,384 directions, some of them rare, and a latent is dead after 20
steps.
"""

import argparse
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.training.sae_trainer import SAETrainer

import sae_lens_auxk  # noqa: F401  (registers the architectures)
from benchmarks.made_by import made_by
from sae_lens_auxk import processes
from sae_lens_auxk.files import write_json
from sae_lens_auxk.sharded.collectives import gather
from sae_lens_auxk.sharded.sae import sharded_sae

N_FEATURES, PER_ROW = 16_384, 32


class Batches:
    """The batch of each step, the same on every rank."""

    def __init__(self, args: argparse.Namespace, permuted: bool):
        self.args, self.permuted = args, permuted
        generator = torch.Generator(args.device).manual_seed(0)
        self.directions = torch.randn(
            N_FEATURES, args.d_in, device=args.device, generator=generator
        )

    def __call__(self, step: int) -> torch.Tensor:
        generator = torch.Generator(self.args.device).manual_seed(step)

        def uniform() -> torch.Tensor:
            return torch.rand(
                self.args.batch, PER_ROW, device=self.args.device, generator=generator
            )

        features = (uniform().pow(3) * N_FEATURES).long()  # the first ones are frequent
        x = torch.einsum("bk,bkd->bd", uniform(), self.directions[features])
        if self.permuted:
            x = x[torch.randperm(len(x), device=x.device, generator=generator)]
        return x


def losses(args: argparse.Namespace, variant: str, group: Any, permuted: bool) -> list[float]:
    """The loss of each step, of one process or of those of a group."""
    cls, cfg_cls = get_sae_training_class(args.architecture)
    fields = {
        "d_in": args.d_in,
        "d_sae": args.d_sae,
        "k": args.k,
        "aux_variant": variant,
        "dead_threshold_tokens": 20 * args.batch,
    }
    torch.manual_seed(0)
    if group is None:
        # On the CPU first: the weights of a shared SAE are those that one process draws there.
        sae = cls(cfg_cls(**fields, device="cpu")).to(args.device)
    else:
        sae = sharded_sae(cfg_cls(**fields, device=args.device), group)
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=args.steps * args.batch,
            train_batch_size_samples=args.batch,
            lr=3e-4,
            lr_end=3e-5,
            device=args.device,
            autocast=args.autocast,
        ),
        sae,
        iter(()),
    )
    batches = Batches(args, permuted)
    found: list[torch.Tensor] = []
    for step in range(args.steps):
        x = batches(step)
        if group is not None:
            own = x.chunk(group.size())[group.rank()]
            x = gather(own.contiguous(), group).flatten(0, 1)
        found.append(trainer.step(x).loss.detach().float())
        trainer.n_training_steps += 1
    return torch.stack(found).tolist()


def differences(one: list[float], other: list[float]) -> dict[str, float]:
    """Relative differences: of the first step, the largest of the first ten, and the largest."""
    relative = [abs(a - b) / a for a, b in zip(one, other, strict=True)]
    return {"first": relative[0], "first ten": max(relative[:10]), "all": max(relative)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--architecture", default="auxk-topk")
    parser.add_argument("--variants", nargs="+", default=["none", "auxk", "pursuit"])
    parser.add_argument("--d_in", type=int, default=768)
    parser.add_argument("--d_sae", type=int, default=24_576)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    n = processes.n_processes()
    settings = {name: str(value) for name, value in vars(args).items()}
    if n > 1:
        args.device = processes.own_device(args.device)
        processes.prefer_own_gpu()
    is_first = processes.rank() == 0
    about = {**made_by(args.device), "settings": settings}
    results: list[dict[str, Any]] = []
    with processes.process_group() if n > 1 else nullcontext():
        group = dist.group.WORLD if n > 1 else None
        for args.autocast in (False, True):
            for variant in args.variants:
                if is_first:
                    one = losses(args, variant, None, permuted=False)
                    permuted = losses(args, variant, None, permuted=True)
                shared = losses(args, variant, group, permuted=False)
                if is_first:
                    result = {
                        "autocast": args.autocast,
                        "variant": variant,
                        "loss": {"first": one[0], "last": one[-1], "last, shared": shared[-1]},
                        "shared": differences(one, shared),
                        "other order of the rows": differences(one, permuted),
                    }
                    results.append(result)
                    print(json.dumps(result), flush=True)
                    if args.out is not None:
                        write_json(args.out, {**about, "results": results})


if __name__ == "__main__":
    main()
