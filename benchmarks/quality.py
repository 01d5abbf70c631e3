"""Does a run on the sparse step end where one on SAELens's dense step ends?

Trains one SAE on a synthetic model of SAELens's with known features and prints its evaluation.
Run it with ``SAE_LENS_AUXK_OPS=auto`` and ``=dense`` and compare over seeds:

    for ops in auto dense; do for seed in 0 1 2; do
        SAE_LENS_AUXK_OPS=$ops python benchmarks/quality.py --seed $seed --device cuda --autocast
    done; done
"""

import argparse
import json
import os
import warnings

import torch
from sae_lens import LoggingConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.synthetic import SyntheticModelConfig
from sae_lens.synthetic.synthetic_sae_runner import SyntheticSAERunner, SyntheticSAERunnerConfig

import sae_lens_auxk  # noqa: F401  (registers the architectures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--autocast", action="store_true")
    parser.add_argument("--architecture", default="auxk-topk")
    parser.add_argument("--samples", type=int, default=600_000)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(args.seed)
    sae = get_sae_training_class(args.architecture)[1](
        d_in=128,
        d_sae=1024,
        k=10,
        # So few that with most latents dead they are pairs on a GPU, and later columns.
        k_aux=8,
        device=args.device,
        aux_bias="none",
        dead_threshold_tokens=20_000,
    )
    runner = SyntheticSAERunner(
        SyntheticSAERunnerConfig(
            synthetic_model=SyntheticModelConfig(num_features=2048, hidden_dim=128, seed=0),
            sae=sae,
            training_samples=args.samples,
            batch_size=512,
            lr=1e-3,
            device=args.device,
            autocast_sae=args.autocast,
            eval_samples=20_000,
            output_path=None,
            checkpoint_path=None,
            logger=LoggingConfig(log_to_wandb=False),
        )
    )
    result = runner.run().final_eval
    assert result is not None
    print(
        json.dumps(
            {
                "ops": os.environ.get("SAE_LENS_AUXK_OPS", "auto"),
                "architecture": args.architecture,
                "seed": args.seed,
                "dead": result.dead_latents,
                "explained variance": round(result.explained_variance, 4),
                "F1": round(result.classification.f1_score, 4),
                "MCC": round(result.mcc, 4),
                "uniqueness": round(result.uniqueness, 4),
            }
        )
    )


if __name__ == "__main__":
    main()
