"""Auxiliary losses against dead latents, as SAELens training architectures.

Importing the package registers seven architectures with SAELens: ``auxk-topk``,
``auxk-batchtopk``, ``auxk-matryoshka-batchtopk``, ``auxk-abstopk`` (where SAELens has ``abstopk``,
from 6.53 on), ``auxk-jumprelu``, ``auxk-standard`` and ``auxk-gated``. The fields of
:class:`AuxConfig` choose the auxiliary loss. SAEs saved for inference are plain SAELens SAEs.
"""

from importlib.metadata import version

from sae_lens_auxk.architectures import (
    ARCHITECTURES,
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
from sae_lens_auxk.aux_config import AuxConfig
from sae_lens_auxk.aux_losses.registry import AuxLossInputs, register_aux_loss
from sae_lens_auxk.fine_tuning import fine_tune_in_every_runner
from sae_lens_auxk.resampling import resample, resample_in_every_trainer
from sae_lens_auxk.run_length import fit_in_every_trainer
from sae_lens_auxk.runner import runner_config
from sae_lens_auxk.sharded.clipping import clip_by_all_in_every_trainer

__version__ = version("sae-lens-auxk")

__all__ = [
    "AuxConfig",
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
    "register_aux_loss",
    "resample",
    "runner_config",
]

if "auxk-abstopk" in ARCHITECTURES:
    from sae_lens_auxk.abstopk import (
        AuxKAbsTopKTrainingSAE,
        AuxKAbsTopKTrainingSAEConfig,
    )

    __all__ += ["AuxKAbsTopKTrainingSAE", "AuxKAbsTopKTrainingSAEConfig"]

register_architectures()
fit_in_every_trainer()
resample_in_every_trainer()
clip_by_all_in_every_trainer()
fine_tune_in_every_runner()
