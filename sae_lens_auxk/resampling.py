"""Resampling: reset dead latents to inputs that are reconstructed badly.

Source: Bricken et al. 2023, "Towards Monosemanticity", appendix "Neuron Resampling". At given steps
each dead latent gets an input, drawn with a probability proportional to the square of its loss. A
direction of this input becomes the latent's decoder row and its encoder vector, its bias becomes 0,
and their Adam moments are reset.

The forward pass draws the inputs, since it has them and their losses, and passes the new weights on
in its output. They are applied after the optimizer's step, by :func:`put_in`, in every step of
SAELens's trainer (:func:`resample_in_every_trainer`).

Deviations from the source:

- The inputs are the rows of one batch (of all ranks under DistributedDataParallel), not 819,200.
- A row is drawn at most once. Latents that start from the same row, with equal moments, would get
  equal gradients and stay equal. If more latents are dead than rows can be drawn, the others wait
  for the next resampling. (dictionary_learning's StandardTrainer.resample_neurons does the same.
  SAELens had resampling until April 2024, see its #74, and drew with replacement.)
- The loss of a row is its squared error, without a sparsity penalty, as in SAELens's own.
- The direction is that of the row's residual, what the SAE does not reconstruct, not that of the
  row itself without ``b_dec``. The activations of a language model have a large part in common.
  SAELens's ``b_dec`` starts at 0 and takes thousands of steps to reach it, so the rows themselves
  all point the same way. New latents with their directions fire everywhere, and ruin the
  reconstruction for hundreds of steps (docs/resampling.md).
- The source's decoder rows have length 1 throughout. SAELens's rows have any length, so the new one
  gets the mean length of the living latents' rows. Its activations then compare with theirs as in
  the source, even if they are rescaled by that length.
- The source's new encoder vectors have 0.2 times the mean length of the living latents', so that
  they fire weakly. This also holds here for architectures in which each latent has its own firing
  threshold. In the TopK family a latent has to beat living ones, and with 0.2 none does
  (docs/resampling.md), so it gets their full mean length.
"""

import warnings
from typing import Any, NamedTuple

import torch
from sae_lens.training.sae_trainer import SAETrainer

from sae_lens_auxk.dead_latents import dead_on_all_ranks, fired_in_batch, ranks_of_step
from sae_lens_auxk.saelens import wrap_once
from sae_lens_auxk.sharded.latents import ALL_LATENTS, AllLatents
from sae_lens_auxk.targets import Targets

METRIC = "resampled_latents"

# Of torch's own optimizers. Others' are added by their names, not by their shapes: schedule-free
# ones keep a copy of the weights, "z", and 8-bit ones keep quantised moments.
MOMENTS = {
    *("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "momentum_buffer"),
    *("square_avg", "grad_avg", "acc_delta", "sum"),
}


class NewLatents(NamedTuple):
    """New weights for resampled latents.

    Attributes:
        latents: (n,) int64, each once.
        encoder: (n, d_in), their columns of W_enc.
        decoder: (n, d_in), their rows of W_dec.
    """

    latents: torch.Tensor
    encoder: torch.Tensor
    decoder: torch.Tensor


@torch.no_grad()
def new_latents(
    sae: Any, target: Targets, step_input: Any, feature_acts: torch.Tensor
) -> NewLatents | None:
    """Draw new weights for the dead latents of an SAE after a training step.

    Args:
        sae: one of this package's.
        target: the step's.
        step_input: an ``AuxStepInput``. Its step seeds the draw, so that a resumed run makes the
            same one.
        feature_acts: (B, d_sae) the step's activations, dense or sparse COO.

    Returns:
        See :func:`resampled`.
    """
    ranks = ranks_of_step()
    if sae.cfg.resolved_dead_criterion == "steps":
        dead = step_input.dead_neuron_mask  # from before this step
        if dead is None:  # on no rank: see agree_on_dead
            return None
        dead = dead & ~fired_in_batch(feature_acts, sae.by_magnitude)
        dead = dead if ranks is None else dead_on_all_ranks(dead, ranks)
    else:  # "batch", too: of the latents that are silent in one batch most are alive
        dead = sae.tokens_since_fired >= sae.cfg.resolved_dead_threshold_tokens
    residual = target.residual
    losses = residual.square().sum(dim=-1).where(step_input.usable.mask, 0)
    if ranks is not None:
        residual, losses = (_of_all_ranks(rows, ranks) for rows in (residual, losses))
    step, length = step_input.step, sae.resampled_length
    new = resampled(residual, losses, dead, sae.W_enc, sae.W_dec, length, step, sae.latents)
    sae.drawn_at = None if new is None else step
    return new


def warn_if_never_put_in(sae: Any, step: int) -> None:
    """Warn if an earlier step drew new latents and the training loop did not apply them."""
    if sae.drawn_at is not None and step > sae.drawn_at:
        sae.drawn_at = None
        # Without a number, so that Python shows it once.
        warnings.warn(
            "resample_every_steps is set, but this training loop resamples nothing: a loop that "
            "does not go through SAELens's SAETrainer.step must call "
            "sae_lens_auxk.resample(output, sae, optimizer) after the optimizer's step",
            stacklevel=2,
        )


def _of_all_ranks(rows: torch.Tensor, group: Any) -> torch.Tensor:
    """(N * ranks, ...): the ``rows`` (N, ...) of every rank of a process group, in their order."""
    parts = [torch.empty_like(rows) for _ in range(group.size())]
    torch.distributed.all_gather(parts, rows, group=group)
    return torch.cat(parts)


@torch.no_grad()
def resampled(
    residuals: torch.Tensor,
    losses: torch.Tensor,
    dead: torch.Tensor,
    W_enc: torch.Tensor,
    W_dec: torch.Tensor,
    encoder_length: float,
    seed: int,
    held: AllLatents = ALL_LATENTS,
) -> NewLatents | None:
    """Draw new weights for the dead latents; the first ones only, if rows run out.

    This waits for the device. The draw itself is made on the CPU, so that it is the same on every
    device and rank.

    Args:
        residuals: (N, d_in) what the SAE does not reconstruct of each row.
        losses: (N,) >= 0; a row of loss 0 is not drawn.
        dead: (d_sae,) bool.
        W_enc: (d_in, n) the columns of the latents that this process holds.
        W_dec: (n, d_in) their rows.
        encoder_length: length of a new encoder vector, relative to the living latents' mean length.
        seed: of the draw.
        held: which latents these are.

    Returns:
        The weights, or None if no latent is dead or no row can be drawn.
    """
    norms = residuals.norm(dim=-1, keepdim=True)
    can_be_drawn = (norms.squeeze(1) > 0) & losses.isfinite()
    drawable = losses.where(can_be_drawn, 0).cpu().double()  # MPS has no float64
    # Without the quotient a square may overflow. All NaN where no row can be drawn.
    probabilities = (drawable / drawable.max()).square()
    latents = dead.nonzero().squeeze(1)[: int((probabilities > 0).sum())]
    if len(latents) == 0:
        return None
    generator = torch.Generator().manual_seed(seed)
    drawn = probabilities.multinomial(len(latents), generator=generator).to(residuals.device)
    directions = (residuals / norms)[drawn]
    return NewLatents(
        latents,
        encoder=directions * encoder_length * _mean_length(W_enc.T, ~dead, residuals.dtype, held),
        decoder=directions * _mean_length(W_dec, ~dead, residuals.dtype, held),
    )


def _mean_length(
    rows: torch.Tensor, alive: torch.Tensor, dtype: torch.dtype, held: AllLatents
) -> torch.Tensor:
    """() the mean length of the living latents' vectors, or of all vectors if none is alive.

    ``rows`` (n, d_in) are the vectors that this process holds.
    """
    counts = alive if alive.any() else torch.ones_like(alive)
    lengths = torch.linalg.vector_norm(rows.to(dtype), dim=1)
    return held.sum(lengths.where(held.own(counts), 0).sum()) / counts.sum()


@torch.no_grad()
def put_in(new: NewLatents, sae: Any, optimizer: torch.optim.Optimizer) -> None:
    """Give an SAE its new latents: weights, optimizer state and counts of silence.

    Biases and thresholds get the values that they have in a new SAE. The optimizer's per-weight
    state (Adam's moments) becomes 0; its step count, which all weights of a parameter share, is
    kept. A new latent has the whole dead threshold to fire in. SAELens's own count of silent steps
    (``dead_criterion="steps"``) is not reset: it says when a latent last fired.

    Args:
        new: the latents.
        sae: one of this package's.
        optimizer: the optimizer of its parameters, after its step.

    Raises:
        ValueError: see :func:`moments_of`; nothing is changed in that case.
    """
    moments = moments_of(sae, optimizer)
    is_own, latents = sae.latents.own_among(new.latents)
    sae.W_enc.index_copy_(1, latents, new.encoder[is_own].T.to(sae.W_enc.dtype))
    sae.W_dec.index_copy_(0, latents, new.decoder[is_own].to(sae.W_dec.dtype))
    for name, value in sae.initial_biases().items():
        getattr(sae, name).index_fill_(0, latents, value)
    for moment, dim in moments:
        moment.index_fill_(dim, latents, 0)
    sae.tokens_since_fired.index_fill_(0, new.latents, 0)
    sae.drawn_at = None


def moments_of(sae: Any, optimizer: torch.optim.Optimizer) -> list[tuple[torch.Tensor, int]]:
    """The moments that an optimizer keeps for an SAE's latents, each with the latents' dimension.

    Raises:
        ValueError: the optimizer keeps anything else per weight.
    """
    moments: list[tuple[torch.Tensor, int]] = []
    for name in ("W_enc", "W_dec", *sae.initial_biases()):
        parameter = getattr(sae, name)
        for key, state in optimizer.state.get(parameter, {}).items():
            if not isinstance(state, torch.Tensor) or state.numel() == 1:
                continue  # a count of steps
            # Quantised tensors have a type of their own, or integers in them.
            plain = type(state) is torch.Tensor and state.is_floating_point()
            if key not in MOMENTS or not plain or state.shape != parameter.shape:
                raise ValueError(
                    f"resample_every_steps={sae.cfg.resample_every_steps} does not work with the "
                    f"optimizer {type(optimizer).__name__}, which keeps {key!r} {state.dtype} "
                    f"{tuple(state.shape)} of {name} {tuple(parameter.shape)}; allowed are "
                    f"floating-point moments of the parameter's shape: {sorted(MOMENTS)}"
                )
            moments.append((state, 1 if name == "W_enc" else 0))
    return moments


def resample(output: Any, sae: Any, optimizer: torch.optim.Optimizer) -> None:
    """Apply the new latents that a training step has drawn, if any, and count them.

    SAELens's trainer does this by itself. A training loop of your own calls it after the
    optimizer's step, with the output of ``training_forward_pass``.

    Args:
        output: the step's output, of any SAE; gets the metric ``resampled_latents``.
        sae: the SAE.
        optimizer: the optimizer of its parameters.

    Raises:
        ValueError: resampling is on and the optimizer keeps something that cannot be reset. This is
            raised at the first step, not at the first resampling. See :func:`moments_of`.
    """
    if _resamples(sae):
        moments_of(sae, optimizer)
    new = getattr(output, "new_latents", None)
    if new is not None:
        put_in(new, sae, optimizer)
        output.metrics[METRIC] = len(new.latents)


def _resamples(sae: Any) -> bool:
    return getattr(sae.cfg, "resample_every_steps", None) is not None


def resample_in_every_trainer() -> None:
    """Make SAELens's ``SAETrainer.step`` end with :func:`resample`, and log the count.

    The step is wrapped because a hook of the optimizer does not see the step's output. SAELens logs
    only some steps, so the log gets the sum since the previous entry. The sum is not in a
    checkpoint: a resumed run starts at 0.
    """

    def step(trainer_step: Any, self: Any, batch: torch.Tensor) -> Any:
        output = trainer_step(self, batch)
        resample(output, self.sae, self.optimizer)
        if _resamples(self.sae):
            before = getattr(self, "resampled_since_log", 0)
            self.resampled_since_log = before + output.metrics.get(METRIC, 0)
        return output

    def log(build_log: Any, self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        entries: dict[str, Any] = build_log(self, *args, **kwargs)
        if _resamples(self.sae):
            entries[f"metrics/{METRIC}"] = getattr(self, "resampled_since_log", 0)
            self.resampled_since_log = 0
        return entries

    wrap_once(SAETrainer, "step", step)
    wrap_once(SAETrainer, "build_train_step_log_dict", log)
