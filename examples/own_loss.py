"""A custom auxiliary loss, used like the package's own.

A loss is a pure function of one record (see ``sae_lens_auxk.AuxLossInputs``) and the config.
This one is a softer pre-activation loss: it penalises the square of a dead latent's distance below
the firing threshold, so that those nearest to firing are pulled least.

    python examples/own_loss.py 2>own_loss.log
"""

from typing import Any

import torch
from sae_lens import LoggingConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.synthetic import SyntheticModelConfig
from sae_lens.synthetic.synthetic_sae_runner import SyntheticSAERunner, SyntheticSAERunnerConfig

from sae_lens_auxk import AuxLossInputs, register_aux_loss


@register_aux_loss("squared_margin", default_coefficient=1e-3)
def squared_margin(inputs: AuxLossInputs, cfg: Any) -> torch.Tensor:  # noqa: ARG001
    """``mean_b sum_{i in D} relu(threshold - nearness(h_bi))^2``."""
    missing = inputs.dead_threshold() - inputs.nearness(inputs.dead_hidden_pre())
    return missing.relu().square().sum(dim=-1).mean()


def main(training_samples: int = 100_000) -> None:
    for aux_variant in ("none", "squared_margin"):
        torch.manual_seed(0)
        runner = SyntheticSAERunner(
            SyntheticSAERunnerConfig(
                synthetic_model=SyntheticModelConfig(num_features=512, hidden_dim=64, seed=0),
                sae=get_sae_training_class("auxk-topk")[1](
                    d_in=64, d_sae=256, k=8, aux_variant=aux_variant, dead_threshold_tokens=5_000
                ),
                training_samples=training_samples,
                batch_size=256,
                lr=1e-3,
                eval_samples=10_000,
                output_path=None,
                checkpoint_path=None,
                logger=LoggingConfig(log_to_wandb=False),
            )
        )
        result = runner.run().final_eval
        assert result is not None
        print(
            f"{aux_variant}: {result.dead_latents} of 256 latents dead, "
            f"explained variance {result.explained_variance:.3f}"
        )


if __name__ == "__main__":
    main()
