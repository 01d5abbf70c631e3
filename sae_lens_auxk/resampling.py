"""Resampling: dead latents start anew from inputs that are reconstructed badly.

Source: Bricken et al. 2023, "Towards Monosemanticity", appendix "Neuron Resampling". At given steps
each dead latent gets an input, drawn with a probability proportional to the square of its loss. The
input's direction becomes the latent's decoder row and its encoder vector, its bias becomes 0, and
Adam forgets what it knows about all of them.

The forward pass draws the inputs, since it has them and their losses, and hands the new weights on
in its output. They are put in after the optimizer's step, by :func:`put_in`, in every step of
SAELens's trainer (:func:`resample_in_every_trainer`).

Deviations from the source:

- The inputs are the rows of one batch (of all ranks under DistributedDataParallel), not 819,200.
- A row is drawn once at most. Latents that start from the same row, with equal moments, would get
  equal gradients and stay equal. Where more latents are dead than rows can be drawn, the others
  wait for the next resampling. (dictionary_learning's StandardTrainer.resample_neurons does the
  same. SAELens had resampling until April 2024, see its #74, and drew with replacement.)
- The loss of a row is its squared error, without a sparsity penalty, as in SAELens's own.
- The input is what the latents have to reconstruct: the row, normalised as the SAE does it, without
  ``b_dec``.
- The source's decoder rows have length 1 throughout. SAELens's have any, so the new one gets the
  mean length of the living latents'. Its activations then stand to theirs as in the source, also
  where they are rescaled by that length.
- The source's new encoder vectors have 0.2 times the mean length of the living latents', so that
  they fire weakly. So they have here, where a pre-activation above a bar of its own fires. In the
  TopK family a latent has to beat living ones, and with 0.2 none does (docs/resampling.md), so it
  gets their whole mean length.
"""

from typing import Any, NamedTuple

import torch
from sae_lens.training.sae_trainer import SAETrainer

from sae_lens_auxk.dead_latents import ranks_of_step
from sae_lens_auxk.saelens import wrap_once
from sae_lens_auxk.sharded.latents import ALL_LATENTS, AllLatents
from sae_lens_auxk.targets import Targets

METRIC = "resampled_latents"


class NewLatents(NamedTuple):
    """Weights for latents that start anew.

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
    sae: Any, target: Targets, usable: torch.Tensor, dead: torch.Tensor, step: int
) -> NewLatents | None:
    """What dead latents of an SAE start anew from after a training step.

    Args:
        sae: one of this package's.
        target: the step's.
        usable: (B,) bool, the rows that may be drawn.
        dead: (d_sae,) bool.
        step: the training step, which seeds the draw, so that a resumed run makes the same one.

    Returns:
        See :func:`resampled`.
    """
    # Times the scale, which changes no direction and may be 0.
    inputs = target.x - sae.b_dec * (1 if target.scale is None else target.scale)
    losses = target.residual.square().sum(dim=-1).where(usable, 0)
    if (ranks := ranks_of_step()) is not None:
        inputs, losses = (_of_all_ranks(rows, ranks) for rows in (inputs, losses))
    length = sae.resampled_length
    return resampled(inputs, losses, dead, sae.W_enc, sae.W_dec, length, step, sae.latents)


def _of_all_ranks(rows: torch.Tensor, group: Any) -> torch.Tensor:
    """(N * ranks, ...): the ``rows`` (N, ...) of every rank of a process group, in their order."""
    parts = [torch.empty_like(rows) for _ in range(group.size())]
    torch.distributed.all_gather(parts, rows, group=group)
    return torch.cat(parts)


@torch.no_grad()
def resampled(
    inputs: torch.Tensor,
    losses: torch.Tensor,
    dead: torch.Tensor,
    W_enc: torch.Tensor,
    W_dec: torch.Tensor,
    encoder_length: float,
    seed: int,
    held: AllLatents = ALL_LATENTS,
) -> NewLatents | None:
    """New weights for the dead latents, or for as many, the first, as there are inputs to draw.

    This waits for the device. The draw itself is made on the CPU, so that it is the same on every
    device and rank.

    Args:
        inputs: (N, d_in) what the latents have to reconstruct.
        losses: (N,) >= 0; an input of loss 0 is not drawn.
        dead: (d_sae,) bool.
        W_enc: (d_in, n) the columns of the latents that this process holds.
        W_dec: (n, d_in) their rows.
        encoder_length: of a new encoder vector, in mean lengths of the living latents'.
        seed: of the draw.
        held: which latents these are.

    Returns:
        The weights, or None where no latent is dead or no input can be drawn.
    """
    norms = inputs.norm(dim=-1, keepdim=True)
    can_be_drawn = (norms.squeeze(1) > 0) & losses.isfinite()
    drawable = losses.where(can_be_drawn, 0).double().cpu()
    # Without the quotient a square may overflow. All NaN where no input can be drawn.
    probabilities = (drawable / drawable.max()).square()
    latents = dead.nonzero().squeeze(1)[: int((probabilities > 0).sum())]
    if len(latents) == 0:
        return None
    generator = torch.Generator().manual_seed(seed)
    drawn = probabilities.multinomial(len(latents), generator=generator).to(inputs.device)
    directions = (inputs / norms)[drawn]
    return NewLatents(
        latents,
        encoder=directions * encoder_length * _mean_length(W_enc.T, ~dead, inputs.dtype, held),
        decoder=directions * _mean_length(W_dec, ~dead, inputs.dtype, held),
    )


def _mean_length(
    rows: torch.Tensor, alive: torch.Tensor, dtype: torch.dtype, held: AllLatents
) -> torch.Tensor:
    """() the mean length of living latents' vectors; of all latents' where none lives.

    ``rows`` (n, d_in) are the vectors that this process holds.
    """
    counts = alive if alive.any() else torch.ones_like(alive)
    lengths = torch.linalg.vector_norm(rows.to(dtype), dim=1)
    return held.sum(lengths.where(held.own(counts), 0).sum()) / counts.sum()


@torch.no_grad()
def put_in(new: NewLatents, sae: Any, optimizer: torch.optim.Optimizer) -> None:
    """Give an SAE its new latents: weights, optimizer state and counts of silence.

    Biases and thresholds get the values that they have in a new SAE. What the optimizer keeps for
    each weight, Adam's moments, becomes 0; its count of steps, which all weights of a parameter
    share, stays. A new latent has the whole dead threshold to fire in. SAELens's own count of
    silent steps (``dead_criterion="steps"``) goes on: it says when a latent fired last.

    Args:
        new: the latents.
        sae: one of this package's.
        optimizer: the one of its parameters, after its step.
    """
    is_own, latents = sae.latents.own_among(new.latents)
    sae.W_enc.index_copy_(1, latents, new.encoder[is_own].T.to(sae.W_enc.dtype))
    sae.W_dec.index_copy_(0, latents, new.decoder[is_own].to(sae.W_dec.dtype))
    columns = {sae.W_enc: 1, sae.W_dec: 0}
    for name, value in sae.initial_biases().items():
        bias = getattr(sae, name)
        bias.index_fill_(0, latents, value)
        columns[bias] = 0
    for parameter, dim in columns.items():
        for state in optimizer.state.get(parameter, {}).values():
            if isinstance(state, torch.Tensor) and state.shape == parameter.shape:
                state.index_fill_(dim, latents, 0)
    sae.tokens_since_fired.index_fill_(0, new.latents, 0)


def resample(output: Any, sae: Any, optimizer: torch.optim.Optimizer) -> None:
    """Put in the new latents that a training step has drawn, if any, and count them.

    SAELens's trainer does this by itself. A training loop of your own calls it after the
    optimizer's step, with the output of ``training_forward_pass``.

    Args:
        output: the step's output, of any SAE; gets the metric ``resampled_latents``.
        sae: the SAE.
        optimizer: the one of its parameters.
    """
    new = getattr(output, "new_latents", None)
    if new is not None:
        put_in(new, sae, optimizer)
        output.metrics[METRIC] = len(new.latents)


def resample_in_every_trainer() -> None:
    """Make SAELens's ``SAETrainer.step`` end with :func:`resample`.

    Around the step instead of in a hook of the optimizer, since a hook sees nothing of the step.
    """

    def step(trainer_step: Any, self: Any, batch: torch.Tensor) -> Any:
        output = trainer_step(self, batch)
        resample(output, self.sae, self.optimizer)
        return output

    wrap_once(SAETrainer, "step", step)
