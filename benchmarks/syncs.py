"""Where a training step on a GPU waits for the device.

torch reports every operation that waits (``torch.cuda.set_sync_debug_mode``). A step waits if the
host cannot go on before the device has come that far. Prints, by line of code, how many of 5 steps
did, for one variant:

    python benchmarks/syncs.py auxk
"""

import sys
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
    case = Case("auxk-topk", 131_072, {"aux_variant": variant, "aux_bias": "none"})
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


if __name__ == "__main__":
    main()
