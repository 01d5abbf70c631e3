"""Which latents are dead, counted in tokens.

The state is one int64 tensor ``tokens_since_fired`` (d_sae,): tokens (rows) that the SAE has
trained on since each latent last fired. Counting tokens instead of steps makes the threshold mean
the same at every batch size (Gao et al. 2024 count 10 million tokens).
"""

import torch


def fired_in_batch(feature_acts: torch.Tensor) -> torch.Tensor:
    """(d_sae,) bool: which latents have an activation other than 0 in at least one row.

    Args:
        feature_acts: (B, d_sae), dense or sparse COO.
    """
    if feature_acts.is_sparse:
        latents, values = feature_acts._indices()[-1], feature_acts._values().detach().abs()
        return values.new_zeros(feature_acts.shape[-1]).index_add_(0, latents, values) > 0
    acts = feature_acts.detach()
    # On a CPU these two passes are faster than any(dim=0).
    return (acts.amax(dim=0) > 0) | (acts.amin(dim=0) < 0)


@torch.no_grad()
def count_tokens(
    tokens_since_fired: torch.Tensor, fired: torch.Tensor, n_tokens: int | torch.Tensor
) -> None:
    """Count a batch in place: reset latents that fired to 0 and add ``n_tokens`` to the rest."""
    tokens_since_fired.add_(n_tokens).masked_fill_(fired, 0)


class DeadCountAhead:
    """An upper bound on the number of dead latents at the next step, without a device wait.

    The exact number is on the device, and reading it waits for the device. But a latent that is
    dead after the next batch, if that is no larger, is at most this batch's tokens short of the
    threshold now. The number of such latents has reached the host by the next step.
    """

    def __init__(self) -> None:
        self._noted: tuple[torch.Tensor, torch.cuda.Event | None, int, int] | None = None

    @torch.no_grad()
    def note(self, tokens_since_fired: torch.Tensor, threshold: int, n_tokens: int) -> None:
        """After a step with ``n_tokens``, count the latents that may be dead after the next one."""
        count = (tokens_since_fired >= threshold - n_tokens).sum()
        arrived = torch.cuda.Event() if count.is_cuda else None
        # torch copies to pinned memory with non_blocking, so nothing waits here.
        count = count.to("cpu", non_blocking=True)
        if arrived is not None:
            arrived.record(torch.cuda.current_stream(tokens_since_fired.device))
        self._noted = count, arrived, threshold, n_tokens

    def bound(self, threshold: int, n_tokens: int) -> int | None:
        """The bound for a step with ``n_tokens``; None if it is not known."""
        if self._noted is None or threshold != self._noted[2] or n_tokens > self._noted[3]:
            return None
        count, arrived, *_ = self._noted
        if arrived is not None:
            arrived.synchronize()
        return int(count)

    def __reduce__(self) -> tuple[type["DeadCountAhead"], tuple[()]]:
        # A copied SAE, or one sent to another process, starts without the pending count.
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
