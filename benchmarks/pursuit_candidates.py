"""What would make the straight-through nudge better? Candidates, side by side with auxk.

The answer is ``aux_variant="pursuit"`` (docs/pursuit.md). Each candidate is a loss of its own,
registered as "st" and its name, and compared on a synthetic model:

    python benchmarks/pursuit_candidates.py --output candidates

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
"""

import argparse
from functools import partial, update_wrapper
from pathlib import Path
from typing import Any

import torch

from sae_lens_auxk.aux_losses.registry import AuxLossInputs, register_aux_loss
from sae_lens_auxk.compare.plan import Comparison
from sae_lens_auxk.compare.resolve import resolve
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
        residual = residual - acts.relu().decode().detach()
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


def pursuit(inputs: AuxLossInputs, cfg: Any, scale: float = 1.0) -> torch.Tensor:
    W, residual = inputs.W_dec, inputs.residual
    norms = (
        W.detach().norm(dim=-1) if cfg.rescale_acts_by_decoder_norm else torch.ones_like(W[:, 0])
    )
    with torch.no_grad():
        pull, latents = (residual @ (W / norms.unsqueeze(1)).T).max(dim=-1, keepdim=True)
        pull = pull * (inputs.dead[latents] & (pull > 0))
    h = inputs.hidden_pre.gather(1, latents)
    fired = pull / norms[latents] * W[latents.squeeze(1)]
    loss = -2 * ((pull * h).sum(dim=-1) + (residual * fired).sum(dim=-1)).mean()
    return scale * (loss - loss.detach())


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
}
for candidates, function in ((CANDIDATES, nudge), (PURSUIT, pursuit)):
    for name, options in candidates.items():
        register_aux_loss(
            f"st {name}",
            update_wrapper(partial(function, **options), function),
            default_coefficient=1 / 32,
            uses_k_aux=function is nudge,
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
        training_samples=400_000,
        batch_size=512,
        lr=1e-3,
        dead_after=20_000,
    )
    run_comparison(resolve(comparison), args.output)


if __name__ == "__main__":
    main()
