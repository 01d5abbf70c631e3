"""Inputs and outputs of a training step beyond those of SAELens's own.

SAELens passes a step's input on to ``calculate_aux_loss`` and its output back to the trainer, so
they carry the data of one step.
"""

from dataclasses import dataclass, field
from typing import Any

from sae_lens.saes.sae import TrainStepInput, TrainStepOutput

from sae_lens_auxk.finite_rows import UsableRows
from sae_lens_auxk.resampling import NewLatents


@dataclass(kw_only=True)
class AuxStepInput(TrainStepInput):
    """A step's input, with data for ``calculate_aux_loss`` and a place for its metrics.

    Attributes:
        usable: the rows that can be trained on.
        again: whether gradient checkpointing runs the step a second time, for its backward pass.
        step: the training step, counted from 0, the same in a resumed run.
        metrics: the auxiliary loss's metrics, for the output of SAELens's own step.
    """

    usable: UsableRows
    again: bool
    step: int
    metrics: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass
class AuxStepOutput(TrainStepOutput):
    """A step's output, with the latents that :func:`~sae_lens_auxk.resampling.resample` applies."""

    new_latents: NewLatents | None = None
