"""float16 parameters are refused: the squares of a step exceed its range."""

from typing import Any

import pytest
import torch
from sae_lens import TrainingSAE

from sae_lens_auxk import cli, runner_config
from sae_lens_auxk.cli.train import _parse
from tests.helpers import ARCHITECTURES, build_config, build_sae, forward
from tests.tiny_model import run_fields

FLAGS = "--architecture auxk-topk --k 4 --log_to_wandb false"


@pytest.mark.parametrize("dtype", ["float16", "torch.float16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_config_of_float16_is_refused(architecture: str, dtype: str) -> None:
    with pytest.raises(
        ValueError, match="float16' is not allowed: it must be float32, bfloat16 or"
    ):
        build_config(architecture, dtype=dtype)
    saved = {**build_config(architecture).to_dict(), "dtype": dtype}
    with pytest.raises(ValueError, match="float16' is not allowed"):
        TrainingSAE.from_dict(saved)


def test_the_config_of_a_run_is_refused() -> None:
    with pytest.raises(ValueError, match="dtype='float16' is not allowed"):
        runner_config("auxk-topk", **run_fields(k=4, dtype="float16"))


@pytest.mark.parametrize("convert", [torch.nn.Module.half, lambda sae: sae.to(torch.float16)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_parameters_that_became_float16_are_refused_by_the_step(
    architecture: str, convert: Any
) -> None:
    sae = build_sae(architecture)
    convert(sae)
    with pytest.raises(ValueError, match="dtype='float16' is not allowed"):
        forward(sae, torch.randn(4, 8))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_activations_of_float16_are_fine(architecture: str) -> None:
    if architecture == "auxk-gated":
        pytest.skip("SAELens's gated loss takes activations of its own precision only")
    sae = build_sae(architecture)
    x = torch.randn(16, 8).half()
    x[3, 2] = 300.0
    output = forward(sae, x)
    output.loss.backward()
    assert output.metrics["nonfinite_rows"] == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in sae.parameters())


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_the_commands_dtype_is_that_of_the_sae_too(dtype: str) -> None:
    """As its help says, and as with runner_config."""
    for flags in (f"--dtype {dtype}", f"--dtype={dtype}"):
        cfg = _parse([*FLAGS.split(), *flags.split()])
        assert (cfg.dtype, cfg.sae.dtype) == (dtype, dtype)
    assert runner_config("auxk-topk", **run_fields(k=4, dtype=dtype)).sae.dtype == dtype
    cfg = _parse([*FLAGS.split(), "--dtype", dtype, "--sae.dtype", "float32"])
    assert (cfg.dtype, cfg.sae.dtype) == (dtype, "float32")
    assert _parse(FLAGS.split()).sae.dtype == "float32"


def test_the_command_refuses_float16(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", *FLAGS.split(), "--dtype", "float16"]) == 2
    error = capsys.readouterr().err
    assert "dtype='float16' is not allowed" in error
    assert error.count("\n") == 1
