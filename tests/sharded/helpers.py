"""The same SAE in one process, and shared among the processes of the group."""

from typing import Any

import torch
import torch.distributed as dist

from sae_lens_auxk.sharded.files import SHARDED_DIM
from sae_lens_auxk.sharded.sae import sharded_sae
from tests.helpers import build_config, build_sae
from tests.sharded.processes import device

D_IN, D_SAE = 8, 48


def both(architecture: str, **fields: Any) -> tuple[Any, Any]:
    """An SAE with random parameters, and the same one as this process holds it."""
    fields = {"d_in": D_IN, "d_sae": D_SAE, "k": 3, "device": device(), **fields}
    torch.manual_seed(1)
    whole = build_sae(architecture, **fields)
    shared = sharded_sae(build_config(architecture, **fields), dist.group.WORLD)
    with torch.no_grad():
        for name, parameter in shared.named_parameters():
            parameter.copy_(part(name, dict(whole.named_parameters())[name], shared))
    if hasattr(whole, "topk_threshold"):
        shared.topk_threshold.copy_(whole.topk_threshold)
    return whole, shared


def part(name: str, tensor: torch.Tensor, shared: Any) -> torch.Tensor:
    """What a process holds of a tensor with this name."""
    dim = SHARDED_DIM.get(name)
    if dim is None:
        return tensor
    return tensor.narrow(dim, shared.shard.start, shared.shard.n)
