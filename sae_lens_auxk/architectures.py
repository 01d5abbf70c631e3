"""The architectures: SAELens's training SAEs joined with the auxiliary loss.

This file holds only what differs between architectures: the name, the inference architecture, and
what a pre-activation must exceed to fire.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from sae_lens import (
    AbsTopKSAEConfig,
    AbsTopKTrainingSAE,
    AbsTopKTrainingSAEConfig,
    BatchTopKTrainingSAE,
    BatchTopKTrainingSAEConfig,
    GatedSAEConfig,
    GatedTrainingSAE,
    GatedTrainingSAEConfig,
    JumpReLUSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
    SAEConfig,
    StandardSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
    TopKSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
    TrainingSAE,
    TrainingSAEConfig,
    register_sae_training_class,
)
from typing_extensions import override

from sae_lens_auxk.config import AuxConfig
from sae_lens_auxk.losses.record import AuxLossInputs
from sae_lens_auxk.saelens.names import SAE_TRAINING_CLASS_REGISTRY, AbsTopK, TrainStepOutput
from sae_lens_auxk.step.inputs import UsableInput
from sae_lens_auxk.step.sparse import (
    SparseBatchTopK,
    SparseMatryoshka,
    SparseTopK,
    with_sparse_step,
)
from sae_lens_auxk.step.training import AuxTraining

# SAELens undoes a run-time normalisation once, in decode(). Matryoshka decodes once per level and
# fails the second time; Gated's own losses compare raw with normalised activations.
RUN_TIME_NORMALIZATIONS = ("constant_norm_rescale", "layer_norm")


@dataclass
class AuxKTopKTrainingSAEConfig(AuxConfig, TopKTrainingSAEConfig):  # type: ignore[misc]
    """``auxk-topk``: the fields of SAELens's TopKTrainingSAEConfig and of AuxConfig."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "auxk-topk"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return TopKSAEConfig


@with_sparse_step
class AuxKTopKTrainingSAE(SparseTopK, TopKTrainingSAE):  # type: ignore[misc]
    """TopK (Gao et al. 2024); saved for inference as SAELens's ``topk``."""


@dataclass
class AuxKBatchTopKTrainingSAEConfig(AuxConfig, BatchTopKTrainingSAEConfig):  # type: ignore[misc]
    """``auxk-batchtopk``: the fields of SAELens's BatchTopKTrainingSAEConfig and of AuxConfig."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "auxk-batchtopk"


@with_sparse_step
class AuxKBatchTopKTrainingSAE(SparseBatchTopK, BatchTopKTrainingSAE):  # type: ignore[misc]
    """BatchTopK (Bussmann et al. 2024); saved for inference as SAELens's ``jumprelu``."""


@dataclass
class AuxKMatryoshkaBatchTopKTrainingSAEConfig(AuxConfig, MatryoshkaBatchTopKTrainingSAEConfig):  # type: ignore[misc]
    """``auxk-matryoshka-batchtopk``: SAELens's Matryoshka fields and those of AuxConfig.

    ``use_matryoshka_aux_loss=False`` uses the residual of the whole SAE and all its dead latents.
    True sums one loss per level, each with the level's own residual, dead latents and ``k_aux``.
    """

    unsupported_normalizations: ClassVar[tuple[str, ...]] = RUN_TIME_NORMALIZATIONS

    @override
    @classmethod
    def architecture(cls) -> str:
        return "auxk-matryoshka-batchtopk"


@with_sparse_step
class AuxKMatryoshkaBatchTopKTrainingSAE(
    SparseMatryoshka, AuxKBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAE
):
    """Matryoshka BatchTopK (Bussmann et al. 2025); saved for inference as ``jumprelu``."""

    cfg: AuxKMatryoshkaBatchTopKTrainingSAEConfig  # type: ignore[assignment]

    @override
    def _levels(
        self,
        record: AuxLossInputs,
        feature_acts: torch.Tensor,
        inner: Sequence[torch.Tensor] | None,
    ) -> Iterator[AuxLossInputs]:
        if not self.cfg.use_matryoshka_aux_loss:
            yield record
            return
        if inner is None:
            with torch.no_grad():
                inner = [out for _, out in self._iterable_decode(feature_acts)]
        residuals = [record.x - out.detach() for out in inner]
        start = 0
        # The outermost level is the SAE itself, so its residual is already known.
        for end, residual in zip(
            self.cfg.matryoshka_widths, [*residuals, record.residual], strict=True
        ):
            dead = torch.zeros_like(record.dead)
            dead[start:end] = record.dead[start:end]
            yield replace(
                record,
                residual=residual,
                dead=dead,
                dead_bound=min(record.dead_bound, end - start),
                level=slice(start, end),
            )
            start = end


@dataclass
class AuxKAbsTopKTrainingSAEConfig(AuxConfig, AbsTopKTrainingSAEConfig):  # type: ignore[misc]
    """``auxk-abstopk``: the fields of SAELens's AbsTopKTrainingSAEConfig and of AuxConfig."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "auxk-abstopk"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return AbsTopKSAEConfig


@with_sparse_step
class AuxKAbsTopKTrainingSAE(SparseTopK, AbsTopKTrainingSAE):  # type: ignore[misc]
    """AbsTopK (arXiv 2510.00404); saved for inference as SAELens's ``abstopk``.

    Every variant measures how near a latent is to firing by ``|h|``, as does SAELens's own loss for
    this architecture, which takes the dead latents with the largest ``|h|`` and keeps their signs.
    """

    activation_class: ClassVar[type[torch.nn.Module]] = AbsTopK
    nearness = staticmethod(torch.abs)
    fire = staticmethod(torch.positive)


@dataclass
class AuxKJumpReLUTrainingSAEConfig(AuxConfig, JumpReLUTrainingSAEConfig):
    """``auxk-jumprelu``: the fields of SAELens's JumpReLUTrainingSAEConfig and of AuxConfig."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "auxk-jumprelu"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return JumpReLUSAEConfig


class AuxKJumpReLUTrainingSAE(AuxTraining, JumpReLUTrainingSAE):
    """JumpReLU (Rajamanoharan et al. 2024); saved for inference as SAELens's ``jumprelu``."""

    @override
    def firing_threshold(self, feature_acts: torch.Tensor) -> torch.Tensor:
        """(d_sae,): the learned thresholds, with their graph."""
        return self.threshold

    @override
    def initial_biases(self) -> dict[str, float]:
        return {"b_enc": 0.0, "threshold": self.cfg.jumprelu_init_threshold}

    @override
    def _dense_step(self, batch: UsableInput) -> TrainStepOutput:
        before = None if batch.counts else self.threshold.detach().clone()
        output = super()._dense_step(batch)
        if before is not None:  # SAELens's step raises negative thresholds to 0
            self.threshold.data.copy_(before)
        return output


@dataclass
class AuxKStandardTrainingSAEConfig(AuxConfig, StandardTrainingSAEConfig):
    """``auxk-standard``: the fields of SAELens's StandardTrainingSAEConfig and of AuxConfig."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "auxk-standard"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return StandardSAEConfig


class AuxKStandardTrainingSAE(AuxTraining, StandardTrainingSAE):
    """ReLU with an L1 penalty; saved for inference as SAELens's ``standard``."""


@dataclass
class AuxKGatedTrainingSAEConfig(AuxConfig, GatedTrainingSAEConfig):
    """``auxk-gated``: the fields of SAELens's GatedTrainingSAEConfig and of AuxConfig."""

    unsupported_normalizations: ClassVar[tuple[str, ...]] = RUN_TIME_NORMALIZATIONS

    @override
    @classmethod
    def architecture(cls) -> str:
        return "auxk-gated"

    @override
    def get_inference_config_class(self) -> type[SAEConfig]:
        return GatedSAEConfig


class AuxKGatedTrainingSAE(AuxTraining, GatedTrainingSAE):
    """Gated (Rajamanoharan et al. 2024); saved for inference as SAELens's ``gated``.

    ``h`` is SAELens's ``hidden_pre``: the magnitude path's pre-activation. A latent whose gate
    is closed gets its gradient through the weights that both paths share.
    """

    @override
    def initial_biases(self) -> dict[str, float]:
        return {"b_gate": 0.0, "b_mag": 0.0, "r_mag": 0.0}


ARCHITECTURES: dict[str, tuple[type[TrainingSAE[Any]], type[TrainingSAEConfig]]] = {
    config_class.architecture(): (training_class, config_class)
    for training_class, config_class in (
        (AuxKTopKTrainingSAE, AuxKTopKTrainingSAEConfig),
        (AuxKBatchTopKTrainingSAE, AuxKBatchTopKTrainingSAEConfig),
        (AuxKMatryoshkaBatchTopKTrainingSAE, AuxKMatryoshkaBatchTopKTrainingSAEConfig),
        (AuxKAbsTopKTrainingSAE, AuxKAbsTopKTrainingSAEConfig),
        (AuxKJumpReLUTrainingSAE, AuxKJumpReLUTrainingSAEConfig),
        (AuxKStandardTrainingSAE, AuxKStandardTrainingSAEConfig),
        (AuxKGatedTrainingSAE, AuxKGatedTrainingSAEConfig),
    )
}


def register_architectures() -> None:
    """Register with SAELens every architecture whose name is not taken yet."""
    for name, (training_class, config_class) in ARCHITECTURES.items():
        if name not in SAE_TRAINING_CLASS_REGISTRY:
            register_sae_training_class(name, training_class, config_class)
