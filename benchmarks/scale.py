"""The cost of sharing the latents of an SAE among processes: measured, and a model of the rest.

    torchrun --nproc-per-node 2 -m benchmarks.scale --device cuda --d_sae 131072 --out 2.json
    python -m benchmarks.scale --device cuda --d_sae 131072 --out 1.json
    torchrun --nproc-per-node 2 -m benchmarks.scale --device cuda \\
        --whole_run --saes "auxk-topk, auxk"
    python -m benchmarks.scale --model docs/scale/cost

The first two measure steps of SAELens's trainer on random data, with half of the latents dead as
in benchmarks/step.py: milliseconds, GiB on each GPU, and how many milliseconds NCCL's kernels run.
Without torchrun the step is the ordinary one; ``--shared`` sends it through a group of one. The
third measures whole runs of this package's architectures, with flags of ``benchmarks.whole_run``.
The last draws the figure of docs/scale.md, and prints tables of it. Times in it are computed: bytes
over bandwidth, a latency for each collective, and a line through measured steps of one H100.
"""

import argparse
import json
import os
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from benchmarks.made_by import made_by
from sae_lens_auxk.files import write_json

D_IN, BATCH, K, K_AUX = 768, 4096, 32, 512
RESULTS = Path(__file__).parent.parent / "docs" / "performance" / "several-gpus.json"
"""Of benchmarks/several_gpus.py."""

# --- measured --------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Figures of this process's steps, one entry for each d_sae and variant; or of its runs."""
    if args.whole_run is not None:
        from benchmarks import whole_run
        from sae_lens_auxk.sharded.runner import ShardedTrainingRunner

        flags = whole_run.parser_of_flags().parse_args(["--device", args.device, *args.whole_run])
        flags.runner = ShardedTrainingRunner
        return [*whole_run.measure(flags)]
    from benchmarks.step import Case, saelens_step

    results: list[dict[str, Any]] = []
    for d_sae in args.d_sae:
        for variant in args.variants:
            fields = {"aux_variant": variant, "aux_batch_fraction": args.aux_batch_fraction}
            case = Case("auxk-" + args.architecture, d_sae, fields, args.batch, args.k)
            if args.device.startswith("cuda"):
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            torch.manual_seed(0)
            group = dist.group.WORLD if dist.is_initialized() else None
            try:
                step = saelens_step(case, args.device, group)
                results.append({"d_sae": d_sae, "variant": variant, **_time(step, args)})
            except torch.OutOfMemoryError as error:
                results.append({"d_sae": d_sae, "variant": variant, "error": str(error)[:200]})
                break  # the other processes cannot go on either
            del step
    return results


def _time(step: Any, args: argparse.Namespace) -> dict[str, float]:
    cuda = args.device.startswith("cuda")
    share = args.batch // (dist.get_world_size() if dist.is_initialized() else 1)
    batches = [torch.randn(share, D_IN, device=args.device) for _ in range(4)]

    def steps(n: int) -> float:
        if cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for i in range(n):
            step(_gathered(batches[i % len(batches)]))
        if cuda:
            torch.cuda.synchronize()
        return (time.perf_counter() - begin) / n * 1e3

    n = 8 if cuda else 1
    steps(2)
    times = [steps(n) for _ in range(7)]
    result = {"ms": statistics.median(times), "min": min(times), "max": max(times)}
    if cuda:
        result["GiB"] = torch.cuda.max_memory_allocated() / 2**30
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            steps(4)
        kernels = [
            event
            for event in profile.events()
            if event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation
        ]
        nccl = [event for event in kernels if "nccl" in event.name.lower()]
        for name, events in (("device_ms", kernels), ("nccl_ms", nccl)):
            result[name] = sum(event.time_range.elapsed_us() for event in events) / 4e3
    return result


def _gathered(own: torch.Tensor) -> torch.Tensor:
    from sae_lens_auxk.sharded.collectives import gather

    return gather(own, dist.group.WORLD).flatten(0, 1) if dist.is_initialized() else own


def measure_all(args: argparse.Namespace) -> None:
    """Measure in every process; rank 0 prints the figures and writes them."""
    from sae_lens_auxk import processes

    shared = args.shared or processes.n_processes() > 1
    if shared and "RANK" not in os.environ:
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        os.environ.update({**alone, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511"})
    if shared:
        args.device = processes.own_device(args.device)
        processes.prefer_own_gpu()
    with processes.process_group() if shared else nullcontext():
        own = measure(args)
        results: list[Any] = [own]
        if shared:
            results *= processes.n_processes()
            dist.all_gather_object(results, own)
    if processes.rank() > 0:
        return
    report = {
        **made_by(args.device),
        "shared": shared,
        "arguments": {name: str(value) for name, value in vars(args).items()},
        **({"ranks": results} if args.whole_run is None else {"runs": own}),
    }
    for of_rank0 in results[0]:
        print(json.dumps(of_rank0))
    if args.out is not None:
        write_json(args.out, report)


def steps(results: dict[str, Any], name: str) -> dict[tuple[int, str], dict[str, Any]]:
    """The figures of a job's slowest rank by the number of latents and the variant.

    A kernel of NCCL's waits for the last rank, so the time that they take is that of the rank that
    waits least.
    """
    found: dict[tuple[int, str], dict[str, Any]] = {}
    for of_ranks in zip(*results.get(name, {}).get("ranks", []), strict=True):
        slowest = max(of_ranks, key=lambda entry: entry.get("ms", 0))
        waits_least = min(entry.get("nccl_ms", 0) for entry in of_ranks)
        key = slowest["d_sae"], slowest["variant"]
        found[key] = {**slowest, "nccl_ms": waits_least}
    return found


# --- computed --------------------------------------------------------------------------------

LATENCY = 20e-6
"""Seconds that a collective takes at least: assumed."""
NVLINK, INFINIBAND = 450e9, 50e9
"""Bytes a second that a GPU sends: an H100's NVLink, and 400 Gb/s InfiniBand for each GPU."""
MEASURED = {24_576: 9.9, 131_072: 14.4, 524_288: 44.1}
"""Milliseconds of a whole auxk step on one H100 by the number of latents (docs/performance.md)."""
MEASURED_GIB = {131_072: 5.2, 524_288: 20.9}


class Collective(NamedTuple):
    """What one process sends in a step, in bytes."""

    name: str
    bytes: float


def collectives(n: int, variant: str = "auxk", k_aux_rows: float = 1.0) -> list[Collective]:
    """The collectives of a TopK step in ``n`` processes, each process's bytes in ring algorithms.

    ``h`` is bfloat16, everything else has 4 bytes.
    """
    gathered, reduced = (n - 1) / n, 2 * (n - 1) / n
    rows = BATCH * k_aux_rows
    found = [
        Collective("all_gather of activations", gathered * BATCH * D_IN * 4),
        Collective("all_gather of k candidates a row", (n - 1) * BATCH * K * (2 + 4)),
        Collective("all_reduce of reconstructions", reduced * BATCH * D_IN * 4),
        Collective("all_reduce of b_dec's gradient and the norm", reduced * (D_IN + 1) * 4),
    ]
    if variant in ("auxk", "pursuit"):
        candidates = (n - 1) * rows * K_AUX * 2
        found.append(Collective("all_gather of k_aux candidates a row", candidates))
        found.append(Collective("all_reduce of auxiliary output", reduced * rows * D_IN * 4))
    if variant == "pursuit":
        found.append(Collective("all_gather of best matches", (n - 1) * rows * 2))
        found.append(Collective("all_reduce of gains", reduced * 2 * rows * 4))
    return found


def sharded_ms(d_sae: int, n: int, bandwidth: float, k_aux_rows: float = 1.0) -> float:
    """Milliseconds of a step: this process's latents, and what it sends."""
    if n == 1:
        return compute_ms(d_sae)
    sent = collectives(n, k_aux_rows=k_aux_rows)
    seconds = sum(each.bytes / bandwidth + LATENCY for each in sent)
    return compute_ms(d_sae // n) + seconds * 1e3


def data_parallel_ms(d_sae: int, n: int, bandwidth: float) -> float:
    """The same where each process has all latents and a share of the batch.

    The part of a step that grows with the batch is taken to fall with it: the products. Adam and
    clipping, 28 bytes of memory traffic a weight, do not.
    """
    weights = d_sae * (2 * D_IN + 1)
    adam = weights * 28 / 3e12 * 1e3
    gradient = 2 * (n - 1) / n * weights * 4 / bandwidth * 1e3
    return adam + max(0.0, compute_ms(d_sae) - adam) / n + gradient


def compute_ms(latents: int) -> float:
    """A line through the measured steps; below, what Python and the launches take."""
    (small, low), (large, high) = sorted(MEASURED.items())[-2:]
    slope = (high - low) / (large - small)
    return max(MEASURED[24_576], low + slope * (latents - small))


def largest_d_sae(n: int, gib: float = 74.5) -> int:
    """Latents that ``n`` GPUs of 80 GB (74.5 GiB) hold, with the rest that a step needs.

    Bytes a latent are those of the measured peaks. Each process also has 16 bytes of counts for
    every latent of all, and the candidates of all processes.
    """
    (small, low), (large, high) = sorted(MEASURED_GIB.items())
    each = (high - low) * 2**30 / (large - small)
    rest = low * 2**30 - each * small
    candidates = 3 * n * BATCH * K_AUX * 2 if n > 1 else 0
    return int((gib * 2**30 - rest - candidates) / (each + 16 * (n - 1))) * n


def print_model(prefix: Path) -> None:
    counts = (1, 2, 4, 8, 16, 32, 64)
    print("| MB that a process sends in a step |", " | ".join(f"N = {n}" for n in counts[1:]), "|")
    print("|---" * len(counts) + "|")
    for variant in ("auxk", "pursuit"):
        for i, each in enumerate(collectives(2, variant)):
            if variant == "pursuit" and i < 6:
                continue
            row = (collectives(n, variant)[i].bytes / 1e6 for n in counts[1:])
            print(f"| {each.name} |", " | ".join(f"{size:.3g}" for size in row), "|")
    sizes = (131_072, 1_048_576, 4_194_304, 16_777_216)
    for name, bandwidth in (("NVLink", NVLINK), ("InfiniBand", INFINIBAND)):
        print(f"\n| ms a step, computed, {name} |", " | ".join(f"N = {n}" for n in counts), "|")
        print("|---" * (len(counts) + 1) + "|")
        for d_sae in sizes:
            for what, cost in (("sharded", sharded_ms), ("data parallel", data_parallel_ms)):
                cells = [
                    f"{cost(d_sae, n, bandwidth):.0f}"
                    if d_sae <= (largest_d_sae(n) if what == "sharded" else largest_d_sae(1))
                    else "–"
                    for n in counts
                ]
                print(f"| {d_sae:,}, {what} |", " | ".join(cells), "|")
            sixteenth = [
                f"{sharded_ms(d_sae, n, bandwidth, 1 / 16):.0f}"
                if n > 1 and d_sae <= largest_d_sae(n)
                else "–"
                for n in counts
            ]
            print(f"| {d_sae:,}, sharded, loss on 1/16 of rows |", " | ".join(sixteenth), "|")
    print("\n| | ", " | ".join(f"N = {n}" for n in counts), "|")
    print("|---" * (len(counts) + 1) + "|")
    largest = (f"{largest_d_sae(n) / 1e6:.1f} million" for n in counts)
    print("| largest d_sae, 80 GB a GPU |", " | ".join(largest), "|")
    _draw(prefix, counts, sizes[1:])


def _measured(d_sae: int) -> list[tuple[int, float]]:
    """(N, ms) of the steps with ``auxk`` in ``RESULTS``."""
    results = json.loads(RESULTS.read_text())
    by_n = {n: steps(results, f"steps, {n}") for n in (1, 2, 4, 8)}
    return [
        (n, found[d_sae, "auxk"]["ms"]) for n, found in by_n.items() if (d_sae, "auxk") in found
    ]


def _draw(prefix: Path, counts: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, (name, bandwidth) in zip(
        axes, (("NVLink", NVLINK), ("InfiniBand", INFINIBAND)), strict=True
    ):
        for i, d_sae in enumerate(sizes):
            for style, cost in (("-", sharded_ms), ("--", data_parallel_ms)):
                held = [n for n in counts if d_sae <= largest_d_sae(n if style == "-" else 1)]
                times = [cost(d_sae, n, bandwidth) for n in held]
                label = f"{d_sae / 2**20:.0f} Mi latents" if style == "-" else None
                axis.plot(held, times, style, color=f"C{i}", marker="o", ms=3, label=label)
            if name == "NVLink" and (points := _measured(d_sae)):
                axis.plot(*zip(*points, strict=True), "kx", label="measured")
        axis.set(xscale="log", yscale="log", xlabel="GPUs", title=f"{name} (lines computed)")
        axis.set_xticks(counts, [str(n) for n in counts])
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("ms a step")
    axes[0].legend(title="solid: latents shared\ndashed: data parallel", fontsize=8, loc=2, ncols=2)
    figure.tight_layout()
    figure.savefig(prefix.with_suffix(".png"), dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--d_sae", type=int, nargs="+", default=[24_576, 131_072])
    parser.add_argument("--architecture", default="topk", choices=("topk", "batchtopk"))
    parser.add_argument("--variants", nargs="+", default=["none", "auxk", "pursuit"])
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--k", type=int, default=K)
    parser.add_argument("--aux_batch_fraction", type=float, default=1.0)
    parser.add_argument("--shared", action="store_true", help="a process group even with one")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--whole_run", nargs=argparse.REMAINDER, help="the flags of whole runs")
    parser.add_argument("--model", type=Path, metavar="FIGURE", help="print and draw the model")
    args = parser.parse_args()
    if args.model is not None:
        print_model(args.model)
    else:
        measure_all(args)


if __name__ == "__main__":
    main()
