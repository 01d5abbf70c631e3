"""What a trained SAE is measured by; each metric is defined in docs/compare.md."""

from statistics import median
from typing import Any

import torch
from sae_lens.evals import ExplainedVarianceCalculator
from sae_lens.saes.sae import SAE
from sae_lens.synthetic import L0Calculator
from sae_lens.util import cosine_similarities

from sae_lens_auxk.compare.peeking import measure_peeking
from sae_lens_auxk.compare.sources import Pass
from sae_lens_auxk.compare.train import Record

LOG10_EDGES = [edge / 4 for edge in range(-24, 1)]
"""Of the histogram of firing rates: from 1e-6 to 1, four bins a power of ten."""
DENSE = 0.1
"""A latent that fires on more than this share of samples is dense."""
FOUND = 0.5
"""A latent whose best cosine with a true feature is below this is junk."""


@torch.no_grad()
def measure(sae: SAE[Any], data: Pass, x: torch.Tensor, record: Record) -> dict[str, Any]:
    """All measurements of a finished run.

    Args:
        sae: the inference model, as it was saved.
        data: the pass that the run belongs to.
        x: (N, d_in) held-out activations of that pass.
        record: what was written down while it trained.

    Returns:
        The entries ``metrics``, ``density``, ``silent_latents`` and ``peeking`` of a run.
    """
    sae.eval()
    batch_size = data.trainer_config.train_batch_size_samples
    metrics, rates = reconstruction(sae, x, batch_size)
    fires = rates > 0
    metrics["dead_fraction"] = record.dead.float().mean().item()
    metrics["dense_latents"] = _share(rates > DENSE, fires)
    metrics |= data.metrics(sae)
    if data.true_features is not None:
        metrics |= coverage(sae.W_dec[fires], data.true_features)
    metrics["ms_per_step"] = 1000 * median(record.step_seconds)
    if record.step_bytes:
        metrics["peak_memory_gib"] = max(record.step_bytes) / 2**30
    revived = record.ever_dead & ~record.dead
    return {
        "metrics": metrics,
        "density": density_histogram(rates),
        "silent_latents": int((~fires).sum()),
        "peeking": measure_peeking(
            sae,
            x,
            revived=revived,
            never_died=~record.ever_dead,
            true_features=data.true_features,
        ),
    }


def reconstruction(
    sae: SAE[Any], x: torch.Tensor, batch_size: int
) -> tuple[dict[str, float | None], torch.Tensor]:
    """Explained variance, L0 and MSE on ``x`` (N, d_in), and firing rates (d_sae,)."""
    explained_variance, l0 = ExplainedVarianceCalculator(), L0Calculator()
    n_fired = torch.zeros(sae.cfg.d_sae, device=x.device)
    for batch in x.split(batch_size):
        acts = sae.encode(batch)
        explained_variance.add_batch(sae.decode(acts), batch)
        l0.add_batch(acts)
        n_fired += (acts != 0).sum(0)
    metrics: dict[str, float | None] = {
        "explained_variance": explained_variance.compute(),
        "l0": l0.compute(),
        "mse": explained_variance.sum_squared_residual / explained_variance.num_samples,
    }
    return metrics, n_fired / x.shape[0]


def coverage(decoder: torch.Tensor, true_features: torch.Tensor) -> dict[str, float | None]:
    """How latents (n, d_in) that fire and true features (n_features, d_in) match.

    A latent's best match is the feature of the largest absolute cosine with its decoder row.
    """
    if decoder.shape[0] == 0:
        return {"features_covered": 0.0, "junk_share": None}
    cosine, match = cosine_similarities(decoder, true_features).abs().max(dim=1)
    return {
        "features_covered": match[cosine > FOUND].unique().numel() / true_features.shape[0],
        "junk_share": (cosine < FOUND).float().mean().item(),
    }


def density_histogram(rates: torch.Tensor) -> dict[str, list[float]]:
    """Counts of log10 of the firing rates (d_sae,) of the latents that fire."""
    log10 = rates[rates > 0].log10().clamp(LOG10_EDGES[0], LOG10_EDGES[-1])
    edges = torch.tensor(LOG10_EDGES)
    counts = torch.histogram(log10.cpu(), edges).hist
    return {"log10_edges": LOG10_EDGES, "counts": counts.int().tolist()}


def _share(part: torch.Tensor, whole: torch.Tensor) -> float | None:
    n = int(whole.sum())
    return int((part & whole).sum()) / n if n else None
