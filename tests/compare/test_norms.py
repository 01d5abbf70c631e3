"""Rows with a large norm: left out of training and measuring, in all cases alike."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from sae_lens_auxk.compare import run, sources
from sae_lens_auxk.compare.checks import resolve
from sae_lens_auxk.compare.config import Comparison, Resolved
from sae_lens_auxk.compare.files import read_results
from sae_lens_auxk.compare.norms import RowFilter
from sae_lens_auxk.compare.run import cases_of, run_comparison
from sae_lens_auxk.compare.sources import source_of
from sae_lens_auxk.compare.train import LockstepTrainer, build_sae
from tests.compare.conftest import tiny
from tests.tiny_model import CONTEXT_SIZE, gpt2, tokens

LONG = 7
"""The token whose activations are long."""


@pytest.fixture(autouse=True)
def _no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "write_report", lambda _, folder: folder)


@pytest.fixture
def on_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Resolved:
    """On a language model with one token of 50 whose activations are a hundred times as long."""
    model = gpt2()
    model.W_E.data[LONG] *= 100
    monkeypatch.setattr(sources, "load_model", lambda *_, **__: model)
    tokens().to_parquet(tmp_path / "text" / "train.parquet")
    return resolve(
        Comparison(
            aux_variant=["none", "auxk"], k=[4], seeds=[0], d_sae=48, training_samples=1280,
            batch_size=64, dead_after=128, eval_samples=200, max_norm_multiple=10,
            model_name="tiny", dataset_path=str(tmp_path / "text"), context_size=CONTEXT_SIZE,
            hook_name="blocks.0.hook_resid_pre",
            language_model={"streaming": False, "prepend_bos": False, "n_eval_batches": 2,
                            "store_batch_size_prompts": 4, "n_batches_in_buffer": 4},
        )
    )  # fmt: skip


def opened(comparison: Resolved) -> tuple[Any, Any]:
    source = source_of(comparison)
    sae = build_sae(cases_of(comparison)[0].sae_config(comparison, source.d_in), seed=0)
    return source.open(0, {"": sae}), sae


def trained_on(comparison: Resolved, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The batches of each case of a whole comparison."""
    seen: dict[str, list[torch.Tensor]] = {}
    step = LockstepTrainer._step

    def recorded(self: Any, trainer: Any, log: Any, batch: torch.Tensor, is_point: bool) -> None:
        name = next(name for name, other in self.trainers.items() if other is trainer)
        seen.setdefault(name, []).append(batch.clone())
        step(self, trainer, log, batch, is_point)

    monkeypatch.setattr(LockstepTrainer, "_step", recorded)
    run_comparison(comparison, folder)
    return seen


def test_the_median_is_that_of_the_held_out_rows() -> None:
    rows = torch.eye(5)[[0, 1, 2, 3, 4]] * torch.tensor([1.0, 2, 3, 29.9, 30.1])[:, None]
    assert RowFilter(rows, 10).keeps(rows).tolist() == [True, True, True, True, False]
    rows[0] = torch.nan
    # Of 2, 3, 29.9 and 30.1 the lower middle one is 3.
    assert RowFilter(rows, 10).keeps(rows).tolist() == [False, True, True, True, False]
    assert RowFilter(rows, 10).keeps(rows[None]).shape == (1, 5)


def test_batches_are_full_and_in_order() -> None:
    rows = torch.arange(1.0, 25.0)[:, None]
    rows[[1, 2, 3, 10, 20]] = 1000.0
    row_filter = RowFilter(torch.ones(3, 1), 100)
    batches = list(row_filter.full_batches(rows.split(4)))
    assert {batch.shape for batch in batches} == {(4, 1)}
    kept = rows[rows[:, 0] < 1000]
    assert torch.equal(torch.cat(batches), kept[: 4 * len(batches)])
    assert len(batches) == len(kept) // 4
    assert row_filter.share_left_out == pytest.approx(5 / 24)


@pytest.mark.parametrize("value", [1, 1.0, 0, -3, float("nan"), float("inf"), True, "10", [10]])
def test_what_is_refused(value: Any) -> None:
    with pytest.raises(ValueError, match="max_norm_multiple="):
        tiny(max_norm_multiple=value)
    assert tiny(max_norm_multiple=1.5).max_norm_multiple == 1.5


def test_synthetic_rows_are_left_out_everywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything, _ = opened(tiny())
    norms = everything.held_out().norm(dim=1)
    limit = 1.3 * norms.median()
    comparison = tiny(max_norm_multiple=1.3)
    data, sae = opened(comparison)
    # The same samples, without the long ones; the features' activations go with them.
    assert torch.equal(data.held_out(), everything.held_out()[norms <= limit])
    assert 0 < len(data.held_out()) < 256
    assert sum(map(len, data.held_out_features)) == len(data.held_out())
    assert data.metrics(sae)["rows_left_out"] == 0  # no batch has been read

    none, auxk = trained_on(comparison, tmp_path, monkeypatch).values()
    assert len(none) == 50
    for batch, same in zip(none, auxk, strict=True):
        assert torch.equal(batch, same)
        assert batch.shape == (32, 12)
        assert batch.norm(dim=1).max() <= limit
    results = read_results(tmp_path)
    assert results["comparison"]["max_norm_multiple"] == 1.3
    (share,) = {entry["metrics"]["rows_left_out"] for entry in results["runs"]}
    assert share == pytest.approx((norms > limit).float().mean().item(), abs=0.05)


def test_nothing_changes_where_it_is_not_asked_for(tmp_path: Path) -> None:
    """A multiple above every norm leaves the data as they are without one."""
    for name, multiple in (("none", None), ("large", 1e6)):
        run_comparison(tiny(max_norm_multiple=multiple), tmp_path / name)
    plain, large = (read_results(tmp_path / name)["runs"] for name in ("none", "large"))
    for entry, other in zip(plain, large, strict=True):
        assert "rows_left_out" not in entry["metrics"]
        assert other["metrics"].pop("rows_left_out") == 0
        for both in (entry, other):
            del both["metrics"]["ms_per_step"]
        assert entry == other


def test_long_tokens_of_a_text_are_left_out_everywhere(
    on_text: Resolved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything, _ = opened(replace(on_text, max_norm_multiple=None))
    norms = everything.held_out().norm(dim=1)
    data, _ = opened(on_text)
    assert torch.equal(data.held_out(), everything.held_out()[norms < 10])
    assert 0 < (norms > 10).sum() < 20

    none, auxk = trained_on(on_text, tmp_path / "out", monkeypatch).values()
    assert len(none) == 20
    for batch, same in zip(none, auxk, strict=True):
        assert torch.equal(batch, same)
        assert batch.shape == (64, 16)
        assert batch.norm(dim=1).max() < 10
    for entry in read_results(tmp_path / "out")["runs"]:
        assert entry["metrics"]["rows_left_out"] == pytest.approx(1 / 50, abs=0.01)


@torch.no_grad()
def test_long_tokens_stay_as_they_are_in_the_ce_loss(on_text: Resolved) -> None:
    data, sae = opened(on_text)
    model, losses = data._runner.model, []
    prompts = torch.cat(data._tokens)
    stays = (prompts == LONG)[..., None]
    assert stays.any()
    for instead in (
        lambda x: x, lambda x: sae.decode(sae.encode(x)), lambda x: torch.zeros_like(x)
    ):  # fmt: skip

        def replace_rows(x: torch.Tensor, hook: Any, instead: Any = instead) -> torch.Tensor:
            return torch.where(stays, x, instead(x))

        hooks = [(data.hook_name, replace_rows)]
        losses.append(model.run_with_hooks(prompts, return_type="loss", fwd_hooks=hooks).item())
    plain, with_sae, zero = losses
    expected = (zero - with_sae) / (zero - plain)
    assert data.metrics(sae)["ce_loss_recovered"] == pytest.approx(expected, rel=1e-4)
    everywhere, _ = opened(replace(on_text, max_norm_multiple=None))
    assert everywhere.metrics(sae)["ce_loss_recovered"] != pytest.approx(expected, rel=1e-2)
