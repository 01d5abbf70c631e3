"""``runner_config``: flat keywords to the right places."""

import pytest
from sae_lens.config import LoggingConfig

from sae_lens_auxk import runner_config
from tests.helpers import ARCHITECTURES
from tests.tiny_model import run_fields


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "topk", "standard"])
def test_every_architecture(architecture: str) -> None:
    fields = run_fields()
    if "topk" in architecture:
        fields["k"] = 4
    if "matryoshka" in architecture:
        fields["matryoshka_widths"] = [24, 48]
    cfg = runner_config(architecture, **fields)
    assert cfg.sae.architecture() == architecture
    assert cfg.sae.d_sae == 48
    assert cfg.training_tokens == fields["training_tokens"]
    assert cfg.logger.log_to_wandb is False


def test_dtype_and_device_go_to_both() -> None:
    cfg = runner_config("auxk-topk", **run_fields(k=4, dtype="float64", device="cpu"))
    assert cfg.dtype == cfg.sae.dtype == "float64"


def test_an_unknown_keyword_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(TypeError, match=r"aux_varant is not a field.*Did you mean aux_variant\?"):
        runner_config("auxk-topk", **run_fields(aux_varant="auxk"))
    with pytest.raises(TypeError, match=r"trainig_tokens.*Did you mean training_tokens\?"):
        runner_config("auxk-topk", **run_fields(trainig_tokens=5))
    with pytest.raises(TypeError, match="l1_coefficient is not a field of auxk-topk"):
        runner_config("auxk-topk", **run_fields(l1_coefficient=5))


def test_an_unknown_architecture_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ValueError, match=r"'aux-topk'.*Did you mean auxk-topk\?"):
        runner_config("aux-topk", **run_fields())


def test_a_bad_value_is_refused() -> None:
    with pytest.raises(ValueError, match="k_aux=0"):
        runner_config("auxk-topk", **run_fields(k_aux=0))


def test_logger_and_its_fields_exclude_each_other() -> None:
    with pytest.raises(TypeError, match="logger and log_to_wandb exclude each other"):
        runner_config("auxk-topk", **run_fields(logger=LoggingConfig()))
    fields = run_fields(logger=LoggingConfig(log_to_wandb=False), k=4)
    del fields["log_to_wandb"]
    assert runner_config("auxk-topk", **fields).logger.log_to_wandb is False
