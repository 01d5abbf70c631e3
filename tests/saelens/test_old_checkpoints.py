"""A checkpoint that an earlier version saved goes on as that version would have gone on.

``checkpoint_28705f1`` was saved at commit 28705f1 in the middle of the run below, in the middle of
its warm-up, which was this package's own then: SAELens's state has no scheduler for it. Its configs
have only what a run that resumes is asked for. ``final.safetensors`` is how that version ended the
run.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import golden

CHECKPOINT = Path(__file__).with_name("checkpoint_28705f1")
CASE = golden.Case("auxk-topk", "auxk", "sparse")
SCHEDULE = {"aux_warm_up_steps": 150, "aux_decay_start_step": 160, "aux_decay_steps": 30}


def test_it_resumes_in_the_middle_of_its_warm_up() -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        runner = golden._runner(
            CASE,
            dtype="float64",
            device="cpu",
            checkpoint_path=None,
            resume_from_checkpoint=str(CHECKPOINT),
            **SCHEDULE,
        )
        outputs = golden._outputs_of(runner)
    finally:
        torch.set_num_threads(threads)
    expected = load_file(CHECKPOINT / "final.safetensors")
    coefficients = [float(output.metrics["aux_coefficient"]) for output in outputs]
    whole = expected.pop("aux_coefficients")
    assert 0 < len(outputs) < golden.N_STEPS
    assert 0.1 < coefficients[0] < 0.2, "of 1/4 in the end"
    assert coefficients == pytest.approx(whole[-len(outputs) :].tolist(), abs=1e-15)
    for name, value in expected.items():
        found = runner.sae.state_dict()[name]
        atol = 1e-9 if value.is_floating_point() else 0
        torch.testing.assert_close(
            found, value, rtol=0, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )
