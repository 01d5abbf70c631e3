"""The command line: SAELens's, with the plugin loaded."""

import dataclasses
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from sae_lens.llm_sae_training_runner import _parse_cfg_args

from sae_lens_auxk import cli
from sae_lens_auxk.config import AuxConfig
from sae_lens_auxk.hub import upload as hub_upload
from sae_lens_auxk_cli import refuse
from tests.helpers import ARCHITECTURES, build_sae


@pytest.mark.oldest
def test_every_field_reaches_the_config() -> None:
    flags = (
        "--architecture auxk-topk --d_in 16 --d_sae 64 --k 8 --aux_variant straight_through "
        "--aux_loss_coefficient 0.25 --k_aux 7 --aux_bias matched --aux_relu true "
        "--aux_normalize true "
        "--dead_criterion steps --dead_threshold_tokens 5000 --aux_warm_up_steps 3 "
        "--aux_decay_start_step 10 --aux_decay_steps 5 --log_to_wandb false "
        "--aux_batch_fraction 0.25 --resample_every_steps 100 --resample_stop_step 400 "
        "--b_dec_init mean --training_tokens 77"
    )
    cfg: Any = _parse_cfg_args(flags.split())
    assert cfg.training_tokens == 77
    sae = cfg.sae
    assert (sae.architecture(), sae.d_in, sae.d_sae, sae.k) == ("auxk-topk", 16, 64, 8)
    assert (sae.aux_variant, sae.aux_loss_coefficient, sae.k_aux) == ("straight_through", 0.25, 7)
    assert (sae.aux_bias, sae.aux_relu, sae.dead_criterion) == ("matched", True, "steps")
    assert (sae.dead_threshold_tokens, sae.aux_warm_up_steps) == (5000, 3)
    assert (sae.aux_decay_start_step, sae.aux_decay_steps) == (10, 5)
    assert (sae.aux_normalize, sae.aux_batch_fraction) == (True, 0.25)
    assert (sae.resample_every_steps, sae.resample_stop_step) == (100, 400)
    assert sae.b_dec_init == "mean"


def test_defaults_are_the_configs() -> None:
    sae: Any = _parse_cfg_args(["--architecture", "auxk-topk", "--log_to_wandb", "false"]).sae
    for field in dataclasses.fields(AuxConfig):
        assert getattr(sae, field.name) == field.default


def test_a_flag_without_a_value_says_none() -> None:
    sae: Any = _parse_cfg_args(["--architecture", "auxk-topk", "--k_aux"]).sae
    assert sae.k_aux is None


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_aux_field_is_a_flag_with_help(
    architecture: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(["train", "--architecture", architecture, "--help"])
    assert exit_info.value.code == 0
    usage, options = capsys.readouterr().out.split("options:", 1)
    assert usage
    text = " ".join(options.split())
    assert text.index(" --aux_variant ") < text.index(" --model_name ")
    for field in dataclasses.fields(AuxConfig):
        after = text.split(f" --{field.name} ", 1)[1]
        description = after.split("(default", 1)[0]
        assert len(description) > 30, f"{field.name} has no help: {description!r}"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["tarin"], "'tarin' is not a command"),
        (["train", "--architecture", "auxk-topk", "--k_aux", "0"], "k_aux=0 is not allowed"),
        (["train", "--architecture", "auxk-topk", "--aux_variant", "x"], "aux_variant='x'"),
        (["train", "--architecture", "auxk-topk", "--aux_bias", "x"], "aux_bias"),
        (["train", "--architecture", "auxk-topk", "--nonsense", "1"], "nonsense"),
        (
            ["train", "--architecture", "auxk-topk", "--aux_varient", "auxk"],
            "--aux_varient auxk (with --architecture auxk-topk). Did you mean --aux_variant?",
        ),
        (["train", "--architecture", "auxk-topkk"], "Did you mean auxk-topk?"),
        (["train", "--architecture", "topk-auxk"], "Did you mean auxk-topk?"),
        (["train", "--architecture"], "expected one argument"),
        (["train", "--architecture", "auxk-topk", "--k_aux", "x"], "invalid int value: 'x'"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(args) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_without_a_command_it_says_how_to_use_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 0
    assert "sae-lens-auxk train" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--version", "-V"])
def test_its_version(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([flag]) == 0
    assert capsys.readouterr().out == f"sae-lens-auxk {version('sae-lens-auxk')}\n"


@pytest.mark.parametrize(("args", "status"), [(["--help"], 0), (["--version"], 0), (["tarin"], 2)])
def test_what_needs_no_torch_does_not_import_it(args: list[str], status: int) -> None:
    code = (
        "import sys; from sae_lens_auxk_cli import main; status = main(sys.argv[1:]); "
        "sys.exit(99 if {'torch', 'sae_lens_auxk'} & {*sys.modules} else status)"
    )
    done = subprocess.run([sys.executable, "-c", code, *args], check=False, capture_output=True)
    assert done.returncode == status


def test_an_error_cannot_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    """It may quote a name from a repository of anyone's."""
    assert cli.main(["\x1b]0;title\x07"]) == 2
    assert refuse("a\x1b[2J\x9b31mb\nc\td") == 2
    errors = capsys.readouterr().err
    assert errors.endswith("error: a\\x1b[2J\\x9b31mb\nc\td\n")
    assert "\x1b" not in errors


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("model_name", "nope", "model_name='nope', dataset_path='me/text' cannot be loaded: nope"),
        (
            "resume_from_checkpoint",
            "nowhere",
            "resume_from_checkpoint='nowhere' is no complete checkpoint: there is no cfg.json",
        ),
        ("device", "meta", "device='meta' is not allowed: it must be cpu, cuda"),
    ],
)
def test_a_run_that_cannot_start_is_one_line(
    field: str, value: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--architecture auxk-topk --k 3 --d_in 8 --d_sae 16 --dataset_path me/text"
    args = [*flags.split(), "--n_batches_in_buffer", "64", "--log_to_wandb", "false"]
    args += [f"--{field}", value]
    assert cli.main(["train", *args]) == 2
    *_, line, end = capsys.readouterr().err.split("\n")
    assert line.startswith(f"sae-lens-auxk: error: {message}")
    assert (end, len(line) < 500) == ("", True)


def test_an_upload_on_a_full_disk_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    build_sae("auxk-topk").save_inference_model(tmp_path)

    def full() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(hub_upload, "TemporaryDirectory", full)
    assert cli.main(["upload", str(tmp_path), "me/saes", "--dry_run"]) == 2
    error = capsys.readouterr().err
    assert "No space left on device" in error
    assert error.count("\n") == 1
