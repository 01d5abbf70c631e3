"""Measures a trained SAE. ``sae_lens_auxk.compare.schema`` defines the metrics."""

from statistics import median
from typing import Any

import torch
from sae_lens import SAE

from sae_lens_auxk.compare.peeking import measure_peeking
from sae_lens_auxk.compare.schema import DENSE, JUNK, Density, Measured, Numbers, require_in_table
from sae_lens_auxk.compare.sources import Pass
from sae_lens_auxk.compare.train import TrainingLog
from sae_lens_auxk.saelens.names import (
    ExplainedVarianceCalculator,
    L0Calculator,
    cosine_similarities,
)

LOG10_EDGES = [edge / 4 for edge in range(-24, 1)]
"""Bin edges of the histogram of firing rates: from 1e-6 to 1, four bins per power of ten."""


@torch.no_grad()
def measure(sae: SAE[Any], data: Pass, x: torch.Tensor, log: TrainingLog) -> Measured:
    """Measure a finished run.

    Args:
        sae: the inference model, as it was saved.
        data: the pass that the run belongs to.
        x: (N, d_in) held-out activations of that pass.
        log: what was logged while the SAE was trained.

    Returns:
        The entries ``metrics``, ``density``, ``silent_latents`` and ``peeking`` of a run.

    Raises:
        ValueError: a metric has no row in the table.
    """
    sae.eval()
    batch_size = data.trainer_config.train_batch_size_samples
    metrics, rates = reconstruction(sae, x, batch_size)
    fires = rates > 0
    metrics["dead_fraction"] = log.dead.float().mean().item()
    metrics["dense_latents"] = _share(rates > DENSE, fires)
    metrics |= data.metrics(sae)
    if data.true_features is not None:
        metrics |= coverage(sae.W_dec[fires], data.true_features)
    metrics["ms_per_step"] = 1000 * median(log.step_seconds)
    if log.step_bytes:
        metrics["peak_memory_gib"] = max(log.step_bytes) / 2**30
    revived = log.ever_dead & ~log.dead
    peeking = measure_peeking(
        sae,
        x,
        revived=revived,
        never_died=~log.ever_dead,
        alive_since=log.alive_since,
        training_samples=log.n_samples,
        true_features=data.true_features,
        feature_acts=data.held_out_features,
    )
    require_in_table(metrics, (key for group in peeking.values() for key in group))
    return {
        "metrics": metrics,
        "density": density_histogram(rates),
        "silent_latents": int((~fires).sum()),
        "peeking": peeking,
    }


def reconstruction(sae: SAE[Any], x: torch.Tensor, batch_size: int) -> tuple[Numbers, torch.Tensor]:
    """Explained variance, L0 and MSE on ``x`` (N, d_in), and the firing rates (d_sae,)."""
    explained_variance, l0 = ExplainedVarianceCalculator(), L0Calculator()
    n_fired = torch.zeros(sae.cfg.d_sae, device=x.device)
    for batch in x.split(batch_size):
        acts = sae.encode(batch)
        explained_variance.add_batch(sae.decode(acts), batch)
        l0.add_batch(acts)
        n_fired += (acts != 0).sum(0)
    metrics: Numbers = {
        "explained_variance": explained_variance.compute(),
        "l0": l0.compute(),
        "mse": explained_variance.sum_squared_residual / explained_variance.num_samples,
    }
    return metrics, n_fired / x.shape[0]


def coverage(decoder: torch.Tensor, true_features: torch.Tensor) -> Numbers:
    """Match the decoder rows (n, d_in) of latents that fire with true features (n_features, d_in).

    A latent's best match is the feature with the largest absolute cosine.
    """
    if decoder.shape[0] == 0:
        return {"features_covered": 0.0, "junk_share": None}
    cosine, match = cosine_similarities(decoder, true_features).abs().max(dim=1)
    return {
        "features_covered": match[cosine > JUNK].unique().numel() / true_features.shape[0],
        "junk_share": (cosine < JUNK).float().mean().item(),
    }


def density_histogram(rates: torch.Tensor) -> Density:
    """Histogram of log10 of the firing rates (d_sae,); latents that never fire are left out."""
    log10 = rates[rates > 0].log10().clamp(LOG10_EDGES[0], LOG10_EDGES[-1])
    edges = torch.tensor(LOG10_EDGES)
    counts = torch.histogram(log10.cpu(), edges).hist
    return {"log10_edges": LOG10_EDGES, "counts": counts.int().tolist()}


def _share(part: torch.Tensor, whole: torch.Tensor) -> float | None:
    n = int(whole.sum())
    return int((part & whole).sum()) / n if n else None
