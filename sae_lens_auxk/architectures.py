"""The architectures: SAELens's training SAEs joined with the auxiliary loss.

This file holds only what differs between architectures: the name, the inference architecture, and
what a pre-activation must exceed to fire. AbsTopK has its own file (:mod:`sae_lens_auxk.abstopk`),
since SAELens before 6.53 does not have it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from sae_lens.registry import (
    SAE_CLASS_REGISTRY,
    SAE_TRAINING_CLASS_REGISTRY,
    register_sae_class,
    register_sae_training_class,
)
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.gated_sae import (
    GatedSAE,
    GatedSAEConfig,
    GatedTrainingSAE,
    GatedTrainingSAEConfig,
)
from sae_lens.saes.jumprelu_sae import (
    JumpReLUSAE,
    JumpReLUSAEConfig,
    JumpReLUTrainingSAE,
    JumpReLUTrainingSAEConfig,
)
from sae_lens.saes.matryoshka_batchtopk_sae import (
    MatryoshkaBatchTopKTrainingSAE,
    MatryoshkaBatchTopKTrainingSAEConfig,
)
from sae_lens.saes.sae import SAE, SAEConfig, TrainingSAE, TrainingSAEConfig, TrainStepOutput
from sae_lens.saes.standard_sae import (
    StandardSAE,
    StandardSAEConfig,
    StandardTrainingSAE,
    StandardTrainingSAEConfig,
)
from sae_lens.saes.topk_sae import (
    TopKSAE,
    TopKSAEConfig,
    TopKTrainingSAE,
    TopKTrainingSAEConfig,
)
from typing_extensions import override

from sae_lens_auxk.aux_config import AuxConfig
from sae_lens_auxk.aux_losses.registry import AuxLossInputs
from sae_lens_auxk.aux_training import AuxTraining
from sae_lens_auxk.inference_loading import InferenceFromCheckpoint
from sae_lens_auxk.ops.activations import smallest_active
from sae_lens_auxk.sparse_topk import SparseBatchTopK, SparseMatryoshka, SparseTopK
from sae_lens_auxk.step_data import AuxStepInput

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


class AuxKTopKTrainingSAE(SparseTopK, AuxTraining, TopKTrainingSAE):  # type: ignore[misc]
    """TopK (Gao et al. 2024); saved for inference as SAELens's ``topk``."""

    @override
    def firing_threshold(self, feature_acts: torch.Tensor) -> torch.Tensor:
        """(B, 1): the smallest active ``h`` of each row, 0 where nothing fired."""
        return smallest_active(feature_acts, int(self.cfg.k))


@dataclass
class AuxKBatchTopKTrainingSAEConfig(AuxConfig, BatchTopKTrainingSAEConfig):  # type: ignore[misc]
    """``auxk-batchtopk``: the fields of SAELens's BatchTopKTrainingSAEConfig and of AuxConfig."""

    @override
    @classmethod
    def architecture(cls) -> str:
        return "auxk-batchtopk"


class AuxKBatchTopKTrainingSAE(  # type: ignore[misc]
    SparseBatchTopK, AuxTraining, BatchTopKTrainingSAE
):
    """BatchTopK (Bussmann et al. 2024); saved for inference as SAELens's ``jumprelu``."""

    @override
    def firing_threshold(self, feature_acts: torch.Tensor) -> torch.Tensor:
        """(): ``topk_threshold``, the moving average that inference will use."""
        return self.topk_threshold

    @override
    def _forward(self, step_input: AuxStepInput) -> TrainStepOutput:
        before = self.topk_threshold
        output = super()._forward(step_input)
        counts = step_input.usable.some & (not step_input.again)
        self.topk_threshold = torch.where(counts, self.topk_threshold, before)
        output.metrics["topk_threshold"] = self.topk_threshold
        return output


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


class _TopKFromCheckpoint(InferenceFromCheckpoint, TopKSAE):
    plain_class = TopKSAE


class _JumpReLUFromCheckpoint(InferenceFromCheckpoint, JumpReLUSAE):
    plain_class = JumpReLUSAE


class _StandardFromCheckpoint(InferenceFromCheckpoint, StandardSAE):
    plain_class = StandardSAE


class _GatedFromCheckpoint(InferenceFromCheckpoint, GatedSAE):
    plain_class = GatedSAE


ARCHITECTURES: dict[str, tuple[type[TrainingSAE[Any]], type[TrainingSAEConfig], type[SAE[Any]]]] = {
    config_class.architecture(): (training_class, config_class, inference_class)
    for training_class, config_class, inference_class in (
        (AuxKTopKTrainingSAE, AuxKTopKTrainingSAEConfig, _TopKFromCheckpoint),
        (AuxKBatchTopKTrainingSAE, AuxKBatchTopKTrainingSAEConfig, _JumpReLUFromCheckpoint),
        (
            AuxKMatryoshkaBatchTopKTrainingSAE,
            AuxKMatryoshkaBatchTopKTrainingSAEConfig,
            _JumpReLUFromCheckpoint,
        ),
        (AuxKJumpReLUTrainingSAE, AuxKJumpReLUTrainingSAEConfig, _JumpReLUFromCheckpoint),
        (AuxKStandardTrainingSAE, AuxKStandardTrainingSAEConfig, _StandardFromCheckpoint),
        (AuxKGatedTrainingSAE, AuxKGatedTrainingSAEConfig, _GatedFromCheckpoint),
    )
}

if "abstopk" in SAE_TRAINING_CLASS_REGISTRY:  # SAELens 6.53 and later
    from sae_lens_auxk.abstopk import (
        AbsTopKFromCheckpoint,
        AuxKAbsTopKTrainingSAE,
        AuxKAbsTopKTrainingSAEConfig,
    )

    ARCHITECTURES["auxk-abstopk"] = (
        AuxKAbsTopKTrainingSAE,
        AuxKAbsTopKTrainingSAEConfig,
        AbsTopKFromCheckpoint,
    )


def register_architectures() -> None:
    """Register with SAELens every architecture whose name is not taken yet."""
    for name, (training_class, config_class, inference_class) in ARCHITECTURES.items():
        if name not in SAE_TRAINING_CLASS_REGISTRY:
            register_sae_training_class(name, training_class, config_class)
        if name not in SAE_CLASS_REGISTRY:
            register_sae_class(name, inference_class, config_class)
