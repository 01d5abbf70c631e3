"""A comparison on a (tiny) language model."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from sae_lens import SAE

from sae_lens_auxk.compare import run, sources
from sae_lens_auxk.compare.checks import resolve
from sae_lens_auxk.compare.config import Comparison, Resolved
from sae_lens_auxk.compare.files import read_results
from sae_lens_auxk.compare.run import run_comparison
from sae_lens_auxk.compare.saelens_evals import SamePrompts
from sae_lens_auxk.compare.sources import LanguageModel
from tests.tiny_model import CONTEXT_SIZE, D_MODEL, gpt2, tokens


@pytest.fixture
def comparison(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Resolved:
    monkeypatch.setattr(sources, "load_model", lambda *_, **__: gpt2())
    monkeypatch.setattr(run, "write_report", lambda _, folder: folder)
    tokens().to_parquet(tmp_path / "text" / "train.parquet")
    return resolve(
        Comparison(
            aux_variant=["none", "auxk"],
            preset=["saelens"],
            k=[4],
            seeds=[0],
            d_sae=48,
            training_samples=1280,
            batch_size=64,
            lr=1e-2,
            dead_after=128,
            eval_samples=200,
            model_name="tiny",
            dataset_path=str(tmp_path / "text"),
            context_size=CONTEXT_SIZE,
            language_model={
                "streaming": False,
                "prepend_bos": False,
                "store_batch_size_prompts": 4,
                "n_batches_in_buffer": 4,
                "n_eval_batches": 2,
            },
        )
    )


def test_tokens_in_a_folder_need_no_hub(
    comparison: Resolved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = gpt2()
    model.tokenizer = MagicMock(bos_token_id=0, eos_token_id=0, padding_side="right")
    monkeypatch.setattr(sources, "load_model", lambda *_, **__: model)
    run_comparison(replace(comparison, preset=[], aux_variant=["none"]), tmp_path / "out")
    (entry,) = read_results(tmp_path / "out")["runs"]
    assert entry["status"] == "finished"


@pytest.mark.oldest
def test_runs_and_measures(comparison: Resolved, tmp_path: Path) -> None:
    run_comparison(comparison, tmp_path / "out")
    results = read_results(tmp_path / "out")
    assert results["data"]["hook_name"] == "blocks.1.hook_resid_pre"
    assert results["data"]["d_in"] == D_MODEL
    assert [entry["case"] for entry in results["runs"]] == ["SAELens topk", "none", "auxk"]
    for entry in results["runs"]:
        assert entry["error"] is None
        assert entry["metrics"]["l0"] == 4
        assert entry["metrics"]["explained_variance"] > 0
        assert entry["metrics"]["ce_loss_recovered"] is not None
        assert "f1" not in entry["metrics"]
        sae = SAE.load_from_disk(tmp_path / "out" / entry["folder"])
        assert sae.cfg.metadata.hook_name == "blocks.1.hook_resid_pre"
        assert sae.cfg.metadata.model_name == "tiny"


def test_ce_loss_is_of_the_same_prompts_for_every_case(comparison: Resolved) -> None:
    source: Any = LanguageModel(comparison)
    config = run.cases_of(comparison)[0].sae_config(comparison, source.d_in)
    sae = run.build_sae(config, seed=0)
    data = source.open(0, {"": sae})
    assert data.metrics(sae) == data.metrics(sae)


def test_ce_loss_of_a_bfloat16_model_is_averaged_in_float32(
    comparison: Resolved, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "load_model", lambda *_, **__: gpt2(dtype=torch.bfloat16))
    source: Any = LanguageModel(comparison)
    config = run.cases_of(comparison)[0].sae_config(comparison, source.d_in)
    sae = run.build_sae(config, seed=0)
    data = source.open(0, {"": sae})
    losses: dict[str, list[torch.Tensor]] = {"clean": [], "sae": [], "zero": []}

    def reconstruct(x: torch.Tensor, hook: Any) -> torch.Tensor:
        return sae.decode(sae.encode(x.float())).to(x.dtype)

    def ablate(x: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.zeros_like(x)

    with torch.no_grad():
        for prompts in data._tokens:
            for name, hook in (("clean", None), ("sae", reconstruct), ("zero", ablate)):
                hooks = [(source.hook_name, hook)] if hook else []
                loss = source.model.run_with_hooks(
                    prompts, return_type="loss", loss_per_token=True, fwd_hooks=hooks
                )
                losses[name].append(loss)
    assert losses["clean"][0].dtype == torch.bfloat16
    clean, with_sae, zero = (torch.cat(parts).double().mean().item() for parts in losses.values())
    expected = (zero - with_sae) / (zero - clean)
    assert data.metrics(sae)["ce_loss_recovered"] == pytest.approx(expected, rel=1e-3)


def test_the_middle_is_the_default_place_and_a_wrong_one_is_refused(comparison: Resolved) -> None:
    assert LanguageModel(comparison).hook_name == "blocks.1.hook_resid_pre"
    wrong = resolve(Comparison(**{**vars(comparison), "hook_name": "blocks.1.hook_resid_prf"}))
    with pytest.raises(ValueError, match="hook_name=.*Did you mean blocks.1.hook_resid_pre"):
        LanguageModel(wrong)


def text_of(comparison: Resolved, seed: int, n_batches: int) -> tuple[torch.Tensor, Any]:
    """The first training prompts of a seed, and its pass."""
    source = LanguageModel(comparison)
    config = run.cases_of(comparison)[0].sae_config(comparison, source.d_in)
    data: Any = source.open(seed, {"": run.build_sae(config, seed)})
    store = data._runner.activations_store
    return torch.cat([store.get_batch_tokens() for _ in range(n_batches)]), data


@pytest.mark.parametrize("streaming", [False, True])
def test_each_seed_has_an_order_of_its_own_that_comes_again(
    comparison: Resolved, streaming: bool
) -> None:
    given = {**comparison.language_model, "streaming": streaming}
    comparison = replace(comparison, language_model=given)
    (zero, _), (again, _), (one, _) = (text_of(comparison, seed, 8) for seed in (0, 0, 1))
    assert torch.equal(zero, again)
    assert not torch.equal(zero, one)
    # As many rows are alike as two draws of 32 out of 176 have in common, about 6.
    in_common = (zero[:, None] == one).all(dim=2).any(dim=1).sum()
    assert in_common < 16


def test_the_held_out_rows_are_the_same_for_every_seed_and_not_trained_on(
    comparison: Resolved,
) -> None:
    (text, zero), (_, one) = (text_of(comparison, seed, 60) for seed in (0, 1))
    assert torch.equal(zero.held_out(), one.held_out())
    assert zero.held_out().shape == (200, D_MODEL)
    # 16 rows of 16 tokens for the 200 activations, read 4 at a time, then 2 times 4 prompts.
    held_out = torch.tensor(tokens()["tokens"])[:24]
    assert torch.equal(torch.cat(zero._tokens), held_out[16:])
    assert torch.equal(torch.cat(one._tokens), held_out[16:])
    # 60 batches are more than the whole text: it starts over without them.
    assert not (text[:, None] == held_out).all(dim=2).any()


@pytest.mark.parametrize("eval_samples", [16 * 196, 16 * 192, 16 * 188 + 1])
def test_a_text_that_is_all_held_out_is_refused(comparison: Resolved, eval_samples: int) -> None:
    short = replace(comparison, eval_samples=eval_samples)
    with pytest.raises(ValueError, match=f"too short.*eval_samples={eval_samples} tokens"):
        text_of(short, 0, 1)


def test_same_prompts_start_over() -> None:
    batches = [torch.zeros(2, 3), torch.ones(2, 3)]
    prompts = SamePrompts(batches)
    assert (prompts.store_batch_size_prompts, prompts.context_size) == (2, 3)
    assert [int(prompts.get_batch_tokens(9)[0, 0]) for _ in range(4)] == [0, 1, 0, 1]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"language_model": {"stream": True}}, "stream is not a field.*Did you mean streaming"),
        ({"language_model": {"lr": 1.0}}, "lr is set by lr"),
        ({"model_class_name": "Hooked"}, "model_class_name='Hooked'"),
        ({"model_class_name": "AutoModelForCausalLM"}, "hook_name=None.*model.layers"),
        ({"dataset_path": None}, "dataset_path=None"),
    ],
)
def test_what_is_refused(comparison: Resolved, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resolve(Comparison(**{**vars(comparison), **fields}))


def test_a_field_of_another_type_is_named(comparison: Resolved, tmp_path: Path) -> None:
    given = {**comparison.language_model, "seqpos_slice": 5}
    with pytest.raises(ValueError, match=r"language_model=.*'seqpos_slice': 5.* cannot be used"):
        run_comparison(replace(comparison, language_model=given), tmp_path / "new")


@pytest.mark.parametrize("name", ["model_name", "synthetic_model"])
def test_a_model_that_is_not_there_is_named(name: str, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing")
    fields: dict[str, Any] = {name: missing}
    if name == "model_name":
        fields |= {
            "dataset_path": "text",
            "hook_name": "model.layers.6",
            "model_class_name": "AutoModelForCausalLM",
        }
    with pytest.raises(ValueError, match=f"{name}='{missing}' cannot be loaded"):
        sources.source_of(resolve(Comparison(**fields)))
