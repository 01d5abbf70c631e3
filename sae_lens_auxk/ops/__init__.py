"""The operations of a sparse training step: selections, and products with a few rows.

Each operation is plain torch, which serves every device and is the reference. On CUDA some of
them use a Triton kernel where that was measured to be faster (docs/performance.md).

The environment variable ``SAE_LENS_AUXK_OPS`` chooses: ``auto`` (the default), ``torch`` (no
Triton), or ``dense`` (SAELens's own dense step, no sparse operation at all).
"""

import os
from functools import cache
from importlib.util import find_spec

import torch


@cache
def _choice() -> str:
    choice = os.environ.get("SAE_LENS_AUXK_OPS", "auto")
    if choice not in ("auto", "torch", "dense"):
        raise ValueError(
            f"SAE_LENS_AUXK_OPS={choice!r} is not allowed: it must be auto, torch or dense."
        )
    return choice


@cache
def _may_use_triton() -> bool:
    return _choice() == "auto" and find_spec("triton") is not None


def use_sparse_step() -> bool:
    """Whether a training step may be sparse."""
    return _choice() != "dense"


# No annotation: ModuleType would hide the module's contents, which the inferred type knows.
def kernels(x: torch.Tensor):
    """The module of Triton kernels if an operation on ``x`` may use them, else None."""
    if not _may_use_triton() or not (x.is_cuda or os.environ.get("TRITON_INTERPRET") == "1"):
        return None
    from sae_lens_auxk.ops import triton_kernels  # where Triton is not installed, this fails

    return triton_kernels
