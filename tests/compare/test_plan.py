"""What is said before a comparison starts."""

from pathlib import Path
from typing import Any

import pytest

from sae_lens_auxk.compare import plan
from sae_lens_auxk.compare.checks import resolve
from sae_lens_auxk.compare.config import Comparison
from sae_lens_auxk.compare.plan import FirstSteps, plan_of
from tests.compare.conftest import tiny


def test_the_plan_by_hand() -> None:
    comparison = tiny(d_sae=1000, d_in=500, batch_size=100, seeds=[0, 1, 2])
    assert plan_of(comparison, Path("here"), n_finished=1).split("\n") == [
        "2 cases x 3 seeds x 1,600 samples, 1,000 latents each:",
        '  "none", auxk-topk, k 2',
        '  "auxk", auxk-topk, k 2',
        "data     synthetic model: 32 features in 500 dimensions",
        # 2 SAEs of 1,001,000 weights at 16 bytes, and three times 100 x 1,000 numbers.
        "memory   33 MB on cpu for the SAEs of a seed; the data and the program itself come on top",
        # 6 SAEs at 4 bytes.
        "results  here, about 24 MB; 1 of 3 seeds finished",
    ]


def test_one_of_each_and_what_is_asked_for_beside_the_training() -> None:
    named = {"cases": [{"name": "a, b", "aux_variant": "auxk"}], "aux_variant": []}
    comparison = tiny(**named, max_norm_multiple=10.0, effect=True)
    assert plan_of(comparison, Path("here"), n_finished=0).split("\n")[:5] == [
        "1 case x 1 seed x 1,600 samples, 24 latents each:",
        '  "a, b", auxk-topk, k 2',
        "data     synthetic model: 32 features in 12 dimensions",
        "rows     without those longer than 10 times the median length",
        "effect   of single latents, measured when all seeds are finished",
    ]


def test_the_plan_of_a_model_that_is_not_loaded() -> None:
    given: Any = {"aux_variant": ["auxk"], "seeds": [0]}
    model = resolve(Comparison(model_name="gpt2", dataset_path="me/text", **given))
    text = plan_of(model, Path("here"), n_finished=0)
    assert "data     gpt2, text me/text\n" in text
    assert "1.0 GB on cpu for the SAEs of a seed if the model's width is 1,024; " in text
    assert text.endswith("results  here, about 101 MB")
    saved = resolve(Comparison(synthetic_model="some/model", **given))
    assert "data     synthetic model some/model\n" in plan_of(saved, Path("here"), n_finished=0)


@pytest.mark.parametrize(("seconds", "said"), [(1.0, "59 s"), (10.0, "10 min"), (1000.0, "16.4 h")])
def test_the_pace_of_the_first_steps(
    seconds: float, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is said once: after 21 of 80 steps, the first of which does not count."""
    times = [seconds * i for i in range(80)]
    monkeypatch.setattr(plan.time, "perf_counter", iter(times).__next__)
    steps = FirstSteps(80 * 32)
    lines = [steps.count(32) for _ in range(80)]
    assert [i for i, line in enumerate(lines) if line] == [20]
    assert f"about {said} of training left at the pace of the first steps" in str(lines[20])


def test_the_pace_is_not_taken_from_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    times = [0.1 * i for i in range(200)]
    monkeypatch.setattr(plan.time, "perf_counter", iter(times).__next__)
    steps = FirstSteps(200 * 32)
    lines = [steps.count(32) for _ in range(200)]
    assert [i for i, line in enumerate(lines) if line] == [50]
