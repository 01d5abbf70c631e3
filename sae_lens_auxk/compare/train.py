"""Lockstep training: every SAE of a pass takes the same step at the same time."""

import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import ceil
from typing import Any

import torch
from sae_lens import SAETrainer, TrainingSAE, TrainingSAEConfig
from typing_extensions import override

from sae_lens_auxk.saelens.checkpoints import fold_scaling
from sae_lens_auxk.saelens.names import (
    MultiHookDataProvider,
    MultiSAETrainer,
    SAETrainerConfig,
    TrainStepOutput,
    get_sae_training_class,
)
from sae_lens_auxk.step.dead import count_tokens

N_POINTS = 100
"""Number of points in a history, and of steps whose time and memory are taken."""


def build_sae(config: TrainingSAEConfig, seed: int) -> TrainingSAE[Any]:
    """Build a new SAE. SAEs with the same shape and seed start from the same weights."""
    torch.manual_seed(seed)
    sae_class, _ = get_sae_training_class(config.architecture())
    return sae_class(config).to(config.device)


@dataclass
class TrainingLog:
    """The log of one SAE's training.

    Attributes:
        dead_after: number of silent samples after which a latent is dead.
        tokens_since_fired: (d_sae,) int64.
        ever_dead: (d_sae,) bool, latents that were dead at some time.
        alive_since: (d_sae,) int64, the training sample at which the latent last came back from
            the dead; 0 for one that never died.
        n_samples: number of samples counted.
        history: one list for each quantity, all of the same length.
        step_seconds: durations of the steps at the points of the history.
        step_bytes: CUDA memory of the same steps; empty on other devices.
    """

    dead_after: int
    tokens_since_fired: torch.Tensor
    ever_dead: torch.Tensor
    alive_since: torch.Tensor
    n_samples: int = 0
    history: dict[str, list[Any]] = field(
        default_factory=lambda: {
            name: []
            for name in ("samples", "dead_fraction", "explained_variance", "l0", "aux_loss")
        }
    )
    step_seconds: list[float] = field(default_factory=list[float])
    step_bytes: list[int] = field(default_factory=list[int])

    @classmethod
    def of(cls, sae: TrainingSAE[Any], dead_after: int) -> "TrainingLog":
        """An empty log for this SAE."""
        zeros = torch.zeros(sae.cfg.d_sae, dtype=torch.int64, device=sae.device)
        return cls(dead_after, zeros, zeros.bool(), zeros.clone())

    @property
    def dead(self) -> torch.Tensor:
        """(d_sae,) bool: silent for ``dead_after`` samples or more."""
        return self.tokens_since_fired >= self.dead_after

    def count(self, fired: torch.Tensor, n_samples: int) -> None:
        """Count a batch of ``n_samples`` rows; ``fired`` (d_sae,) bool says which latents fired."""
        self.n_samples += n_samples
        self.alive_since.masked_fill_(self.dead & fired, self.n_samples)
        count_tokens(self.tokens_since_fired, fired, n_samples)
        self.ever_dead |= self.dead

    @torch.no_grad()
    def write_point(self, output: TrainStepOutput, n_samples: int) -> None:
        """Add a point to the history.

        Raises:
            FloatingPointError: the loss is NaN or infinite.
        """
        if not torch.isfinite(output.loss):
            raise FloatingPointError(f"the loss is {output.loss.item()} at sample {n_samples}")
        x = output.sae_in.float()
        residual = (x - output.sae_out.float()).pow(2).sum()
        variance = (x - x.mean(0)).pow(2).sum()
        # The first name is this package's, the second that of SAELens's TopK family.
        aux_loss = output.losses.get("aux_loss")
        if aux_loss is None:
            aux_loss = output.losses.get("auxiliary_reconstruction_loss")
        acts = output.feature_acts
        active = acts._values() if acts.is_sparse else acts
        point = {
            "samples": n_samples,
            "dead_fraction": self.dead.float().mean().item(),
            "explained_variance": (1 - residual / variance).item(),
            "l0": (active != 0).sum().item() / x.shape[0],
            "aux_loss": None if aux_loss is None else float(aux_loss),
        }
        for name, value in point.items():
            self.history[name].append(value)


class LockstepTrainer(MultiSAETrainer):
    """SAELens's trainer of several SAEs, with a log for each, that survives a failing SAE.

    SAELens's loop has no hook for looking at a step, and it stops for all SAEs when one of them
    raises. So this class has its own loop around SAELens's public steps. An SAE that fails is
    left out of the rest of the training, and ``on_failure`` gets its name and the error. An SAE may
    have a learning rate of its own.
    """

    def __init__(
        self,
        cfg: SAETrainerConfig,
        saes: dict[str, TrainingSAE[Any]],
        hook_name: str,
        data_provider: MultiHookDataProvider,
        dead_after: int,
        learning_rates: Mapping[str, float],
        on_samples: Callable[[int], object],
        on_failure: Callable[[str, Exception], object],
    ):
        super().__init__(
            cfg=cfg,
            saes=saes,
            hook_names=dict.fromkeys(saes, hook_name),
            data_provider=data_provider,
        )
        # SAELens has one rate for all. One that a schedule ends with keeps its share of the rate.
        for name, lr in learning_rates.items():
            own = self.trainers[name].cfg
            own = replace(own, lr=lr, lr_end=(own.lr_end or 0.0) * lr / own.lr)
            self.trainers[name] = SAETrainer(own, saes[name], data_provider=iter(()))
        self.hook_name = hook_name
        self.logs = {name: TrainingLog.of(sae, dead_after) for name, sae in saes.items()}
        self._on_samples = on_samples
        self._on_failure = on_failure

    @override
    def fit(self) -> dict[str, TrainingSAE[Any]]:
        """Train to the end. Return the SAEs that did not fail, with any scaling folded in."""
        total = self.cfg.total_training_samples
        n_steps = ceil(total / self.cfg.train_batch_size_samples)
        every = ceil(n_steps / N_POINTS)
        self._estimate_scaling_factors()
        while self.n_training_samples < total and self.trainers:
            self._maybe_log_sparsity()  # this also restarts SAELens's count of firing rates
            batch = next(self.data_provider)[self.hook_name]
            self.n_training_samples += batch.shape[0]
            self.n_training_steps += 1
            is_point = self.n_training_steps % every == 0 or self.n_training_steps == n_steps
            for name, trainer in list(self.trainers.items()):
                with self._may_fail(name):
                    self._step(trainer, self.logs[name], batch, is_point)
            self._on_samples(batch.shape[0])
        for name, trainer in list(self.trainers.items()):
            with self._may_fail(name):
                # The loss of the last step was of the weights before it.
                if not all(p.isfinite().all() for p in trainer.sae.parameters()):
                    raise FloatingPointError("the weights are not finite after the last step")
                fold_scaling(self.saes[name], trainer.activation_scaler)
                trainer.set_final_sae_metadata()
        return self.saes

    @contextmanager
    def _may_fail(self, name: str) -> Generator[None]:
        try:
            yield
        # An error in one SAE must not cost the others, whatever it is.
        except Exception as error:
            self._on_failure(name, error)
            del self.trainers[name], self.saes[name]

    def _step(
        self, trainer: SAETrainer[Any, Any], log: TrainingLog, batch: torch.Tensor, is_point: bool
    ) -> None:
        if is_point:
            with _Cost(trainer, log):
                output = trainer.step(batch)
        else:
            output = trainer.step(batch)
        trainer.n_training_steps += 1
        # SAELens has just found the latents that fired: its count of steps is 0 for them.
        log.count(trainer.n_forward_passes_since_fired == 0, batch.shape[0])
        if is_point:
            log.write_point(output, self.n_training_samples)


class _Cost:
    """Takes the time of a step and, on CUDA, the memory that it needs.

    The memory is that of the SAE itself (weights, buffers, Adam's state) plus the peak of what
    the step allocates. Other memory in use on the device, such as other SAEs, does not count.
    """

    def __init__(self, trainer: SAETrainer[Any, Any], log: TrainingLog):
        self._trainer = trainer
        self._log = log
        self._device = trainer.sae.device
        self._start = 0.0
        self._bytes_before = 0

    def __enter__(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._bytes_before = torch.cuda.memory_allocated(self._device)
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._log.step_seconds.append(time.perf_counter() - self._start)
        if self._device.type == "cuda":
            on_top = torch.cuda.max_memory_allocated(self._device) - self._bytes_before
            self._log.step_bytes.append(on_top + _own_bytes(self._trainer))


def _own_bytes(trainer: SAETrainer[Any, Any]) -> int:
    """Bytes of an SAE's weights, its buffers and its optimizer's state."""
    state = (value for values in trainer.optimizer.state.values() for value in values.values())
    tensors = [*trainer.sae.parameters(), *trainer.sae.buffers(), *state]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
