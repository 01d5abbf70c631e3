"""The seam: where a SAELens training SAE meets an auxiliary loss.

SAELens's trainer calls ``training_forward_pass`` once a step, and that calls
``calculate_aux_loss``. :class:`AuxTraining` puts itself in front of both: it counts dead
latents, builds the record that a loss may see, calls the loss by its name and multiplies it
by the scheduled coefficient.
"""

import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import TopKTrainingSAE
from typing_extensions import override

from sae_lens_auxk.aux_losses import AuxLossInputs, DeadCriterion
from sae_lens_auxk.aux_losses.auxk import k_aux_of
from sae_lens_auxk.dead_latents import DeadCountAhead, count_tokens, fired_in_batch
from sae_lens_auxk.finite_rows import UsableRows, replace_rows, usable_rows
from sae_lens_auxk.latent_access import DenseAccess, LatentAccess

if TYPE_CHECKING:
    from sae_lens.saes.sae import TrainingSAE

    _Base = TrainingSAE[Any]
else:
    _Base = object

AUX_LOSS_KEY = "aux_loss"
STEPS_BETWEEN_NONFINITE_REPORTS = 100


_Method = TypeVar("_Method", bound=Callable[..., Any])


def never_compiled(method: _Method) -> _Method:
    """Leave a method out of ``torch.compile``: it runs as it is, between compiled parts."""
    return torch.compiler.disable(method)  # type: ignore[no-any-return]


class AuxTraining(_Base):
    """Mixin in front of a SAELens training SAE; see the module docstring.

    Buffers, both int64, in training checkpoints and not in the saved inference model:

    - ``tokens_since_fired`` (d_sae,): see :mod:`sae_lens_auxk.dead_latents`.
    - ``training_steps`` (): training steps taken, for the schedule of a resumed run.

    ``training_forward_pass`` adds to the output ``losses["aux_loss"]``, with its coefficient,
    and the metrics ``dead_latents``, ``dead_fraction``, ``aux_coefficient``, ``k_aux_used``
    (dead latents that the loss may use in a row), ``revived_latents`` (dead before the batch,
    active in it) and ``nonfinite_rows``.
    """

    tokens_since_fired: torch.Tensor
    training_steps: torch.Tensor

    def __init__(self, cfg: Any, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)
        device = self.W_dec.device
        self.register_buffer(
            "tokens_since_fired", torch.zeros(cfg.d_sae, dtype=torch.int64, device=device)
        )
        self.register_buffer("training_steps", torch.zeros((), dtype=torch.int64, device=device))
        self._dead_count_ahead = DeadCountAhead()
        self._steps_before_run = 0
        self._loaded = False
        self._nonfinite_rows: torch.Tensor | int = 0
        self._next_nonfinite_report = 0
        self._usable: UsableRows | None = None
        self._aux_metrics: dict[str, Any] = {}

    # --- the two methods of SAELens that this mixin is about ---------------------------------

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """SAELens's training step, on an input of any leading shape (..., d_in).

        A row with a NaN or infinity is replaced by a finite row of the batch, counts no token,
        and is reported by a warning and the metric ``nonfinite_rows``. A batch with no finite
        row has a gradient of zero and leaves the counts and thresholds alone; at the first
        step of a run it is a ValueError. (Under ``constant_norm_rescale`` a row of zeros is
        no better than a NaN.)
        """
        sae_in = step_input.sae_in
        # SAELens's Matryoshka and JumpReLU take 2-D input only, hence the flattening.
        batch_dims = sae_in.ndim - (2 if self.hook_z_reshaping_mode else 1)
        leading = sae_in.shape[:batch_dims]
        flat = sae_in.reshape(-1, *sae_in.shape[batch_dims:])
        usable = usable_rows(flat, self.cfg.normalize_activations)
        flat = replace_rows(flat, usable)
        self._usable = usable
        n_nonfinite = flat.shape[0] - usable.n
        self._watch_nonfinite_rows(n_nonfinite, usable, step_input.n_training_steps)

        output = super().training_forward_pass(replace(step_input, sae_in=flat))

        output.loss = output.loss * usable.some
        output.metrics.update(self._aux_metrics)
        output.metrics["nonfinite_rows"] = n_nonfinite
        self._usable = None
        if len(leading) != 1:
            for name in ("sae_in", "sae_out", "feature_acts", "hidden_pre"):
                setattr(output, name, _unflatten(getattr(output, name), leading))
        return output

    @override
    def calculate_aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: torch.Tensor,
        hidden_pre: torch.Tensor,
        sae_out: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        """The architecture's own losses, and ``aux_loss``.

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

        losses[AUX_LOSS_KEY] = self._aux_loss(step_input, feature_acts, hidden_pre, sae_out)
        return losses

    # --- what an architecture says about itself ----------------------------------------------

    def firing_threshold(self, feature_acts: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """What ``h`` must exceed for a latent to fire, broadcastable to (B, d_sae)."""
        return torch.zeros((), device=self.W_dec.device)

    def _access(self, hidden_pre: torch.Tensor) -> LatentAccess:
        """The way to ``h`` and ``W_i`` that an architecture has in this step."""
        rescaled = getattr(self.cfg, "rescale_acts_by_decoder_norm", False)
        return DenseAccess(hidden_pre, self.W_dec, rescaled)

    def _levels(
        self,
        record: AuxLossInputs,
        feature_acts: torch.Tensor,  # noqa: ARG002
    ) -> Iterator[AuxLossInputs]:
        """The records whose losses are added up: one, but for Matryoshka's levels."""
        yield record

    # --- its parts ---------------------------------------------------------------------------

    # The number of dead latents, a shape here, is another one at every step: compiled, this
    # would be compiled again and again.
    @never_compiled
    def _aux_loss(
        self,
        step_input: TrainStepInput,
        feature_acts: torch.Tensor,
        hidden_pre: torch.Tensor,
        sae_out: torch.Tensor,
    ) -> torch.Tensor:
        """Count the batch, and give the auxiliary loss with its coefficient; sets the metrics."""
        step = self._schedule_step(step_input)
        coefficient = self.cfg.aux_coefficient_at(step)
        dead, revived = self._update_dead_latents(step_input, feature_acts)
        n_dead = dead.sum()
        self._aux_metrics = {
            "dead_latents": n_dead,
            "dead_fraction": n_dead / dead.numel(),
            "aux_coefficient": coefficient,
            "k_aux_used": 0,
            "revived_latents": revived,
        }
        aux = self.cfg.aux_loss
        n_rows = feature_acts.shape[0]
        max_dead = self._max_dead(dead, n_rows) if aux.uses_dead_latents else dead.numel()
        loss = sae_out.new_zeros(())
        if coefficient == 0 or max_dead == 0:
            return loss
        record = self._record(step_input, feature_acts, hidden_pre, sae_out, dead, max_dead)
        rows = self._aux_rows(n_rows, step)
        for level in self._levels(record, feature_acts):
            seen = level if rows is None else level.at_rows(rows)
            n_used = level.dead.sum()
            loss = loss + coefficient * self._level_loss(seen, n_used)
            if aux.uses_k_aux:
                n_used = n_used.clamp(max=k_aux_of(self.cfg))
            self._aux_metrics["k_aux_used"] += n_used
        return loss

    def _level_loss(self, level: AuxLossInputs, n_dead: torch.Tensor) -> torch.Tensor:
        """The loss of one record, 0 where it needs dead latents and there are none."""
        aux = self.cfg.aux_loss
        if not aux.uses_dead_latents:
            return aux.function(level, self.cfg)
        if aux.by_mask:
            return aux.function(level, self.cfg).where(n_dead > 0, 0)
        if level.dead_latents.numel() == 0:
            return level.x.new_zeros(())
        return aux.function(level, self.cfg)

    def _aux_rows(self, n_rows: int, step: int) -> torch.Tensor | None:
        """The rows of the batch that the auxiliary loss sees (m,), or None for all of them.

        A random sample without repetition, the same again in a resumed run.
        """
        if self.cfg.aux_batch_fraction == 1:
            return None
        device = self.W_dec.device
        generator = torch.Generator(device).manual_seed(step)
        n_used = max(1, round(self.cfg.aux_batch_fraction * n_rows))
        return torch.randperm(n_rows, generator=generator, device=device)[:n_used]

    @torch.no_grad()
    def _update_dead_latents(
        self, step_input: TrainStepInput, feature_acts: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Count the batch; the dead latents (d_sae,), and how many were revived."""
        fired = fired_in_batch(feature_acts)
        n_tokens: int | torch.Tensor = feature_acts.shape[0]
        if self._usable is not None:
            n_tokens = self._usable.n
            fired = fired & self._usable.some
        criterion: DeadCriterion = self.cfg.resolved_dead_criterion
        threshold = self.cfg.dead_threshold_tokens if criterion == "tokens" else 1
        was_dead = self.tokens_since_fired >= threshold
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

    def _max_dead(self, dead: torch.Tensor, n_rows: int) -> int:
        """A number that the dead latents are no more than, called at every step if at all.

        An upper bound on CUDA, where the true number is not known yet.
        """
        match self.cfg.resolved_dead_criterion:
            case "tokens" if dead.is_cuda:
                bound = self._dead_count_ahead.at_most(n_rows)
                threshold = self.cfg.dead_threshold_tokens
                self._dead_count_ahead.note(self.tokens_since_fired, threshold, n_rows)
                return int(dead.sum()) if bound is None else bound
            case "batch" if dead.is_cuda:
                return dead.numel()
            case _:
                return int(dead.sum())

    def _record(
        self,
        step_input: TrainStepInput,
        feature_acts: torch.Tensor,
        hidden_pre: torch.Tensor,
        sae_out: torch.Tensor,
        dead: torch.Tensor,
        max_dead: int,
    ) -> AuxLossInputs:
        precise = torch.promote_types(self.dtype, torch.float32)
        d_in = self.cfg.d_in
        x = step_input.sae_in.detach().reshape(-1, d_in).to(precise)
        residual = x - sae_out.detach().reshape(-1, d_in)
        scale, shift = _output_units(x, self.cfg.normalize_activations)
        return AuxLossInputs(
            x=x if shift is None else x - shift,
            residual=residual,
            dead=dead,
            max_dead=max_dead,
            access=self._access(hidden_pre),
            W_dec=self.W_dec,
            b_dec=self.b_dec,
            output_scale=scale,
            firing_threshold=lambda: self.firing_threshold(feature_acts),
            d_sae=self.cfg.d_sae,
        )

    def _schedule_step(self, step_input: TrainStepInput) -> int:
        """The step that the coefficient's schedule is at, the same in a resumed run.

        SAELens saves a checkpoint before it counts the step that the checkpoint ends with, so
        its ``n_training_steps`` is one behind after resuming. The first step after loading a
        checkpoint finds out by how much; a new run on loaded weights starts at step 0.
        """
        if self._loaded:
            if step_input.n_training_steps > 0:
                self._steps_before_run = int(self.training_steps) - step_input.n_training_steps
            self._loaded = False
        step = step_input.n_training_steps + self._steps_before_run
        self.training_steps.fill_(step + 1)
        return step

    @never_compiled
    def _watch_nonfinite_rows(
        self, n_nonfinite: torch.Tensor, usable: UsableRows, step: int
    ) -> None:
        self._nonfinite_rows = self._nonfinite_rows + n_nonfinite
        if step == 0 and not usable.some:
            raise ValueError(
                "no row of the first training batch is finite: the activations hold NaN or "
                "infinity, or the statistics that SAELens estimated for normalize_activations="
                f"{self.cfg.normalize_activations!r} do"
            )
        # To look at a tensor is to wait for the device, so CUDA is looked at now and then.
        if step >= self._next_nonfinite_report or step == 0:
            reported = self._report_nonfinite_rows()
            if reported or n_nonfinite.is_cuda:
                self._next_nonfinite_report = step + STEPS_BETWEEN_NONFINITE_REPORTS

    def _report_nonfinite_rows(self) -> bool:
        total = int(self._nonfinite_rows)
        if total:
            warnings.warn(
                f"{total} rows of activations with a NaN or infinity so far; each was replaced "
                "by a finite row of its batch (a batch without any was skipped) and counted as "
                "no token",
                stacklevel=2,
            )
        return total > 0

    # --- checkpoints -------------------------------------------------------------------------

    @override
    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving(state_dict)
        self._report_nonfinite_rows()
        for name in _COUNTS:
            state_dict[name] = _to_bytes(state_dict[name])

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
                state_dict[name] = _from_bytes(state_dict[name])
            else:  # a checkpoint of SAELens's own architecture, to be trained on
                fresh = torch.zeros_like(getattr(self, name), device=state_dict["W_dec"].device)
                state_dict[name] = fresh


_COUNTS = ("tokens_since_fired", "training_steps")


def _to_bytes(count: torch.Tensor) -> torch.Tensor:
    """int64 (...) -> uint8 (..., 8).

    SAELens's loader casts every tensor of a checkpoint to the SAE's dtype, and bfloat16 holds
    no integer above 256 exactly. It does hold a byte.
    """
    return count.unsqueeze(-1).contiguous().view(torch.uint8)


def _from_bytes(count: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`_to_bytes`, from any dtype that holds a byte."""
    return count.to(torch.uint8).contiguous().view(torch.int64).squeeze(-1)


def _unflatten(x: torch.Tensor, leading: torch.Size) -> torch.Tensor:
    """(N, ...) -> (*leading, ...), also for the sparse COO that torch cannot reshape."""
    shape = (*leading, *x.shape[1:])
    if not x.is_sparse:
        return x.reshape(shape)
    x = x.coalesce()
    rows, *others = x.indices()
    unraveled = torch.unravel_index(rows, leading) if leading else ()
    return torch.sparse_coo_tensor(torch.stack([*unraveled, *others]), x.values(), shape)


def _output_units(
    x: torch.Tensor, normalize_activations: str
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(B, 1) factor and offset that SAELens's run-time normalisation gives the decoder's output.

    The two other modes of ``normalize_activations`` change the data before the SAE sees it.
    """
    if normalize_activations == "layer_norm":
        return x.std(dim=-1, keepdim=True), x.mean(dim=-1, keepdim=True)
    if normalize_activations == "constant_norm_rescale":
        return x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5, None
    return None, None
