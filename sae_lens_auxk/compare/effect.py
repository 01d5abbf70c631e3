"""Effects of single latents: what is lost where a latent is taken out.

A latent's contribution, its activation times its decoder row in the units of the data, is
subtracted from the model's activations at the tokens where it fires. All else stays, the SAE's
error too: the model never sees a reconstruction. So the next token's cross-entropy (CE) rises by
what the model did with that contribution, and the SAE's MSE by what the SAE explained with it. A
latent that only corrects errors should raise the MSE but hardly the CE.

A latent that fires often or strongly has a larger effect, whatever it means. So latents are
compared in pairs that are alike in both.
"""

from collections.abc import Mapping, Sequence
from math import log
from pathlib import Path
from typing import Any

import torch
from sae_lens import SAE
from safetensors import SafetensorError
from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment

from sae_lens_auxk.compare.files import EFFECTS_FILENAME, LIVES_FILENAME
from sae_lens_auxk.compare.latents import ROWS_PER_CHUNK, has_signed_rows
from sae_lens_auxk.compare.prompts import Prompts
from sae_lens_auxk.compare.reproducibility import alive_latents, best_cosines, naming, read_lives
from sae_lens_auxk.compare.schema import (
    ALIKE,
    EFFECT,
    FOUND_AGAIN,
    JUNK,
    MATCHED,
    MIN_PAIRS,
    Numbers,
    Run,
)
from sae_lens_auxk.compare.seeds import case_of
from sae_lens_auxk.compare.sources import Pass
from sae_lens_auxk.files import write_tensors
from sae_lens_auxk.saelens.checkpoints import open_sae
from sae_lens_auxk.saelens.names import SAE_WEIGHTS_FILENAME, cosine_similarities

CONTRASTS = (("revived", "never_died"), ("found", "not_found"), ("feature", "junk"))
"""The groups that are compared, the last two where true features are known."""
MAX_PAIRS = 500
MAX_FIRINGS = 200
"""The first firings of a latent, in the order of the text, that it is taken out at."""
LATENTS_AT_ONCE = 10
FORBIDDEN = 1e6
"""The cost of a pair that is not alike; more than that of all pairs that are."""


def effects_of_pass(
    runs: Sequence[Run], all_runs: Sequence[Run], data: Pass, folder: Path, device: str
) -> dict[str, dict[str, Numbers]]:
    """The effects of the runs of a pass, by the folder of the run; see ``EFFECT``.

    Measured latents are kept in the run's folder, and not measured again.

    Args:
        runs: the finished runs of the pass. Those whose files are gone are left out.
        all_runs: the finished runs of all passes that have the same model: latents that are found
            again are found in these.
        data: the pass.
        folder: of the comparison.
        device: where to compute.
    """
    prompts = data.prompts()
    x = data.held_out() if prompts is None else prompts.rows
    x = x.to(device)
    effects: dict[str, dict[str, Numbers]] = {}
    for run in runs:
        path = folder / (run["folder"] or "")
        if not (path / SAE_WEIGHTS_FILENAME).is_file() or not (path / LIVES_FILENAME).is_file():
            continue
        with naming(path):
            sae = open_sae(path, device)
        sae.eval()
        groups = _groups(sae, run, all_runs, data, folder)
        effects[run["folder"] or ""] = effects_of(sae, x, groups, prompts, path / EFFECTS_FILENAME)
    return effects


def effects_of(
    sae: SAE[Any],
    x: torch.Tensor,
    groups: Mapping[str, torch.Tensor],
    prompts: Prompts | None,
    path: Path,
) -> dict[str, Numbers]:
    """Measure the pairs of an SAE.

    Args:
        sae: an inference SAE whose decoder is linear.
        x: (N, d_in) held-out activations, those of ``prompts`` if there are some.
        groups: of latents, as (n,) int64, by names in ``CONTRASTS``.
        prompts: of the language model; None leaves out the CE.
        path: of the file that keeps what is measured.

    Returns:
        For each group that has a counterpart the numbers of ``EFFECT``. ``n_pairs`` is that of
        both; with fewer than MIN_PAIRS the others are None.
    """
    rate, size = habits(sae, x)
    pairs = {
        pair: matched_pairs(groups[pair[0]], groups[pair[1]], rate, size)
        for pair in CONTRASTS
        if pair[0] in groups and pair[1] in groups
    }
    enough = [found.flatten() for found in pairs.values() if len(found) >= MIN_PAIRS]
    measured: dict[str, torch.Tensor] = {}
    if enough:
        measured = _measured(sae, x, torch.cat(enough).unique(), prompts, path)
    variance = x.float().var(dim=0, correction=0).sum().item()
    effects: dict[str, Numbers] = {}
    for pair, found in pairs.items():
        for name, latents in zip(pair, found.T.contiguous(), strict=True):
            effects[name] = {**dict.fromkeys(EFFECT), "n_pairs": len(latents)}
            if len(latents) < MIN_PAIRS:
                continue
            at = torch.searchsorted(measured["latents"], latents)
            mse = measured["mse_rise"][at].mean().item() / variance
            effects[name] |= {
                "firing_rate": rate[latents].median().item(),
                "mean_activation": size[latents].median().item(),
                "mse_rise": mse,
            }
            if "ce_rise" in measured:
                ce = measured["ce_rise"][at].mean().item()
                effects[name] |= {"ce_rise": ce, "ce_per_mse": ce / mse if mse else None}
    return effects


def matched_pairs(
    a: torch.Tensor, b: torch.Tensor, rate: torch.Tensor, size: torch.Tensor
) -> torch.Tensor:
    """(p, 2) int64: latents of ``a`` (n,) with one of ``b`` (m,) each, every latent once.

    No pair differs by more than ALIKE in rate or in size (d_sae,). There are as many pairs as
    possible, and of all such matchings this is the one whose pairs differ least. Latents that
    never fire are left out. MATCHED latents are drawn from a larger group, and MAX_PAIRS from more
    pairs.
    """
    generator = torch.Generator().manual_seed(0)

    def drawn(latents: torch.Tensor, most: int) -> torch.Tensor:
        order = torch.randperm(len(latents), generator=generator)[:most]
        return latents[order.sort().values]

    a, b = (drawn(latents[rate[latents] > 0], MATCHED) for latents in (a, b))
    apart = torch.stack(
        [(values[a].double().log()[:, None] - values[b].double().log()).abs()
         for values in (rate, size)]
    )  # fmt: skip
    alike = (apart <= log(ALIKE) + 1e-6).all(dim=0)  # float32 is not more exact
    cost = apart.sum(dim=0).where(alike, FORBIDDEN).numpy()
    rows, columns = map(torch.from_numpy, linear_sum_assignment(cost))
    kept = alike[rows, columns]
    return drawn(torch.stack([a[rows[kept]], b[columns[kept]]], dim=1), MAX_PAIRS)


@torch.no_grad()
def habits(sae: SAE[Any], x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(d_sae,) on the CPU: the share of rows of ``x`` (N, d_in) that a latent fires on, and its
    mean activation there, times the length of its decoder row; 0 for one that never fires."""
    fired = torch.zeros(sae.cfg.d_sae, device=x.device)
    total = torch.zeros_like(fired)
    for rows in x.split(ROWS_PER_CHUNK):
        acts = _encode(sae, rows)
        fired += (acts != 0).sum(dim=0)
        total += acts.abs().sum(dim=0)
    size = total / fired.clamp(min=1) * sae.W_dec.float().norm(dim=-1)
    return fired.cpu() / len(x), size.cpu()


@torch.no_grad()
def rises(
    sae: SAE[Any], x: torch.Tensor, latents: torch.Tensor, prompts: Prompts | None
) -> dict[str, torch.Tensor]:
    """Take out latents one by one, each at its first MAX_FIRINGS firings.

    Args:
        sae: an inference SAE whose decoder is linear.
        x: (N, d_in) held-out activations, those of ``prompts`` if there are some.
        latents: (n,) int64, each of which fires on some row.
        prompts: of the language model; None leaves out the CE.

    Returns:
        (n,) on the CPU: "mse_rise", the mean rise of a row's squared error where the latent fires,
        and "ce_rise", that of its next token's CE. Of a text with several firings the latent is
        taken out at all of them at once.
    """
    latents = latents.to(x.device)
    rows, which = _firings(sae, x, latents)
    n_firings = which.bincount(minlength=len(latents))
    risen: dict[str, list[torch.Tensor]] = {"mse_rise": [], "ce_rise": []}
    sizes = [int(part.sum()) for part in n_firings.split(LATENTS_AT_ONCE)]
    for at, own in zip(rows.split(sizes), which.split(sizes), strict=True):
        change, mse = _taken_out(sae, x[at], latents[own])
        risen["mse_rise"].append(mse)
        if prompts is not None:
            risen["ce_rise"].append(prompts.rise(at, change, together=own).to(x.device))
    return {
        name: (which.bincount(torch.cat(parts).double()) / n_firings).float().cpu()
        for name, parts in risen.items()
        if parts
    }


def _firings(
    sae: SAE[Any], x: torch.Tensor, latents: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(m,) rows of ``x`` and (m,) indices of ``latents`` (n,) that fire there: the first
    MAX_FIRINGS of each latent, sorted by latent and then by row."""
    found: list[torch.Tensor] = []
    left = latents.new_full((len(latents),), MAX_FIRINGS)
    for i, chunk in enumerate(x.split(ROWS_PER_CHUNK)):
        fires = _encode(sae, chunk)[:, latents] != 0
        fires &= fires.cumsum(dim=0) <= left
        left -= fires.sum(dim=0)
        found.append(fires.nonzero() + torch.tensor([i * ROWS_PER_CHUNK, 0], device=x.device))
    rows, which = torch.cat(found).unbind(dim=1)
    which, order = which.sort(stable=True)
    return rows[order], which


def _taken_out(
    sae: SAE[Any], x: torch.Tensor, latents: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(m, d_in) what latents (m,) contribute to rows (m, d_in), in the units of these, and (m,)
    how much the squared error rises without it."""
    with_it = sae.decode(_encode(sae, x))
    acts = _encode(sae, x)  # again, as decoding ends what an SAE knows of the scale of its input
    acts[torch.arange(len(x), device=x.device), latents] = 0
    change = (with_it - sae.decode(acts)).float()
    error = x.float() - with_it.float()
    return change, (2 * error * change + change**2).sum(dim=1)


def _encode(sae: SAE[Any], x: torch.Tensor) -> torch.Tensor:
    acts = sae.encode(x)
    return acts.to_dense() if acts.is_sparse else acts


def _measured(
    sae: SAE[Any], x: torch.Tensor, latents: torch.Tensor, prompts: Prompts | None, path: Path
) -> dict[str, torch.Tensor]:
    """What :func:`rises` says of ``latents``, sorted, and of those that the file knows."""
    names = {"latents", "mse_rise"} | (set() if prompts is None else {"ce_rise"})
    known = _known(path, names, sae.cfg.d_sae) or {"latents": latents[:0]}
    new = latents[~torch.isin(latents, known["latents"])]
    if len(new):
        found = {"latents": new, **rises(sae, x, new, prompts)}
        order = torch.cat([known["latents"], new]).argsort()
        known = {
            name: torch.cat([known.get(name, values[:0]), values])[order]
            for name, values in found.items()
        }
        write_tensors(path, known)
    return known


def _known(path: Path, names: set[str], d_sae: int) -> dict[str, torch.Tensor] | None:
    """What the file says; None if it is damaged, as all can be measured again."""
    try:
        known = load_file(path)
    except (OSError, SafetensorError):
        return None
    if known.keys() != names or len({values.shape for values in known.values()}) > 1:
        return None
    latents = known["latents"]
    if latents.dtype != torch.int64 or latents.dim() != 1:
        return None
    # The order is what they are looked up by.
    is_sound = bool((latents.diff() > 0).all() and ((latents >= 0) & (latents < d_sae)).all())
    return known if is_sound else None


def _groups(
    sae: SAE[Any], run: Run, all_runs: Sequence[Run], data: Pass, folder: Path
) -> dict[str, torch.Tensor]:
    """The groups of a run's latents, by their names in CONTRASTS."""
    lives = read_lives(folder / (run["folder"] or ""), len(sae.W_dec))
    alive = ~lives["dead"]
    members = {"revived": alive & lives["ever_dead"], "never_died": alive & ~lives["ever_dead"]}
    signed = has_signed_rows(run["architecture"])
    others = [
        found
        for other in all_runs
        if other["seed"] != run["seed"]
        and case_of(other) == case_of(run)
        and (found := alive_latents(other, folder, str(sae.device))) is not None
    ]
    decoder = sae.W_dec.detach().float()
    if others:
        best = torch.stack([best_cosines(decoder, other.decoder, signed)[0] for other in others])
        found = (best > FOUND_AGAIN).any(dim=0).cpu()
        members |= {"found": alive & found, "not_found": alive & ~found}
    if data.true_features is not None:
        cosines = cosine_similarities(decoder, data.true_features.to(decoder))
        holds = (cosines if signed else cosines.abs()).amax(dim=1).cpu() >= JUNK
        members |= {"feature": alive & holds, "junk": alive & ~holds}
    return {name: mask.nonzero().flatten() for name, mask in members.items()}
