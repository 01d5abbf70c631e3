"""Small SAEs of every architecture, and one training step of them."""

from typing import Any

import torch
from sae_lens.config import SAETrainerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainingSAE, TrainingSAEConfig, TrainStepInput
from sae_lens.training.sae_trainer import SAETrainer

import sae_lens_auxk  # noqa: F401  (registers the architectures)
from sae_lens_auxk.architectures import ARCHITECTURES as _ARCHITECTURES
from sae_lens_auxk.losses.registry import AUX_LOSSES
from sae_lens_auxk.saelens.pretrained import stock_architecture

ARCHITECTURES = list(_ARCHITECTURES)
TOPK_ARCHITECTURES = [name for name in ARCHITECTURES if "topk" in name]
VARIANTS = list(AUX_LOSSES)
STOCK = {name: stock_architecture(config) for name, (_, config) in _ARCHITECTURES.items()}
PAIRS = [
    (architecture, variant)
    for architecture in ARCHITECTURES
    for variant in VARIANTS
    if not AUX_LOSSES[variant].topk_only or architecture in TOPK_ARCHITECTURES
]


def build_config(architecture: str, **fields: Any) -> Any:
    defaults: dict[str, Any] = {"d_in": 8, "d_sae": 24}
    if "topk" in architecture:
        defaults["k"] = 3
    if "matryoshka" in architecture:
        d_sae = fields.get("d_sae", defaults["d_sae"])
        defaults["matryoshka_widths"] = [d_sae // 4, d_sae // 2, d_sae]
    return get_sae_training_class(architecture)[1](**{**defaults, **fields})


def build_sae(architecture: str, randomize: bool = True, **fields: Any) -> Any:
    """An SAE with parameters that are all different from 0 (``randomize``)."""
    cfg: TrainingSAEConfig = build_config(architecture, **fields)
    sae = TrainingSAE.from_dict(cfg.to_dict())
    if randomize:
        randomize_parameters(sae)
    return sae


@torch.no_grad()
def randomize_parameters(sae: Any) -> None:
    for name, parameter in sae.named_parameters():
        noise = torch.randn_like(parameter) * 0.5
        if name == "threshold":
            noise = noise.abs()
        parameter.copy_(noise)
    if hasattr(sae, "topk_threshold"):
        sae.topk_threshold.fill_(0.7)


def step_input(x: torch.Tensor, dead: torch.Tensor | None = None, step: int = 0) -> TrainStepInput:
    return TrainStepInput(
        sae_in=x,
        coefficients={"l1": 0.1, "l0": 0.1},
        dead_neuron_mask=dead,
        n_training_steps=step,
        is_logging_step=False,
    )


def forward(sae: Any, x: torch.Tensor, dead: torch.Tensor | None = None, step: int = 0) -> Any:
    return sae.training_forward_pass(step_input(x, dead, step))


def aux_loss(sae: Any, x: torch.Tensor, dead: torch.Tensor | None = None) -> torch.Tensor:
    return forward(sae, x, dead).losses["aux_loss"]


def aux_value_and_gradients(
    sae: Any, x: torch.Tensor, dead: torch.Tensor | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The auxiliary loss of one step and the gradient of it alone."""
    loss = aux_loss(sae, x, dead)
    return loss, gradients_of(loss, sae)


def aux_gradients(
    sae: Any, x: torch.Tensor, dead: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    return aux_value_and_gradients(sae, x, dead)[1]


def gradients_of(loss: torch.Tensor, sae: Any) -> dict[str, torch.Tensor]:
    """Gradients by parameter name; zeros for parameters that the loss does not reach."""
    parameters = dict(sae.named_parameters())
    if not loss.requires_grad:
        return {name: torch.zeros_like(p) for name, p in parameters.items()}
    gradients = torch.autograd.grad(
        loss, list(parameters.values()), allow_unused=True, materialize_grads=True
    )
    return dict(zip(parameters, gradients, strict=True))


def build_trainer(sae: Any, **fields: Any) -> SAETrainer[Any, Any]:
    defaults: dict[str, Any] = {
        "total_training_samples": 10**9,
        "train_batch_size_samples": 16,
        "lr": 1e-2,
        "lr_end": 1e-3,
    }
    return SAETrainer(SAETrainerConfig(**{**defaults, **fields}), sae, iter(()))


def kill_latents(sae: Any, n: int) -> None:
    """Keep the first ``n`` latents from firing."""
    bias = sae.b_gate if hasattr(sae, "b_gate") else sae.b_enc
    with torch.no_grad():
        if sae.cfg.architecture() == "auxk-abstopk":
            sae.W_enc[:, :n] *= 1e-3
            bias[:n] *= 1e-3
            return
        bias[:n] -= 100.0
        if hasattr(sae, "b_mag"):
            sae.b_mag[:n] -= 100.0


def assert_sparse_step_equals_dense(architecture: str, variant: str, d_sae: int) -> None:
    """Loss, activations and gradients of one step, with half of the latents dead."""
    results: list[tuple[Any, dict[str, torch.Tensor]]] = []
    for sparse in (True, False):
        torch.manual_seed(0)
        sae = build_sae(
            architecture,
            d_in=6,
            d_sae=d_sae,
            k=4,
            k_aux=16,
            aux_variant=variant,
            dead_criterion="steps",
            randomize=False,
        )
        sae.may_be_sparse = sparse
        x = torch.randn(8, 6)
        assert sae._can_be_sparse(x) == sparse
        output = forward(sae, x, torch.arange(d_sae) % 2 == 0)
        results.append((output, gradients_of(output.loss, sae)))
    (a, grads_a), (b, grads_b) = results
    torch.testing.assert_close(a.loss, b.loss)
    torch.testing.assert_close(a.feature_acts, b.feature_acts)
    for name, gradient in grads_b.items():
        torch.testing.assert_close(grads_a[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
