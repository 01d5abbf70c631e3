"""What a comparison will do and cost, said before it starts."""

import time
from collections.abc import Iterator
from pathlib import Path

from sae_lens_auxk.compare.cases import cases_of
from sae_lens_auxk.compare.config import Resolved

BYTES_PER_WEIGHT = 16
"""In float32: the weight, its gradient and Adam's two moments."""
ROWS_OF_LATENTS = 3
"""A step of one SAE has about as many (batch_size, d_sae) tensors at once."""
USUAL_WIDTH = 1024
"""Stands for a model's width before the model is loaded."""
FIRST_STEPS, FIRST_SECONDS = 20, 5
"""The pace is that of at least so many steps, and of at least so long a time."""


def plan_of(comparison: Resolved, folder: Path, n_finished: int) -> str:
    """The cases, the work, the memory, and where the results go.

    Args:
        comparison: what to compare.
        folder: where to write.
        n_finished: the number of seeds that are finished there.
    """
    cases = cases_of(comparison)
    n_seeds = len(comparison.seeds)
    width = comparison.d_in or USUAL_WIDTH
    n_weights = len(cases) * comparison.d_sae * (2 * width + 1)
    step = 4 * ROWS_OF_LATENTS * comparison.batch_size * comparison.d_sae
    at_width = "" if comparison.d_in else f" if the model's width is {width:,}"
    if comparison.model_name:
        data = f"{comparison.model_name}, text {comparison.dataset_path}"
    elif isinstance(comparison.synthetic_model, str):
        data = f"synthetic model {comparison.synthetic_model}"
    else:
        size = f"{comparison.n_features:,} features in {comparison.d_in:,} dimensions"
        data = f"synthetic model: {size}"
    lines = [
        f"{_count(len(cases), 'case')} x {_count(n_seeds, 'seed')} x "
        f"{comparison.training_samples:,} samples, {comparison.d_sae:,} latents each:",
        # In quotes, as a name may have commas.
        *(f'  "{case.name}"{case.title.removeprefix(case.name)}' for case in cases),
        f"data     {data}",
        *_options(comparison),
        f"memory   {_bytes(BYTES_PER_WEIGHT * n_weights + step)} on {comparison.device} for the "
        f"SAEs of a seed{at_width}; the data and the program itself come on top",
        f"results  {folder}, about {_bytes(4 * n_weights * n_seeds)}"
        + (f"; {n_finished} of {_count(n_seeds, 'seed')} finished" if n_finished else ""),
    ]
    return "\n".join(lines)


class FirstSteps:
    """After the first steps, how long the rest of the training takes at their pace."""

    def __init__(self, n_samples: int):
        self._n_left = n_samples
        self._n_steps = 0
        self._n_seen = 0
        self._start = 0.0
        self._is_said = False

    def count(self, n_samples: int) -> str | None:
        """Count a step; a sentence the one time that there is something to say."""
        now = time.perf_counter()
        self._n_left -= n_samples
        self._n_steps += 1
        if self._n_steps == 1:  # which also loads and compiles
            self._start = now
            return None
        self._n_seen += n_samples
        seconds = now - self._start
        if self._is_said or self._n_steps <= FIRST_STEPS or seconds < FIRST_SECONDS:
            return None
        self._is_said = True
        left = _duration(self._n_left * seconds / self._n_seen)
        return (
            f"about {left} of training left at the pace of the first steps; "
            "with dead latents steps take longer"
        )


def _options(comparison: Resolved) -> Iterator[str]:
    if multiple := comparison.max_norm_multiple:
        yield f"rows     without those longer than {multiple:g} times the median length"
    if comparison.effect:
        yield "effect   of single latents, measured when all seeds are finished"


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _bytes(n: float) -> str:
    return f"{n / 1e9:.1f} GB" if n >= 1e9 else f"{max(n / 1e6, 1):.0f} MB"


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
