"""The results of a comparison: their format, and the table of metrics.

A new metric needs two things: the code that computes it, and a row of ``METRICS`` (for a whole
SAE) or ``PEEKING`` (for a group of latents). Reports and model cards take their columns,
number formats and definitions from these rows.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypedDict

VERSION = 2
"""Version of the format of results.json. ``earlier.py`` reads the one before."""

Numbers = dict[str, float | None]
"""Numbers by metric. None where a number could not be measured."""


# --- the table of metrics --------------------------------------------------------------------

DENSE = 0.1
"""A latent is dense if it fires on a larger share of the samples."""
JUNK = 0.5
"""A latent is junk if its best cosine with a true feature is smaller."""
FOUND_AGAIN = 0.7
"""A latent is found again by another seed if one of its decoder rows has a larger cosine."""
MATCHED = 2048
"""The most latents used in the one-to-one matching, whose time grows with the cube of their number;
from more, this many are drawn."""
ALIKE = 1.25
"""Latents are alike if neither their firing rates nor their mean activations differ by a larger
factor."""
MIN_PAIRS = 100
"""Groups with fewer pairs of like latents are not compared."""
AGES = 10
"""Number of equal parts of training that latents are grouped by."""
ACROSS_SEEDS = ("found_again", "mean_best_cosine", "matched_cosine")
"""The metrics, of a whole SAE and of a group of latents, that compare a run with other seeds."""


@dataclass(frozen=True)
class Metric:
    """How a metric is named, written and read.

    Attributes:
        label: the head of its column.
        digits: decimal places, of the percentage if ``percent``.
        definition: one sentence, with the source if it is not our own.
        percent: write the number, a share between 0 and 1, as a percentage.
        better: which direction is better; None if neither is.
    """

    label: str
    digits: int
    definition: str
    percent: bool = False
    better: Literal["up", "down"] | None = None

    def show(self, value: float | None, spread: float | None = None) -> str:
        """``0.123 ± 0.004``, or a dash for None.

        Example:
            >>> METRICS["dead_fraction"].show(0.25, 0.011), METRICS["l0"].show(None)
            ('25.0 ± 1.1%', '–')
        """
        if value is None:
            return "–"
        factor, unit = (100, "%") if self.percent else (1, "")
        text = f"{factor * value:.{self.digits}f}"
        if spread is not None:
            text += f" ± {factor * spread:.{self.digits}f}"
        return text + unit

    def difference(self, *values: float) -> str:
        """A difference, or the ends of its interval.

        Example:
            >>> METRICS["dead_fraction"].difference(0.156, 0.207), METRICS["f1"].difference(-0.5)
            ('15.6 to 20.7 points', '-0.500')
        """
        factor, unit = (100, " points") if self.percent else (1, "")
        return " to ".join(f"{factor * value:.{self.digits}f}" for value in values) + unit


METRICS = {
    "dead_fraction": Metric(
        "dead",
        1,
        "Share of the latents that were silent for dead_after or more training samples when "
        "training ended.",
        percent=True,
        better="down",
    ),
    "explained_variance": Metric(
        "EV",
        3,
        "Explained variance, 1 - E|x - x_hat|^2 / (E|x|^2 - |E x|^2), over all samples "
        "(SAELens's ExplainedVarianceCalculator).",
        better="up",
    ),
    "l0": Metric("L0", 1, "Mean number of active latents per sample (SAELens's L0Calculator)."),
    "ce_loss_recovered": Metric(
        "CE recovered",
        3,
        "(CE_zero - CE_sae) / (CE_zero - CE_plain), where CE is the language model's loss with "
        "the activations replaced by zero, replaced by the reconstruction, or left alone, on the "
        "same prompts for every case (ce_loss_score of SAELens's run_evals).",
        better="up",
    ),
    "f1": Metric(
        "F1",
        3,
        "Mean F1 score over all latents, each taken as a detector of the true feature nearest to "
        "its decoder row; 0 for a latent that never fires (SAELens's "
        "ClassificationMetricsCalculator; Chanin and Garriga-Alonso 2026).",
        better="up",
    ),
    "mcc": Metric(
        "MCC",
        3,
        "Mean absolute cosine over the best one-to-one matching of latents and true features "
        "(SAELens's mean_correlation_coefficient; O'Neill et al. 2024).",
        better="up",
    ),
    "precision": Metric("precision", 3, "Mean precision of the detectors of F1.", better="up"),
    "recall": Metric("recall", 3, "Mean recall of the detectors of F1.", better="up"),
    "uniqueness": Metric(
        "unique",
        3,
        "Number of different true features that are nearest to a latent, divided by the number "
        "of latents (SAELens's feature_uniqueness).",
        better="up",
    ),
    "features_covered": Metric(
        "covered",
        1,
        "Share of the true features that are nearest to a latent that fires, with an absolute "
        f"cosine above {JUNK}; at most d_sae / n_features.",
        percent=True,
        better="up",
    ),
    "found_again": Metric(
        "found again",
        1,
        "Share of all d_sae latents that are alive (not dead when training ended) and whose "
        f"decoder row has a cosine above {FOUND_AGAIN} with that of an alive latent of another "
        "seed, mean ± standard deviation over the pairs of seeds (after Paulo and Belrose 2025). "
        "AbsTopK: the absolute cosine. Pairs with a seed in common are not independent, so cases "
        "are compared by one value for each of the n seeds, over the same pairs: n times the mean "
        "over all pairs, less n - 1 times the mean over those without the seed (the jackknife, "
        "which on average does not understate the variance).",
        percent=True,
        better="up",
    ),
    "mean_best_cosine": Metric(
        "best cosine",
        3,
        'Mean over the alive latents of the best cosine that "found again" is based on. Fewer '
        "alive latents can raise it, so no case is called better.",
    ),
    "matched_cosine": Metric(
        "matched cosine",
        3,
        "Mean cosine of the best one-to-one matching of the alive latents of two seeds, over as "
        "many pairs as the seed with fewer has, mean over the other seeds (PW-MCC of Song et al. "
        f"2025). Of more than {MATCHED:,}, that many are drawn. AbsTopK: the absolute cosine. "
        "Fewer alive latents can raise it, so no case is called better.",
    ),
    "junk_share": Metric(
        "junk",
        1,
        "Share of the latents that fire whose best absolute cosine with a true feature is below "
        f"{JUNK}. Fewer latents that fire can lower it, so no case is called better.",
        percent=True,
    ),
    "dense_latents": Metric(
        "dense",
        1,
        f"Share of the latents that fire that do so on more than {DENSE:.0%} of the samples.",
        percent=True,
    ),
    "mse": Metric(
        "MSE",
        3,
        "E|x - x_hat|^2, summed over d_in and averaged over samples (SAELens's training loss).",
        better="down",
    ),
    "rows_left_out": Metric(
        "rows left out",
        2,
        "Share of the training rows left out because their norm is above max_norm_multiple times "
        "the median norm of the held-out rows. Held-out rows above it are left out too.",
        percent=True,
    ),
    "ms_per_step": Metric(
        "ms/step",
        1,
        "Median time in milliseconds of a training step, from forward pass to optimizer, over "
        "the roughly 100 steps of the history; the device is synchronised before and after. A case "
        "that is trained again is timed alone, so no case is called better.",
    ),
    "peak_memory_gib": Metric(
        "GiB",
        2,
        "CUDA memory in GiB: the SAE's weights, buffers and Adam state, plus the most that one "
        "step allocated on top of what was allocated before it.",
        better="down",
    ),
}
"""Metrics of a whole SAE, the entry ``metrics`` of a run, in the order of the columns."""

PEEKING = {
    "n_alive": Metric("alive", 0, "Number of latents that were revived, or never died."),
    "n_firing": Metric("fire", 0, "Number of those that fire on a held-out sample."),
    "n_latents": Metric(
        "measured",
        0,
        "Number of different latents that the numbers after it are from; of those that never "
        "died, the ones that fire as often as the revived.",
    ),
    "firing_rate": Metric(
        "firing rate", 4, "Median share of the samples on which a latent of the group fires."
    ),
    "age": Metric(
        "age",
        1,
        "Median share of the training since the latents of the group last came back.",
        percent=True,
    ),
    "junk_share": Metric(
        "junk",
        1,
        f"Share of the group whose best cosine with a true feature is below {JUNK}; the cosine "
        "is signed, but for AbsTopK.",
        percent=True,
    ),
    "duplicate_share": Metric(
        "duplicates",
        1,
        "Share of the group that is not junk, but whose true feature another alive latent matches "
        "with a larger cosine.",
        percent=True,
    ),
    "features_hurt": Metric(
        "features hurt",
        2,
        "Effective number of true features that are recovered less well without the latent.",
    ),
    "split": Metric(
        "split",
        3,
        "How much more of the variance of the nearest true feature's activation the latent and "
        "one other, both with positive coefficients, explain together than the better of the two "
        "alone; over latents that are not junk.",
    ),
    "direction_spread": Metric(
        "spread",
        3,
        "Effective share of the samples that vary along the latent's direction; 1/3 for a random "
        "direction.",
    ),
    "nearest_cosine": Metric(
        "nearest latent",
        3,
        "Cosine of the latent's decoder row with the nearest one of another alive latent.",
    ),
    "found_again": Metric(
        "found again",
        1,
        "Share of all alive latents of the group that have a cosine above "
        f"{FOUND_AGAIN} with an alive latent, of any group, of another seed.",
        percent=True,
    ),
    "mean_best_cosine": Metric(
        "best cosine",
        3,
        "Mean of that cosine over all alive latents of the group.",
    ),
}
"""Means over a group of latents, the entry ``peeking`` of a run; see docs/methods.md."""

EFFECT = {
    "n_pairs": Metric(
        "pairs",
        0,
        "Number of latents of the group, each paired with one of its counterpart that differs by "
        f"at most a factor of {ALIKE} in firing rate and in mean activation. Groups with fewer "
        f"than {MIN_PAIRS} pairs are not compared.",
    ),
    "firing_rate": Metric(
        "firing rate", 4, "Median share of the tokens that a latent of the group fires on."
    ),
    "mean_activation": Metric(
        "activation",
        3,
        "Median of the mean activation of a latent where it fires, times the length of its decoder "
        "row.",
    ),
    "ce_rise": Metric(
        "CE rise",
        4,
        "Rise of the cross-entropy of the next token, in nats, where a latent is taken out: its "
        "activation times its decoder row is subtracted from the model's activations at the tokens "
        "where it fires, and all else stays, the SAE's error too. Mean over the group.",
    ),
    "mse_rise": Metric(
        "MSE rise",
        2,
        "Rise of the SAE's squared error at the same tokens without the latent, as a share of the "
        "variance of the activations.",
        percent=True,
    ),
    "ce_per_mse": Metric(
        "CE / MSE", 3, "CE rise divided by MSE rise. A corrector of errors has a small one."
    ),
}
"""Means over a group of latents, the entry ``effect`` of a run."""


def require_in_table(metrics: Iterable[str], peeking: Iterable[str] = ()) -> None:
    """Check that every metric has a row.

    Args:
        metrics: keys that ``METRICS`` must have.
        peeking: keys that ``PEEKING`` must have.

    Raises:
        ValueError: a key has no row; the message names the key and the table.
    """
    for keys, table, name in ((metrics, METRICS, "METRICS"), (peeking, PEEKING, "PEEKING")):
        for key in keys:
            if key not in table:
                raise ValueError(
                    f"metric {key!r} is not in the table: add a row to {name} in "
                    "sae_lens_auxk/compare/schema.py."
                )


# --- the format ------------------------------------------------------------------------------


class Density(TypedDict):
    """A histogram; there is one edge more than counts."""

    log10_edges: list[float]
    counts: list[float]


class Measured(TypedDict):
    """The measurements of a run; until it is finished, ``metrics`` is empty and the rest None.

    ``density`` is a histogram of the firing rates. ``silent_latents`` is a number of latents.
    ``peeking`` has the numbers of ``revived`` latents and of the ``never_died`` ones that they are
    compared with, and of the halves of both by age, ``revived_young``, ``never_died_young``,
    ``revived_old`` and ``never_died_old``.
    """

    metrics: Numbers
    density: Density | None
    silent_latents: int | None
    peeking: dict[str, Numbers] | None


class Pair(TypedDict):
    """What comparing a run with one other seed gives; ``peeking`` has "revived" and "never_died".

    ``found_again_by_age`` has AGES shares: that of the latents that last came alive in each part
    of training, from the first on. Latents that never died belong to the first. None where there
    are too few.
    """

    metrics: Numbers
    peeking: dict[str, Numbers]
    found_again_by_age: list[float | None]


class AcrossSeeds(TypedDict, total=False):
    """Measurements of finished passes that are not part of a pass; most need a second seed.

    ``pairs`` is by the other seed, as text. The run's own numbers are means over it.

    ``effect`` has the numbers of EFFECT of groups of alive latents that are compared in pairs,
    where they were asked for: ``revived`` and ``never_died``; ``found`` again by at least one other
    seed, and ``not_found``; where true features are known, ``feature``, with a cosine of at least
    JUNK to one, and ``junk``.
    """

    found_again_by_age: list[float | None]
    pairs: dict[str, Pair]
    effect: dict[str, Numbers]


class Failure(TypedDict, total=False):
    """Of a run that failed: the traceback of its ``error``."""

    traceback: str


class Run(Measured, AcrossSeeds, Failure):
    """One SAE: an entry of ``runs`` in results.json.

    ``folder`` is relative to that of the results. The lists in ``history`` are equally long.
    """

    name: str
    case: str
    architecture: str
    k: float | None
    seed: int
    status: Literal["finished", "failed", "unfinished"]
    error: str | None
    sae_config: dict[str, Any]
    folder: str | None
    training_samples: int
    history: dict[str, list[float | None]]


class MeanAndStd(TypedDict):
    """Means and sample standard deviations over seeds or, of ``ACROSS_SEEDS``, over pairs of seeds.

    The latter are None for a single one.
    """

    mean: Numbers
    std: Numbers


class EffectOverSeeds(MeanAndStd):
    """Over the ``n_seeds`` that have enough pairs or, if none has, the pairs of all."""

    n_seeds: int


class EffectOfGroup(TypedDict, total=False):
    """As in a run, over the seeds."""

    effect: dict[str, EffectOverSeeds]


class Group(MeanAndStd, EffectOfGroup):
    """The finished runs of one case at one k."""

    case: str
    architecture: str
    k: float | None
    n_seeds: int
    peeking: dict[str, MeanAndStd]
    runs: list[Run]


class Results(TypedDict):
    """The content of results.json, and ``groups``, which are made of the runs when it is read."""

    version: int
    name: str
    created: str
    finished: bool
    machine: str
    packages: dict[str, str]
    comparison: dict[str, Any]
    command: str
    data: dict[str, Any]
    runs: list[Run]
    groups: list[Group]
