"""Which latents are dead, counted in tokens.

The state is one int64 tensor ``tokens_since_fired`` (d_sae,): tokens (rows) that the SAE has
trained on since each latent last fired. Counting tokens instead of steps makes the threshold mean
the same at every batch size (Gao et al. 2024 count 10 million tokens).
"""

from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import override

from sae_lens_auxk.saelens.resume import require_same_sae

if TYPE_CHECKING:
    from sae_lens import TrainingSAE

    _Base = TrainingSAE[Any]
else:
    _Base = object


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


STEPS_AHEAD = 2
"""A step may be a single launch (see :mod:`~sae_lens_auxk.step.captured`). What the step before has
counted would reach the host at its end only, so that the device would be idle until the next one is
launched."""

BOUNDS = 8
"""So many bounds, evenly spaced, are told apart: each is a shape, for which a step is captured."""

STEADY_STEPS = 50
"""So many steps a bound stays. Without that, a number of dead latents that goes to and fro between
two eighths would change it, and with it the graph, at every other step."""


def soon_dead(tokens_since_fired: torch.Tensor, threshold: int, n_tokens: int) -> torch.Tensor:
    """() int64: after a batch of ``n_tokens``, how many latents may be dead two steps later."""
    return (tokens_since_fired >= threshold - STEPS_AHEAD * n_tokens).sum()


class DeadCountAhead:
    """An upper bound on the number of dead latents at a step, without a device wait.

    The exact number is on the device, and reading it waits for the device. But a latent that is
    dead after the next two batches, if they are no larger than the last one, is at most so many
    tokens short of the threshold now. The number of such latents has reached the host by then.
    """

    def __init__(self) -> None:
        self._noted: deque[tuple[torch.Tensor, torch.cuda.Event | None, int, int]]
        self._noted = deque(maxlen=STEPS_AHEAD)
        self._bounds = deque[int](maxlen=STEADY_STEPS)
        self._is_open = False

    def note(self, soon_dead: torch.Tensor, threshold: int, n_tokens: int) -> None:
        """After a step with ``n_tokens``, note its :func:`soon_dead`."""
        self._is_open = False
        arrived = torch.cuda.Event() if soon_dead.is_cuda else None
        # torch copies to pinned memory with non_blocking, so nothing waits here.
        count = soon_dead.to("cpu", non_blocking=True)
        if arrived is not None:
            arrived.record(torch.cuda.current_stream(soon_dead.device))
        self._noted.append((count, arrived, threshold, n_tokens))

    def bound(self, threshold: int, n_tokens: int, d_sae: int) -> int | None:
        """The bound for a step with ``n_tokens``: the largest of the last steps, or 0.

        It is a multiple of an eighth of ``d_sae``. None if it is not known.
        """
        if self._is_open:  # the last step counted and then failed
            self._noted.clear()
        self._is_open = True
        if len(self._noted) < STEPS_AHEAD:
            return None
        count, arrived, noted, largest = self._noted[0]
        if threshold != noted or max(n_tokens, self._noted[-1][-1]) > largest:
            return None
        if arrived is not None:
            arrived.synchronize()
        self._bounds.append(-(-int(count) * BOUNDS // d_sae) * d_sae // BOUNDS)
        return max(self._bounds) if self._bounds[-1] else 0

    def __reduce__(self) -> tuple[type["DeadCountAhead"], tuple[()]]:
        # A copied SAE, or one sent to another process, starts without the pending counts.
        return DeadCountAhead, ()


class Counts(_Base):
    """The counts of a training SAE: in its checkpoints, not in the saved inference model.

    Buffers, both int64:

    - ``tokens_since_fired`` (d_sae,): tokens since each latent fired.
    - ``training_steps`` (): training steps taken. After a resume SAELens's own counter is one
      behind, and decay, resampling and the row sample need the true one.
    """

    tokens_since_fired: torch.Tensor
    training_steps: torch.Tensor

    _loaded: bool = False
    """Whether the counts are from a checkpoint, and no step was taken since."""

    def __init__(self, cfg: Any, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)
        for name, shape in (("tokens_since_fired", (cfg.d_sae,)), ("training_steps", ())):
            count = torch.zeros(shape, dtype=torch.int64, device=self.W_dec.device)
            self.register_buffer(name, count)

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)
        for name in _COUNTS:
            state_dict[name] = count_to_bytes(state_dict[name])

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving_inference(state_dict)
        for name in _COUNTS:
            del state_dict[name]

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        # SAELens's own architectures save none. A trainer that resumes knows its steps.
        fresh = torch.zeros_like(self.tokens_since_fired), self.training_steps
        self._loaded = "training_steps" in state_dict or bool(self.training_steps.any())
        for name, count in zip(_COUNTS, fresh, strict=True):
            if name in state_dict:
                state_dict[name] = count_from_bytes(state_dict[name])
            else:
                state_dict[name] = count.to(state_dict["W_dec"].device)

    @override
    def load_weights_from_checkpoint(self, checkpoint_path: Path | str) -> None:
        """Load a training checkpoint; one of another SAE is refused with a ValueError."""
        require_same_sae(self.cfg, checkpoint_path)
        super().load_weights_from_checkpoint(checkpoint_path)


_COUNTS = ("tokens_since_fired", "training_steps")


def count_to_bytes(count: torch.Tensor) -> torch.Tensor:
    """int64 (...) -> uint8 (..., 8).

    SAELens's loader casts every tensor of a checkpoint to the SAE's dtype, and bfloat16 holds
    no integer above 256 exactly. It does hold a byte.
    """
    return count.unsqueeze(-1).contiguous().view(torch.uint8)


def count_from_bytes(count: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`count_to_bytes`, from any dtype that holds a byte."""
    return count.to(torch.uint8).contiguous().view(torch.int64).squeeze(-1)
