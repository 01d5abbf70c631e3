"""What the processes save together is what one process would have saved."""

import json
import warnings
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sae_lens import LanguageModelSAETrainingRunner
from sae_lens.saes.sae import SAE, TrainingSAE
from safetensors.torch import load_file
from transformer_lens import HookedTransformer

from sae_lens_auxk import runner_config
from sae_lens_auxk.sharded import files
from sae_lens_auxk.sharded.runner import ShardedTrainingRunner
from tests import tiny_model
from tests.helpers import TOPK_ARCHITECTURES
from tests.sharded.helpers import D_IN, both
from tests.sharded.processes import COUNTS, NCCL, device, in_processes


def _same_files(folder: Path, architecture: str) -> None:
    files.BLOCK_BYTES = 100  # several blocks
    whole, shared = both(architecture)
    shared.tokens_since_fired.copy_(whole.tokens_since_fired.random_(10))
    if dist.get_rank() == 0:
        whole.save_model(folder / "whole")
        whole.save_inference_model(folder / "whole-inference")
    shared.save_model(folder / "shared")
    shared.save_inference_model(folder / "shared-inference")
    dist.barrier()
    again = both(architecture)[1]
    with torch.no_grad():
        for parameter in again.parameters():
            parameter.zero_()
    again.load_weights_from_checkpoint(folder / "whole")
    for name, tensor in shared.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name


@pytest.mark.parametrize("architecture", TOPK_ARCHITECTURES)
def test_the_files_are_those_of_one_process_byte_for_byte(
    tmp_path: Path, architecture: str
) -> None:
    in_processes(2, _same_files, tmp_path, architecture)
    for ending in ("", "-inference"):
        whole, shared = tmp_path / f"whole{ending}", tmp_path / f"shared{ending}"
        for name in ("sae_weights.safetensors", "cfg.json"):
            assert (whole / name).read_bytes() == (shared / name).read_bytes(), name
    x = torch.randn(5, D_IN)
    a, b = (SAE.load_from_disk(tmp_path / f"{name}-inference") for name in ("whole", "shared"))
    assert torch.equal(a(x), b(x))


def _device() -> str:
    if dist.is_initialized():
        return device()
    return "cuda:0" if NCCL else "cpu"


def _model() -> HookedTransformer:
    # TransformerLens moves the tokens of a model on "cuda" to the first GPU, whichever it is on.
    return tiny_model.gpt2(device=_device(), dtype=torch.float64)


def _config(folder: Path, **fields: Any) -> Any:
    return runner_config(
        "auxk-topk",
        **{
            **tiny_model.run_fields(
                k=4,
                dtype="float64",
                device=_device(),
                aux_variant="auxk",
                dead_threshold_tokens=200,
                normalize_activations="expected_average_only_in",
                n_batches_for_norm_estimate=2,
                n_checkpoints=3,
                checkpoint_path=str(folder / "checkpoints"),
                output_path=str(folder / "output"),
            ),
            **fields,
        },
    )


@contextmanager
def _in_float64() -> Generator[None, None, None]:
    """SAELens's store takes torch's default dtype, whatever the SAE's.

    torch 2.11 has no gradient of the squared error of a float64 and a float32 tensor.
    """
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def _run(folder: Path, fields: dict[str, Any]) -> None:
    warnings.simplefilter("ignore")
    n = dist.get_world_size()
    cfg = _config(folder, store_batch_size_prompts=4 // n, n_batches_in_buffer=4 // n, **fields)
    torch.manual_seed(7)
    with _in_float64():
        ShardedTrainingRunner(cfg, tiny_model.tokens(), _model()).run()


def _run_whole(folder: Path, fields: dict[str, Any]) -> None:
    warnings.simplefilter("ignore")
    cfg = _config(folder, **fields)
    torch.manual_seed(7)
    with _in_float64():
        model = _model()
        # Drawn on the CPU, as the processes draw theirs: a GPU has random numbers of its own.
        sae: Any = TrainingSAE.from_dict({**cfg.get_training_sae_cfg_dict(), "device": "cpu"})
        LanguageModelSAETrainingRunner(cfg, tiny_model.tokens(), model, sae).run()


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoints/*/*"), key=lambda path: int(path.name))


def _assert_same_run(a: Path, b: Path) -> None:
    for name in ("sae_weights", "sparsity"):
        x, y = (load_file(folder / f"output/{name}.safetensors") for folder in (a, b))
        assert x.keys() == y.keys()
        for key in x:
            torch.testing.assert_close(y[key], x[key], rtol=1e-6, atol=1e-6)
    x, y = (json.loads((folder / "output/cfg.json").read_text()) for folder in (a, b))
    assert x == y


def test_a_run_is_that_of_one_process_and_goes_on_with_any_number(tmp_path: Path) -> None:
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    _run_whole(whole, {})
    in_processes(2, _run, shared, {})
    _assert_same_run(whole, shared)
    assert [p.name for p in _checkpoints(whole)] == [p.name for p in _checkpoints(shared)]
    for a, b in zip(_checkpoints(whole), _checkpoints(shared), strict=True):
        assert {path.name for path in a.iterdir()} == {path.name for path in b.iterdir()}
        x, y = (torch.load(path / "trainer_state.pt", map_location="cpu") for path in (a, b))
        assert x.keys() == y.keys()
        assert x["optimizer"]["param_groups"] == y["optimizer"]["param_groups"]
        for i, of_one in x["optimizer"]["state"].items():
            for key, value in of_one.items():
                torch.testing.assert_close(y["optimizer"]["state"][i][key], value)
        assert TrainingSAE.load_from_disk(b).cfg.d_sae == 48
    middle = _checkpoints(shared)[0]
    for n in [n for n in (4, 2) if n in COUNTS]:
        folder = tmp_path / f"resumed-{n}"
        in_processes(n, _run, folder, {"resume_from_checkpoint": str(middle)})
        _assert_same_run(whole, folder)
    folder = tmp_path / "resumed-1"
    _run_whole(folder, {"resume_from_checkpoint": str(middle)})
    _assert_same_run(whole, folder)
