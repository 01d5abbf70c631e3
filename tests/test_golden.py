"""Training gives the weights that it gave when ``golden.safetensors`` was written."""

from functools import cache

import pytest
import torch
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from safetensors.torch import load_file

from tests import golden

# Other instruction sets change a result by 1e-12 at most, and a coefficient that is 1% larger
# changes it by 1e-2 at least.
TOLERANCE = 1e-9


@cache
def recorded() -> dict[str, torch.Tensor]:
    return load_file(golden.FILE)


def test_the_record_has_every_case_and_no_other() -> None:
    names = {name.rsplit("/", 1)[0] for name in recorded()}
    assert names == {case.name for case in golden.CASES}


@pytest.mark.parametrize("case", golden.CASES, ids=lambda case: case.name)
def test_training_gives_the_recorded_weights(case: golden.Case) -> None:
    if case.architecture not in SAE_TRAINING_CLASS_REGISTRY:
        pytest.skip(f"this SAELens has no {case.architecture.removeprefix('auxk-')}")
    actual, expected = golden.record(case), golden.of_case(recorded(), case)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        atol = TOLERANCE if value.is_floating_point() else 0
        torch.testing.assert_close(
            actual[name], value, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )
