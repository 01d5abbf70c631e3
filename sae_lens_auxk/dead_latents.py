"""Which latents are dead, counted in tokens.

The state is one int64 tensor ``tokens_since_fired`` (d_sae,): tokens (rows) that the SAE has
trained on since each latent last fired. Counting tokens instead of steps makes the threshold mean
the same at every batch size (Gao et al. 2024 count 10 million tokens).
"""

from typing import Any

import torch
from sae_lens.saes.sae import TrainStepInput
from torch.distributed import is_available
from torch.nn.parallel import DistributedDataParallel

DEFAULT_THRESHOLD = 10_000_000
"""Gao et al. 2024, section 2.2."""


def threshold_for(training_samples: int) -> int:
    """Tokens of silence that make a latent dead, where a config leaves them to the run's length.

    10 million, or a twentieth of the run where that is less, so that a short run has dead latents
    at all.
    """
    return max(1, min(DEFAULT_THRESHOLD, training_samples // 20))


def fired_in_batch(feature_acts: torch.Tensor, by_magnitude: bool = False) -> torch.Tensor:
    """(d_sae,) bool: which latents are active in at least one row.

    Args:
        feature_acts: (B, d_sae), dense or sparse COO.
        by_magnitude: whether activations may be negative.
    """
    if feature_acts.is_sparse:
        latents, values = feature_acts._indices()[-1], feature_acts._values().detach()
        values = values.abs() if by_magnitude else values
        return values.new_zeros(feature_acts.shape[-1]).index_add_(0, latents, values) > 0
    acts = feature_acts.detach()
    # On CPU amax is four times as fast as (acts > 0).any(), and with amin three times as fast as
    # abs().amax().
    fired = acts.amax(dim=0) > 0
    return fired | (acts.amin(dim=0) < 0) if by_magnitude else fired


def ranks_of_step() -> Any:
    """The process group of the DistributedDataParallel that is running this forward pass, or None.

    Ranks without one may train SAEs of their own, which must not wait for each other.
    """
    ddp = DistributedDataParallel._active_ddp_module if is_available() else None
    return None if ddp is None else ddp.process_group


@torch.no_grad()
def over_ranks(
    fired: torch.Tensor, n_tokens: torch.Tensor, group: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Combine what the ranks of a process group have seen, each in its own rows.

    Args:
        fired: (d_sae,) bool, the latents that fired in this rank's rows.
        n_tokens: () int64, how many rows those are.
        group: the group.
    """
    both = torch.cat([fired.long(), n_tokens.view(1)])
    torch.distributed.all_reduce(both, group=group)
    return both[:-1] > 0, both[-1]


@torch.no_grad()
def dead_on_all_ranks(dead: torch.Tensor, group: Any) -> torch.Tensor:
    """(d_sae,) bool: the latents that are dead on every rank of a process group.

    Args:
        dead: (d_sae,) bool, those that are on this rank.
        group: the group.
    """
    least = dead.to(torch.uint8)
    torch.distributed.all_reduce(least, op=torch.distributed.ReduceOp.MIN, group=group)
    return least.bool()


@torch.compiler.disable()
def agree_on_dead(step_input: TrainStepInput, d_sae: int) -> None:
    """Replace SAELens's mask of dead latents by what all ranks agree on, if there are ranks.

    A rank without a mask has no dead latent, and asks the others all the same: they wait for it.
    The mask is replaced in the caller's own input. Gradient checkpointing hands that in again, in
    the backward pass, where no rank can be asked.
    """
    if (ranks := ranks_of_step()) is not None:
        dead = step_input.dead_neuron_mask
        if dead is None:
            dead = torch.zeros(d_sae, dtype=torch.bool, device=step_input.sae_in.device)
        step_input.dead_neuron_mask = dead_on_all_ranks(dead, ranks)


@torch.no_grad()
def count_tokens(
    tokens_since_fired: torch.Tensor, fired: torch.Tensor, n_tokens: int | torch.Tensor
) -> None:
    """Count a batch in place: 0 for latents that fired in it, ``n_tokens`` more for the rest."""
    tokens_since_fired.add_(n_tokens).masked_fill_(fired, 0)


class DeadCountAhead:
    """An upper bound on the number of latents that are dead at the next step, known in time.

    The number itself is on the device, and reading it waits until the device has come that far.
    But a latent that is dead after the next batch of at most as many tokens is at most this
    batch's tokens short of dead now, and the number of those has arrived by then.
    """

    def __init__(self) -> None:
        self._noted: tuple[torch.Tensor, torch.cuda.Event | None, int] | None = None
        self.latest: int | None = None
        """What :meth:`bound` returned last, for a step that is computed a second time."""

    @torch.no_grad()
    def note(self, tokens_since_fired: torch.Tensor, threshold: int, n_tokens: int) -> None:
        """Count, after a step with ``n_tokens``, what may be dead after the next one."""
        count = (tokens_since_fired >= threshold - n_tokens).sum()
        arrived = torch.cuda.Event() if count.is_cuda else None
        # Copied to pinned memory, as torch does with non_blocking: nothing waits here.
        count = count.to("cpu", non_blocking=True)
        if arrived is not None:
            arrived.record(torch.cuda.current_stream(tokens_since_fired.device))
        self._noted = count, arrived, n_tokens

    def bound(self, n_tokens: int) -> int | None:
        """The bound for a step with ``n_tokens``; None where nothing is known."""
        self.latest = None
        if self._noted is not None and n_tokens <= self._noted[2]:
            count, arrived, _ = self._noted
            if arrived is not None:
                arrived.synchronize()
            self.latest = int(count)
        return self.latest

    def __reduce__(self) -> tuple[type["DeadCountAhead"], tuple[()]]:
        # A copy of an SAE, or one sent to another process, starts without it.
        return DeadCountAhead, ()


def count_to_bytes(count: torch.Tensor) -> torch.Tensor:
    """int64 (...) -> uint8 (..., 8).

    SAELens's loader casts every tensor of a checkpoint to the SAE's dtype, and bfloat16 holds
    no integer above 256 exactly. It does hold a byte.
    """
    return count.unsqueeze(-1).contiguous().view(torch.uint8)


def count_from_bytes(count: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`count_to_bytes`, from any dtype that holds a byte."""
    return count.to(torch.uint8).contiguous().view(torch.int64).squeeze(-1)
