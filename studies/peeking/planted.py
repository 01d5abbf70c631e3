"""Do the measures of a latent tell an error corrector from a feature? On planted latents.

Builds SAEs whose latents are the true features of one of SAELens's synthetic models, plants
latents of a known kind among them, and measures these and the others latent by latent. The tables
are in tables.md.

    python -m studies.peeking.planted      # a minute on a CPU core
"""

import argparse
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

import torch
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAE
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from sae_lens.synthetic import SyntheticModel, SyntheticModelConfig, ZipfianFiringProbabilityConfig

from sae_lens_auxk.compare.latents import count_firings, measure_latents

N_FEATURES, D_IN, N_ROWS = 320, 128, 20_000
N_PLANTED = 8
"""Latents of each planted kind."""
SPOILT = 6
"""Badly reconstructed features to each corrector."""
KINDS = ("feature", "mean error", "error direction", "random", "duplicate")
COLUMNS = (
    "junk_share",
    "duplicate_share",
    "features_hurt",
    "split",
    "direction_spread",
    "nearest_cosine",
)


@dataclass
class World:
    """An SAE, ``x`` (N, d_in), the true features and their activations (N, n_features), and which
    latents (d_sae,) are in question."""

    sae: SAE[Any]
    x: torch.Tensor
    true_features: torch.Tensor
    feature_acts: torch.Tensor
    in_question: torch.Tensor

    def measure(self) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Each measure (n,) of the latents that fire, and which of these (n,) are in question."""
        firings = count_firings(self.sae, self.x)
        latents = (firings > 0).nonzero().flatten()
        measured = measure_latents(
            self.sae, self.x, latents, firings, self.true_features, [self.feature_acts]
        )
        return measured, self.in_question[latents]


def auc(values: torch.Tensor, of: torch.Tensor) -> float | None:
    """Probability that a value (n,) in ``of`` (n,) bool is larger than one that is not.

    Ties count half. NaN are left out; None where one side is empty.
    """
    known = ~values.isnan()
    ours, others = values[known & of][:, None], values[known & ~of]
    if not ours.numel() or not others.numel():
        return None
    return ((ours > others).float() + 0.5 * (ours == others).float()).mean().item()


def planted(
    architecture: str, spoilt_by: str, seed: int, data: str = "independent"
) -> dict[str, World]:
    """
    SAEs with a latent for most true features, to each of which latents of one kind are added.

    The kinds, N_PLANTED latents each: "feature" (a true feature that no latent holds),
    "duplicate" (of one that a latent holds), "mean error" (the mean error on rows with one of
    SPOILT badly reconstructed features, fires where these are), "error direction" (the first
    principal direction of those errors), "random" (a random direction).

    Args:
        architecture: "jumprelu" or "topk".
        spoilt_by: how the badly reconstructed features are: "rotation" of the decoder row or
            "shrinkage" to half.
        seed: of everything.
        data: "independent" features; "rare": each missing feature on 0.2% of rows; "correlated":
            each missing feature fires where one of SPOILT badly reconstructed ones does (80% of
            its rows); "absorbed": a missing feature always comes with another feature, whose
            latent is silent there and which the planted latent has in its direction.
    """
    torch.manual_seed(seed)
    model = SyntheticModel(
        SyntheticModelConfig(
            num_features=N_FEATURES,
            hidden_dim=D_IN,
            seed=seed,
            firing_probability=ZipfianFiringProbabilityConfig(
                exponent=0.5, max_prob=0.1, min_prob=0.01
            ),
            std_firing_magnitudes=0.15,
            bias=False,
        )
    )
    features = model.feature_dict.feature_vectors.detach()
    order = torch.randperm(N_FEATURES)
    missing, held = order[:N_PLANTED], order[N_PLANTED:]
    spoilt = held[: N_PLANTED * SPOILT].view(N_PLANTED, SPOILT)
    partners = held[N_PLANTED * SPOILT :][:N_PLANTED]

    acts = model.activation_generator.sample(N_ROWS)
    acts[:, missing] = rewired(acts[:, missing], acts, spoilt, data)
    if data == "absorbed":
        acts[:, partners] = torch.where(acts[:, missing] > 0, acts[:, missing], acts[:, partners])
    x = acts @ features

    encoder, decoder = features[held].clone(), features[held].clone()
    decoder += 0.15 * torch.nn.functional.normalize(torch.randn_like(decoder), dim=-1)
    wrong = torch.nn.functional.normalize(torch.randn(spoilt.numel(), D_IN), dim=-1)
    noise = torch.nn.functional.normalize(torch.randn(2, N_PLANTED, D_IN), dim=-1)
    spoilt_rows = features[spoilt.flatten()]
    decoder[: spoilt.numel()] = (
        0.7 * spoilt_rows + 0.5 * wrong if spoilt_by == "rotation" else 0.5 * spoilt_rows
    )
    if data == "absorbed":
        encoder[spoilt.numel() : spoilt.numel() + N_PLANTED] -= features[missing]
    threshold = torch.full((len(held),), 0.6)
    error = x - _reconstruct(_build(architecture, encoder, decoder, threshold), x)

    rows: list[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for i in range(N_PLANTED):
        direction = features[missing[i]]
        own = direction + features[partners[i]] * (data == "absorbed")
        rows.append(("feature", direction, own, torch.tensor(0.6)))
        noisy = torch.nn.functional.normalize(features[partners[i]] + 0.3 * noise[0, i], dim=0)
        rows.append(("duplicate", noisy, 0.5 * noisy, torch.tensor(0.8)))
        here = (acts[:, spoilt[i]] > 0).any(dim=1)
        where = torch.nn.functional.normalize(features[spoilt[i]].sum(dim=0), dim=0)
        principal = torch.linalg.eigh(error[here].T @ error[here])[1][:, -1]
        principal = principal * (error[here] @ principal).mean().sign()
        meant = torch.nn.functional.normalize(error[here].mean(dim=0), dim=0)
        for kind, encode, decode in (
            ("mean error", where, meant),
            ("error direction", principal, principal),
            ("random", noise[1, i], noise[1, i]),
        ):
            pre = x @ encode
            fires = pre > pre.quantile(0.97)
            # The size that takes most off the error.
            size = (error[fires] @ decode * pre[fires]).sum() / (pre[fires] ** 2).sum()
            rows.append((kind, encode, decode * size.clamp(min=0.1), pre.quantile(0.97)))
    worlds: dict[str, World] = {}
    for kind in KINDS:
        encoders, decoders, thresholds = zip(
            *(row[1:] for row in rows if row[0] == kind), strict=True
        )
        sae = _build(
            architecture,
            torch.cat([encoder, torch.stack(encoders)]),
            torch.cat([decoder, torch.stack(decoders)]),
            torch.cat([threshold, torch.stack(thresholds)]),
        )
        worlds[kind] = World(sae, x, features, acts, torch.arange(sae.cfg.d_sae) >= len(held))
    return worlds


def rewired(own: torch.Tensor, acts: torch.Tensor, spoilt: torch.Tensor, data: str) -> torch.Tensor:
    """Activations (N, N_PLANTED) of the missing features."""
    if data == "rare":
        return (torch.rand_like(own) < 0.002) * (1 + 0.15 * torch.randn_like(own))
    if data == "correlated":
        near = torch.stack([(acts[:, group] > 0).any(dim=1) for group in spoilt], dim=1)
        rate = torch.where(near, 0.8, 0.2 * near.float().mean() / (1 - near.float().mean()))
        return (torch.rand_like(own) < 0.1 * rate) * (1 + 0.15 * torch.randn_like(own))
    return own


def _build(
    architecture: str, encoder: torch.Tensor, decoder: torch.Tensor, threshold: torch.Tensor
) -> SAE[Any]:
    """An inference SAE with these latents (n, d_in); TopK has k and no thresholds."""
    size = {"d_in": D_IN, "d_sae": encoder.shape[0]}
    sae = (
        JumpReLUSAE(JumpReLUSAEConfig(**size))
        if architecture == "jumprelu"
        else TopKSAE(TopKSAEConfig(**size, k=8))
    )
    if architecture == "jumprelu":
        sae.threshold.data = threshold.clone()
    sae.W_enc.data, sae.W_dec.data = encoder.T.clone(), decoder.clone()
    sae.b_enc.data.zero_()
    sae.b_dec.data.zero_()
    return sae


@torch.no_grad()
def _reconstruct(sae: SAE[Any], x: torch.Tensor) -> torch.Tensor:
    return sae.decode(sae.encode(x))


def print_row(name: str, worlds: Sequence[World]) -> None:
    """For each measure the mean of the latents in question, of the others, and the AUC."""
    measured = [world.measure() for world in worlds]
    cells: list[str] = []
    for key in COLUMNS:
        areas = [a for values, which in measured if (a := auc(values[key], which)) is not None]
        ours = torch.cat([values[key][which] for values, which in measured]).nanmean()
        others = torch.cat([values[key][~which] for values, which in measured]).nanmean()
        cells.append(f"{ours:.3f} ({others:.3f}) {mean(areas):.2f}" if areas else "–")
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def print_head(title: str) -> None:
    print(f"\n{title}\n\n| | {' | '.join(COLUMNS)} |\n|---{'|---' * len(COLUMNS)}|")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    seeds = range(parser.parse_args().seeds)
    warnings.simplefilter("ignore")
    for architecture in ("jumprelu", "topk"):
        for spoilt_by in ("rotation", "shrinkage"):
            worlds = [planted(architecture, spoilt_by, seed) for seed in seeds]
            print_head(f"{architecture}, bad latents by {spoilt_by}")
            for kind in KINDS:
                print_row(kind, [world[kind] for world in worlds])
    print_head("missing features that are harder, jumprelu, bad latents by rotation")
    for data in ("rare", "correlated", "absorbed"):
        worlds = [planted("jumprelu", "rotation", seed, data)["feature"] for seed in seeds]
        print_row(f"feature, {data}", worlds)


if __name__ == "__main__":
    main()
