"""Residual peeking: are latents that came back from the dead features or error correctors?

A corrector's direction is an average of what other latents got wrong (SAELens #666). Rare latents
differ from frequent ones and young latents from old ones in every measure of
``sae_lens_auxk.compare.latents``, whatever brought them back. So latents that came back are
compared with latents that never died and fire as often, and their younger half with the older.
studies/peeking has the results.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from sae_lens import SAE

from sae_lens_auxk.compare.latents import count_firings, measure_latents
from sae_lens_auxk.compare.schema import Numbers

MIN_LATENTS = 5
"""A group with fewer latents gets no numbers."""
NEIGHBOURS = 5
"""Number of never-dead latents that each revived one is compared with."""
MAX_LATENTS = 1000
"""This many latents are drawn from a larger group; a share then has a standard error of 1.6%."""


def measure_peeking(
    sae: SAE[Any],
    x: torch.Tensor,
    *,
    revived: torch.Tensor,
    never_died: torch.Tensor,
    alive_since: torch.Tensor,
    training_samples: int,
    true_features: torch.Tensor | None = None,
    feature_acts: Sequence[torch.Tensor] = (),
    seed: int = 0,
) -> dict[str, Numbers]:
    """
    Compare latents that were dead and came back with latents that never died.

    Every latent that fires on a row of ``x`` can be measured; none is left out because it fires
    rarely, as one loss may make more of these than another. Each revived latent is compared with
    the NEIGHBOURS never-dead latents nearest to it in firing rate (one may serve several).

    Args:
        sae: an SAE whose decoder is linear.
        x: (N, d_in) held-out activations in the units that the SAE takes.
        revived: (d_sae,) bool, latents that were dead at some time and are not now.
        never_died: (d_sae,) bool, latents that never were dead.
        alive_since: (d_sae,) int64, the training sample at which a revived latent last came back.
        training_samples: number of samples that the SAE was trained on.
        true_features: (n_features, d_in) directions of the true features, where known.
        feature_acts: batches (B, n_features) of their activations, together the N rows.
        seed: of the draw where a group has more than MAX_LATENTS latents.

    Returns:
        Numbers of "revived" and of its comparison group "never_died", and the same of the half
        of the revived latents that came back last, "revived_young" and "never_died_young", and
        of the other half, "revived_old" and "never_died_old":

        n_alive: latents that were revived, or never died, in all; not for a half.
        n_firing: those of them that fire on a row of ``x``; not for a half.
        n_latents: how many different latents the numbers below are from. With fewer than
            MIN_LATENTS all of these are None, and for a comparison group also where there are
            too few revived latents to compare it with. So is a single one of them that fewer
            latents have: junk has no split.
        firing_rate: median share of rows that a latent fires on.
        age: median share of the training since the latents came back; 1 if they never died.

        The others are means over the group's latents of what
        :func:`~sae_lens_auxk.compare.latents.measure_latents` returns, or None if it does not
        return them.

    Raises:
        ValueError: if an argument does not have the shape above.
    """
    _require_shapes(
        sae,
        x,
        true_features,
        feature_acts,
        revived=revived,
        never_died=never_died,
        alive_since=alive_since,
    )
    firings = count_firings(sae, x)
    fires = (firings > 0).cpu()
    revived, never_died, alive_since = revived.cpu(), never_died.cpu(), alive_since.cpu()
    came_back = _draw((revived & fires).nonzero().flatten(), seed)
    by_age = came_back[alive_since[came_back].argsort(descending=True, stable=True)]
    half = len(by_age) // 2
    offered = (never_died & fires).nonzero().flatten()
    groups: dict[str, torch.Tensor] = {}
    for part, members in (("", came_back), ("_young", by_age[:half]), ("_old", by_age[half:])):
        groups[f"revived{part}"] = members
        matched = members[:0] if len(members) < MIN_LATENTS else members
        groups[f"never_died{part}"] = nearest_in_rate(firings.cpu(), matched, offered)

    latents = torch.cat([*groups.values()]).unique()
    on_device = latents.to(x.device)
    values = {
        "firing_rate": firings[on_device] / x.shape[0],
        "age": 1 - (alive_since * revived)[latents] / training_samples,
    }
    if latents.numel():
        values |= measure_latents(sae, x, on_device, firings, true_features, feature_acts)
    measured = {
        name: _summary({key: value.cpu() for key, value in values.items()}, latents, members)
        for name, members in groups.items()
    }
    for name, alive in (("revived", revived), ("never_died", never_died)):
        measured[name] |= {"n_alive": int(alive.sum()), "n_firing": int((alive & fires).sum())}
    return measured


def nearest_in_rate(
    firings: torch.Tensor, members: torch.Tensor, offered: torch.Tensor
) -> torch.Tensor:
    """Comparison latents: for each of ``members`` (n,) NEIGHBOURS of ``offered`` (m,), flat.

    They are the nearest in firing rate on a log scale; one may occur several times. ``firings``
    (d_sae,) are numbers of rows, above 0 for all that are named.
    """
    log = firings.log()
    distance = (log[members][:, None] - log[offered]).abs()
    return offered[distance.argsort(dim=1, stable=True)[:, :NEIGHBOURS].flatten()]


def _draw(latents: torch.Tensor, seed: int) -> torch.Tensor:
    order = torch.randperm(latents.numel(), generator=torch.Generator().manual_seed(seed))
    return latents[order[:MAX_LATENTS]].sort().values


def _summary(
    values: Mapping[str, torch.Tensor], latents: torch.Tensor, members: torch.Tensor
) -> Numbers:
    """Medians and means over ``members`` of values of ``latents``, which are sorted.

    A latent that occurs several times is counted each time.
    """
    summary: Numbers = {"n_latents": members.unique().numel()}
    at = torch.searchsorted(latents, members)
    for name, of_latents in values.items():
        summary[name] = None
        is_known = ~of_latents[at].isnan()
        if members[is_known].unique().numel() >= MIN_LATENTS:
            known = of_latents[at][is_known]
            middle = known.median() if name in ("firing_rate", "age") else known.mean()
            summary[name] = middle.item()
    return summary


def _require_shapes(
    sae: SAE[Any],
    x: torch.Tensor,
    true_features: torch.Tensor | None,
    feature_acts: Sequence[torch.Tensor],
    **of_latents: torch.Tensor,
) -> None:
    d_sae, d_in = sae.W_dec.shape
    for name, values in of_latents.items():
        dtype = torch.int64 if name == "alive_since" else torch.bool
        if values.shape != (d_sae,) or values.dtype != dtype:
            raise ValueError(
                f"{name} is {values.dtype} {tuple(values.shape)}, must be {dtype} ({d_sae},)"
            )
    for name, rows in (("x", x), ("true_features", true_features)):
        if rows is not None and (rows.ndim != 2 or rows.shape[1] != d_in):
            raise ValueError(f"{name} is {tuple(rows.shape)}, must be (n, {d_in})")
    n_rows = sum(len(batch) for batch in feature_acts)
    if feature_acts and (n_rows != len(x) or true_features is None):
        raise ValueError(
            f"feature_acts has {n_rows} rows, must have those of x ({len(x)}) and come with "
            "true_features"
        )
