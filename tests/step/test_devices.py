"""On a device without the operations of the sparse step, a training goes the dense way.

No Mac is needed: the CPU takes the part of MPS, and operations that MPS lacks are noticed.
"""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sae_lens_auxk.ops import selection
from sae_lens_auxk.ops.selection import indices_of
from tests.helpers import PAIRS, build_sae, build_trainer, kill_latents

NOT_ON_MPS = ("_embedding_bag", "nonzero_static", "sparse_coo", "_coalesce", "_sparse_mm")
"""By the operator tables of torch 2.8 to 2.11."""


class Noted(TorchDispatchMode):
    """Notes the operations that MPS lacks."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(name in str(func) for name in NOT_ON_MPS):
            self.names.add(str(func))
        return func(*args, **(kwargs or {}))


def trained(architecture: str, variant: str) -> tuple[Any, set[str]]:
    torch.manual_seed(0)
    sae = build_sae(
        architecture, aux_variant=variant, dead_threshold_tokens=16, resample_every_steps=2
    )
    kill_latents(sae, 10)
    trainer = build_trainer(sae)
    with Noted() as noted:
        for _ in range(4):
            trainer.step(torch.randn(16, 8))
            trainer.n_training_steps += 1
    return sae, noted.names


@pytest.mark.parametrize(("architecture", "variant"), PAIRS)
def test_no_operation_is_used_that_mps_lacks(
    architecture: str, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sparse, used = trained(architecture, variant)
    assert used or "topk" not in architecture
    monkeypatch.setattr(selection, "SPARSE_DEVICES", ("cuda",))
    dense, used = trained(architecture, variant)
    assert used == set()
    for name, value in sparse.state_dict().items():
        torch.testing.assert_close(dense.state_dict()[name], value, rtol=1e-3, atol=1e-4, msg=name)


def test_the_indices_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    mask = torch.rand(200) < 0.4
    static = indices_of(mask, 100)
    assert len(static) == 128
    monkeypatch.setattr(selection, "SPARSE_DEVICES", ())
    assert torch.equal(indices_of(mask, 100), static)
