"""What SAELens touches of an SAE, so that a release that touches more is noticed here."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sae_lens import TrainingSAE
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner

from sae_lens_auxk import runner_config
from sae_lens_auxk.step.sparse import HOOK_POINTS, REPLACED, REPLACED_ATTRIBUTES
from tests import tiny_model
from tests.helpers import STOCK, TOPK_ARCHITECTURES, build_sae, step_input
from tests.saelens.touched import watched

pytestmark = pytest.mark.oldest

RUNS = (
    "training",
    "llm_sae_training_runner.py",
    "multi_sae_training_runner.py",
    "config.py",
)
"""SAELens's trainers and runners."""

OF_SAE = {
    *("cfg", "device", "parameters", "to", "train", "eval"),
    *("get_coefficients", "training_forward_pass", "log_histograms"),
    *("save_model", "save_inference_model", "load_weights_from_checkpoint"),
}
OF_CONFIG = {
    *("d_sae", "d_in", "normalize_activations", "metadata", "sae_lens_training_version"),
    *("to_dict", "architecture"),
}


@pytest.fixture
def _log(monkeypatch: pytest.MonkeyPatch) -> None:
    """A W&B that takes everything."""
    fake = SimpleNamespace(
        log=lambda *_, **__: None,
        init=lambda *_, **__: None,
        finish=lambda: None,
        Histogram=lambda value: value,
    )
    for module in ("training.sae_trainer", "training.multi_sae_trainer", "llm_sae_training_runner"):
        monkeypatch.setattr(f"sae_lens.{module}.wandb", fake)
    monkeypatch.setattr("sae_lens.config.LoggingConfig.log", lambda *_, **__: None)


@pytest.mark.usefixtures("_log")
def test_what_a_runner_and_its_trainer_touch(tmp_path: Path) -> None:
    """With checkpoints, a resume, evaluations and logs."""
    fields: dict[str, Any] = tiny_model.run_fields(
        k=4,
        dead_threshold_tokens=200,
        checkpoint_path=str(tmp_path / "checkpoints"),
        output_path=str(tmp_path / "output"),
        n_checkpoints=1,
        log_to_wandb=True,
        wandb_log_frequency=2,
        eval_every_n_wandb_logs=2,
    )
    for _ in range(2):
        cfg = runner_config("auxk-topk", **fields)
        sae = TrainingSAE.from_dict(cfg.sae.to_dict())
        with watched(sae, *RUNS) as of_sae, watched(sae.cfg, *RUNS) as of_config:
            tiny_model.run(cfg, override_sae=sae)
        assert of_sae <= OF_SAE, of_sae - OF_SAE
        assert of_config <= OF_CONFIG, of_config - OF_CONFIG
        fields["resume_from_checkpoint"] = str(next((tmp_path / "checkpoints").glob("*/*")))
    assert {"training_forward_pass", "load_weights_from_checkpoint", "log_histograms"} <= of_sae


@pytest.mark.usefixtures("_log")
def test_what_the_runner_of_several_saes_touches() -> None:
    saes = {name: build_sae("auxk-topk", d_in=16, d_sae=48) for name in "ab"}
    runner = MultiSAETrainingRunner(
        tiny_model.multi_sae_config({name: sae.cfg for name, sae in saes.items()}),
        override_model=tiny_model.gpt2(),
        override_dataset=tiny_model.tokens(),
    )
    sae = runner.saes["a"]
    with watched(sae, *RUNS) as of_sae, watched(sae.cfg, *RUNS) as of_config:
        runner.run()
    assert "training_forward_pass" in of_sae
    assert of_sae <= OF_SAE, of_sae - OF_SAE
    assert of_config <= OF_CONFIG, of_config - OF_CONFIG


# --- the step that the sparse one replaces ---------------------------------------------------

CALLED_TOO = {
    *("mse_loss_fn", "run_time_activation_norm_fn_in", "run_time_activation_norm_fn_out"),
    *("update_topk_threshold", "training_forward_pass", "activation_fn"),
}
"""What the sparse step calls itself (``activation_fn`` it looks at)."""

OWN_LOSS = {
    *("calculate_topk_aux_loss", "calculate_abstopk_aux_loss", "calculate_matryoshka_aux_loss"),
}
"""SAELens's own auxiliary losses, which ``calculate_aux_loss`` of this package does not call."""

DATA = {
    *("W_enc", "W_dec", "b_enc", "b_dec", "topk_threshold", "cfg", "dtype", "device", "d_head"),
    *("_parameters", "_buffers", "_modules"),
}


@pytest.mark.parametrize("architecture", TOPK_ARCHITECTURES)
def test_all_that_saelens_step_calls_is_called_or_checked(architecture: str) -> None:
    """Else an override of it would be ignored without a word."""
    sae = build_sae(STOCK[architecture])
    with watched(sae, "saes") as touched:
        sae.training_forward_pass(step_input(torch.randn(16, 8), torch.arange(24) < 9))
    methods = {name for name in touched if not name.startswith("__")}
    assert {"encode_with_hidden_pre", "calculate_aux_loss", "mse_loss_fn"} <= methods
    checked = {*REPLACED, *REPLACED_ATTRIBUTES, *HOOK_POINTS}
    unknown = methods - checked - CALLED_TOO - OWN_LOSS - DATA
    assert not unknown, unknown
