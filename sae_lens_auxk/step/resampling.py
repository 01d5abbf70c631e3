"""Resampling: reset dead latents to inputs that are reconstructed badly.

Source: Bricken et al. 2023, "Towards Monosemanticity", appendix "Neuron Resampling". At given steps
each dead latent gets an input, drawn with a probability proportional to the square of its loss. A
direction of this input becomes the latent's decoder row and its encoder vector, its bias becomes 0,
and their Adam moments are reset.

The forward pass draws the inputs, since it has them and their losses. The new weights wait on the
SAE and are put in by a hook of the optimizer, after its step: :func:`resample_with`. SAELens's
trainers get that hook when they are created.

Deviations from the source:

- The inputs are the rows of one batch, not 819,200.
- A row is drawn at most once. Latents that start from the same row, with equal moments, would get
  equal gradients and stay equal. If more latents are dead than rows can be drawn, the others wait
  for the next resampling. (dictionary_learning's StandardTrainer.resample_neurons does the same.
  SAELens had resampling until April 2024, see its #74, and drew with replacement.)
- The loss of a row is its squared error, without a sparsity penalty, as in SAELens's own.
- The direction is that of the row's residual, what the SAE does not reconstruct, not that of the
  row itself without ``b_dec``. The activations of a language model have a large part in common.
  SAELens's ``b_dec`` starts at 0 and takes thousands of steps to reach it, so the rows themselves
  all point the same way. New latents with their directions fire everywhere, and ruin the
  reconstruction for hundreds of steps (studies/resampling).
- The source's decoder rows have length 1 throughout. SAELens's rows have any length, so the new one
  gets the mean length of the living latents' rows. Its activations then compare with theirs as in
  the source, even if they are rescaled by that length.
- The source's new encoder vectors have 0.2 times the mean length of the living latents', so that
  they fire weakly. This also holds here for architectures in which each latent has its own firing
  threshold. In the TopK family a latent has to beat living ones, and with 0.2 none does
  (studies/resampling), so it gets their full mean length.
"""

import warnings
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch

from sae_lens_auxk.saelens.names import TrainStepOutput
from sae_lens_auxk.step import never_compiled
from sae_lens_auxk.step.dead import fired_in_batch
from sae_lens_auxk.step.inputs import StepInput, targets_of

if TYPE_CHECKING:
    from sae_lens import TrainingSAE

    _Base = TrainingSAE[Any]
else:
    _Base = object

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
        step: the training step that drew them.
    """

    latents: torch.Tensor
    encoder: torch.Tensor
    decoder: torch.Tensor
    step: int


class Resampling(_Base):
    """The part of a training SAE that draws new latents and puts them in."""

    tokens_since_fired: torch.Tensor

    resampled_length: ClassVar[float] = 0.2
    """Length of a resampled latent's encoder vector, relative to the mean of the living latents."""

    drawn: NewLatents | None = None
    """What a step has drawn, until the optimizer's step puts it in or the next forward drops it."""

    _n_resampled: int = 0

    @never_compiled
    def draw_new_latents(self, batch: StepInput, output: TrainStepOutput) -> None:
        """Draw new weights for the dead latents if this step resamples them."""
        if not batch.counts:
            return
        output.metrics[METRIC] = self._take_n_resampled
        if not self.cfg.resamples_after(batch.step):
            return
        if self.cfg.resolved_dead_criterion == "steps":
            dead = batch.dead_neuron_mask  # from before this step
            if dead is None:
                return
            dead = dead & ~fired_in_batch(output.feature_acts)
        else:  # "batch", too: of the latents that are silent in one batch most are alive
            dead = self.tokens_since_fired >= self.cfg.resolved_dead_threshold_tokens
        rows = batch.with_usable_rows()
        residual = targets_of(rows.sae_in, output.sae_out, batch.mode, batch.dtype).residual
        # Other rows repeat one of these, and latents drawn from equal rows would stay equal.
        losses = residual.square().sum(dim=-1).where(rows.is_token, 0)
        lengths = self.mean_lengths(~dead)
        self.drawn = resampled(residual, losses, dead, lengths, self.resampled_length, batch.step)

    @torch.no_grad()
    def mean_lengths(self, alive: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """() each, the mean length of the latents' encoder vectors and decoder rows.

        Args:
            alive: (d_sae,) bool, the latents to count; all if there is none.
        """
        counts = alive if alive.any() else torch.ones_like(alive)
        encoder, decoder = self.sums_of_lengths(counts)
        return encoder / counts.sum(), decoder / counts.sum()

    def sums_of_lengths(self, among: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """() each, the summed lengths of encoder vectors and decoder rows of some (d_sae,) bool."""
        return sum_of_lengths(self.W_enc.T, among), sum_of_lengths(self.W_dec, among)

    @torch.no_grad()
    def put_in(self, new: NewLatents, optimizer: torch.optim.Optimizer) -> None:
        """Give the SAE its new latents: weights, optimizer state and counts of silence.

        Biases and thresholds get the values that they have in a new SAE. The optimizer's per-weight
        state (Adam's moments) becomes 0; its step count, which all weights of a parameter share, is
        kept. A new latent has the whole dead threshold to fire in. SAELens's own count of silent
        steps (``dead_criterion="steps"``) is not reset: it says when a latent last fired.

        Args:
            new: the latents.
            optimizer: the optimizer of the SAE's parameters, after its step.

        Raises:
            ValueError: see :func:`moments_of`; nothing is changed in that case.
        """
        moments = moments_of(self, optimizer)
        self._write(new, moments)
        self.tokens_since_fired.index_fill_(0, new.latents, 0)
        self._n_resampled += len(new.latents)

    def _write(self, new: NewLatents, moments: list[tuple[torch.Tensor, int]]) -> None:
        """Write the weights of new latents, and 0 to their moments."""
        self.W_enc.index_copy_(1, new.latents, new.encoder.T.to(self.W_enc.dtype))
        self.W_dec.index_copy_(0, new.latents, new.decoder.to(self.W_dec.dtype))
        for name, value in self.initial_biases().items():
            getattr(self, name).index_fill_(0, new.latents, value)
        for moment, dim in moments:
            moment.index_fill_(dim, new.latents, 0)

    def initial_biases(self) -> dict[str, float]:
        """Initial values of the per-latent parameters (d_sae,) other than the weights, by name."""
        return {"b_enc": 0.0}

    def drop_drawn(self, step: int) -> None:
        """Forget what was drawn, as no optimizer's step came; warn if it was an earlier step's."""
        drawn, self.drawn = self.drawn, None
        if drawn is not None and drawn.step < step:
            # Without a number, so that Python shows it once.
            warnings.warn(
                "resample_every_steps is set, but this training loop resamples nothing: a loop "
                "that does not use SAELens's SAETrainer, or gives it another optimizer, must call "
                "sae_lens_auxk.resample_with(sae, optimizer) once",
                stacklevel=4,
            )

    def _take_n_resampled(self) -> int:
        """How many latents were resampled since this was called last."""
        n, self._n_resampled = self._n_resampled, 0
        return n


@torch.no_grad()
def resampled(
    residuals: torch.Tensor,
    losses: torch.Tensor,
    dead: torch.Tensor,
    lengths: tuple[torch.Tensor, torch.Tensor],
    encoder_length: float,
    step: int,
) -> NewLatents | None:
    """Draw new weights for the dead latents; the first ones only, if rows run out.

    This waits for the device. The draw itself is made on the CPU, so that it is the same on every
    device.

    Args:
        residuals: (N, d_in) what the SAE does not reconstruct of each row.
        losses: (N,) >= 0; a row of loss 0 is not drawn.
        dead: (d_sae,) bool.
        lengths: () each, the living latents' mean lengths: of encoder vectors and decoder rows.
        encoder_length: that of a new encoder vector, relative to theirs.
        step: the training step. It seeds the draw, so that a resumed run makes the same one.

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
    generator = torch.Generator().manual_seed(step)
    drawn = probabilities.multinomial(len(latents), generator=generator).to(residuals.device)
    directions = (residuals / norms)[drawn]
    encoder, decoder = lengths
    return NewLatents(latents, directions * encoder_length * encoder, directions * decoder, step)


def sum_of_lengths(rows: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
    """() the sum of the lengths of some rows (n, d_in), ``among`` (n,) bool, in float32 or more."""
    dtype = torch.promote_types(rows.dtype, torch.float32)
    return torch.linalg.vector_norm(rows.to(dtype), dim=1).where(among, 0).sum()


def moments_of(sae: Any, optimizer: torch.optim.Optimizer) -> list[tuple[torch.Tensor, int]]:
    """The moments that an optimizer keeps for an SAE's latents, each with the latents' dimension.

    Raises:
        ValueError: the optimizer keeps anything else per weight.
    """
    moments: list[tuple[torch.Tensor, int]] = []
    for name in ("W_enc", "W_dec", *sae.initial_biases()):
        parameter = sae._parameters.get(name)
        if parameter is None:
            raise ValueError(
                f"resample_every_steps={sae.cfg.resample_every_steps} does not work with a "
                f"parametrised {name}, whose rows cannot be written: it must be None"
            )
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


def resample_with(sae: Any, optimizer: torch.optim.Optimizer) -> Any:
    """Put in the latents that an SAE's training steps draw after each step of its optimizer.

    SAELens's trainers do this by themselves. A training loop of your own calls it once, and so
    must anyone who replaces a trainer's optimizer.

    Args:
        sae: one of this package's SAEs, with ``resample_every_steps``.
        optimizer: the optimizer of its parameters.

    Returns:
        A handle; its ``remove()`` ends it.

    Raises:
        ValueError: at the optimizer's first step, if it keeps something that cannot be reset. See
            :func:`moments_of`.
    """

    def after_step(stepped: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:  # noqa: ARG001
        # Not only where latents wait, so that an optimizer is refused at the first step.
        moments_of(sae, stepped)
        drawn, sae.drawn = sae.drawn, None
        if drawn is not None:
            sae.put_in(drawn, stepped)

    return optimizer.register_step_post_hook(after_step)
