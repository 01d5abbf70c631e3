"""Lockstep training: the same as alone, with one definition of dead, and room for failures."""

from typing import Any

import pytest
import torch
from sae_lens.saes.sae import TrainingSAE
from sae_lens.training.sae_trainer import SAETrainer

from sae_lens_auxk.compare.cases import cases_of
from sae_lens_auxk.compare.plan import Resolved
from sae_lens_auxk.compare.sources import source_of
from sae_lens_auxk.compare.train import LockstepTrainer, build_sae
from tests.compare.conftest import tiny
from tests.helpers import NEEDS_WHITENING


def trainer_of(comparison: Resolved) -> LockstepTrainer:
    source = source_of(comparison)
    saes: dict[str, TrainingSAE[Any]] = {
        case.name: build_sae(case.sae_config(comparison, source.d_in), seed=0)
        for case in cases_of(comparison)
    }
    data = source.open(0, saes)
    return LockstepTrainer(
        data.trainer_config, saes, data.hook_name, data.batches(), comparison.dead_after, int
    )


@pytest.mark.oldest
def test_a_case_trains_as_it_would_alone_in_saelens() -> None:
    """The weights are those of SAELens's own trainer, to the bit, whatever trains beside it."""
    comparison = tiny(preset=["saelens", "variants"], aux_variant=None)
    together = trainer_of(comparison).fit()
    source = source_of(comparison)
    for case in cases_of(comparison):
        sae = build_sae(case.sae_config(comparison, source.d_in), seed=0)
        data = source.open(0, {"": sae})
        batches = (batch[data.hook_name] for batch in data.batches())
        SAETrainer(data.trainer_config, sae, batches).fit()
        for name, parameter in sae.named_parameters():
            assert torch.equal(parameter, dict(together[case.name].named_parameters())[name])


def test_history_and_ever_dead_against_a_count_of_our_own() -> None:
    comparison = tiny(aux_variant=["auxk"], training_samples=3200)
    trainer = trainer_of(comparison)
    fired: list[torch.Tensor] = []
    (single,) = trainer.trainers.values()
    step = single.step

    def watched(batch: torch.Tensor) -> Any:
        output = step(batch)
        fired.append((output.feature_acts.to_dense() != 0).any(0))
        return output

    single.step = watched
    trainer.fit()
    (record,) = trainer.records.values()
    silent = torch.zeros(24, dtype=torch.long)
    ever_dead = torch.zeros(24, dtype=torch.bool)
    dead_fractions: list[float] = []
    for row in fired:
        silent = torch.where(row, 0, silent + 32)
        ever_dead |= silent >= 128
        dead_fractions.append((silent >= 128).float().mean().item())
    assert torch.equal(record.tokens_since_fired, silent)
    assert torch.equal(record.ever_dead, ever_dead)
    assert 0 < int(ever_dead.sum()) < 24, "the test would see nothing"
    assert record.history["samples"] == [32 * n for n in range(1, 101)]
    assert record.history["dead_fraction"] == dead_fractions
    assert len(record.step_seconds) == 100
    assert all(l0 == 2 for l0 in record.history["l0"])
    assert any(loss != 0 for loss in record.history["aux_loss"])


def test_a_long_run_has_about_a_hundred_points() -> None:
    comparison = tiny(aux_variant=["none"], training_samples=32 * 250)
    trainer = trainer_of(comparison)
    trainer.fit()
    (record,) = trainer.records.values()
    samples = record.history["samples"]
    assert 80 <= len(samples) <= 101
    assert samples[-1] == 32 * 250


@pytest.mark.parametrize("how", ["raises", "nan"])
def test_one_that_fails_leaves_the_others_alone(how: str) -> None:
    comparison = tiny(aux_variant=["none", "auxk"])
    expected = trainer_of(comparison).fit()["none"].W_dec
    trainer = trainer_of(comparison)
    failing = trainer.saes["auxk"]
    if how == "nan":
        with torch.no_grad():
            failing.b_dec.fill_(torch.nan)
    else:

        def fail(*_: Any, **__: Any) -> Any:
            raise torch.OutOfMemoryError("no room")

        failing.training_forward_pass = fail
    saes = trainer.fit()
    assert list(saes) == ["none"]
    assert torch.equal(saes["none"].W_dec, expected)
    assert trainer.records["none"].error is None
    error = trainer.records["auxk"].error
    assert error is not None
    assert ("no room" if how == "raises" else "loss is nan") in error


def test_when_all_fail_it_stops() -> None:
    trainer = trainer_of(tiny(aux_variant=["none"]))

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no")

    trainer.saes["none"].training_forward_pass = fail
    assert trainer.fit() == {}
    assert trainer.n_training_steps == 1


@pytest.mark.oldest
@pytest.mark.parametrize(
    "mode",
    ["expected_average_only_in", pytest.param("covariance_whitening", marks=NEEDS_WHITENING)],
)
def test_scaling_is_folded_in_as_saelens_does(mode: str) -> None:
    comparison = tiny(aux_variant=["auxk"], sae={"normalize_activations": mode})
    sae = trainer_of(comparison).fit()["auxk"]
    assert sae.cfg.normalize_activations == "none"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_memory_of_a_case_is_its_own() -> None:
    alone = trainer_of(tiny(device="cuda", aux_variant=["auxk"]))
    alone.fit()
    beside = trainer_of(tiny(device="cuda", preset=["variants", "saelens"]))
    beside.fit()
    one, other = (max(t.records["auxk"].step_bytes) for t in (alone, beside))
    assert one == pytest.approx(other, rel=0.1)
