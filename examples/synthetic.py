"""Which auxiliary loss finds the true features? A comparison on a synthetic model.

SAELens's synthetic models have known features, so an SAE can be checked against them. Every variant
is trained on the same model with the same seeds; the table shows the mean over the seeds and, after
±, the standard deviation.

    python examples/synthetic.py 2>synthetic.log      # about 6 minutes on 2 CPU cores
"""

import warnings
from statistics import mean, stdev

import torch
from sae_lens import LoggingConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.synthetic import SyntheticModelConfig
from sae_lens.synthetic.synthetic_sae_runner import SyntheticSAERunner, SyntheticSAERunnerConfig

import sae_lens_auxk  # noqa: F401  (registers the architectures)

VARIANTS = {
    "SAELens topk": ("topk", {}),
    "none": ("auxk-topk", {"aux_variant": "none"}),
    "auxk": ("auxk-topk", {"aux_variant": "auxk"}),
    "auxk, bias none": ("auxk-topk", {"aux_variant": "auxk", "aux_bias": "none"}),
    "straight_through": ("auxk-topk", {"aux_variant": "straight_through"}),
    "pursuit": ("auxk-topk", {"aux_variant": "pursuit"}),
    "reanimation": ("auxk-topk", {"aux_variant": "reanimation"}),
}


def train(name: str, seed: int, training_samples: int = 400_000) -> dict[str, float]:
    """Train one SAE and return SAELens's evaluation of it against the true features."""
    architecture, fields = VARIANTS[name]
    if architecture != "topk":
        fields = {**fields, "dead_threshold_tokens": 20_000}
    torch.manual_seed(seed)
    runner = SyntheticSAERunner(
        SyntheticSAERunnerConfig(
            synthetic_model=SyntheticModelConfig(num_features=1024, hidden_dim=128, seed=seed),
            sae=get_sae_training_class(architecture)[1](d_in=128, d_sae=512, k=10, **fields),
            training_samples=training_samples,
            batch_size=512,
            lr=1e-3,
            dead_feature_window=40,  # 20,480 samples, for SAELens's own loss
            eval_samples=20_000,
            output_path=None,
            checkpoint_path=None,
            logger=LoggingConfig(log_to_wandb=False),
        )
    )
    result = runner.run().final_eval
    assert result is not None
    return {
        "dead": result.dead_latents,
        "EV": result.explained_variance,
        "F1": result.classification.f1_score,
        "MCC": result.mcc,
        "unique": result.uniqueness,
    }


def main(seeds: tuple[int, ...] = (0, 1, 2), training_samples: int = 400_000) -> None:
    print("| variant | dead of 512 | EV | F1 | MCC | unique |")
    print("|---|---|---|---|---|---|")
    for name in VARIANTS:
        runs = [train(name, seed, training_samples) for seed in seeds]
        cells = []
        for key in runs[0]:
            values = [run[key] for run in runs]
            spread = stdev(values) if len(values) > 1 else 0.0
            cells.append(
                f"{mean(values):.0f} ± {spread:.0f}"
                if key == "dead"
                else f"{mean(values):.3f} ± {spread:.3f}"
            )
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
