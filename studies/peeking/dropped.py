"""Measures that were dropped, and how well they tell junk from features.

    python -m studies.peeking.dropped peeking/400000

For each case of a comparison on a synthetic model the AUC of each measure, the probability that it
is larger for a junk latent than for another, and for latents_hurt also for a duplicate than for a
feature; means over seeds. ``e_b`` is the error with all latents and ``c_bi`` what latent i adds, so
that ``s_bi = cos^2(e_b + c_bi W_i, W_i)`` is the share of the error without the latent that lies
along its direction.

rows_hurt: participation ratio of s over all rows, over the rows on which the latent fires, and over
    those on which it is silent.
error_auc: probability that a row on which the latent fires has a larger share of unexplained
    variance than one on which it does not.
latents_hurt: effective number of alive latents whose directions lose when this one is removed.
near: number of latents with a cosine above 0.7 to another alive latent, in all seeds.
"""

import argparse
import warnings
from pathlib import Path
from statistics import mean

import torch
from sae_lens.saes.sae import SAE

from sae_lens_auxk.compare.latents import _hurt
from studies.peeking.planted import auc
from studies.peeking.trained import Comparison, measure_all

KEYS = ("rows_hurt", "rows_hurt, firing", "rows_hurt, silent", "error_auc", "latents_hurt")
MIN_FIRINGS = 20
"""As the dropped measures needed: over fewer rows a participation ratio says nothing."""


def spread(s: torch.Tensor) -> torch.Tensor:
    """Participation ratio over the rows of ``s`` (N, n)."""
    return s.sum(dim=0) ** 2 / (s**2).sum(dim=0).clamp(min=1e-12)


@torch.no_grad()
def dropped(sae: SAE, x: torch.Tensor, latents: torch.Tensor) -> dict[str, torch.Tensor]:
    """Each dropped measure (n,) of ``latents``; all rows are held at once."""
    acts = sae.encode(x)
    acts = (acts.to_dense() if acts.is_sparse else acts).float()
    rescaled = getattr(sae.cfg, "rescale_acts_by_decoder_norm", False)
    norms = sae.W_dec.norm(dim=-1)
    directions = sae.W_dec / norms[:, None]
    W, c = directions[latents], (acts if rescaled else acts * norms)[:, latents]
    error, centred = x - sae.decode(sae.encode(x)), x - x.mean(dim=0)
    along = error @ W.T
    without = (error**2).sum(dim=1, keepdim=True) + 2 * along * c + c**2
    s, fires = (along + c) ** 2 / without.clamp(min=1e-12), c != 0
    unexplained = (error**2).sum(dim=1) / (centred**2).sum(dim=1)
    percentile = (unexplained.argsort().argsort().float() + 0.5) / len(x)
    rate = fires.float().mean(dim=0)
    # The mean percentile of the rows on which it fires is rate / 2 + (1 - rate) * AUC.
    at_firings = (percentile @ fires.float()) / fires.sum(dim=0)
    alive = (acts != 0).any(dim=0)
    return {
        "rows_hurt": spread(s) / len(x),
        "rows_hurt, firing": spread(s * fires) / fires.sum(dim=0),
        "rows_hurt, silent": spread(s * ~fires) / (~fires).sum(dim=0),
        "error_auc": (at_firings - rate / 2) / (1 - rate),
        "latents_hurt": _hurt(W, c.T @ centred, directions[alive]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    warnings.simplefilter("ignore")
    comparison = Comparison(parser.parse_args().folder)
    print(f"| | {' | '.join(KEYS)} | latents_hurt: duplicate | near |")
    print(f"|---{'|---' * (len(KEYS) + 2)}|")
    for name, runs in comparison.cases():
        areas: dict[str, list[float]] = {}
        near = 0
        for run in runs:
            sae, data = comparison.sae(run), comparison.data(run)
            measured, latents = measure_all(sae, data)
            often = measured["firing_rate"] * comparison.plan.eval_samples >= MIN_FIRINGS
            measured = {key: value[often] for key, value in measured.items()}
            near += int((measured["nearest_cosine"] > 0.7).sum())
            junk, duplicate = (measured[f"{what}_share"] > 0 for what in ("junk", "duplicate"))
            values = dropped(sae, data.held_out(), latents[often])
            found = {key: auc(values[key], junk) for key in KEYS}
            found["duplicate"] = auc(values["latents_hurt"][~junk], duplicate[~junk])
            for key, area in found.items():
                areas.setdefault(key, []).extend([] if area is None else [area])
        cells = [f"{mean(areas[key]):.2f}" if areas[key] else "–" for key in (*KEYS, "duplicate")]
        print(f"| {name} | {' | '.join(cells)} | {near} |", flush=True)


if __name__ == "__main__":
    main()
