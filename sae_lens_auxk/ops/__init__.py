"""The operations of a sparse training step: selections, and products with a few rows.

Each operation is plain torch, which serves every device and is the reference. On CUDA some of
them use a Triton kernel where that was measured to be faster (docs/performance.md).

The environment variable ``SAE_LENS_AUXK_OPS`` chooses: ``auto`` (the default), ``torch`` (no
Triton), or ``dense`` (SAELens's own dense step, no sparse operation at all). It is read when an SAE
is made.
"""

import os
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def choice() -> str:
    """The value of ``SAE_LENS_AUXK_OPS``.

    Raises:
        ValueError: it is none of the three.
    """
    given = os.environ.get("SAE_LENS_AUXK_OPS", "auto")
    if given not in ("auto", "torch", "dense"):
        raise ValueError(
            f"SAE_LENS_AUXK_OPS={given!r} is not allowed: it must be auto, torch or dense."
        )
    return given


class _Kernels(dict[str, Any]):
    """The kernels by type of device, looked up once: a step asks a hundred times."""

    def __missing__(self, device_type: str) -> Any:
        has_kernels = device_type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
        # Importing the module fails where Triton is not installed.
        if has_kernels and choice() == "auto" and find_spec("triton") is not None:
            self[device_type] = import_module("sae_lens_auxk.ops.triton_kernels")
        else:
            self[device_type] = None
        return self[device_type]


KERNELS = _Kernels()
"""The module of Triton kernels for each type of device, None where plain torch serves."""
