"""Connects a SAELens training SAE with an auxiliary loss.

SAELens's trainer calls ``training_forward_pass`` once a step. :class:`AuxTraining` stands in front
of it: it makes the batch flat and finite, and takes the sparse step where that is SAELens's (on a
GPU maybe as a graph), else SAELens's own. In it ``_aux_loss`` counts dead latents, builds the
record that a loss may see, calls the loss by its name and multiplies it by the coefficient.

The data of one step travels in arguments: in :class:`~sae_lens_auxk.step.inputs.StepInput`. What
outlives a step are buffers, a few attributes that ``__init__`` sets (where in a run the SAE is, bad
rows, a bound on the dead, graphs), and what :mod:`~sae_lens_auxk.step.resampling` has drawn, which
waits for the optimizer's step.
"""

import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from sae_lens import TopKTrainingSAE
from typing_extensions import override

from sae_lens_auxk.losses.access import DenseAccess, LatentAccess
from sae_lens_auxk.losses.record import AuxLossInputs
from sae_lens_auxk.ops.encoder import unflatten
from sae_lens_auxk.saelens.names import TrainCoefficientConfig, TrainStepInput, TrainStepOutput
from sae_lens_auxk.step import never_compiled
from sae_lens_auxk.step.bias import initial_b_dec
from sae_lens_auxk.step.captured import CapturedStep
from sae_lens_auxk.step.dead import Counts, DeadCountAhead, count_tokens, fired_in_batch, soon_dead
from sae_lens_auxk.step.inputs import (
    BadRowWatch,
    SparseForward,
    StepInput,
    UsableInput,
    precise,
    targets_of,
)
from sae_lens_auxk.step.resampling import Resampling

if TYPE_CHECKING:
    from sae_lens import TrainingSAE

    _Base = TrainingSAE[Any]
else:
    _Base = object

AUX_LOSS_KEY = "aux_loss"
SAELENS_AUX_LOSS_KEY = "auxiliary_reconstruction_loss"
SOON_DEAD = "soon_dead"  # a metric of no one but the next steps


class AuxTraining(Resampling, Counts, _Base):
    """Mixin placed before a SAELens training SAE; see the module docstring.

    ``training_forward_pass`` adds to the output ``losses["aux_loss"]``, with its coefficient (for
    the TopK family under SAELens's key ``"auxiliary_reconstruction_loss"`` too), and the metrics
    ``dead_latents``, ``dead_fraction``, ``aux_coefficient``, ``k_aux_used`` (dead latents that the
    loss may use in a row), ``revived_latents`` (dead before the batch, active in it) and
    ``nonfinite_rows``. With resampling there is ``resampled_latents`` too, a function that SAELens
    calls when it logs: how many since it was called last.
    """

    moved_by_step: ClassVar[tuple[str, ...]] = ()
    """Buffers that SAELens's step rebinds, put back where a step must change nothing."""

    record_class: ClassVar[type[AuxLossInputs]] = AuxLossInputs

    trainer_class: ClassVar[type[Any] | None] = None
    """The subclass of SAELens's SAETrainer that a trainer of this SAE becomes, or None."""

    def __init__(self, cfg: Any, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)
        self._bad_rows = BadRowWatch()
        self._dead_count_ahead = DeadCountAhead()
        self._captured = CapturedStep()
        self._steps_before_run = 0
        self._b_dec_is_set = False
        self.register_load_state_dict_post_hook(_forget)

    # --- a step ------------------------------------------------------------------------------

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """SAELens's training step, on an input of any leading shape (..., d_in).

        A row with a NaN, an infinity or a norm above 4e9 (in float32) is replaced by a usable row
        of the batch, not counted as a token, and reported by a warning and the metric
        ``nonfinite_rows``. A batch with no usable row has a gradient of zero and leaves the counts
        and thresholds alone. (Under ``constant_norm_rescale`` a row of zeros counts as bad too.) In
        eval mode the step counts, draws and moves nothing.

        Raises:
            ValueError: the batch is empty, has no usable row at the first step of a run, or the
                parameters are float16.
        """
        batch = self._prepare(step_input)
        self._begin(batch)
        output = self._replayed(batch) if batch.sae_in.is_cuda else None
        if output is None:
            output = self._step(batch)
        self._note(batch, output)
        if self.cfg.resample_every_steps is not None:
            self.draw_new_latents(batch, output)
        return self._finish(batch, output)

    @never_compiled
    def _prepare(self, step_input: TrainStepInput) -> StepInput:
        """The batch, flat, with all that the host decides of its step."""
        if self.W_dec.dtype == torch.float16:
            raise ValueError(
                "dtype='float16' is not allowed: the squares of a step exceed its range. It must "
                "be float32, bfloat16 or float64 (bfloat16 autocast may be on)."
            )
        if not self.training and torch.is_grad_enabled():
            # Without a number, so that Python shows it once.
            warnings.warn(
                "training_forward_pass in eval mode, with gradients on: the step counts no tokens, "
                "and its latents cannot die. Call sae.train() to train, torch.no_grad() to measure",
                stacklevel=3,
            )
        step = self._step_of_run(step_input)
        n_row_dims = 2 if self.hook_z_reshaping_mode else 1
        mode, dtype = self.cfg.normalize_activations, precise(self.dtype)
        batch = StepInput.of(step_input, n_row_dims, mode, dtype, step, counts=self.training)
        # SAELens's scheduler warms it up; a loop without one passes none.
        alpha = batch.coefficients.get(AUX_LOSS_KEY, self.cfg.resolved_aux_coefficient)
        batch.coefficient = alpha * self.cfg.aux_decay_at(step)
        batch.dead_bound = self._dead_bound(batch) if batch.coefficient else 0
        batch.aux_rows = self._aux_rows(len(batch.sae_in), step)
        return batch

    @never_compiled
    def _begin(self, batch: StepInput) -> None:
        """Drop what an earlier step has drawn; give b_dec its first value if a run begins."""
        if not batch.counts:
            return
        if self.drawn is not None:
            self.drop_drawn(batch.step)
        if batch.n_training_steps == 0:
            usable = batch.with_usable_rows()
            if not usable.n_tokens:
                raise ValueError(
                    "no row of the first training batch is finite and has a reasonable norm: the "
                    "activations hold NaN or infinity, or the statistics that SAELens estimated "
                    f"for normalize_activations={batch.mode!r} do"
                )
            if self.cfg.b_dec_init != "zeros" and not self._b_dec_is_set:
                rows = usable.sae_in.flatten(1).to(self.dtype)
                rows = self.run_time_activation_norm_fn_in(rows)
                self.b_dec.data.copy_(initial_b_dec(rows, self.cfg.b_dec_init))
        self._b_dec_is_set = True

    @never_compiled
    def _replayed(self, batch: StepInput) -> TrainStepOutput | None:
        """The step from a captured graph; None where there is none."""
        return self._captured.step(self, batch)

    def _step(self, given: StepInput) -> TrainStepOutput:
        """The sparse step where that is SAELens's, else SAELens's own.

        The sparse one is a function of tensors, so that it can be captured: no shape and no branch
        depends on a value on the device, and buffers are written in place.
        """
        batch = given.with_usable_rows()
        buffers = {name: getattr(self, name) for name in self.moved_by_step}
        before = {name: buffer.clone() for name, buffer in buffers.items()}
        sparse = self._sparse_forward(batch)
        output = self._dense_step(batch) if sparse is None else self._sparse_step(batch, sparse)
        some = batch.n_tokens > 0
        for name, buffer in buffers.items():
            moved = torch.where(some & batch.counts, getattr(self, name), before[name])
            setattr(self, name, buffer.copy_(moved))  # SAELens's step rebinds it
            output.metrics[name] = moved
        output.loss = output.loss * some
        output.metrics["nonfinite_rows"] = len(batch.is_token) - batch.n_tokens
        return output

    def _sparse_forward(self, batch: UsableInput) -> SparseForward | None:  # noqa: ARG002
        """What a sparse step computes before its losses; None if the step has to be dense."""
        return None

    @never_compiled
    def _sparse_step(self, batch: UsableInput, forward: SparseForward) -> TrainStepOutput:
        losses = {"mse_loss": forward.mse(forward.sae_out)}
        losses[AUX_LOSS_KEY], metrics = self._aux_loss(
            batch, forward.acts, forward.access, forward.sae_out, [*forward.inner.values()]
        )
        losses.update(forward.inner_losses())
        output = forward.output(batch, losses, metrics)
        self._after_sparse_step(output)
        return output

    def _after_sparse_step(self, output: TrainStepOutput) -> None:
        """What SAELens's step of the architecture does after its losses."""

    def _dense_step(self, batch: UsableInput) -> TrainStepOutput:
        """SAELens's own step, which calls ``calculate_aux_loss``."""
        output = super().training_forward_pass(batch)
        output.metrics.update(batch.metrics)
        return output

    @override
    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: torch.Tensor,
        hidden_pre: torch.Tensor,
        sae_out: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """Return the architecture's own losses and ``aux_loss``.

        SAELens's TopK loss (``auxiliary_reconstruction_loss``) is replaced, and the methods that
        compute it are not called; the losses of the other architectures stay.
        """
        losses: dict[str, torch.Tensor] = {}
        if not isinstance(self, TopKTrainingSAE):
            own = super().calculate_aux_loss(  # pyright: ignore[reportAbstractUsage]
                step_input, feature_acts, hidden_pre, sae_out
            )
            assert isinstance(own, dict)
            losses.update(own)

        if not isinstance(step_input, UsableInput):
            raise TypeError(
                "calculate_aux_loss needs the input that training_forward_pass of this package "
                "prepares: an override of training_forward_pass must call "
                "super().training_forward_pass(step_input)"
            )
        rescaled = getattr(self.cfg, "rescale_acts_by_decoder_norm", False)
        access = DenseAccess(hidden_pre, self.W_dec, rescaled, self.nearness)
        losses[AUX_LOSS_KEY], metrics = self._aux_loss(step_input, feature_acts, access, sae_out)
        step_input.metrics.update(metrics)
        return losses

    def _finish(self, batch: StepInput, output: TrainStepOutput) -> TrainStepOutput:
        """The output in the shape that the input had."""
        output.metrics["aux_coefficient"] = batch.coefficient
        if isinstance(self, TopKTrainingSAE) and AUX_LOSS_KEY in output.losses:
            # For the log only, so that it overlays the curve of SAELens's own TopK family. The
            # total is already summed, so the loss is not counted twice.
            output.losses[SAELENS_AUX_LOSS_KEY] = output.losses[AUX_LOSS_KEY]
        if len(batch.leading) != 1:
            for name in ("sae_in", "sae_out", "feature_acts", "hidden_pre"):
                setattr(output, name, unflatten(getattr(output, name), batch.leading))
        return output

    # --- what an architecture says about itself ----------------------------------------------

    # torch's own functions, so that nothing on a step's way calls back into this file.
    nearness = staticmethod(torch.positive)
    """How near to firing pre-activations (...) are: ``h`` itself, as the same object."""

    fire = staticmethod(torch.relu)
    """The activations of selected pre-activations (...)."""

    def firing_threshold(self, feature_acts: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """What the nearness must exceed for a latent to fire, broadcastable to (B, d_sae)."""
        return torch.zeros((), device=self.W_dec.device)

    def _levels(
        self,
        record: AuxLossInputs,
        feature_acts: torch.Tensor,  # noqa: ARG002
        inner: Sequence[torch.Tensor] | None,  # noqa: ARG002
    ) -> Iterator[AuxLossInputs]:
        """The inputs whose losses are summed: one, or one per level for Matryoshka."""
        yield record

    # --- the auxiliary loss ------------------------------------------------------------------

    # The number of dead latents is a shape here and changes at every step, so a compiled version
    # would be recompiled each time.
    @never_compiled
    def _aux_loss(
        self,
        batch: UsableInput,
        feature_acts: torch.Tensor,
        access: LatentAccess,
        sae_out: torch.Tensor,
        inner: Sequence[torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Count the batch; return the weighted auxiliary loss and the step's metrics.

        Args:
            batch: the batch.
            feature_acts: (B, d_sae) the activations, dense or sparse COO.
            access: gives ``h`` and ``W_i``.
            sae_out: (B, d_in) the reconstruction.
            inner: (B, d_in) each, Matryoshka's inner reconstructions, if known.
        """
        aux, rows = self.cfg.aux_loss, batch.aux_rows
        dead, revived = self._count(batch, feature_acts)
        n_dead = dead.sum()
        metrics = {
            "dead_latents": n_dead,
            "dead_fraction": n_dead / dead.numel(),
            "k_aux_used": 0,
            "revived_latents": revived,
        }
        if n_dead.is_cuda and batch.counts and self.cfg.resolved_dead_criterion == "tokens":
            threshold = self.cfg.resolved_dead_threshold_tokens
            metrics[SOON_DEAD] = soon_dead(self.tokens_since_fired, threshold, len(batch.sae_in))
        bound = int(n_dead) if batch.dead_bound is None else batch.dead_bound
        loss = sae_out.new_zeros(())
        if bound == 0:
            return loss, metrics
        record = self._record(batch, feature_acts, access, sae_out, dead, bound)
        for level in self._levels(record, feature_acts, inner):
            seen = level if rows is None else level.at_rows(rows)
            if aux.uses_dead_latents and not aux.sync_free and not len(seen.dead_latents):
                continue
            value = aux.function(seen, self.cfg)
            if aux.uses_dead_latents:
                value = value.where(seen.n_dead > 0, 0)
            loss = loss + batch.coefficient * value
            n_used = seen.n_dead
            if aux.uses_k_aux:
                n_used = n_used.clamp(max=self.cfg.resolved_k_aux)
            metrics["k_aux_used"] += n_used
        return loss, metrics

    def _aux_rows(self, n_rows: int, step: int) -> torch.Tensor | None:
        """The rows of the batch that the auxiliary loss sees (m,), or None for all of them.

        A random sample without replacement, the same in a resumed run.
        """
        if self.cfg.aux_batch_fraction == 1:
            return None
        device = self.W_dec.device
        generator = torch.Generator(device).manual_seed(step)
        n_used = max(1, round(self.cfg.aux_batch_fraction * n_rows))
        return torch.randperm(n_rows, generator=generator, device=device)[:n_used]

    @torch.no_grad()
    def _count(
        self, batch: UsableInput, feature_acts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Count the batch; return the dead latents (d_sae,) and how many were revived."""
        criterion = self.cfg.resolved_dead_criterion
        threshold = self.cfg.resolved_dead_threshold_tokens if criterion == "tokens" else 1
        fired = fired_in_batch(feature_acts) & (batch.n_tokens > 0)
        was_dead = self.tokens_since_fired >= threshold
        if batch.counts:
            count_tokens(self.tokens_since_fired, fired, batch.n_tokens)
        match criterion:
            case "tokens":
                dead = self.tokens_since_fired >= threshold
            case "steps":
                dead = batch.dead_neuron_mask
                was_dead = dead = torch.zeros_like(fired) if dead is None else dead
            case _:
                dead = ~fired
        return dead, (was_dead & fired).sum()

    def _dead_bound(self, batch: StepInput) -> int | None:
        """An upper bound on the number of dead latents that the step will see, known beforehand.

        None: their number has to be read, which waits for the device. On CUDA the first two steps
        do so, one with more rows than before, one in eval mode, and all steps with
        ``dead_criterion="steps"``, which uses SAELens's mask.
        """
        if not self.cfg.aux_loss.uses_dead_latents:
            return self.cfg.d_sae
        criterion = self.cfg.resolved_dead_criterion
        if batch.sae_in.is_cuda and criterion == "batch":
            return self.cfg.d_sae
        if batch.sae_in.is_cuda and criterion == "tokens" and batch.counts:
            threshold, d_sae = self.cfg.resolved_dead_threshold_tokens, self.cfg.d_sae
            return self._dead_count_ahead.bound(threshold, len(batch.sae_in), d_sae)
        return None

    @never_compiled
    def _note(self, batch: StepInput, output: TrainStepOutput) -> None:
        """Pass on what later steps and warnings ask of this one."""
        metrics: dict[str, Any] = output.metrics
        count = metrics.pop(SOON_DEAD, None)
        if count is not None:
            threshold = self.cfg.resolved_dead_threshold_tokens
            self._dead_count_ahead.note(count, threshold, len(batch.sae_in))
        if batch.counts:
            self._bad_rows.count(metrics["nonfinite_rows"], batch.n_training_steps)

    def _record(
        self,
        batch: UsableInput,
        feature_acts: torch.Tensor,
        access: LatentAccess,
        sae_out: torch.Tensor,
        dead: torch.Tensor,
        dead_bound: int,
    ) -> AuxLossInputs:
        target = targets_of(batch.sae_in, sae_out, batch.mode, batch.dtype)
        return self.record_class(
            x=target.x,
            residual=target.residual,
            dead=dead,
            dead_bound=dead_bound,
            access=access,
            W_dec=self.W_dec,
            b_dec=self.b_dec,
            output_scale=target.scale,
            firing_threshold=lambda: self.firing_threshold(feature_acts),
            nearness=self.nearness,
            fire=self.fire,
            level=slice(None),
        )

    # --- schedules and checkpoints -----------------------------------------------------------

    @override
    def get_coefficients(self) -> dict[str, Any]:
        """SAELens's coefficients, and that of the auxiliary loss with its warm-up."""
        alpha = self.cfg.resolved_aux_coefficient
        own = TrainCoefficientConfig(alpha, self.cfg.aux_warm_up_steps)
        theirs = super().get_coefficients()  # pyright: ignore[reportAbstractUsage]
        return {**theirs, AUX_LOSS_KEY: own}

    def _step_of_run(self, step_input: TrainStepInput) -> int:
        """The step to use for schedules, the same in a resumed run.

        SAELens saves a checkpoint before it counts the last step, so its ``n_training_steps`` is
        one behind after resuming. The first step after loading a checkpoint determines the offset;
        a new run on loaded weights starts at step 0.
        """
        n_steps, before = step_input.n_training_steps, self._steps_before_run
        if n_steps == 0:
            before = 0
        elif self._loaded:
            before = int(self.training_steps) - n_steps
        step = n_steps + before
        if self.training:
            self._steps_before_run, self._loaded = before, False
            self.training_steps.fill_(step + 1)
        return step

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)
        self._bad_rows.report()


def _forget(sae: Any, incompatible_keys: Any) -> None:  # noqa: ARG001
    """Forget what belongs to the weights before a load."""
    sae._b_dec_is_set = True
    sae._dead_count_ahead = DeadCountAhead()
    sae._captured = CapturedStep()
    sae.drawn = None
