"""A sparse step is a function of tensors: what a CUDA graph of it takes for granted, on the CPU.

Two steps that differ in number, coefficient, data and number of dead latents must run the same
operations on the same shapes with the same scalars, and read nothing back. What does not is named
here, not by a capture that fails on a GPU, or worse, does not.
"""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sae_lens_auxk.ops import selection
from sae_lens_auxk.step.sparse import SparseTopK
from tests.helpers import TOPK_ARCHITECTURES, VARIANTS, build_sae, kill_latents, step_input

READS = (
    "aten._local_scalar_dense",
    "aten.nonzero.default",
    "aten.is_nonzero",
    "aten.equal.default",
)


class Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations.append((str(func), _described(args), _described(kwargs or {})))
        return result


def _described(value: Any) -> Any:
    """Tensors by dtype and shape, other values as they are."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape)
    if isinstance(value, list | tuple):
        return [_described(item) for item in value]
    if isinstance(value, dict):
        return {key: _described(item) for key, item in value.items()}
    return value


def require_the_same_operations(sae: Any) -> None:
    """Take two steps that differ, and compare what they run."""
    assert isinstance(sae, SparseTopK)
    n_latents = sae.cfg.d_sae
    sae._dead_bound = lambda _: n_latents  # what is known beforehand
    recorded: list[list[Any]] = []
    for step, coefficient, n_dead in ((3, 0.5, 4), (8, 0.25, 9)):
        kill_latents(sae, n_dead)
        given = step_input(torch.randn(16, sae.cfg.d_in), step=step)
        batch = sae._prepare(given)
        batch.coefficient = torch.tensor(coefficient)
        parameters = [*sae.parameters()]
        places = [buffer.data_ptr() for buffer in sae.buffers()]
        with Recorder() as recorder:
            output = sae._step(batch)
            torch.autograd.grad(output.loss, parameters, allow_unused=True)
        recorded.append(recorder.operations)
        assert places == [buffer.data_ptr() for buffer in sae.buffers()]
    assert len(recorded[0]) > 50
    for first, second in zip(*recorded, strict=True):
        assert first == second
        assert not first[0].startswith(READS), first


@pytest.mark.parametrize("fields", [{}, {"aux_batch_fraction": 0.5, "aux_bias": "matched"}])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("architecture", TOPK_ARCHITECTURES)
def test_two_steps_run_the_same_operations(
    architecture: str, variant: str, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "SLOW_TO_ALLOCATE", ())  # as on a GPU
    sae = build_sae(architecture, aux_variant=variant, dead_threshold_tokens=20, **fields)
    require_the_same_operations(sae)
