"""What would make the straight-through nudge better? Candidates, side by side with auxk.

The answer is ``aux_variant="pursuit"``. Each candidate is a loss of its own,
registered as "st" and its name, and compared on a synthetic model:

    python studies/pursuit-candidates/pursuit_candidates.py --output candidates

or in any other comparison, from this folder:

    sae-lens-auxk compare --import pursuit_candidates --aux_variant "st gain" "st pursuit"

The plain nudge, ``aux_variant="straight_through"``, is the gradient of the main loss with respect
to the activation of each of the ``k_aux`` dead latents nearest to firing, passed straight to its
``h``, and nothing else. A candidate changes something of it:

- ``gated``: only where the residual pulls upwards, that is, where firing lowers the loss.
- ``gain``: only where firing *at the threshold* would lower the loss: 2 t r.W > t^2 |W|^2.
- ``decoder``: the decoder row learns too, as if the latent had fired at the threshold t.
- ``best n``: only the n latents of the row with the strongest pull; ``push``: the others get no
  pull upwards, but keep theirs downwards.
- ``times 4``, ``by 4``: another coefficient.
- ``joint``: the residual is what the dead latents nearest to firing leave of it together.
- ``pursuit``: one more step of matching pursuit. Of *all* latents the one that the residual pulls
  most, and only if it is dead: a row that a live latent could explain better is left to it. The
  dead one learns as if it had fired at the value that would explain most, r.W instead of t.
  ``after step``: a row won by a dead latent goes to the dead latent that explains it best once each
  has taken its step, so that one feature is not won by several. ``silent``: any latent that does
  not fire in the batch may learn, dead or not. ``down``: the dead latents nearest to firing are
  pushed down where firing at h would raise the error. ``swap``: in TopK a latent that fires takes
  the place of the weakest one, so the residual has that one's part again; a dead latent must
  explain more than it does. The package's ``pursuit`` is ``pursuit, down``.
"""

import argparse
from collections.abc import Callable
from functools import partial, update_wrapper
from pathlib import Path
from typing import Any

import torch

from sae_lens_auxk import AuxLossInputs, register_aux_loss
from sae_lens_auxk.compare.checks import resolve
from sae_lens_auxk.compare.config import Comparison
from sae_lens_auxk.compare.run import run_comparison


def nudge(
    inputs: AuxLossInputs,
    cfg: Any,
    gate: str = "",
    decoder: bool = False,
    joint: bool = False,
    best: int | None = None,
    push: bool = False,
    scale: float = 1.0,
) -> torch.Tensor:
    acts = inputs.nearest_dead(cfg.resolved_k_aux)
    residual = inputs.residual
    if joint:
        residual = residual - acts.map(torch.relu).decode().detach()
    h = acts.h
    threshold = inputs.firing_threshold().clamp(min=0).reshape(-1, 1).expand(len(h), 1).to(h.dtype)
    pull = all_pull = 2 * acts.project(residual).to(inputs.x.dtype)
    if gate == "gated":
        pull = pull.relu()
    elif gate == "gain":
        pull = pull * (pull > threshold)
    if best is not None and best < pull.shape[1]:
        others = all_pull.clamp(max=0) if push else 0.0
        pull = pull.where(pull >= pull.topk(best, dim=1).values[:, -1:], others)
    loss = -(pull * h).sum(dim=-1).mean()
    if decoder:
        fires = (pull > threshold).to(h.dtype) * threshold if gate else threshold.expand_as(h)
        fired = acts.decode_as(fires.where(h.detach() != 0, 0))
        loss = loss - 2 * (residual * fired).sum(dim=-1).mean()
    return scale * (loss - loss.detach())


def pursuit(
    inputs: AuxLossInputs,
    cfg: Any,
    scale: float = 1.0,
    down: bool = False,
    after_step: bool = False,
    silent: bool = False,
    swap: bool = False,
) -> torch.Tensor:
    W, residual, all_h = inputs.W_dec, inputs.residual, inputs.hidden_pre
    norms = (
        W.detach().norm(dim=-1) if cfg.rescale_acts_by_decoder_norm else torch.ones_like(W[:, 0])
    )
    with torch.no_grad():
        directions = W / norms.unsqueeze(1)
        if swap:
            acts, firing = all_h.topk(cfg.k, dim=1)
            residual = residual + acts[:, -1:].relu() * directions[firing[:, -1]]
        products = residual @ directions.T
        pull, latents = products.max(dim=-1)
        threshold = inputs.firing_threshold().reshape(-1, 1)
        taught = ~(all_h >= threshold).any(0) if silent else inputs.dead
        wins = taught[latents] & (pull > 0)
        if after_step:
            pull, latents = best_after_step(residual, directions, pull, latents, wins)
            wins &= pull > 0
        pull = (pull * wins).unsqueeze(1)
    h = all_h.gather(1, latents.unsqueeze(1))
    fired = pull / norms[latents].unsqueeze(1) * W[latents]
    loss = -2 * ((pull * h).sum(dim=-1) + (residual * fired).sum(dim=-1)).mean()
    if down:
        nearest = inputs.nearest_dead(cfg.resolved_k_aux)
        acts = nearest.h.detach().relu()
        excess = (nearest.project(inputs.residual) - acts).clamp(max=0).where(acts > 0, 0)
        loss = loss - 2 * (excess * nearest.h).sum(dim=-1).mean()
    return scale * (loss - loss.detach())


def best_after_step(
    residual: torch.Tensor,
    directions: torch.Tensor,
    pull: torch.Tensor,
    latents: torch.Tensor,
    wins: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Give each row won by a dead latent to the one that explains it best after its own step.

    A latent's direction after its step is that of the rows that it wins, each times its pull, and
    of its own as if it were one more row. The row in question is left out of its winner's.
    """
    rows = wins.nonzero().squeeze(1)
    if not rows.numel():
        return pull, latents
    winners, own = latents[rows].unique(return_inverse=True)
    a, r = pull[rows], residual[rows]
    prior = a.mean() * r.norm(dim=1).mean()
    moved = (prior * directions[winners]).index_add_(0, own, a.unsqueeze(1) * r)
    without = moved[own] - a.unsqueeze(1) * r
    score = r @ torch.nn.functional.normalize(moved, dim=1).T
    own_score = (r * torch.nn.functional.normalize(without, dim=1)).sum(dim=1)
    score[torch.arange(len(rows), device=own.device), own] = own_score
    best, winner = score.max(dim=1)
    return pull.index_copy(0, rows, best), latents.index_copy(0, rows, winners[winner])


CANDIDATES: dict[str, dict[str, Any]] = {
    "plain": {},
    "gated": {"gate": "gated"},
    "gain": {"gate": "gain"},
    "decoder": {"decoder": True},
    "gated, decoder": {"gate": "gated", "decoder": True},
    "gain, decoder": {"gate": "gain", "decoder": True},
    "gain, best 16": {"gate": "gain", "best": 16},
    "gain, best 4": {"gate": "gain", "best": 4},
    "gain, decoder, best 16": {"gate": "gain", "decoder": True, "best": 16},
    "gain, decoder, best 4": {"gate": "gain", "decoder": True, "best": 4},
    "gain, decoder, best 2": {"gate": "gain", "decoder": True, "best": 2},
    "gain, decoder, best 1": {"gate": "gain", "decoder": True, "best": 1},
    "gain, decoder, best 4, push": {"gate": "gain", "decoder": True, "best": 4, "push": True},
    "gain, decoder, best 1, push": {"gate": "gain", "decoder": True, "best": 1, "push": True},
    "gain, decoder, best 2, times 4": {"gate": "gain", "decoder": True, "best": 2, "scale": 4},
    "gain, decoder, best 1, times 4": {"gate": "gain", "decoder": True, "best": 1, "scale": 4},
    "gain, decoder, best 1, times 16": {"gate": "gain", "decoder": True, "best": 1, "scale": 16},
    "gain, decoder, best 2, times 16": {"gate": "gain", "decoder": True, "best": 2, "scale": 16},
    "gain, decoder, best 4, times 4": {"gate": "gain", "decoder": True, "best": 4, "scale": 4},
    "gain, decoder, best 2, by 4": {"gate": "gain", "decoder": True, "best": 2, "scale": 0.25},
    "joint": {"joint": True},
    "joint, decoder": {"joint": True, "decoder": True},
    "joint, gain, decoder": {"joint": True, "gate": "gain", "decoder": True},
}
PURSUIT: dict[str, dict[str, Any]] = {
    "pursuit": {},
    "pursuit, times 4": {"scale": 4},
    "pursuit, times 16": {"scale": 16},
    "pursuit, times 32": {"scale": 32},
    "pursuit, after step": {"scale": 16, "after_step": True},
    "pursuit, silent": {"scale": 16, "silent": True},
    "pursuit, down": {"scale": 16, "down": True},
    "pursuit, down, silent": {"scale": 16, "down": True, "silent": True},
    "pursuit, down, swap": {"scale": 16, "down": True, "swap": True},
}
FORMS: list[tuple[dict[str, dict[str, Any]], Callable[..., torch.Tensor]]] = [
    (CANDIDATES, nudge),
    (PURSUIT, pursuit),
]
for candidates, function in FORMS:
    for name, options in candidates.items():
        register_aux_loss(
            f"st {name}",
            update_wrapper(partial(function, **options), function),
            default_coefficient=1 / 32,
            uses_k_aux=function is nudge or "down" in options,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path("candidates"))
    parser.add_argument("--architecture", nargs="+", default=["auxk-topk", "auxk-batchtopk"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--names", nargs="+", default=[*CANDIDATES, *PURSUIT])
    args = parser.parse_args()
    base = ("none", "pursuit")
    cases = [{"aux_variant": "auxk", "aux_bias": "none", "name": "auxk"}]
    strong = {"aux_loss_coefficient": 1 / 8, "name": "auxk, times 4"}
    cases += [{**cases[0], **strong}, *({"aux_variant": name} for name in base)]
    cases += [{"aux_variant": f"st {name}"} for name in args.names]
    comparison = Comparison(
        architecture=args.architecture,
        cases=[{**c, "architecture": a} for a in args.architecture for c in cases],
        sae={"k_aux": 64},
        seeds=args.seeds,
        k=[10],
        d_sae=512,
        n_features=1024,
        d_in=128,
        synthetic_model={"seed": None},  # another model for each seed
        training_samples=400_000,
        batch_size=512,
        lr=1e-3,
        dead_after=20_000,
    )
    run_comparison(resolve(comparison), args.output)


if __name__ == "__main__":
    main()
