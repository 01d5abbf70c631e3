"""The examples: the same code that the README points at, made small."""

import runpy
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from sae_lens import SAE, LanguageModelSAETrainingRunner

from sae_lens_auxk.losses.registry import AUX_LOSSES
from tests import tiny_model

EXAMPLES = Path(__file__).parents[2] / "examples"


def load(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / name))


def test_gpt2(tmp_path: Path) -> None:
    changes = tiny_model.run_fields(
        output_path=str(tmp_path),
        n_checkpoints=0,
        device="cpu",
        lr_warm_up_steps=2,
        lr_decay_steps=2,
        exclude_special_tokens=False,
        is_dataset_tokenized=True,
        dead_threshold_tokens=200,
    )
    cfg = load("gpt2.py")["config"](**changes)
    runner = LanguageModelSAETrainingRunner(
        cfg, override_model=tiny_model.gpt2(), override_dataset=tiny_model.tokens()
    )
    runner.run()
    assert SAE.load_from_disk(tmp_path).cfg.metadata.training_architecture == "auxk-topk"


@pytest.mark.filterwarnings("ignore")
def test_synthetic(capsys: pytest.CaptureFixture[str]) -> None:
    example = load("synthetic.py")
    example["main"](seeds=(0,), training_samples=2048)
    rows = capsys.readouterr().out.strip().split("\n")
    assert len(rows) == 2 + len(example["VARIANTS"])


def test_own_loss(capsys: pytest.CaptureFixture[str]) -> None:
    with patch.dict(AUX_LOSSES):
        load("own_loss.py")["main"](training_samples=20_000)
    assert "explained variance" in capsys.readouterr().out
