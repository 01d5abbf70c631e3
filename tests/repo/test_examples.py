"""The examples: the same code that the README points at, made small."""

import json
import re
import runpy
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from datasets import Dataset, Features, Sequence, Value
from sae_lens import SAE
from transformer_lens import HookedTransformer, HookedTransformerConfig

from sae_lens_auxk.compare import sources
from sae_lens_auxk.compare.files import read_results, write_results
from sae_lens_auxk.losses.registry import AUX_LOSSES
from tests.compare.fake_results import failed, fake_results

EXAMPLES = Path(__file__).parents[2] / "examples"
N_WORDS = 500


def load(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / name))


@pytest.fixture
def openwebtext(tmp_path: Path) -> Path:
    """A folder as SAELens's pretokenizer pushes one: Parquet, rows of 1,024 tokens of GPT-2."""
    folder = tmp_path / "text"
    rows = torch.randint(0, N_WORDS, (64, 1024), generator=torch.manual_seed(0)).tolist()
    features = Features({"input_ids": Sequence(Value("int32"))})
    parquet = folder / "data" / "train-00000-of-00001.parquet"
    Dataset.from_dict({"input_ids": rows}, features=features).to_parquet(parquet)
    metadata = {"tokenizer_name": "gpt2", "context_size": 1024, "shuffled": True}
    (folder / "sae_lens.json").write_text(json.dumps(metadata))
    return folder


def random_gpt2(*_: Any, **__: Any) -> HookedTransformer:
    """GPT-2 small's shape, but for its numbers of layers and words, which take most of the time."""
    config = HookedTransformerConfig(
        n_layers=1, d_model=768, n_ctx=1024, n_heads=12, d_head=64, d_mlp=3072, d_vocab=N_WORDS,
        act_fn="gelu_new", model_name="gpt2", seed=0,
    )  # fmt: skip
    return HookedTransformer(config)


def test_gpt2(
    openwebtext: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sources, "load_model", random_gpt2)
    example = load("gpt2.py")
    small = f"--dataset_path {openwebtext} --hook_name blocks.0.hook_resid_post --autocast false "
    small += "--device cpu --d_sae 256 --training_samples 8184 --batch_size 1023 --seeds 0 "
    small += "--preset saelens --aux_variant auxk pursuit --eval_samples 2046 "
    small += f"--output {tmp_path / 'out'}"
    example["GPT2"].language_model.update(n_batches_in_buffer=4, n_eval_batches=1, streaming=False)
    example["GPT2"].language_model.update(store_batch_size_prompts=2, eval_batch_size_prompts=1)
    example["main"]([*small.split(), "--dry_run"])
    assert not (tmp_path / "out").exists()
    assert "auxk" in capsys.readouterr().out
    read: list[torch.Size] = []
    forward = HookedTransformer.forward

    def noted(self: Any, tokens: torch.Tensor, *args: Any, **keywords: Any) -> Any:
        read.append(tokens.shape)
        return forward(self, tokens, *args, **keywords)

    monkeypatch.setattr(HookedTransformer, "forward", noted)
    example["main"](small.split())
    # The whole of each row, and nothing of it twice.
    assert {shape[1] for shape in read if shape[1] > 1} == {1024}
    runs = read_results(tmp_path / "out")["runs"]
    assert [run["status"] for run in runs] == ["finished"] * 3
    assert {run["architecture"] for run in runs} == {"topk", "auxk-topk"}
    said = capsys.readouterr().out
    assert "report.html" in said
    assert "would go to me/gpt2-saes:" in said
    assert len(re.findall("sae_weights.safetensors", said)) == 3
    sae = SAE.load_from_disk(tmp_path / "out" / str(runs[1]["folder"]))
    assert sae.cfg.metadata.training_architecture == "auxk-topk"
    assert (sae.cfg.d_in, sae.cfg.metadata.context_size) == (768, 1024)


def test_gpt2_says_what_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = fake_results(cases=("auxk", "none"), ks=(32,), seeds=(0,))
    failed(results["runs"][0], "failed", "KeyError")
    write_results(tmp_path, results)
    main = load("gpt2.py")["main"]
    monkeypatch.setitem(main.__globals__, "run_comparison", lambda *_, **__: tmp_path / "report")
    with pytest.raises(SystemExit, match=rf"^failed: {results['runs'][0]['name']}$"):
        main(["--output", str(tmp_path)])


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
