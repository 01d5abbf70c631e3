"""SAELens's training run in many processes, which share one SAE."""

import tempfile
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from sae_lens import (
    LanguageModelSAERunnerConfig,
    LanguageModelSAETrainingRunner,
    SAETrainer,
    TrainingSAE,
    TrainingSAEConfig,
)
from typing_extensions import override

from sae_lens_auxk.files import write_json
from sae_lens_auxk.processes import require_same
from sae_lens_auxk.saelens.interruption import fit, noted_signals
from sae_lens_auxk.saelens.names import RUNNER_CFG_FILENAME
from sae_lens_auxk.sharded.data import GatheredBatches, load_position, save_position, share_data
from sae_lens_auxk.sharded.files import load_trainer_state, write_whole_optimizer_state
from sae_lens_auxk.sharded.sae import require_shardable, sharded_sae


class ShardedTrainingRunner(LanguageModelSAETrainingRunner):
    """``LanguageModelSAETrainingRunner`` for the processes of a process group.

    Every process creates one from the same config and calls ``run``. Each holds ``d_sae / N``
    latents and makes ``train_batch_size_tokens / N`` activations of each batch. Rank 0 alone writes
    files and logs, as one process would, except that Weights & Biases gets no evaluations, for
    which a process would need the whole SAE, and its histogram of decoder norms is that of rank 0's
    latents.
    """

    noted: Sequence[int] = ()
    """The signals that came to this process while it trained."""

    n_sparsity_samples: int = 0
    """The samples that the firing rates saved with the SAE are of."""

    def __init__(
        self,
        cfg: LanguageModelSAERunnerConfig[Any],
        override_dataset: Any = None,
        override_model: Any = None,
        group: Any = None,
    ):
        """
        Args:
            cfg: the config of the whole run. ``device`` is this process's.
            override_dataset: a data set instead of ``cfg.dataset_path``'s, the whole of it.
            override_model: a model instead of ``cfg.model_name``.
            group: the process group; None is the default one.

        Raises:
            ValueError: the config is not one of a run that can be shared among the processes, or
                is not the same in all of them.
        """
        self._group: Any = dist.group.WORLD if group is None else group
        require_same_run(cfg, self._group)
        require_shared_run(cfg, self._group.size())
        self._scratch = tempfile.TemporaryDirectory()
        cfg = self._of_rank(cfg)
        sae_cfg = TrainingSAEConfig.from_dict(cfg.get_training_sae_cfg_dict())
        sae = sharded_sae(sae_cfg, self._group)
        super().__init__(cfg, override_dataset, override_model, sae)
        share_data(self.activations_store, self._group)

    def _of_rank(self, cfg: LanguageModelSAERunnerConfig[Any]) -> LanguageModelSAERunnerConfig[Any]:
        """The config, changed so that only rank 0 logs and writes files."""
        if self._group.rank() == 0:
            return cfg
        cfg = copy(cfg)
        cfg.logger = replace(cfg.logger, log_to_wandb=False)
        cfg.verbose = False
        for name in ("checkpoint_path", "output_path"):
            if getattr(cfg, name) is not None:
                setattr(cfg, name, self._scratch.name)
        return cfg

    @override
    def run(self) -> TrainingSAE[Any]:
        # SAELens would read the whole checkpoint in every process.
        self._checkpoint, self.cfg.resume_from_checkpoint = self.cfg.resume_from_checkpoint, None
        with self._scratch:
            return super().run()

    @override
    def run_trainer_with_interruption_handling(
        self, trainer: SAETrainer[Any, Any]
    ) -> TrainingSAE[Any]:
        trainer.evaluator = None
        write_whole_optimizer_state(trainer)
        self.cfg.resume_from_checkpoint = self._checkpoint
        if self._checkpoint is not None:
            checkpoint = Path(self._checkpoint)
            load_trainer_state(trainer, checkpoint)
            self.sae.load_weights_from_checkpoint(checkpoint)
            load_position(self.activations_store, self._group, checkpoint)
        with noted_signals() as self.noted:
            batches = GatheredBatches(
                trainer.data_provider, self._group, self.cfg.device, told_to_stop=self.noted
            )
            trainer.data_provider = batches
            sae = fit(trainer, batches.all_told_to_stop)
        self.n_sparsity_samples = trainer.n_frac_active_samples
        return sae

    @override
    def save_checkpoint(self, checkpoint_path: Path | None) -> None:
        if checkpoint_path is None:
            return
        save_position(self.activations_store, self._group, self.cfg.device, checkpoint_path)
        if self._group.rank() == 0:
            # Last, as SAELens does: a checkpoint that has it is complete.
            write_json(checkpoint_path / RUNNER_CFG_FILENAME, self.cfg.to_dict())


OF_RANK_0 = ("checkpoint_path", "output_path", "logger", "verbose")
"""The fields of a run that only rank 0 uses. SAELens gives each process's ``checkpoint_path`` a
random ending."""

PATHS = ("model_name", "dataset_path", "cached_activations_path", "resume_from_checkpoint")
"""Fields of which only the last part counts: a node may have its own copy, in its own folder."""

DEVICES = ("device", "llm_device", "act_store_device", "sae.device")
"""Fields of which only the type counts, as ``cuda:0`` and ``cuda:1`` are two processes' own."""


def require_same_run(cfg: LanguageModelSAERunnerConfig[Any], group: Any) -> None:
    """Raise the same ValueError in every process if a field differs: rank, field, both values."""
    fields = cfg.to_dict()
    fields |= {f"sae.{name}": value for name, value in fields.pop("sae").items()}
    fields |= {name: torch.device(fields[name]).type for name in DEVICES}
    fields |= {name: fields[name] and Path(fields[name]).name for name in PATHS}
    require_same({name: fields[name] for name in fields if name not in OF_RANK_0}, group)


def require_shared_run(cfg: LanguageModelSAERunnerConfig[Any], n_processes: int) -> None:
    """Raise a ValueError that names what in a run's config cannot be shared among processes."""
    require_shardable(cfg.sae, n_processes)
    if cfg.from_pretrained_path is not None:
        raise ValueError(
            f"from_pretrained_path={cfg.from_pretrained_path!r} is not allowed with more than one "
            "process: it must be None (resume_from_checkpoint is allowed)."
        )
    if cfg.train_batch_size_tokens % n_processes:
        raise ValueError(
            f"train_batch_size_tokens={cfg.train_batch_size_tokens} cannot be shared among "
            f"{n_processes} processes: it must be a multiple of {n_processes}."
        )
