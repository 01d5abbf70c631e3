"""Do the measures of residual peeking tell an error corrector from a feature?

Builds SAEs whose latents are the true features of one of SAELens's synthetic models, plants
latents of a known kind among them, and prints what ``measure_peeking`` says of each kind, mean ±
standard deviation over seeds, and in brackets of the latents that it is compared with. The tables
are in docs/peeking.md.

    python benchmarks/peeking.py                # planted latents: about a minute on a CPU core
    python benchmarks/peeking.py --trained      # latents of trained SAEs: 5 minutes more
"""

import argparse
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, stdev
from typing import Any

import torch
from sae_lens import LoggingConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from sae_lens.saes.sae import SAE
from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig
from sae_lens.synthetic import SyntheticModel, SyntheticModelConfig, ZipfianFiringProbabilityConfig
from sae_lens.synthetic.synthetic_sae_runner import SyntheticSAERunner, SyntheticSAERunnerConfig
from sae_lens.util import cosine_similarities

import sae_lens_auxk  # noqa: F401  (registers the architectures)
from sae_lens_auxk.compare.peeking import MIN_FIRINGS, _Data, measure_peeking
from sae_lens_auxk.results import JUNK, PEEKING

N_FEATURES, D_IN, N_ROWS = 320, 128, 20_000
N_PLANTED = 8
"""Latents of each planted kind."""
SPOILT = 6
"""Badly reconstructed features to each corrector."""
KINDS = ("feature", "mean error", "error direction", "random", "duplicate")
COLUMNS = tuple(key for key in PEEKING if key != "n_latents")


@dataclass
class World:
    """An SAE, ``x`` (N, d_in), the true features, and which latents (d_sae,) are in question."""

    sae: SAE[Any]
    x: torch.Tensor
    true_features: torch.Tensor
    in_question: torch.Tensor

    def measure(self) -> dict[str, dict[str, float | None]]:
        """The latents in question, as if revived, against all others."""
        return measure_peeking(
            self.sae,
            self.x,
            revived=self.in_question,
            never_died=~self.in_question,
            true_features=self.true_features,
        )


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
        worlds[kind] = World(sae, x, features, torch.arange(sae.cfg.d_sae) >= len(held))
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


def trained(architecture: str, d_sae: int, num_features: int, seed: int) -> World:
    """An SAE trained as in examples/synthetic.py; its junk latents are in question."""
    torch.manual_seed(seed)
    fields = {} if architecture == "topk" else {"dead_threshold_tokens": 20_000}
    runner = SyntheticSAERunner(
        SyntheticSAERunnerConfig(
            synthetic_model=SyntheticModelConfig(
                num_features=num_features, hidden_dim=128, seed=seed
            ),
            sae=get_sae_training_class(architecture)[1](d_in=128, d_sae=d_sae, k=10, **fields),
            training_samples=400_000,
            batch_size=512,
            lr=1e-3,
            dead_feature_window=40,
            eval_samples=1000,
            output_path=None,
            checkpoint_path=None,
            logger=LoggingConfig(log_to_wandb=False),
        )
    )
    sae = runner.run().sae
    features = runner.synthetic_model.feature_dict.feature_vectors.detach()
    best = cosine_similarities(sae.W_dec.detach(), features).amax(dim=1)
    return World(sae, runner.synthetic_model.sample(N_ROWS), features, best < JUNK)


def print_row(name: str, worlds: Sequence[World]) -> None:
    """A row: mean ± standard deviation over seeds, and in brackets the never-dead latents'."""
    results = [world.measure() for world in worlds]
    cells: list[str] = []
    for key in COLUMNS:
        values, control = (
            [group[key] for result in results if (group := result[which])[key] is not None]
            for which in ("revived", "never_died")
        )
        spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
        cells.append(f"{mean(values):.3f}{spread} ({mean(control):.3f})")
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


@torch.no_grad()
def print_ranking(name: str, world: World) -> None:
    """For each measure the probability that it is larger for a latent in question than for another,
    and its rank correlation with a latent's best cosine with a true feature."""
    data = _Data(world.sae, world.x)
    latents = (data.firings >= MIN_FIRINGS).nonzero().flatten()
    measured = data.measure(latents, world.true_features)
    best = cosine_similarities(data.directions[latents], world.true_features).amax(dim=1)
    junk = world.in_question[latents]
    cells: list[str] = []
    for key in ("features_hurt", "rows_hurt", "latents_hurt", "error_auc"):
        values = measured[key]
        assert values is not None
        larger = (values[junk][:, None] > values[~junk]).float().mean().item()
        ranks = torch.stack([values, best]).argsort(dim=1).argsort(dim=1).float()
        cells.append(f"{key} {larger:.2f} ({torch.corrcoef(ranks)[0, 1].item():.2f})")
    print(f"{name}: {', '.join(cells)}", flush=True)


def print_head(title: str) -> None:
    print(f"\n{title}\n\n| | {' | '.join(COLUMNS)} |\n|---{'|---' * len(COLUMNS)}|")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trained", action="store_true")
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    seeds = range(args.seeds)
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
    if not args.trained:
        return
    print_head("trained SAEs, junk latents against the others (3 seeds)")
    for architecture in ("topk", "auxk-topk"):
        for d_sae, num_features in ((512, 1024), (512, 512)):
            worlds = [trained(architecture, d_sae, num_features, seed) for seed in range(3)]
            print_row(f"{architecture}, {d_sae} latents, {num_features} features", worlds)
    print("\nsingle latents, seed 0: how well each measure ranks junk above the others\n")
    for architecture in ("topk", "auxk-topk"):
        print_ranking(architecture, trained(architecture, 512, 1024, 0))


if __name__ == "__main__":
    main()
