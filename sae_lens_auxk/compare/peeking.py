"""Residual peeking: are latents that came back from the dead features or error correctors?

A corrector's direction is an average of what other latents got wrong (SAELens #666). What
it is made of and what its removal hurts tell it from a feature. docs/peeking.md derives each
measure, checks it on planted latents, and says where it fails.

Notation: ``W_i`` is the decoder row of latent i at unit length and ``c_bi`` what the latent adds
along it in row b, so that the reconstruction is ``sum_i c_bi W_i + b_dec``. ``e_b`` is the error
with all latents, and ``e_b + c_bi W_i`` the error without latent i. Nothing is encoded again: in
a TopK SAE, no other latent takes the place of the one that is left out.
"""

from collections.abc import Iterator
from typing import Any

import torch
from sae_lens.saes.sae import SAE

from sae_lens_auxk.results import JUNK, NEAR_DUPLICATE, PEEKING, Numbers

MIN_FIRINGS = 20
"""A latent that fires on fewer rows is not measured."""
MIN_LATENTS = 5
"""A group with fewer latents gets no numbers."""
NEIGHBOURS = 5
"""Number of never-dead latents that each revived one is compared with."""
MAX_LATENTS = 1000
"""This many latents are drawn from a larger group; a share then has a standard error of 1.6%."""
ROWS_PER_CHUNK = 2048
TINY = 1e-12


@torch.no_grad()
def measure_peeking(
    sae: SAE[Any],
    x: torch.Tensor,
    *,
    revived: torch.Tensor,
    never_died: torch.Tensor,
    true_features: torch.Tensor | None = None,
    seed: int = 0,
) -> dict[str, Numbers]:
    """
    Compare latents that were dead and came back with latents that never died.

    Rare latents differ from frequent ones in every measure, so each revived latent is compared
    with the NEIGHBOURS never-dead latents nearest to it in firing rate (one may serve several).

    Args:
        sae: an SAE with non-negative activations whose decoder is linear.
        x: (N, d_in) held-out activations in the units that the SAE takes.
        revived: (d_sae,) bool, latents that were dead at some time and are not now.
        never_died: (d_sae,) bool, latents that never were dead.
        true_features: (n_features, d_in) directions of the true features, where known.
        seed: of the draw where a group has more than MAX_LATENTS latents.

    Returns:
        For each of "revived" and "never_died", numbers that are means over the group's latents
        unless said otherwise:

        n_latents: how many different latents they are from, of those that fire on at least
            MIN_FIRINGS rows. With fewer than MIN_LATENTS all others are None, and for
            "never_died" they are None too where "revived" has too few to be matched with.
        firing_rate: median share of rows that a latent fires on.
        error_auc: probability that a row on which the latent fires is reconstructed worse than
            one on which it does not; 0.5 means that it fires regardless of errors. The error is
            ``||e_b||^2 / ||x_b - mean||^2``, with the latent on. The measure is weak, and in TopK
            SAEs it points the other way: see docs/peeking.md.
        rows_hurt: effective share of rows (participation ratio) over which the part of the
            error without the latent that lies along its direction is spread; small for a rare
            feature, 1/3 for a direction without meaning (a Gaussian's).
        latents_hurt: effective number of alive latents whose directions lose when this one is
            removed, itself included; 1 is itself alone.
        near_duplicate_share: share with a cosine above NEAR_DUPLICATE to another alive latent.

        With ``true_features``, else None:

        junk_share: share whose best cosine with a true feature is below JUNK. The cosine has
            its sign: minus a feature is a correction, as activations are not negative.
        duplicate_share: share that are not junk, but whose feature another alive latent holds
            with a larger cosine.
        features_hurt: effective number of true features whose recovery suffers when the latent
            is removed.

    Raises:
        ValueError: if a mask or the true features do not have the shapes above.
    """
    d_sae, d_in = sae.W_dec.shape
    for name, mask in (("revived", revived), ("never_died", never_died)):
        if mask.shape != (d_sae,) or mask.dtype != torch.bool:
            raise ValueError(
                f"{name} is {mask.dtype} {tuple(mask.shape)}, must be torch.bool ({d_sae},)"
            )
    for name, rows in (("x", x), ("true_features", true_features)):
        if rows is not None and (rows.ndim != 2 or rows.shape[1] != d_in):
            raise ValueError(f"{name} is {tuple(rows.shape)}, must be (n, {d_in})")

    data = _Data(sae, x)
    firings = data.firings.cpu()
    measurable = firings >= MIN_FIRINGS
    generator = torch.Generator().manual_seed(seed)
    came_back = _draw((revived.cpu() & measurable).nonzero().flatten(), generator)
    control = (never_died.cpu() & measurable).nonzero().flatten()
    control = control[_nearest(firings[came_back], firings[control])]

    latents = torch.cat([came_back, control]).unique()
    if not latents.numel():  # often because none fires at all, which has no largest loss
        no_numbers: Numbers = {**dict.fromkeys(PEEKING), "n_latents": 0}
        return {"revived": no_numbers, "never_died": dict(no_numbers)}
    measured = data.measure(latents.to(x.device), true_features)
    return {
        "revived": _summary(measured, torch.searchsorted(latents, came_back)),
        "never_died": _summary(measured, torch.searchsorted(latents, control)),
    }


class _Data:
    """The data and their errors in the SAE's own units, and what is measured on them.

    Attributes:
        x: (N, d_in) rows as the SAE reconstructs them, after SAELens's run-time normalisation.
        e: (N, d_in) ``e_b``.
        firings: (d_sae,) rows that each latent fires on.
        directions: (d_sae, d_in) ``W_i``.
    """

    def __init__(self, sae: SAE[Any], x: torch.Tensor) -> None:
        self.sae = sae
        self.raw = x
        norms = sae.W_dec.float().norm(dim=-1)
        self.directions = sae.W_dec.float() / norms.clamp(min=TINY)[:, None]
        rescaled = getattr(sae.cfg, "rescale_acts_by_decoder_norm", False)
        self.scale = torch.ones_like(norms) if rescaled else norms
        offset = sae.b_dec.float() * (not sae.cfg.apply_b_dec_to_input)
        self.x = torch.empty_like(x, dtype=torch.float32)
        self.e = torch.empty_like(self.x)
        self.firings = torch.zeros_like(norms)
        for rows, c in self._chunks():
            self.x[rows] = sae.process_sae_in(x[rows]).float() - offset
            self.e[rows] = self.x[rows] - c @ self.directions
            self.firings += (c != 0).sum(dim=0)

    def _chunks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Slices of the rows, each with its ``c`` (B, d_sae)."""
        for start in range(0, self.raw.shape[0], ROWS_PER_CHUNK):
            rows = slice(start, start + ROWS_PER_CHUNK)
            acts = self.sae.encode(self.raw[rows])
            yield rows, (acts.to_dense() if acts.is_sparse else acts).float() * self.scale

    def measure(
        self, latents: torch.Tensor, true_features: torch.Tensor | None
    ) -> dict[str, torch.Tensor | None]:
        """Each measure for each of the ``latents`` (n,), as (n,)."""
        n_rows = self.x.shape[0]
        W = self.directions[latents]
        centred = self.x - self.x.mean(dim=0)
        unexplained = _squared_norm(self.e) / _squared_norm(centred).clamp(min=TINY)
        percentile = (unexplained.argsort().argsort().float() + 0.5) / n_rows

        percentiles, shares, squared_shares = self.firings.new_zeros(3, latents.numel())
        gain = torch.zeros_like(W)
        for rows, all_c in self._chunks():
            c, e = all_c[:, latents], self.e[rows]
            along = e @ W.T
            without = _squared_norm(e)[:, None] + 2 * along * c + c**2
            share = (along + c) ** 2 / without.clamp(min=TINY)
            shares += share.sum(dim=0)
            squared_shares += (share**2).sum(dim=0)
            percentiles += percentile[rows] @ (c != 0).float()
            gain += c.T @ centred[rows]

        firings = self.firings[latents]
        rate = firings / n_rows
        others = (self.firings > 0).nonzero().flatten()
        near = W @ self.directions[others].T
        near[latents[:, None] == others] = -1.0
        measured: dict[str, torch.Tensor | None] = {
            "firing_rate": rate,
            # mean percentile = rate / 2 + (1 - rate) * AUC
            "error_auc": (percentiles / firings - rate / 2) / (1 - rate).clamp(min=TINY),
            "rows_hurt": shares**2 / squared_shares.clamp(min=TINY) / n_rows,
            "latents_hurt": _hurt(W, gain, self.directions[others]),
            "near_duplicate_share": (near.amax(dim=1) > NEAR_DUPLICATE).float(),
            "junk_share": None,
            "duplicate_share": None,
            "features_hurt": None,
        }
        if true_features is not None:
            features = torch.nn.functional.normalize(true_features.float(), dim=-1)
            best, holds = (self.directions[others] @ features.T).max(dim=1)
            best_of_feature = best.new_full((features.shape[0],), -1.0)
            best_of_feature.scatter_reduce_(0, holds, best, "amax")
            own = torch.searchsorted(others, latents)
            is_junk = best[own] < JUNK
            measured["junk_share"] = is_junk.float()
            second = best[own] < best_of_feature[holds[own]]
            measured["duplicate_share"] = (second & ~is_junk).float()
            measured["features_hurt"] = _hurt(W, gain, features)
        return measured


def _hurt(W: torch.Tensor, gain: torch.Tensor, dictionary: torch.Tensor) -> torch.Tensor:
    """(n,): effective number of directions (m, d_in) that lose when a latent is removed.

    What direction d loses is the covariance of its readings in the latent's contribution and in
    the data, ``(W_i . d) cov(c_i, x . d)``; ``gain`` (n, d_in) is cov(c_i, x) up to a factor.
    The losses are squared before their participation ratio is taken, for each of many thousand
    directions has an overlap of about 1 / d_in with any other.
    """
    loss = ((W @ dictionary.T) * (gain @ dictionary.T)) ** 2
    loss = loss / loss.amax(dim=1, keepdim=True).clamp(min=TINY)
    return loss.sum(dim=1) ** 2 / (loss**2).sum(dim=1).clamp(min=TINY)


def _squared_norm(rows: torch.Tensor) -> torch.Tensor:
    return (rows**2).sum(dim=-1)


def _nearest(wanted: torch.Tensor, offered: torch.Tensor) -> torch.Tensor:
    """For each of ``wanted`` (n,) the NEIGHBOURS nearest of ``offered`` on a log scale, flat."""
    distance = (wanted.log()[:, None] - offered.log()).abs()
    return distance.argsort(dim=1, stable=True)[:, :NEIGHBOURS].flatten()


def _draw(latents: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    order = torch.randperm(latents.numel(), generator=generator)
    return latents[order[:MAX_LATENTS]].sort().values


def _summary(measured: dict[str, torch.Tensor | None], columns: torch.Tensor) -> Numbers:
    """Means over the latents in ``columns``; a latent counts as often as it is there."""
    n_latents = columns.unique().numel()
    summary: Numbers = {"n_latents": n_latents}
    for name, values in measured.items():
        if values is None or n_latents < MIN_LATENTS:
            summary[name] = None
        elif name == "firing_rate":
            summary[name] = values.cpu()[columns].median().item()
        else:
            summary[name] = values.cpu()[columns].mean().item()
    return summary
