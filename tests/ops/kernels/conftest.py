"""Tests that need the Triton kernels: compiled on a GPU, or by Triton's interpreter.

Triton reads TRITON_INTERPRET when a kernel is defined, so that it must be set before the import.
Without a GPU, ``test_ops.py`` runs this folder in a process of its own where it is.
"""

from collections.abc import Iterator

import pytest
import torch

from sae_lens_auxk.ops import KERNELS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

if KERNELS[DEVICE] is None:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def _on_the_kernels_device() -> Iterator[None]:
    with torch.device(DEVICE):
        yield
