"""``auxk-abstopk``: TopK whose latents fire in both directions.

The ``k`` latents with the largest ``|h|`` of each row fire at ``h``, without a ReLU. SAELens has
had this architecture since 6.53; with an older version this file is not imported.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from sae_lens.saes.abstopk_sae import (
    AbsTopKSAE,
    AbsTopKSAEConfig,
    AbsTopKTrainingSAE,
    AbsTopKTrainingSAEConfig,
)
from sae_lens.saes.sae import SAEConfig
from typing_extensions import override

from sae_lens_auxk.aux_config import AuxConfig
from sae_lens_auxk.aux_training import AuxTraining
from sae_lens_auxk.inference_loading import InferenceFromCheckpoint
from sae_lens_auxk.ops.activations import smallest_active
from sae_lens_auxk.sparse_topk import SparseTopK


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


class AuxKAbsTopKTrainingSAE(SparseTopK, AuxTraining, AbsTopKTrainingSAE):  # type: ignore[misc]
    """AbsTopK (arXiv 2510.00404); saved for inference as SAELens's ``abstopk``.

    Every variant measures how near a latent is to firing by ``|h|``, as does SAELens's own loss for
    this architecture, which takes the dead latents with the largest ``|h|`` and keeps their signs.
    """

    by_magnitude: ClassVar[bool] = True

    @override
    def firing_threshold(self, feature_acts: torch.Tensor) -> torch.Tensor:
        """(B, 1): the smallest ``|a|`` of the active latents of each row, 0 where nothing fired."""
        return smallest_active(feature_acts, int(self.cfg.k), by_magnitude=True)


class AbsTopKFromCheckpoint(InferenceFromCheckpoint, AbsTopKSAE):
    plain_class = AbsTopKSAE
