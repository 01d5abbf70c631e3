"""Auxiliary losses against dead latents, as SAELens training architectures.

Importing the package registers seven architectures with SAELens: ``auxk-topk``,
``auxk-batchtopk``, ``auxk-matryoshka-batchtopk``, ``auxk-abstopk``, ``auxk-jumprelu``,
``auxk-standard`` and ``auxk-gated``. The fields of :class:`AuxConfig` choose the auxiliary loss.
SAEs saved for inference are plain SAELens SAEs.
"""

from importlib.metadata import version

from sae_lens_auxk.architectures import (
    AuxKAbsTopKTrainingSAE,
    AuxKAbsTopKTrainingSAEConfig,
    AuxKBatchTopKTrainingSAE,
    AuxKBatchTopKTrainingSAEConfig,
    AuxKGatedTrainingSAE,
    AuxKGatedTrainingSAEConfig,
    AuxKJumpReLUTrainingSAE,
    AuxKJumpReLUTrainingSAEConfig,
    AuxKMatryoshkaBatchTopKTrainingSAE,
    AuxKMatryoshkaBatchTopKTrainingSAEConfig,
    AuxKStandardTrainingSAE,
    AuxKStandardTrainingSAEConfig,
    AuxKTopKTrainingSAE,
    AuxKTopKTrainingSAEConfig,
    register_architectures,
)
from sae_lens_auxk.config import AuxConfig
from sae_lens_auxk.losses.record import AuxLossInputs
from sae_lens_auxk.losses.registry import register_aux_loss
from sae_lens_auxk.saelens.patches import patch_saelens
from sae_lens_auxk.saelens.pretrained import load_pretrained
from sae_lens_auxk.saelens.runner_config import runner_config
from sae_lens_auxk.step.resampling import resample_with
from sae_lens_auxk.step.run import fit_to_run

__version__ = version("sae-lens-auxk")

__all__ = [
    "AuxConfig",
    "AuxKAbsTopKTrainingSAE",
    "AuxKAbsTopKTrainingSAEConfig",
    "AuxKBatchTopKTrainingSAE",
    "AuxKBatchTopKTrainingSAEConfig",
    "AuxKGatedTrainingSAE",
    "AuxKGatedTrainingSAEConfig",
    "AuxKJumpReLUTrainingSAE",
    "AuxKJumpReLUTrainingSAEConfig",
    "AuxKMatryoshkaBatchTopKTrainingSAE",
    "AuxKMatryoshkaBatchTopKTrainingSAEConfig",
    "AuxKStandardTrainingSAE",
    "AuxKStandardTrainingSAEConfig",
    "AuxKTopKTrainingSAE",
    "AuxKTopKTrainingSAEConfig",
    "AuxLossInputs",
    "load_pretrained",
    "register_aux_loss",
    "resample_with",
    "runner_config",
]

register_architectures()
patch_saelens(AuxConfig, fit_to_run)
