"""Resampling in whole runs: SAELens's runners, and training loops of one's own."""

import copy
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.config import LoggingConfig
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner
from sae_lens.saes.sae import TrainingSAE
from sae_lens.synthetic import SyntheticModelConfig
from sae_lens.synthetic.synthetic_sae_runner import SyntheticSAERunner, SyntheticSAERunnerConfig

from sae_lens_auxk import resample_with, runner_config
from sae_lens_auxk.step.resampling import NewLatents, Resampling
from tests import tiny_model
from tests.helpers import (
    ARCHITECTURES,
    build_config,
    build_trainer,
    forward,
    kill_latents,
)
from tests.step.test_resampling import sae_with_dead


@pytest.fixture
def put_in_counts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, int]]:
    """The SAEs that got new latents, and how many."""
    counts: list[tuple[Any, int]] = []
    put_in = Resampling.put_in

    def counted(self: Any, new: NewLatents, optimizer: Any) -> None:
        counts.append((self, len(new.latents)))
        put_in(self, new, optimizer)

    monkeypatch.setattr(Resampling, "put_in", counted)
    return counts


@pytest.mark.parametrize("criterion", ["tokens", "steps"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_resumed_run_is_bit_equal_to_one_never_interrupted(
    architecture: str,
    criterion: str,
    tmp_path: Path,
    put_in_counts: list[tuple[Any, int]],
) -> None:
    fields: dict[str, Any] = {
        "dead_criterion": criterion,
        "dead_threshold_tokens": 200,
        "dead_feature_window": 3,
        # Where a latent fires by itself, the first resampling leaves none for another one.
        "resample_every_steps": 12,
    }
    if "topk" in architecture:
        fields.update(k=4, resample_every_steps=4)
    if "matryoshka" in architecture:
        fields.update(matryoshka_widths=[12, 24, 48], use_matryoshka_aux_loss=True)

    def config(**more: Any) -> Any:
        return runner_config(architecture, **tiny_model.run_fields(**fields, **more))

    whole, path, resume = tiny_model.run_to_resume(config, tmp_path)
    n_resampled = [n for _, n in put_in_counts]
    assert 8 < int(path.name) // 64 < 12
    torch.manual_seed(2)
    resumed = resume()
    n_after = [n for _, n in put_in_counts][len(n_resampled) :]
    assert n_after
    assert n_resampled[-len(n_after) :] == n_after
    assert len(n_resampled) > len(n_after) or "topk" not in architecture
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.parametrize("architecture", ["auxk-topk", "auxk-jumprelu"])
def test_compiled_run_equals_an_eager_one(
    architecture: str, put_in_counts: list[tuple[Any, int]]
) -> None:
    more: dict[str, Any] = {"k": 4} if architecture == "auxk-topk" else {}
    fields = tiny_model.run_fields(
        **more,
        training_tokens=8 * 64,
        dead_threshold_tokens=200,
        resample_every_steps=4,
        resample_stop_step=4,
    )
    saes = []
    for compile_sae in (False, True):
        torch.manual_seed(0)
        cfg = runner_config(architecture, **fields, compile_sae=compile_sae)
        sae = TrainingSAE.from_dict(cfg.sae.to_dict())
        kill_latents(sae, 15)
        saes.append(tiny_model.run(cfg, override_sae=sae))
    assert [n for _, n in put_in_counts] == 2 * [put_in_counts[0][1]]
    for (name, p), q in zip(saes[0].named_parameters(), saes[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-4, msg=name)
    assert torch.equal(saes[0].tokens_since_fired, saes[1].tokens_since_fired)


# --- around a run ----------------------------------------------------------------------------


def test_the_log_has_all_resampled_latents_since_the_last_one(
    monkeypatch: pytest.MonkeyPatch, put_in_counts: list[tuple[Any, int]]
) -> None:
    logged: list[dict[str, Any]] = []
    log = SimpleNamespace(log=lambda entries, **_: logged.append(entries))
    monkeypatch.setattr("sae_lens.training.sae_trainer.wandb", log)
    fields: dict[str, Any] = {"k": 4, "dead_threshold_tokens": 100, "training_tokens": 21 * 64}
    # After steps 3, 6 and 9, logged after steps 7, 14 and 21.
    resampling_: dict[str, Any] = {"resample_every_steps": 3, "resample_stop_step": 9}
    logging: dict[str, Any] = {"log_to_wandb": True, "wandb_log_frequency": 7}
    for more in (resampling_, {}):
        logged.clear()
        cfg = runner_config("auxk-topk", **tiny_model.run_fields(**fields, **more, **logging))
        sae = TrainingSAE.from_dict(cfg.sae.to_dict())
        sae.W_enc.data[:, :15] *= 1e-3  # so that some are dead again and again
        tiny_model.run(cfg, override_sae=sae)
        name = "metrics/resampled_latents"
        counts = [entries[name] for entries in logged if name in entries]
        if not more:
            assert counts == []
            continue
        n = [count for _, count in put_in_counts]
        assert len(n) == 3, "the test would not see a sum"
        assert counts == [n[0] + n[1], n[2], 0]


@pytest.mark.parametrize("resamples", [True, False])
def test_a_loop_that_never_resamples_is_warned(resamples: bool) -> None:
    sae = sae_with_dead("auxk-topk", resample_every_steps=2)
    optimizer = torch.optim.Adam(sae.parameters())
    if resamples:
        resample_with(sae, optimizer)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for step in range(8):
            for _ in range(2):  # accumulated gradients: resampled after the last part of a step
                output = forward(sae, torch.randn(16, 8), step=step)
                output.loss.backward()
            optimizer.step()
            assert not caught or step >= 2
    messages = [str(w.message) for w in caught]
    assert len(messages) == (0 if resamples else 1)
    assert resamples or "resamples nothing" in messages[0]
    assert resamples or "must call sae_lens_auxk.resample_with(sae, optimizer) once" in messages[0]


@pytest.mark.parametrize("name", ["ASGD", "Adafactor", "Rprop"])
def test_an_optimizer_with_unknown_state_is_refused_at_the_first_step(name: str) -> None:
    """ASGD keeps a mean of the weights, Adafactor rows and columns, Rprop its step sizes."""
    for every in (None, 1000):
        sae = sae_with_dead("auxk-topk", resample_every_steps=every)
        trainer = build_trainer(sae)
        optimizer = trainer.optimizer = getattr(torch.optim, name)(sae.parameters(), lr=1e-2)
        if every is None:
            trainer.step(torch.randn(16, 8))
            continue
        resample_with(sae, optimizer)
        with pytest.raises(ValueError, match=rf"=1000 does not work with the optimizer {name}"):
            trainer.step(torch.randn(16, 8))
        before = copy.deepcopy((sae.state_dict(), optimizer.state_dict()))
        with pytest.raises(ValueError, match="allowed are floating-point moments"):
            sae.put_in(
                NewLatents(torch.tensor([2]), torch.ones(1, 8), torch.ones(1, 8), 0), optimizer
            )
        torch.testing.assert_close((sae.state_dict(), optimizer.state_dict()), before)


def test_quantised_moments_are_refused_by_their_type() -> None:
    sae = sae_with_dead("auxk-topk", resample_every_steps=1000)
    trainer = build_trainer(sae)
    trainer.step(torch.randn(16, 8))
    state = trainer.optimizer.state[sae.W_dec]
    state["exp_avg"] = state["exp_avg"].to(torch.uint8)
    with pytest.raises(ValueError, match=r"'exp_avg' torch.uint8 \(24, 8\) of W_dec \(24, 8\)"):
        trainer.optimizer.step()


@pytest.mark.oldest
def test_every_runner_resamples(tmp_path: Path, put_in_counts: list[tuple[Any, int]]) -> None:
    fields: dict[str, Any] = {
        "d_in": tiny_model.D_MODEL,
        "d_sae": 48,
        "k": 2,
        "dead_threshold_tokens": 100,
        "resample_every_steps": 3,
    }
    sae = build_config("auxk-topk", **fields)
    no_log = LoggingConfig(log_to_wandb=False)
    MultiSAETrainingRunner(
        tiny_model.multi_sae_config(
            {"a": sae, "b": build_config("auxk-topk", **fields)}, training_tokens=10 * 64
        ),
        override_model=tiny_model.gpt2(),
        override_dataset=tiny_model.tokens(),
    ).run()
    assert len({id(sae) for sae, _ in put_in_counts}) == 2
    put_in_counts.clear()
    SyntheticSAERunner(
        SyntheticSAERunnerConfig(
            synthetic_model=SyntheticModelConfig(num_features=32, hidden_dim=16, seed=0),
            sae=sae,
            training_samples=1000,
            batch_size=100,
            eval_samples=100,
            output_path=str(tmp_path),
            checkpoint_path=None,
            logger=no_log,
        )
    ).run()
    assert put_in_counts
    metadata = SAE.load_from_disk(tmp_path).cfg.metadata
    details = metadata.training_architecture_details
    assert (details["resample_every_steps"], details["resample_stop_step"]) == (3, None)
    assert metadata.fitted == {"resample_stop_step": 9}
