"""Measures of single latents of an SAE, with or without the true features.

docs/methods.md says where each measure fails. studies/peeking shows on planted and on trained
latents how well it tells latents without meaning, duplicates and split features from features.
``W_i`` is the decoder row of latent i at unit length.
"""

from collections.abc import Sequence
from typing import Any

import torch
from sae_lens import SAE

from sae_lens_auxk.compare.schema import JUNK
from sae_lens_auxk.compare.split import split_gain

ROWS_PER_CHUNK = 2048
TINY = 1e-12


def has_signed_rows(architecture: str) -> bool:
    """Whether a decoder row and its negative are different latents.

    They are the same latent if latents fire in both directions. Otherwise activations are never
    negative.
    """
    return not architecture.endswith("abstopk")


@torch.no_grad()
def count_firings(sae: SAE[Any], x: torch.Tensor) -> torch.Tensor:
    """(d_sae,): the number of rows of ``x`` (N, d_in) on which each latent fires."""
    firings = torch.zeros(sae.cfg.d_sae, device=x.device)
    for rows in x.split(ROWS_PER_CHUNK):
        firings += (_encode(sae, rows) != 0).sum(dim=0)
    return firings


@torch.no_grad()
def measure_latents(
    sae: SAE[Any],
    x: torch.Tensor,
    latents: torch.Tensor,
    firings: torch.Tensor,
    true_features: torch.Tensor | None = None,
    feature_acts: Sequence[torch.Tensor] = (),
) -> dict[str, torch.Tensor]:
    """
    Measure single latents.

    Args:
        sae: an SAE whose decoder is linear.
        x: (N, d_in) held-out activations in the units that the SAE takes.
        latents: (n,) int64, the latents to measure, each of which fires on some row.
        firings: (d_sae,), from :func:`count_firings`; a latent that fires is alive.
        true_features: (n_features, d_in) directions of the true features, where known.
        feature_acts: batches (B, n_features) of the true features' activations, dense or sparse,
            together the N rows.

    Returns:
        For each measure its values (n,):

        direction_spread: effective share of the rows (participation ratio of ``cos^2(x_b - mean,
            W_i)``) that vary along the latent's direction: small for the direction of a feature,
            1/3 for one without meaning (a Gaussian's), and not much less for a very rare feature.
        nearest_cosine: cosine of ``W_i`` with the nearest decoder row of another alive latent;
            this and the cosines below are absolute ones in AbsTopK.

        With ``true_features``:

        junk_share: 1 where the best cosine with a true feature is below JUNK. The cosine has
            its sign: minus a feature is a correction, as activations are not negative.
        duplicate_share: 1 where the latent is not junk, but another alive latent holds its
            feature with a larger cosine.
        features_hurt: effective number of true features whose recovery suffers when the latent
            is removed.

        With ``feature_acts``:

        split: :func:`~sae_lens_auxk.compare.split.split_gain` for the nearest true feature; NaN
            for junk, which holds none, and where the feature does not vary.
    """
    directions = torch.nn.functional.normalize(sae.W_dec.float(), dim=-1)
    W = directions[latents]
    alive = (firings > 0).nonzero().flatten()
    centred = torch.cat([sae.process_sae_in(rows).float() for rows in x.split(ROWS_PER_CHUNK)])
    centred -= centred.mean(dim=0)
    size = (centred**2).sum(dim=1, keepdim=True).clamp(min=TINY)

    shares, squared_shares = W.new_zeros(2, latents.numel())
    for rows, norms in zip(centred.split(ROWS_PER_CHUNK), size.split(ROWS_PER_CHUNK), strict=True):
        share = (rows @ W.T) ** 2 / norms
        shares += share.sum(dim=0)
        squared_shares += (share**2).sum(dim=0)
    signed = has_signed_rows(sae.cfg.architecture())
    near = _cosines(W, directions[alive], signed)
    near[latents[:, None] == alive] = -1.0
    measured = {
        "direction_spread": shares**2 / squared_shares.clamp(min=TINY) / x.shape[0],
        "nearest_cosine": near.amax(dim=1),
    }
    if true_features is None:
        return measured

    features = torch.nn.functional.normalize(true_features.float(), dim=-1)
    best, holds = _cosines(directions[alive], features, signed).max(dim=1)
    best_of_feature = best.new_full((features.shape[0],), -1.0)
    best_of_feature.scatter_reduce_(0, holds, best, "amax")
    own = torch.searchsorted(alive, latents)
    is_junk = best[own] < JUNK
    second = best[own] < best_of_feature[holds[own]]
    gain = torch.zeros_like(W)
    for raw, rows in zip(x.split(ROWS_PER_CHUNK), centred.split(ROWS_PER_CHUNK), strict=True):
        gain += _encode(sae, raw)[:, latents].T @ rows
    measured |= {
        "junk_share": is_junk.float(),
        "duplicate_share": (second & ~is_junk).float(),
        "features_hurt": _hurt(W, gain, features),
    }
    if feature_acts:
        targets = (batch.to_dense()[:, holds[own]].to(x.device) for batch in feature_acts)
        acts = (_encode(sae, rows) for rows in x.split([len(batch) for batch in feature_acts]))
        gains = split_gain(zip(acts, targets, strict=True), latents, signed)
        measured["split"] = gains.masked_fill(is_junk, torch.nan)
    return measured


def _cosines(a: torch.Tensor, b: torch.Tensor, signed: bool) -> torch.Tensor:
    """(n, m) of rows at unit length."""
    cosines = a @ b.T
    return cosines if signed else cosines.abs()


def _encode(sae: SAE[Any], x: torch.Tensor) -> torch.Tensor:
    acts = sae.encode(x)
    return (acts.to_dense() if acts.is_sparse else acts).float()


def _hurt(W: torch.Tensor, gain: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """(n,): effective number of features (m, d_in) that lose when a latent is removed.

    What feature f loses is the covariance of its readings in the latent's contribution and in
    the data, ``(W_i . f) cov(c_i, x . f)``; ``gain`` (n, d_in) is cov(c_i, x) up to a factor.
    The losses are squared before their participation ratio is taken, for each of many thousand
    features has an overlap of about 1 / d_in with any direction.
    """
    loss = ((W @ features.T) * (gain @ features.T)) ** 2
    loss = loss / loss.amax(dim=1, keepdim=True).clamp(min=TINY)
    return loss.sum(dim=1) ** 2 / (loss**2).sum(dim=1).clamp(min=TINY)
