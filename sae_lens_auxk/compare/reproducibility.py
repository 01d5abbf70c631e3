"""Reproducibility: are the latents of a run found again by the runs of other seeds?

A direction that is learnt again from other weights and other samples is in the data; one that is
not may be an accident of its run. docs/methods.md has the sources and says where the measures fail;
studies/found-again checks them on known features.

Only alive latents count, on both sides: those that were not dead when training ended. What is found
again is a share of all latents, so that a run does not gain by killing those that nothing finds.
"""

from collections.abc import Generator, Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from statistics import mean
from textwrap import shorten

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from scipy.optimize import linear_sum_assignment
from scipy.special import betainc

from sae_lens_auxk.compare.files import LIVES, LIVES_FILENAME
from sae_lens_auxk.compare.latents import has_signed_rows
from sae_lens_auxk.compare.peeking import MIN_LATENTS
from sae_lens_auxk.compare.schema import (
    AGES,
    FOUND_AGAIN,
    MATCHED,
    AcrossSeeds,
    Numbers,
    Pair,
    Run,
)
from sae_lens_auxk.compare.seeds import Case, case_of
from sae_lens_auxk.saelens.names import SAE_WEIGHTS_FILENAME, cosine_similarities

ROWS_PER_CHUNK = 1024
"""At 36,864 latents, this many rows of cosines take 150 MB."""


@dataclass(frozen=True)
class Alive:
    """The latents of a run that were not dead when its training ended.

    Attributes:
        decoder: (n, d_in) their decoder rows.
        ever_dead: (n,) bool, those that were dead before.
        age: (n,) int64, the part of training, from 0 to AGES - 1, in which each last came alive;
            0 for a latent that never died.
        d_sae: the number of all latents, dead ones included.
    """

    decoder: torch.Tensor
    ever_dead: torch.Tensor
    age: torch.Tensor
    d_sae: int


def with_reproducibility(runs: Sequence[Run], folder: Path, device: str) -> list[Run]:
    """The runs; those whose case has another finished seed get the numbers of this module.

    A run whose files are gone gets no numbers and does not count as a seed.

    Args:
        runs: of all passes of a comparison. They are left as they are.
        folder: of the comparison.
        device: where to compute.
    """
    measured = list(runs)
    cases: dict[Case, list[int]] = {}
    for i, run in enumerate(runs):
        if run["status"] == "finished":
            cases.setdefault(case_of(run), []).append(i)
    for (_, architecture, _), members in cases.items():
        loaded = {i: alive_latents(runs[i], folder, device) for i in members}
        alive = {i: latents for i, latents in loaded.items() if latents is not None}
        if len(alive) < 2:
            continue
        signed = has_signed_rows(architecture)
        for i, pairs in zip(alive, reproducibility([*alive.values()], signed), strict=True):
            others = [str(runs[j]["seed"]) for j in alive if j != i]
            found = _over_pairs(pairs)
            peeking = runs[i]["peeking"] or {}
            across: AcrossSeeds = {
                "found_again_by_age": found["found_again_by_age"],
                "pairs": dict(zip(others, pairs, strict=True)),
            }
            measured[i] = {
                **runs[i],
                "metrics": runs[i]["metrics"] | found["metrics"],
                "peeking": peeking
                | {name: peeking.get(name, {}) | own for name, own in found["peeking"].items()},
                **across,
            }
    return measured


def alive_latents(run: Run, folder: Path, device: str) -> Alive | None:
    """The alive latents of a finished run; None if its files are gone.

    Raises:
        ValueError: a file cannot be read; the message names the folder.
    """
    sae = folder / (run["folder"] or "")
    weights, lives = sae / SAE_WEIGHTS_FILENAME, sae / LIVES_FILENAME
    if not (weights.is_file() and lives.is_file()):
        return None
    with naming(sae), safe_open(weights, framework="pt") as file:
        decoder = file.get_tensor("W_dec")
    lived = read_lives(sae, len(decoder))
    alive = ~lived["dead"]
    age = AGES * lived["alive_since"][alive] // max(run["training_samples"], 1)
    age = age.clamp(max=AGES - 1)
    return Alive(decoder[alive].float().to(device), lived["ever_dead"][alive], age, len(alive))


def read_lives(sae: Path, d_sae: int) -> dict[str, torch.Tensor]:
    """The lives of the latents of the SAE in a folder; raises as :func:`naming`."""
    with naming(sae):
        lives = load_file(sae / LIVES_FILENAME)
        for name, dtype in LIVES.items():
            if name not in lives or lives[name].shape != (d_sae,) or lives[name].dtype != dtype:
                raise ValueError(f"{LIVES_FILENAME} has no {name}, ({d_sae},) of {dtype}.")
    return lives


@contextmanager
def naming(sae: Path) -> Generator[None]:
    """Whatever cannot be read of an SAE, raise a ValueError that names its folder."""
    try:
        yield
    except (OSError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # each library has its own, and torch's have many lines
        raise ValueError(
            f"the SAE in {sae} cannot be read: {type(error).__name__}: {shorten(str(error), 300)} "
            f"Move {sae.parent} away to train the pass again."
        ) from error


def reproducibility(runs: Sequence[Alive], signed: bool = True) -> list[list[Pair]]:
    """Compare each of two or more runs with all the others.

    Args:
        runs: the alive latents of the runs, all with the same d_in.
        signed: whether a row and its negative are two different latents.

    Returns:
        For each run, what it and each of the others have in common, in their order.
    """
    pairs: list[list[Pair]] = [[] for _ in runs]
    for i, j in combinations(range(len(runs)), 2):
        a, b = runs[i].decoder, runs[j].decoder
        matched = matched_cosine(a, b, signed)
        for of_run, run, best in zip(
            (pairs[i], pairs[j]), (runs[i], runs[j]), best_cosines(a, b, signed), strict=True
        ):
            of_run.append(_pair(run, best.cpu(), matched))
    return pairs


def best_cosines(
    a: torch.Tensor, b: torch.Tensor, signed: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """For each row of ``a`` (n, d_in) its best cosine with a row of ``b`` (m, d_in), as (n,), and
    for each row of ``b`` that with a row of ``a``, as (m,); -1 where the other has no row."""
    if not (len(a) and len(b)):
        return a.new_full((len(a),), -1.0), b.new_full((len(b),), -1.0)
    of_a: list[torch.Tensor] = []
    of_b = a.new_full((b.shape[0],), -1.0)
    for rows in a.split(ROWS_PER_CHUNK):
        cosines = _cosines(rows, b, signed)
        of_a.append(cosines.amax(dim=1))
        of_b = of_b.maximum(cosines.amax(dim=0))
    return torch.cat(of_a), of_b


def matched_cosine(a: torch.Tensor, b: torch.Tensor, signed: bool = True) -> float | None:
    """Mean cosine of the one-to-one matching of rows (n, d_in) and (m, d_in) that makes it largest.

    It has min(n, m) pairs. If that is more than MATCHED, MATCHED rows of the smaller side are drawn
    and matched with all rows of the other. Each drawn row has fewer rivals, so drawing raises the
    mean, but it stays below the mean of the best cosines of these rows.

    Source: PW-MCC of Song et al. 2025 (arXiv 2505.20254), whose code has signed cosines too, but
    takes all latents of two SAEs of the same size.
    """
    few, many = sorted((a, b), key=len)
    if not len(few):
        return None
    if len(few) > MATCHED:
        order = torch.randperm(len(few), generator=torch.Generator().manual_seed(0))
        few = few[order[:MATCHED].to(few.device)]
    cosines = _cosines(few, many, signed).cpu().numpy()
    return float(cosines[linear_sum_assignment(cosines, maximize=True)].mean())


def by_chance(n_latents: int, d_in: int, signed: bool = True) -> Numbers:
    """The expected ``found_again`` and ``mean_best_cosine`` for random directions.

    Args:
        n_latents: number of directions on the other side, all independent and uniform.
        d_in: 2 or more.
        signed: whether the cosine has its sign.

    Source: the squared cosine of a direction with a random one has a Beta(1/2, (d_in - 1)/2)
    distribution; the largest of n independent cosines is below t with the n-th power of the
    probability that one is.
    """

    t = np.append(np.linspace(-1, 1, 20_001), FOUND_AGAIN)
    beyond = betainc((d_in - 1) / 2, 0.5, 1 - t**2)  # the probability of |cosine| > |t|
    below = np.where(t < 0, beyond / 2, 1 - beyond / 2) if signed else (1 - beyond) * (t >= 0)
    best_below = below**n_latents
    return {
        "found_again": float(1 - best_below[-1]),
        # The mean of a number between -1 and 1 is 1 minus the integral of its distribution.
        "mean_best_cosine": float(1 - 2 * best_below[:-1].mean()),
    }


def _cosines(a: torch.Tensor, b: torch.Tensor, signed: bool) -> torch.Tensor:
    cosines = cosine_similarities(a, b)
    return cosines if signed else cosines.abs()


def _pair(run: Alive, best: torch.Tensor, matched: float | None) -> Pair:
    """``best`` (n,) has each latent's best cosine with the other run, ``matched`` None if a run has
    no latent."""
    found = (best > FOUND_AGAIN).float()

    def of(values: torch.Tensor, group: torch.Tensor) -> float | None:
        return values[group].mean().item() if group.sum() >= MIN_LATENTS else None

    return {
        "metrics": {
            "found_again": found.sum().item() / run.d_sae,
            "mean_best_cosine": None if matched is None else best.mean().item(),
            "matched_cosine": matched,
        },
        "peeking": {
            name: {"found_again": of(found, group), "mean_best_cosine": of(best, group)}
            for name, group in (("revived", run.ever_dead), ("never_died", ~run.ever_dead))
        },
        "found_again_by_age": [of(found, run.age == age) for age in range(AGES)],
    }


def _over_pairs(pairs: Sequence[Pair]) -> Pair:
    """Means over the other seeds, of those that have the number."""

    def over(values: Iterable[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return mean(known) if known else None

    def numbers(of_pairs: Sequence[Numbers]) -> Numbers:
        return {key: over(of[key] for of in of_pairs) for key in of_pairs[0]}

    return {
        "metrics": numbers([pair["metrics"] for pair in pairs]),
        "peeking": {
            name: numbers([pair["peeking"][name] for pair in pairs])
            for name in ("revived", "never_died")
        },
        "found_again_by_age": [
            over(ages) for ages in zip(*(p["found_again_by_age"] for p in pairs), strict=True)
        ],
    }
