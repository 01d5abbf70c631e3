"""SAELens's trainer for an SAE whose latents are shared: clipping by the whole norm.

SAELens's trainer calls ``torch.nn.utils.clip_grad_norm_`` in the middle of its step, with the
parameters that a process holds, so each process would clip by a different norm. (torch itself clips
DTensors correctly. But Adam then handles one parameter at a time, with a DTensor dispatch for each
operation, which costs milliseconds per step.)
"""

from collections.abc import Iterable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from sae_lens import SAETrainer
from typing_extensions import override

from sae_lens_auxk.sharded.collectives import sum_over
from sae_lens_auxk.sharded.files import SHARDED_DIM


class ShardedTrainer(SAETrainer[Any, Any]):
    """``SAETrainer`` that clips by the norm of all processes' gradients together."""

    @override
    def _train_step(self, sae: Any, sae_in: torch.Tensor) -> Any:
        with patch.object(torch.nn.utils, "clip_grad_norm_", partial(_clip, sae)):
            return super()._train_step(sae, sae_in)


@torch.no_grad()
def clip_grad_norm_(sae: Any, max_norm: float) -> torch.Tensor:
    """Clip the gradients of an SAE whose latents are shared, as torch's function of this name does.

    :class:`ShardedTrainer` does this by itself. A training loop of your own calls it after the
    backward pass, on every process.

    Args:
        sae: the SAE, of :func:`~sae_lens_auxk.sharded.sae.sharded_sae`.
        max_norm: the largest norm that all gradients together may have.

    Returns:
        () the norm before clipping, the same on every process.
    """
    own: list[torch.Tensor] = []
    shared: list[torch.Tensor] = []
    for name, parameter in sae.named_parameters():
        if parameter.grad is not None:
            (own if name in SHARDED_DIM else shared).append(parameter.grad)
    square = torch.nn.utils.get_total_norm(own).square()
    total = sum_over(square, sae.shard.group)
    norm = (total + torch.nn.utils.get_total_norm(shared).square()).sqrt()
    torch.nn.utils.clip_grads_with_norm_(sae.parameters(), max_norm, norm)
    return norm


def _clip(sae: Any, parameters: Iterable[torch.Tensor], max_norm: float) -> torch.Tensor:
    parameters = [*parameters]
    if any(a is not b for a, b in zip(parameters, sae.parameters(), strict=False)):
        return _torchs_own(parameters, max_norm)  # of a trainer in another thread
    return clip_grad_norm_(sae, max_norm)


_torchs_own = torch.nn.utils.clip_grad_norm_
