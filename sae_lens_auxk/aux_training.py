"""Connects a SAELens training SAE with an auxiliary loss.

SAELens's trainer calls ``training_forward_pass`` once a step. :class:`AuxTraining` stands in front
of it: it flattens the batch, replaces bad rows, and passes the step on to SAELens's own step or to
a sparse one. Either calls ``_aux_loss``, which counts dead latents, builds the record that a loss
may see, calls the loss by its name and multiplies it by the scheduled coefficient.

The data of one step is passed in arguments: see :mod:`sae_lens_auxk.step_data`.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopKTrainingSAE
from typing_extensions import override

from sae_lens_auxk.aux_losses.registry import AuxLossInputs, DeadCriterion
from sae_lens_auxk.dead_latents import (
    DeadCountAhead,
    agree_on_dead,
    count_from_bytes,
    count_to_bytes,
    count_tokens,
    fired_in_batch,
    over_ranks,
    ranks_of_step,
)
from sae_lens_auxk.finite_rows import BadRowWatch, UsableRows, replace_rows, usable_rows
from sae_lens_auxk.latent_access import DenseAccess, LatentAccess
from sae_lens_auxk.ops.activations import unflatten
from sae_lens_auxk.resampling import NewLatents, new_latents, warn_if_never_put_in
from sae_lens_auxk.sharded.latents import ALL_LATENTS, AllLatents
from sae_lens_auxk.step_data import AuxStepInput, AuxStepOutput
from sae_lens_auxk.targets import Targets, targets_of

if TYPE_CHECKING:
    from sae_lens.saes.sae import TrainingSAE

    _Base = TrainingSAE[Any]
else:
    _Base = object

AUX_LOSS_KEY = "aux_loss"
SAELENS_AUX_LOSS_KEY = "auxiliary_reconstruction_loss"


_Method = TypeVar("_Method", bound=Callable[..., Any])


def never_compiled(method: _Method) -> _Method:
    """Exclude a method from ``torch.compile``: it runs uncompiled between compiled parts."""
    return torch.compiler.disable(method)  # type: ignore[no-any-return]


class AuxTraining(_Base):
    """Mixin placed before a SAELens training SAE; see the module docstring.

    Buffers, both int64, in training checkpoints and not in the saved inference model:

    - ``tokens_since_fired`` (d_sae,): see :mod:`sae_lens_auxk.dead_latents`.
    - ``training_steps`` (): training steps taken, for the schedule of a resumed run.

    ``training_forward_pass`` adds to the output ``losses["aux_loss"]``, with its coefficient (for
    the TopK family under SAELens's key ``"auxiliary_reconstruction_loss"`` too), and the metrics
    ``dead_latents``, ``dead_fraction``, ``aux_coefficient``, ``k_aux_used`` (dead latents that the
    loss may use in a row), ``revived_latents`` (dead before the batch, active in it) and
    ``nonfinite_rows``. :mod:`sae_lens_auxk.resampling` adds ``resampled_latents``.
    """

    tokens_since_fired: torch.Tensor
    training_steps: torch.Tensor

    by_magnitude: ClassVar[bool] = False
    """Whether latents fire in both directions: those with the largest ``|h|``, without a ReLU."""

    latents: AllLatents = ALL_LATENTS
    """Which latents this process holds."""

    resampled_length: ClassVar[float] = 0.2
    """Length of a resampled latent's encoder vector, relative to the mean of the living latents."""

    def __init__(self, cfg: Any, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)
        device = self.W_dec.device
        self.register_buffer(
            "tokens_since_fired", torch.zeros(cfg.d_sae, dtype=torch.int64, device=device)
        )
        self.register_buffer("training_steps", torch.zeros((), dtype=torch.int64, device=device))
        self._bad_rows = BadRowWatch()
        self._dead_count_ahead = DeadCountAhead()
        self._steps_before_run = 0
        self._loaded = False
        self.drawn_at: int | None = None  # step whose new latents are not applied yet

    # --- a step ------------------------------------------------------------------------------

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """SAELens's training step, on an input of any leading shape (..., d_in).

        A row with a NaN, an infinity or a norm above 4e9 is replaced by a usable row of the batch,
        not counted as a token, and reported by a warning and the metric ``nonfinite_rows``. A batch
        with no usable row has a gradient of zero and leaves the counts and thresholds alone.
        (Under ``constant_norm_rescale`` a row of zeros counts as bad too.)

        Raises:
            ValueError: the batch is empty, or has no usable row at the first step of a run.
        """
        sae_in = step_input.sae_in
        if sae_in.numel() == 0:
            raise ValueError(f"sae_in of shape {tuple(sae_in.shape)} has no row to train on.")
        # SAELens's Matryoshka and JumpReLU take 2-D input only, hence the flattening.
        batch_dims = sae_in.ndim - (2 if self.hook_z_reshaping_mode else 1)
        leading = sae_in.shape[:batch_dims]
        flat = sae_in.reshape(-1, *sae_in.shape[batch_dims:])
        precise = torch.promote_types(self.dtype, torch.float32)
        usable = usable_rows(flat, self.cfg.normalize_activations, precise)
        again = _in_backward_pass()
        if not again:
            self._count_bad_rows(usable, step_input.n_training_steps)
        step = self._schedule_step(step_input)
        if self.cfg.resolved_dead_criterion == "steps":
            agree_on_dead(step_input, self.cfg.d_sae)
        aux_input = AuxStepInput(**vars(step_input), usable=usable, again=again, step=step)
        aux_input.sae_in = replace_rows(flat, usable)

        plain = self._forward(aux_input)

        output = AuxStepOutput(**vars(plain), new_latents=self._new_latents(aux_input, plain))

        output.loss = output.loss * usable.some
        output.metrics["nonfinite_rows"] = usable.n_bad
        if isinstance(self, TopKTrainingSAE):
            # For the log only, so that it overlays the curve of SAELens's own TopK family. The
            # total is already summed, so the loss is not counted twice.
            output.losses[SAELENS_AUX_LOSS_KEY] = output.losses[AUX_LOSS_KEY]
        if len(leading) != 1:
            for name in ("sae_in", "sae_out", "feature_acts", "hidden_pre"):
                setattr(output, name, unflatten(getattr(output, name), leading))
        return output

    def _forward(self, step_input: AuxStepInput) -> TrainStepOutput:
        """Run the step on flat, finite input. SAELens's own step calls ``calculate_aux_loss``."""
        output = super().training_forward_pass(step_input)
        output.metrics.update(step_input.metrics)
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

        SAELens's TopK loss (``auxiliary_reconstruction_loss``) is replaced; the losses of the
        other architectures stay.
        """
        losses: dict[str, torch.Tensor] = {}
        if not isinstance(self, TopKTrainingSAE):
            own = super().calculate_aux_loss(  # pyright: ignore[reportAbstractUsage]
                step_input, feature_acts, hidden_pre, sae_out
            )
            assert isinstance(own, dict)
            losses.update(own)

        assert isinstance(step_input, AuxStepInput)
        rescaled = getattr(self.cfg, "rescale_acts_by_decoder_norm", False)
        access = DenseAccess(hidden_pre, self.W_dec, rescaled, self.by_magnitude)
        losses[AUX_LOSS_KEY], metrics = self._aux_loss(step_input, feature_acts, access, sae_out)
        step_input.metrics.update(metrics)
        return losses

    # --- what an architecture says about itself ----------------------------------------------

    def firing_threshold(self, feature_acts: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """What ``h``, or ``|h|``, must exceed to fire, broadcastable to (B, d_sae)."""
        return torch.zeros((), device=self.W_dec.device)

    def initial_biases(self) -> dict[str, float]:
        """Initial values of the per-latent parameters (d_sae,) other than the weights, by name."""
        return {"b_enc": 0.0}

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
        step_input: AuxStepInput,
        feature_acts: torch.Tensor,
        access: LatentAccess,
        sae_out: torch.Tensor,
        inner: Sequence[torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Count the batch; return the weighted auxiliary loss and the step's metrics.

        Args:
            step_input: the batch.
            feature_acts: (B, d_sae) the activations, dense or sparse COO.
            access: gives ``h`` and ``W_i``.
            sae_out: (B, d_in) the reconstruction.
            inner: (B, d_in) each, Matryoshka's inner reconstructions, if known.
        """
        step = step_input.step
        coefficient = self.cfg.aux_coefficient_at(step)
        dead, revived = self._update_dead_latents(step_input, feature_acts)
        n_dead = dead.sum()
        metrics = {
            "dead_latents": n_dead,
            "dead_fraction": n_dead / dead.numel(),
            "aux_coefficient": coefficient,
            "k_aux_used": 0,
            "revived_latents": revived,
        }
        aux = self.cfg.aux_loss
        n_rows = feature_acts.shape[0]
        bound = dead.numel()
        if aux.uses_dead_latents:
            bound = self._dead_bound(dead, n_rows, step_input.again)
        loss = sae_out.new_zeros(())
        if coefficient == 0 or bound == 0:
            return loss, metrics
        record = self._record(step_input, feature_acts, access, sae_out, dead, bound)
        rows = self._aux_rows(n_rows, step)
        for level in self._levels(record, feature_acts, inner):
            seen = level if rows is None else level.at_rows(rows)
            loss = loss + coefficient * aux(seen, self.cfg)
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
    def _update_dead_latents(
        self, step_input: AuxStepInput, feature_acts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Count the batch; return the dead latents (d_sae,) and how many were revived."""
        fired = fired_in_batch(feature_acts, self.by_magnitude) & step_input.usable.some
        n_tokens = step_input.usable.n
        if (ranks := ranks_of_step()) is not None:
            fired, n_tokens = over_ranks(fired, n_tokens, ranks)
        criterion: DeadCriterion = self.cfg.resolved_dead_criterion
        threshold = self.cfg.resolved_dead_threshold_tokens if criterion == "tokens" else 1
        was_dead = self.tokens_since_fired >= threshold
        if not step_input.again:
            count_tokens(self.tokens_since_fired, fired, n_tokens)
        match criterion:
            case "tokens":
                dead = self.tokens_since_fired >= threshold
            case "steps":
                dead = step_input.dead_neuron_mask
                was_dead = dead = torch.zeros_like(fired) if dead is None else dead
            case "batch":
                dead = ~fired
        return dead, (was_dead & fired).sum()

    def _dead_bound(self, dead: torch.Tensor, n_rows: int, again: bool) -> int:
        """An upper bound on the number of dead latents. Call it at every step or never.

        On CUDA, reading the exact number waits for the device. Only ``dead_criterion="steps"``,
        which uses SAELens's mask, does so. Under DistributedDataParallel every rank must have the
        same number of rows.
        """
        match self.cfg.resolved_dead_criterion:
            case "tokens" if self._knows_late():
                n_rows *= 1 if (ranks := ranks_of_step()) is None else ranks.size()
                ahead, threshold = self._dead_count_ahead, self.cfg.resolved_dead_threshold_tokens
                bound = ahead.latest if again else ahead.bound(n_rows)
                if not again:
                    ahead.note(self.tokens_since_fired, threshold, n_rows)
                return int(dead.sum()) if bound is None else bound
            case "batch" if self._knows_late():
                return dead.numel()
            case _:
                return int(dead.sum())

    def _knows_late(self) -> bool:
        return self.W_dec.is_cuda

    def _record(
        self,
        step_input: TrainStepInput,
        feature_acts: torch.Tensor,
        access: LatentAccess,
        sae_out: torch.Tensor,
        dead: torch.Tensor,
        dead_bound: int,
    ) -> AuxLossInputs:
        target = self._targets(step_input, sae_out)
        return AuxLossInputs(
            x=target.x,
            residual=target.residual,
            dead=dead,
            dead_bound=dead_bound,
            access=access,
            W_dec=self.W_dec,
            b_dec=self.b_dec,
            output_scale=target.scale,
            firing_threshold=lambda: self.firing_threshold(feature_acts),
            level=slice(None),
        )

    def _targets(self, step_input: TrainStepInput, sae_out: torch.Tensor) -> Targets:
        precise = torch.promote_types(self.dtype, torch.float32)
        return targets_of(step_input.sae_in, sae_out, self.cfg.normalize_activations, precise)

    @never_compiled
    def _new_latents(self, step_input: AuxStepInput, output: TrainStepOutput) -> NewLatents | None:
        """New weights for the dead latents if this step resamples them."""
        if step_input.again:
            return None
        warn_if_never_put_in(self, step_input.step)
        if not self.cfg.resamples_after(step_input.step):
            return None
        target = self._targets(step_input, output.sae_out)
        return new_latents(self, target, step_input, output.feature_acts)

    # --- schedules and checkpoints -----------------------------------------------------------

    @never_compiled
    def _schedule_step(self, step_input: TrainStepInput) -> int:
        """The step to use for schedules, the same in a resumed run.

        SAELens saves a checkpoint before it counts the last step, so its ``n_training_steps`` is
        one behind after resuming. The first step after loading a checkpoint determines the offset;
        a new run on loaded weights starts at step 0.
        """
        if self._loaded:
            if step_input.n_training_steps > 0:
                self._steps_before_run = int(self.training_steps) - step_input.n_training_steps
            self._loaded = False
        step = step_input.n_training_steps + self._steps_before_run
        self.training_steps.fill_(step + 1)
        return step

    @never_compiled
    def _count_bad_rows(self, usable: UsableRows, step: int) -> None:
        self._bad_rows.count(usable, step, self.cfg.normalize_activations)

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)
        self._bad_rows.report()
        for name in _COUNTS:
            state_dict[name] = count_to_bytes(state_dict[name])

    @override
    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving_inference(state_dict)
        for name in _COUNTS:
            del state_dict[name]

    @override
    def process_state_dict_for_loading(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_loading(state_dict)
        self._loaded = True
        self._dead_count_ahead = DeadCountAhead()
        for name in _COUNTS:
            if name in state_dict:
                state_dict[name] = count_from_bytes(state_dict[name])
            else:  # a checkpoint of SAELens's own architecture, to train further
                fresh = torch.zeros_like(getattr(self, name), device=state_dict["W_dec"].device)
                state_dict[name] = fresh


def _in_backward_pass() -> bool:
    """Whether autograd is running. A forward pass inside it means gradient checkpointing."""
    return torch._C._current_graph_task_id() != -1


_COUNTS = ("tokens_since_fired", "training_steps")
