"""Lockstep training: the same as alone, with one definition of dead, and room for failures."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens.saes.sae import SAE, TrainingSAE, TrainStepOutput
from sae_lens.training.sae_trainer import SAETrainer

from sae_lens_auxk.compare import train
from sae_lens_auxk.compare.cases import cases_of
from sae_lens_auxk.compare.config import Resolved
from sae_lens_auxk.compare.sources import source_of
from sae_lens_auxk.compare.train import LockstepTrainer, TrainingLog, build_sae
from tests.compare.conftest import tiny


def trainer_of(
    comparison: Resolved, on_failure: Callable[[str, Exception], object] = print
) -> LockstepTrainer:
    source = source_of(comparison)
    saes: dict[str, TrainingSAE[Any]] = {
        case.name: build_sae(case.sae_config(comparison, source.d_in), seed=0)
        for case in cases_of(comparison)
    }
    data = source.open(0, saes)
    return LockstepTrainer(
        cfg=data.trainer_config,
        saes=saes,
        hook_name=data.hook_name,
        data_provider=data.batches(),
        dead_after=comparison.dead_after,
        learning_rates={case.name: case.lr for case in cases_of(comparison) if case.lr},
        on_samples=int,
        on_failure=on_failure,
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


def test_a_case_may_have_its_own_learning_rate() -> None:
    """It trains as a comparison of that rate, and the case beside it as one of the other."""
    rows: list[dict[str, Any]] = [{"aux_variant": "auxk", "name": name} for name in ("own", "all")]
    rows[0]["lr"] = 7e-3
    together = trainer_of(tiny(aux_variant=None, cases=rows)).fit()
    for row in rows:
        lr = row.pop("lr", None)
        alone = trainer_of(tiny(aux_variant=None, cases=[row], **({"lr": lr} if lr else {}))).fit()
        name = row["name"]
        assert torch.equal(alone[name].W_dec, together[name].W_dec)
    assert not torch.equal(together["own"].W_dec, together["all"].W_dec)


@pytest.mark.parametrize("sae", [{}, {"resample_every_steps": 7}])
def test_history_and_ever_dead_against_a_count_of_our_own(sae: dict[str, Any]) -> None:
    """A resampled latent comes back from the dead when it fires, not when it gets new weights."""
    comparison = tiny(aux_variant=["auxk"], training_samples=3200, sae=sae)
    trainer = trainer_of(comparison)
    fired: list[torch.Tensor] = []
    resampled: list[int] = []
    (single,) = trainer.trainers.values()
    step = single.step

    def watched(batch: torch.Tensor) -> Any:
        output = step(batch)
        fired.append((output.feature_acts.to_dense() != 0).any(0))
        resampled.append(output.metrics.get("resampled_latents", int)())
        return output

    single.step = watched
    trainer.fit()
    (log,) = trainer.logs.values()
    silent = torch.zeros(24, dtype=torch.long)
    ever_dead = torch.zeros(24, dtype=torch.bool)
    dead_fractions: list[float] = []
    alive_since = torch.zeros(24, dtype=torch.long)
    for n, row in enumerate(fired, 1):
        alive_since[row & (silent >= 128)] = 32 * n
        silent = torch.where(row, 0, silent + 32)
        ever_dead |= silent >= 128
        dead_fractions.append((silent >= 128).float().mean().item())
    assert torch.equal(log.tokens_since_fired, silent)
    assert torch.equal(log.ever_dead, ever_dead)
    assert torch.equal(log.alive_since, alive_since)
    assert alive_since.any(), "no latent came back, so the test would see nothing"
    assert any(resampled) == bool(sae)
    assert 0 < int(ever_dead.sum()) < 24, "the test would see nothing"
    assert log.history["samples"] == [32 * n for n in range(1, 101)]
    assert log.history["dead_fraction"] == dead_fractions
    assert len(log.step_seconds) == 100
    assert all(l0 == 2 for l0 in log.history["l0"])
    assert any(loss != 0 for loss in log.history["aux_loss"])


def test_a_long_run_has_about_a_hundred_points() -> None:
    comparison = tiny(aux_variant=["none"], training_samples=32 * 250)
    trainer = trainer_of(comparison)
    trainer.fit()
    (log,) = trainer.logs.values()
    samples = log.history["samples"]
    assert 80 <= len(samples) <= 101
    assert samples[-1] == 32 * 250


FAILURES = {
    "raises": "no room",
    "nan": "the loss is nan",
    "last update": "the weights are not finite after the last step",
    "metadata": "no metadata",
}


@pytest.mark.parametrize("how", FAILURES)
def test_one_that_fails_leaves_the_others_alone(how: str) -> None:
    comparison = tiny(aux_variant=["none", "auxk"])
    expected = trainer_of(comparison).fit()["none"].W_dec
    failures: dict[str, str] = {}
    trainer = trainer_of(comparison, lambda name, error: failures.update({name: str(error)}))
    failing, own = trainer.saes["auxk"], trainer.trainers["auxk"]

    def fail(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError(FAILURES[how])

    def diverge(*_: Any, **__: Any) -> Any:
        if trainer.n_training_samples == comparison.training_samples:
            failing.W_dec.data[0] = torch.inf

    if how == "nan":
        failing.b_dec.data.fill_(torch.nan)
    elif how == "raises":
        failing.training_forward_pass = fail
    elif how == "metadata":
        own.set_final_sae_metadata = fail
    else:
        own.optimizer.register_step_post_hook(diverge)
    saes = trainer.fit()
    assert list(saes) == ["none"]
    assert torch.equal(saes["none"].W_dec, expected)
    assert list(failures) == ["auxk"]
    assert failures["auxk"].startswith(FAILURES[how])


def test_when_all_fail_it_stops() -> None:
    trainer = trainer_of(tiny(aux_variant=["none"]))

    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("no")

    trainer.saes["none"].training_forward_pass = fail
    assert trainer.fit() == {}
    assert trainer.n_training_steps == 1


def test_a_point_of_the_history_by_hand() -> None:
    log = TrainingLog(
        dead_after=4,
        tokens_since_fired=torch.tensor([0, 4, 5, 3]),
        ever_dead=torch.zeros(4, dtype=torch.bool),
        alive_since=torch.zeros(4, dtype=torch.int64),
    )
    # The samples are 1 and -1 in the first place around their mean (2, 2): a variance of 2.
    x = torch.tensor([[1.0, 2.0], [3.0, 2.0]])
    acts = torch.tensor([[1.0, 0.0, 2.0, 0.0], [0.0, 0.0, -3.0, 0.0]])
    output = TrainStepOutput(
        sae_in=x,
        sae_out=x + torch.tensor([0.0, 0.5]),  # an error of 0.5
        feature_acts=acts,
        hidden_pre=acts,
        loss=torch.tensor(1.0),
        losses={"auxiliary_reconstruction_loss": torch.tensor(0.125)},
    )
    log.write_point(output, 64)
    assert log.history == {
        "samples": [64],
        "dead_fraction": [0.5],
        "explained_variance": [0.75],
        "l0": [1.5],
        "aux_loss": [0.125],
    }


@pytest.mark.oldest
@pytest.mark.parametrize("normalization", ["expected_average_only_in", "covariance_whitening"])
def test_scaling_is_folded_into_the_saved_sae(
    normalization: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The saved SAE does with raw activations what the trained one did with scaled ones."""
    before: list[Any] = []
    fold_scaling = train.fold_scaling

    def watched(sae: Any, scaler: Any) -> None:
        before.extend([copy.deepcopy(sae), copy.deepcopy(scaler)])
        fold_scaling(sae, scaler)

    monkeypatch.setattr(train, "fold_scaling", watched)
    comparison = tiny(aux_variant=["auxk"], sae={"normalize_activations": normalization})
    trainer = trainer_of(comparison)
    trainer.fit()["auxk"].save_inference_model(tmp_path)
    saved = SAE.load_from_disk(tmp_path)
    assert saved.cfg.normalize_activations == "none"
    scaler = trainer.trainers["auxk"].activation_scaler
    assert scaler.scaling_factor is None
    assert scaler.whitening is None

    unfolded, scaler = before
    x = 3 + torch.randn(500, 12)
    with torch.no_grad():
        expected = scaler.unscale(unfolded.decode(unfolded.encode(scaler.scale(x))))
        got = saved.decode(saved.encode(x))
        unscaled = unfolded.decode(unfolded.encode(x))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert (got - unscaled).abs().max() > 0.1, "the test would see nothing"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_memory_of_a_case_is_its_own() -> None:
    alone = trainer_of(tiny(device="cuda", aux_variant=["auxk"]))
    alone.fit()
    beside = trainer_of(tiny(device="cuda", preset=["variants", "saelens"]))
    beside.fit()
    one, other = (max(t.logs["auxk"].step_bytes) for t in (alone, beside))
    assert one == pytest.approx(other, rel=0.1)
