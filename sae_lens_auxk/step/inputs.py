"""The data of a training step: what it is given, its targets, what a sparse step computes."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from sae_lens_auxk.losses.access import LatentAccess
from sae_lens_auxk.saelens.names import TrainStepInput, TrainStepOutput

STEPS_BETWEEN_REPORTS = 100


@torch.no_grad()
def usable_rows(x: torch.Tensor, normalize_activations: str, dtype: torch.dtype) -> torch.Tensor:
    """(B,) bool: the rows of ``x`` (B, ...) that can be trained on.

    A row's norm must be finite and at most :func:`largest_norm`. Under ``constant_norm_rescale``,
    which divides by it, it must not be 0 either.

    Args:
        x: the batch.
        normalize_activations: the SAE's.
        dtype: the dtype of the SAE's losses, float32 or float64.
    """
    x = x.flatten(1)
    if x.dtype == torch.float64:  # torch's norm cannot take a narrower dtype than its input
        x = x.to(dtype)
    norm = torch.linalg.vector_norm(x, dim=1, dtype=dtype)
    usable = norm <= largest_norm(dtype)
    return usable & (norm > 0) if normalize_activations == "constant_norm_rescale" else usable


def precise(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the losses: float32, or float64 with float64 parameters."""
    return torch.promote_types(dtype, torch.float32)


def largest_norm(dtype: torch.dtype) -> float:
    """The largest row norm that does not ruin a training step: 4e9 in float32.

    A weight's gradient grows with the square of a row's norm, and gradient clipping squares it
    again. If that overflows, the gradient of the whole batch becomes 0 or NaN.
    """
    return torch.finfo(dtype).max ** 0.25


def replace_rows(x: torch.Tensor, usable: torch.Tensor) -> torch.Tensor:
    """Put the first usable row of ``x`` (B, ...) in place of every row not in ``usable`` (B,).

    A batch without a usable row becomes all ones. Repeating a row gives its token extra weight,
    once for each bad row. Dropping rows instead would change the shape and synchronise with the
    host. A usable row keeps its graph.
    """
    first = usable.int().argmax(dim=0, keepdim=True)
    instead = x.detach().index_select(0, first).where(usable.any(), 1.0)
    return torch.where(usable.view(-1, *[1] * (x.ndim - 1)), x, instead)


class BadRowWatch:
    """Counts the rows of a run that were replaced, and warns about them."""

    def __init__(self) -> None:
        self._n_rows: torch.Tensor | int = 0
        self._next_report = 0

    def count(self, n_replaced: torch.Tensor, step: int) -> None:
        """Count a step's bad rows; warn, at most once in 100 steps."""
        self._n_rows = self._n_rows + n_replaced
        # Reading a tensor waits for the device, so on CUDA it is read only now and then.
        if step >= self._next_report or step == 0:
            reported = self.report()
            if reported or n_replaced.is_cuda:
                self._next_report = step + STEPS_BETWEEN_REPORTS

    def report(self) -> bool:
        """Warn if there have been bad rows so far, and return whether there have."""
        n_rows = int(self._n_rows)
        if n_rows:
            warnings.warn(
                f"{n_rows} rows of activations with a NaN, infinity or a norm out of range so far; "
                "each was replaced by a usable row of its batch (a batch without any was skipped) "
                "and not counted as a token",
                stacklevel=2,
            )
        return n_rows > 0


@dataclass(kw_only=True)
class StepInput(TrainStepInput):
    """A step's input, flat, with all that the host decides of the step.

    SAELens passes a step's input on to ``calculate_aux_loss``, so it carries the data of one step.

    Attributes:
        mode: the SAE's ``normalize_activations``.
        dtype: of the SAE's losses, float32 or float64.
        leading: the shape of the rows as they came; ``sae_in`` has one dimension instead.
        step: the training step, counted from 0, the same in a resumed run.
        counts: whether the step belongs to the training: a step in eval mode changes nothing.
        coefficient: of the auxiliary loss at this step; () a tensor where the step is captured.
        dead_bound: an upper bound on the number of dead latents; 0 if there is no auxiliary loss,
            None if their number has to be read.
        aux_rows: (m,) the rows that the auxiliary loss sees, or None for all.
        metrics: the auxiliary loss's metrics, for the output of SAELens's own step.
    """

    mode: str
    dtype: torch.dtype
    leading: torch.Size
    step: int
    counts: bool
    coefficient: float | torch.Tensor = 0.0
    dead_bound: int | None = None
    aux_rows: torch.Tensor | None = None
    metrics: dict[str, Any] = field(default_factory=dict[str, Any])

    def with_usable_rows(self) -> "UsableInput":
        """The same with another row in place of each that would ruin the step."""
        usable = usable_rows(self.sae_in, self.mode, self.dtype)
        fields: dict[str, Any] = {**vars(self), "sae_in": replace_rows(self.sae_in, usable)}
        return UsableInput(**fields, is_token=usable, n_tokens=usable.sum())

    @staticmethod
    def of(
        given: TrainStepInput,
        n_row_dims: int,
        normalize_activations: str,
        dtype: torch.dtype,
        step: int,
        counts: bool,
    ) -> "StepInput":
        """From SAELens's input, whose ``sae_in`` is (..., d_in).

        Args:
            given: SAELens's input.
            n_row_dims: how many dimensions of ``sae_in`` are one row: 1, or 2 with hook_z.
            normalize_activations: the SAE's.
            dtype: the dtype of the SAE's losses, float32 or float64.
            step: the training step.
            counts: whether it belongs to the training.

        Raises:
            ValueError: the batch is empty.
        """
        sae_in = given.sae_in
        if sae_in.numel() == 0:
            raise ValueError(f"sae_in of shape {tuple(sae_in.shape)} has no row to train on.")
        # SAELens's Matryoshka and JumpReLU take 2-D input only, hence the flattening.
        n_leading = sae_in.ndim - n_row_dims
        flat = sae_in.reshape(-1, *sae_in.shape[n_leading:])
        fields: dict[str, Any] = {**vars(given), "sae_in": flat}
        return StepInput(
            **fields,
            mode=normalize_activations,
            dtype=dtype,
            leading=sae_in.shape[:n_leading],
            step=step,
            counts=counts,
        )


@dataclass(kw_only=True)
class UsableInput(StepInput):
    """A step's input as the rest of the step sees it: without rows that would ruin it.

    Attributes:
        is_token: (B,) bool, the rows that count as tokens. The others replace rows that would have
            ruined the step: they repeat another row, or are all ones where no row is usable.
        n_tokens: () int64, how many rows count.
    """

    is_token: torch.Tensor
    n_tokens: torch.Tensor


class Targets(NamedTuple):
    """Targets of one batch, detached, in at least float32.

    Attributes:
        x: (B, d_in) what the decoder's output is compared with. Under ``normalize_activations=
            "layer_norm"`` each row's mean is subtracted, as it is from the decoder's output.
        residual: (B, d_in) ``x`` minus the reconstruction.
        scale: (B, 1) factor from the decoder's output to the units of ``x``, or None. Only the two
            run-time modes of ``normalize_activations`` have one; the others change the data before
            the SAE sees it.
    """

    x: torch.Tensor
    residual: torch.Tensor
    scale: torch.Tensor | None


@torch.no_grad()
def targets_of(
    sae_in: torch.Tensor, sae_out: torch.Tensor, normalize_activations: str, dtype: torch.dtype
) -> Targets:
    """The targets of a step.

    Args:
        sae_in: (B, ...) with d_in entries a row.
        sae_out: the reconstruction, of the same shape.
        normalize_activations: the SAE's.
        dtype: of the result.
    """
    x = sae_in.flatten(1).to(dtype)
    residual = x - sae_out.flatten(1)
    if normalize_activations == "layer_norm":
        return Targets(x - x.mean(dim=-1, keepdim=True), residual, x.std(dim=-1, keepdim=True))
    if normalize_activations == "constant_norm_rescale":
        return Targets(x, residual, x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5)
    return Targets(x, residual, None)


@dataclass(frozen=True)
class SparseForward:
    """What a sparse step has computed before its losses.

    Attributes:
        access: gives ``h`` and ``W_i`` to an auxiliary loss.
        acts: (B, d_sae) the activations.
        sae_out: (B, d_in) the reconstruction.
        inner: (B, d_in) Matryoshka's inner reconstructions by their widths, ascending.
        target: (B, d_in) what they are compared with.
        mse_loss_fn: SAELens's, of the SAE.
    """

    access: LatentAccess
    acts: torch.Tensor
    sae_out: torch.Tensor
    inner: dict[int, torch.Tensor]
    target: torch.Tensor
    mse_loss_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]

    def mse(self, reconstruction: torch.Tensor) -> torch.Tensor:
        return self.mse_loss_fn(reconstruction, self.target).sum(dim=-1).mean()

    def inner_losses(self) -> dict[str, torch.Tensor]:
        """SAELens's losses of Matryoshka's inner levels."""
        return {f"inner_mse_loss_{width}": self.mse(out) for width, out in self.inner.items()}

    def output(
        self, batch: StepInput, losses: dict[str, torch.Tensor], metrics: dict[str, Any]
    ) -> TrainStepOutput:
        return TrainStepOutput(
            sae_in=batch.sae_in,
            sae_out=self.sae_out,
            feature_acts=self.acts,
            hidden_pre=self.access.columns(),
            loss=sum(losses.values(), start=self.sae_out.new_zeros(())),
            losses=losses,
            metrics=metrics,
        )
