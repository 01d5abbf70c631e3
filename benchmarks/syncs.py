"""Whether a training step on a GPU waits for the device, and whether the device waits for Python.

    python -m benchmarks.syncs auxk                    # a variant, or "saelens"
    python -m benchmarks.syncs auxk --d_sae 131072

From a profile of 16 steps: how long a step is, how much of it the device works and how much the
host waits, by CUDA's calls that wait. A host that is faster than the device has to wait somewhere;
it should do so with work left for the device. So the device is then kept busy for half a second,
and this prints how many steps the host could launch meanwhile.
"""

import argparse
import time
from collections import defaultdict

import torch

from benchmarks.step import D_IN, Case, saelens_step

WAITS = ("cudaEventSynchronize", "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaMemcpy")
STEPS = 16


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("variant")
    parser.add_argument("--d_sae", type=int, default=24_576)
    args = parser.parse_args()
    case = Case("topk", args.d_sae)
    if args.variant != "saelens":
        fields = {"aux_variant": args.variant}
        case = Case("auxk-topk", args.d_sae, fields, captured=True, fused=True)
    step = saelens_step(case, "cuda")
    xs = [torch.randn(case.batch, D_IN, device="cuda") for _ in range(4)]
    for i in range(32):
        step(xs[i % 4])
    torch.cuda.synchronize()

    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        start = time.perf_counter()
        for i in range(STEPS):
            step(xs[i % 4])
        torch.cuda.synchronize()
        wall = (time.perf_counter() - start) * 1e3
    # The wait at the end is the benchmark's own.
    calls: defaultdict[str, list[float]] = defaultdict(list)
    work = 0.0
    for event in profile.events():
        milliseconds = event.time_range.elapsed_us() / 1e3
        if event.device_type == torch.autograd.DeviceType.CUDA:
            work += 0 if event.is_user_annotation else milliseconds
        elif event.name in WAITS:
            calls[event.name].append(milliseconds)
    own = calls["cudaDeviceSynchronize"].pop()
    print(f"{args.variant}, {args.d_sae:,} latents, profiled: {wall / STEPS:.2f} ms a step")
    print(f"the device works for {work / STEPS:.2f} ms of it, {work / wall:.0%}")
    for name, times in calls.items():
        n, waited = len(times) / STEPS, sum(times) / STEPS
        print(f"{name}: {n:.1f} times a step, {waited:.2f} ms")
    print(f"after the last launch the device worked for another {own:.2f} ms")

    torch.cuda._sleep(10**9)
    busy = torch.cuda.Event()
    busy.record()
    start, n = time.perf_counter(), 0
    while not busy.query() and n < STEPS:
        step(xs[n % 4])
        n += not busy.query()
        last = time.perf_counter()
    milliseconds = (last - start) * 1e3 / max(n, 1)
    print(f"with the device busy for half a second: {n} steps launched, {milliseconds:.1f} ms each")


if __name__ == "__main__":
    main()
