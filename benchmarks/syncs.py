"""Where a training step on a GPU waits for the device.

    python benchmarks/syncs.py auxk

Torch reports what waits by its own doing (``torch.cuda.set_sync_debug_mode``); this prints, by
line of code, how many of 5 steps did. What waits in a library that torch calls it does not report:
so the device is kept busy first, and the host's time for a step tells whether it came back before.
``saelens`` instead of a variant is SAELens's own TopK.
"""

import sys
import time
import traceback
import warnings
from collections import Counter
from typing import Any

import torch
from step import Case, saelens_step

found: Counter[str] = Counter()


def note(*args: Any, **kwargs: Any) -> None:  # noqa: ARG001
    frames = [f for f in traceback.extract_stack() if "sae_lens" in f.filename]
    where = frames[-1] if frames else traceback.extract_stack()[-2]
    found[f"{where.filename.split('site-packages/')[-1]}:{where.lineno}  {where.line}"] += 1


def main() -> None:
    variant = sys.argv[1] if len(sys.argv) > 1 else "auxk"
    fields = {"aux_variant": variant, "aux_bias": "none"}
    case = Case("topk", 131_072) if variant == "saelens" else Case("auxk-topk", 131_072, fields)
    step = saelens_step(case, "cuda")
    x = torch.randn(case.batch, 768, device="cuda")
    for _ in range(3):
        step(x)
    torch.cuda.synchronize()
    warnings.showwarning = note
    warnings.simplefilter("always")
    torch.cuda.set_sync_debug_mode("warn")
    for _ in range(5):
        step(x)
    torch.cuda.set_sync_debug_mode("default")
    # What every hundredth step does, to report rows with a NaN, is not among these 5.
    for where, times in found.most_common():
        print(f"{times / 5:5.1f} a step  {where}")
    print(f"{variant}: {sum(found.values()) / 5:.1f} waits a step in all")

    torch.cuda.synchronize()
    torch.cuda._sleep(10**9)
    busy = torch.cuda.Event()
    busy.record()
    start = time.perf_counter()
    step(x)
    milliseconds = (time.perf_counter() - start) * 1e3
    answer = "waited for it" if busy.query() else "did not wait"
    print(f"with the device busy for half a second before: {milliseconds:.0f} ms, {answer}")


if __name__ == "__main__":
    main()
