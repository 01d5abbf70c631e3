"""Resampling in whole runs: SAELens's runners, several processes, training loops of one's own."""

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
from torch.utils.checkpoint import checkpoint

from sae_lens_auxk import resample, resampling, runner_config
from sae_lens_auxk.resampling import NewLatents, put_in
from tests import tiny_model
from tests.helpers import (
    ARCHITECTURES,
    build_config,
    build_trainer,
    forward,
    kill_latents,
    step_input,
)
from tests.sharded.processes import in_processes
from tests.test_resampling import sae_with_dead


@pytest.fixture
def put_in_counts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, int]]:
    """The SAEs that got new latents, and how many."""
    counts: list[tuple[Any, int]] = []

    def counted(new: NewLatents, sae: Any, optimizer: Any) -> None:
        counts.append((sae, len(new.latents)))
        put_in(new, sae, optimizer)

    monkeypatch.setattr(resampling, "put_in", counted)
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


class StepOutput(torch.nn.Module):
    """What DistributedDataParallel wraps: its forward is the training step, as in a checkpoint."""

    def __init__(self, sae: Any):
        super().__init__()
        self.sae = sae

    def forward(self, x: torch.Tensor, dead: torch.Tensor | None, step: int) -> Any:
        given = step_input(x, dead, step)
        output: Any = checkpoint(self.sae.training_forward_pass, given, use_reentrant=False)
        return output.loss, output


def mask_on_a_rank(rank: int, step: int) -> torch.Tensor | None:
    """Latent 0 is dead on one rank only, latent 1 on the other. One rank has no mask at step 3."""
    return None if (rank, step) == (1, 3) else torch.arange(24) != rank


def train_on_a_rank(criterion: str) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
    rank, n_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.manual_seed(0)
    sae = sae_with_dead("auxk-topk", dead_criterion=criterion, resample_every_steps=2)
    model = torch.nn.parallel.DistributedDataParallel(StepOutput(sae), find_unused_parameters=True)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    steps: list[dict[str, Any]] = []
    for step, x in enumerate(torch.randn(4, 8 * n_ranks, 8)):
        loss, output = model(x.chunk(n_ranks)[rank], mask_on_a_rank(rank, step), step)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        resample(output, sae, optimizer)
        new = output.new_latents
        fired = (output.feature_acts.to_dense() != 0).any(0)
        dead = int(output.metrics["dead_latents"])
        steps.append({"new": None if new is None else new._asdict(), "fired": fired, "dead": dead})
    return steps, sae.state_dict()


def trained_on_two_ranks(criterion: str) -> Any:
    """The steps of both ranks, whose weights and counts are equal at the end."""
    (steps, state), (others, other) = in_processes(2, train_on_a_rank, criterion)
    for name in state:
        assert torch.equal(state[name], other[name]), name
    return steps, others


def test_ranks_resample_the_same_latents_from_the_rows_of_all() -> None:
    steps, others = trained_on_two_ranks("tokens")
    new = steps[1]["new"]
    assert all(torch.equal(new[name], others[1]["new"][name]) for name in new)
    torch.manual_seed(0)
    sae = sae_with_dead("auxk-topk", resample_every_steps=2)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    for step, x in enumerate(torch.randn(4, 16, 8)[:2]):
        output = forward(sae, x, step=step)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(output.new_latents.latents, new["latents"])
    torch.testing.assert_close(output.new_latents.decoder, new["decoder"])


def test_a_latent_is_dead_where_the_masks_of_all_ranks_say_so() -> None:
    steps, others = trained_on_two_ranks("steps")
    here, there = steps[1]["fired"], others[1]["fired"]
    assert (here != there)[2:].any(), "a rank's own batch would do"
    expected = (~(here | there))[2:].nonzero().T[0] + 2
    for rank in (steps, others):
        assert rank[1]["new"]["latents"].tolist() == expected.tolist()
        assert [step["dead"] for step in rank] == [22, 22, 22, 0]
        assert rank[3]["new"] is None


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
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for step in range(8):
            for _ in range(2):  # accumulated gradients: resampled after the last part of a step
                output = forward(sae, torch.randn(16, 8), step=step)
                output.loss.backward()
            optimizer.step()
            if resamples:
                resample(output, sae, optimizer)
            assert not caught or step >= 2
    messages = [str(w.message) for w in caught if "resamples nothing" in str(w.message)]
    assert len(messages) == (0 if resamples else 1)


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
        with pytest.raises(ValueError, match=rf"=1000 does not work with the optimizer {name}"):
            trainer.step(torch.randn(16, 8))
        before = copy.deepcopy((sae.state_dict(), optimizer.state_dict()))
        with pytest.raises(ValueError, match="allowed are floating-point moments"):
            put_in(
                NewLatents(torch.tensor([2]), torch.ones(1, 8), torch.ones(1, 8)), sae, optimizer
            )
        torch.testing.assert_close((sae.state_dict(), optimizer.state_dict()), before)


def test_quantised_moments_are_refused_by_their_type() -> None:
    sae = sae_with_dead("auxk-topk", resample_every_steps=1000)
    trainer = build_trainer(sae)
    trainer.step(torch.randn(16, 8))
    state = trainer.optimizer.state[sae.W_dec]
    state["exp_avg"] = state["exp_avg"].to(torch.uint8)
    with pytest.raises(ValueError, match=r"'exp_avg' torch.uint8 \(24, 8\) of W_dec \(24, 8\)"):
        resample(None, sae, trainer.optimizer)


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
    details = SAE.load_from_disk(tmp_path).cfg.metadata.training_architecture_details
    assert (details["resample_every_steps"], details["resample_stop_step"]) == (3, 9)
