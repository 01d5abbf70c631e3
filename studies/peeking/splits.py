"""Does split_gain tell a feature that needs two latents from one that has its own?

Activations of 8 features of each kind are made by hand, beside 200 latents that read other
features. Prints split_gain, what the gain would be against the latent alone, and the AUC of
split_gain against latents that hold a feature, over 5 seeds.

    python -m studies.peeking.splits
"""

from statistics import mean

import torch

from sae_lens_auxk.compare.split import split_gain
from studies.peeking.planted import auc

N_ROWS, N_OTHERS, N_PLANTED = 20_000, 200, 8
NOISE = 0.1
"""Standard deviation of a reading where the latent fires: other features interfere."""


def planted_activations(kind: str, y: torch.Tensor, others: torch.Tensor) -> list[torch.Tensor]:
    """Activations (N,), one or two latents of a feature with the activations y (N,)."""
    reads = (y + NOISE * torch.randn_like(y)) * (y > 0)
    if kind == "a feature":
        return [reads]
    if kind == "split by size":
        return [reads * (y < 1.5), reads * (y >= 1.5)]
    if kind == "split by context":  # as where a latent of a child silences its parent's
        context = torch.rand_like(y) < 0.3
        return [reads * ~context, reads * context]
    if kind == "a latent too small for it, and a corrector":
        return [reads.clamp(max=1.5), (reads - 1.5).clamp(min=0)]
    if kind == "a feature and a corrector of 6 features":
        near = (others[:, :5] > 0).any(dim=1) | (y > 0)
        return [reads, near * (1 + NOISE * torch.randn_like(y)).clamp(min=0)]
    if kind == "two features that fire together":
        return [reads, (torch.rand_like(y) < 0.8) * (y > 0) * (1 + torch.rand_like(y))]
    return [reads + (torch.rand_like(y) < 0.02) * torch.rand_like(y), reads]  # a copy


KINDS = (
    "a feature",
    "split by size",
    "split by context",
    "a latent too small for it, and a corrector",
    "a feature and a corrector of 6 features",
    "two features that fire together",
    "a poor copy, and the original",
)


def feature(n: int) -> torch.Tensor:
    """(N, n): each fires on 3% of the rows, with 1 to 2."""
    return (torch.rand(N_ROWS, n) < 0.03) * (1 + torch.rand(N_ROWS, n))


def gains(kind: str, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(16,) gains, of 8 planted latents of this kind and 8 that hold a feature; and against the
    latent alone."""
    torch.manual_seed(seed)
    truth = feature(2 * N_PLANTED + N_OTHERS)
    others = truth[:, 2 * N_PLANTED :]
    latents, firsts = [], []
    for i in range(2 * N_PLANTED):
        firsts.append(len(latents))
        latents += planted_activations(kind if i < N_PLANTED else KINDS[0], truth[:, i], others)
    readings = others + NOISE * torch.randn_like(others) * (others > 0)
    acts = torch.cat([torch.stack(latents, dim=1), readings], dim=1)
    targets = truth[:, : 2 * N_PLANTED]
    found = split_gain([(acts, targets)], torch.tensor(firsts))
    return found, torch.tensor(
        [best_of_all(acts, targets[:, i], first) for i, first in enumerate(firsts)]
    )


def best_of_all(acts: torch.Tensor, target: torch.Tensor, own: int) -> float:
    """What the best partner adds to the R2 of latent ``own``, by the partial correlation."""
    c, y = acts - acts.mean(dim=0), target - target.mean()
    x = c[:, own]
    left = c - (x @ c / (x @ x)) * x[:, None]
    added = (left.T @ (y - (x @ y / (x @ x)) * x)) ** 2 / (left**2).sum(dim=0).clamp(min=1e-3)
    added[own] = 0.0
    return (added.max() / (y @ y)).item()


def main() -> None:
    print("| | split_gain | against the latent alone | AUC |\n|---|---|---|---|")
    for kind in KINDS:
        found = [gains(kind, seed) for seed in range(5)]
        ours = torch.arange(2 * N_PLANTED) < N_PLANTED
        gain, alone = (mean(pair[i][ours].mean().item() for pair in found) for i in (0, 1))
        areas = [auc(pair[0], ours) or 0.0 for pair in found]
        print(f"| {kind} | {gain:.4f} | {alone:.4f} | {mean(areas):.2f} |", flush=True)


if __name__ == "__main__":
    main()
