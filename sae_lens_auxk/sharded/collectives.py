"""The exchanges between the processes that share the latents of an SAE.

Every process computes the same losses from the same batch, and runs its backward pass from the same
number. So a sum over processes passes its gradient on unchanged, and a tensor that all processes
use with their own latents sums their gradients (the operators g and f of Shoeybi et al. 2019,
"Megatron-LM"). torch's own differentiable collectives treat each process's loss as one part of a
total, and would give N times the gradient.
"""

from typing import Any

import torch
import torch.distributed as dist


def sum_over(x: torch.Tensor, group: Any) -> torch.Tensor:
    """The sum of ``x`` over the processes. The gradient goes to ``x`` of each unchanged."""
    return _SumOver.apply(x, group)  # type: ignore[no-any-return]


def sum_in_backward(x: torch.Tensor, group: Any) -> torch.Tensor:
    """``x``, which is the same on all processes; its gradient is the sum of theirs."""
    return _SumInBackward.apply(x, group)  # type: ignore[no-any-return]


@torch.no_grad()
def largest_over(x: torch.Tensor, group: Any) -> torch.Tensor:
    """The largest of the processes' ``x``, entry by entry."""
    largest = x.clone()
    dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    return largest


@torch.no_grad()
def gather(x: torch.Tensor, group: Any) -> torch.Tensor:
    """(N, ...): ``x`` (...) of every process, in the order of their ranks."""
    everywhere = x.new_empty((group.size(), *x.shape))
    dist.all_gather([*everywhere], x.contiguous(), group=group)
    return everywhere


class _SumOver(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:  # noqa: ARG004
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:  # noqa: ARG004
        return grad_outputs[0], None


class _SumInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: Any) -> torch.Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[Any, ...]:
        total = grad_outputs[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None
