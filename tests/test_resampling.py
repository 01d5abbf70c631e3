"""Dead latents resampled, against a plain version of the procedure."""

import copy
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE
from sae_lens.config import LoggingConfig
from sae_lens.multi_sae_training_runner import (
    MultiSAETrainingRunner,
)
from sae_lens.saes.sae import TrainingSAE
from sae_lens.synthetic import SyntheticModelConfig
from sae_lens.synthetic.synthetic_sae_runner import SyntheticSAERunner, SyntheticSAERunnerConfig
from torch.utils.checkpoint import checkpoint

from sae_lens_auxk import resample, resampling, runner_config
from sae_lens_auxk.resampling import NewLatents, put_in, resampled
from tests import tiny_model
from tests.helpers import (
    ARCHITECTURES,
    TOPK_ARCHITECTURES,
    build_config,
    build_sae,
    build_trainer,
    forward,
    kill_latents,
    step_input,
)

N_DEAD = 9
BIASES: dict[str, dict[str, float]] = {
    "auxk-gated": {"b_gate": 0.0, "b_mag": 0.0, "r_mag": 0.0},
    "auxk-jumprelu": {"b_enc": 0.0, "threshold": 0.125},
}
MODES = ["none", "layer_norm", "constant_norm_rescale"]


def sae_with_dead(architecture: str, **fields: Any) -> Any:
    """The first 9 latents have been silent for long, and stay so."""
    if architecture == "auxk-jumprelu":
        fields = {"jumprelu_init_threshold": 0.125, **fields}
    sae = build_sae(architecture, **{"dead_threshold_tokens": 100, **fields})
    kill_latents(sae, N_DEAD)
    sae.tokens_since_fired[:N_DEAD] = 1000
    return sae


def per_latent(sae: Any) -> dict[str, torch.Tensor]:
    """All parameters of latents, one row each."""
    parameters = dict(sae.named_parameters())
    del parameters["b_dec"]
    return {name: p.T if name == "W_enc" else p for name, p in parameters.items()}


@pytest.fixture
def put_in_counts(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, int]]:
    """The SAEs that got new latents, and how many."""
    counts: list[tuple[Any, int]] = []

    def counted(new: NewLatents, sae: Any, optimizer: Any) -> None:
        counts.append((sae, len(new.latents)))
        put_in(new, sae, optimizer)

    monkeypatch.setattr(resampling, "put_in", counted)
    return counts


# --- by value --------------------------------------------------------------------------------


def plain_version(
    before: dict[str, torch.Tensor],
    b_dec: torch.Tensor,
    sae_in: torch.Tensor,
    sae_out: torch.Tensor,
    mode: str,
    factor: float,
    step: int,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Encoder and decoder rows of the new latents, one after the other."""
    inputs: list[torch.Tensor] = []
    squared: list[float] = []
    for x, out in zip(sae_in, sae_out, strict=True):
        squared.append(((x - out) ** 2).sum().item() ** 2)
        if mode == "layer_norm":
            x = (x - x.mean()) / x.std()
        if mode == "constant_norm_rescale":
            x = x * len(x) ** 0.5 / x.pow(2).sum().sqrt()
        inputs.append(x - b_dec)
    generator = torch.Generator().manual_seed(step)
    shares = torch.tensor(squared, dtype=torch.float64)
    order = torch.multinomial(shares / shares.sum(), N_DEAD, generator=generator)
    encoder_length = sum(row.pow(2).sum().sqrt() for row in before["W_enc"][N_DEAD:])
    decoder_length = sum(row.pow(2).sum().sqrt() for row in before["W_dec"][N_DEAD:])
    n_alive = len(before["W_enc"]) - N_DEAD
    encoder, decoder = [], []
    for drawn in order.tolist():
        direction = inputs[drawn] / inputs[drawn].pow(2).sum().sqrt()
        encoder.append(direction * factor * encoder_length / n_alive)
        decoder.append(direction * decoder_length / n_alive)
    return encoder, decoder


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_new_latents_equal_a_plain_version_and_nothing_else_changes(
    architecture: str, mode: str
) -> None:
    if mode in type(build_config(architecture)).unsupported_normalizations:
        return
    fields: dict[str, Any] = {"normalize_activations": mode, "dtype": "float64"}
    sae = sae_with_dead(architecture, resample_every_steps=3, **fields)
    plain = copy.deepcopy(sae)
    plain.cfg.resample_every_steps = None
    trainer, other = build_trainer(sae), build_trainer(plain)
    for step, x in enumerate(torch.randn(3, 16, 8, dtype=torch.float64)):
        before = {name: p.detach().clone() for name, p in per_latent(sae).items()}
        b_dec = sae.b_dec.detach().clone()
        trainer.n_training_steps = other.n_training_steps = step
        output = trainer.step(x)
        other.step(x)
        assert output.metrics.get("resampled_latents") == (N_DEAD if step == 2 else None)
    factor = 1.0 if architecture in TOPK_ARCHITECTURES else 0.2
    encoder, decoder = plain_version(
        before, b_dec, output.sae_in, output.sae_out.detach(), mode, factor, step
    )
    new, kept = per_latent(sae), per_latent(plain)
    for latent in range(N_DEAD):
        torch.testing.assert_close(new["W_enc"][latent], encoder[latent])
        torch.testing.assert_close(new["W_dec"][latent], decoder[latent])
    for name, value in BIASES.get(architecture, {"b_enc": 0.0}).items():
        assert (new[name][:N_DEAD] == value).all()
    assert set(new) == {"W_enc", "W_dec", *BIASES.get(architecture, {"b_enc": 0.0})}
    for name in new:
        assert torch.equal(new[name][N_DEAD:], kept[name][N_DEAD:]), name
    assert torch.equal(sae.b_dec, plain.b_dec)
    assert (sae.tokens_since_fired[:N_DEAD] == 0).all()
    assert torch.equal(sae.tokens_since_fired[N_DEAD:], plain.tokens_since_fired[N_DEAD:])
    assert torch.equal(trainer.n_forward_passes_since_fired, other.n_forward_passes_since_fired)


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "Adam": {},
    "AdamW": {"amsgrad": True},
    "NAdam": {},
    "RMSprop": {"momentum": 0.9},
    "SGD": {"momentum": 0.9},
}


@pytest.mark.parametrize(
    ("optimizer", "fields"),
    [*OPTIMIZERS.items(), ("Adam", {"foreach": True}), ("Adam", {"fused": True})],
)
@pytest.mark.parametrize("architecture", ["auxk-topk", "auxk-jumprelu", "auxk-gated"])
def test_the_optimizer_forgets_these_latents_and_no_others(
    architecture: str, optimizer: str, fields: dict[str, Any]
) -> None:
    sae = sae_with_dead(architecture)
    optim = getattr(torch.optim, optimizer)(sae.parameters(), lr=1e-2, **fields)
    for p in sae.parameters():
        p.grad = torch.randn_like(p)
    optim.step()
    before = copy.deepcopy(optim.state_dict()["state"])
    latents = torch.tensor([2, 5])
    put_in(NewLatents(latents, torch.randn(2, 8), torch.randn(2, 8)), sae, optim)
    n_moments = 0
    for (name, p), old in zip(sae.named_parameters(), before.values(), strict=True):
        for key, state in optim.state[p].items():
            expected = old[key]
            if name != "b_dec" and torch.is_tensor(state) and state.shape == p.shape:
                n_moments += 1
                expected = expected.clone()
                (expected.T if name == "W_enc" else expected)[latents] = 0
            assert torch.equal(torch.as_tensor(state), torch.as_tensor(expected)), (name, key)
    assert n_moments >= len(before) - 1


# --- the draw --------------------------------------------------------------------------------


def draw(losses: torch.Tensor, dead: torch.Tensor, inputs: torch.Tensor, seed: int = 0) -> Any:
    weights = torch.ones(inputs.shape[1], len(dead))
    return resampled(inputs, losses, dead, weights, weights.T, 1.0, seed)


def test_rows_are_drawn_by_the_square_of_their_loss() -> None:
    losses = torch.tensor([1.0, 2.0, 3.0, 0.0])
    inputs, dead = torch.eye(4), torch.tensor([False, True])
    drawn = Counter(int(draw(losses, dead, inputs, seed).decoder.argmax()) for seed in range(3000))
    shares = [drawn[row] / 3000 for row in range(4)]
    assert shares == pytest.approx([1 / 14, 4 / 14, 9 / 14, 0], abs=0.03)


def test_a_row_is_drawn_once_and_the_rest_waits() -> None:
    losses = torch.tensor([1.0, 1e-30, 3.0, 0.0, torch.inf, 5.0])
    inputs = torch.eye(6)
    inputs[5] = 0.0  # no direction
    new = draw(losses, torch.tensor([False, *[True] * 9]), inputs)
    assert new.latents.tolist() == [1, 2, 3]
    assert sorted(new.decoder.argmax(dim=1).tolist()) == [0, 1, 2]


@pytest.mark.parametrize(
    ("losses", "dead"), [([0.0, 0.0], [True, True]), ([1.0, 1.0], [False, False])]
)
def test_nothing_to_draw_or_to_resample_is_nothing(losses: list[float], dead: list[bool]) -> None:
    assert draw(torch.tensor(losses), torch.tensor(dead), torch.eye(2)) is None


def test_where_all_latents_are_dead_their_own_lengths_count() -> None:
    W_enc, W_dec = torch.full((4, 2), 1.0), torch.full((2, 4), 3.0)
    new = resampled(torch.eye(4), torch.ones(4), torch.tensor([True, True]), W_enc, W_dec, 0.2, 0)
    assert new is not None
    torch.testing.assert_close(new.encoder.norm(dim=1), torch.full((2,), 0.4))
    torch.testing.assert_close(new.decoder.norm(dim=1), torch.full((2,), 6.0))


def test_bad_rows_are_not_drawn() -> None:
    sae = sae_with_dead("auxk-topk", resample_every_steps=1)
    x = torch.randn(12, 8)
    x[3:, 1] = torch.nan
    with pytest.warns(UserWarning, match="9 rows"):
        new = forward(sae, x).new_latents
    assert len(new.latents) == 3
    directions = (x[:3] - sae.b_dec) / (x[:3] - sae.b_dec).norm(dim=-1, keepdim=True)
    cosines = new.decoder / new.decoder.norm(dim=-1, keepdim=True) @ directions.T
    assert sorted(cosines.argmax(dim=1).tolist()) == [0, 1, 2]


# --- when ------------------------------------------------------------------------------------


def test_the_steps_are_counted_from_1_and_the_last_one_counts() -> None:
    cfg = build_config("auxk-topk", resample_every_steps=4, resample_stop_step=12)
    assert [step + 1 for step in range(40) if cfg.resamples_after(step)] == [4, 8, 12]
    forever = build_config("auxk-topk", resample_every_steps=4)
    assert sum(forever.resamples_after(step) for step in range(40)) == 10
    assert not any(build_config("auxk-topk").resamples_after(step) for step in range(40))


@pytest.mark.parametrize("criterion", ["tokens", "batch", "steps"])
def test_dead_is_what_the_criterion_says_but_not_silent_in_one_batch(criterion: Any) -> None:
    sae = sae_with_dead("auxk-topk", dead_criterion=criterion, resample_every_steps=1)
    mask = torch.arange(24) >= N_DEAD - 2
    output = forward(sae, torch.randn(16, 8), dead=mask)
    expected = torch.arange(24) < N_DEAD
    if criterion == "steps":  # SAELens's mask is from before the step, in which some of it fire
        fired = (output.feature_acts.to_dense() != 0).any(0)
        assert (mask & fired).any()
        expected = mask & ~fired
    assert output.new_latents.latents.sort().values.tolist() == expected.nonzero().T[0].tolist()
    assert criterion != "steps" or forward(sae, torch.randn(16, 8)).new_latents is None


@pytest.mark.parametrize("variant", ["none", "auxk", "pursuit"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_dead_latents_are_revived(architecture: str, variant: str) -> None:
    torch.manual_seed(0)
    features = torch.nn.functional.normalize(torch.randn(64, 16), dim=1)
    sae = build_sae(
        architecture,
        d_in=16,
        d_sae=48,
        aux_variant=variant,
        dead_threshold_tokens=64 * 20,
        randomize=False,
        resample_every_steps=30,
    )
    kill_latents(sae, 24)
    if architecture == "auxk-abstopk":  # small weights would grow again by themselves
        sae.W_enc.data[:, :24] = 0.0
        sae.W_dec.data[:24] = torch.nn.functional.normalize(sae.W_dec.data[:24]) * 0.1
    trainer = build_trainer(sae, lr=1e-3, train_batch_size_samples=64)
    for step in range(60):
        trainer.n_training_steps = step
        chosen = torch.rand(64, 64) < 0.05
        output = trainer.step((chosen * torch.rand(64, 64)) @ features)
        if step == 29:
            n_resampled = output.metrics["resampled_latents"]
            assert n_resampled >= 20
    assert (sae.tokens_since_fired[:24] < 64 * 30).sum() >= 0.8 * 24
    assert all(p.isfinite().all() for p in sae.parameters())


# --- around a step ---------------------------------------------------------------------------


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

    torch.manual_seed(1)
    sae = TrainingSAE.from_dict(config().sae.to_dict())
    kill_latents(sae, 15)
    start = {name: value.clone() for name, value in sae.state_dict().items()}
    whole = tiny_model.run(config(n_checkpoints=1, checkpoint_path=str(tmp_path)), override_sae=sae)
    n_resampled = [n for _, n in put_in_counts]
    path = next(tmp_path.glob("*/*"))
    assert 8 < int(path.name) // 64 < 12
    other = copy.deepcopy(whole)
    other.load_state_dict(start)
    torch.manual_seed(2)
    resumed = tiny_model.run(config(resume_from_checkpoint=str(path)), override_sae=other)
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


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradient_checkpointing_draws_once(architecture: str) -> None:
    x = torch.randn(16, 8)
    saes = []
    for checkpointed in (False, True):
        torch.manual_seed(0)
        sae = sae_with_dead(architecture, resample_every_steps=2)
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
        for step in range(4):
            given = step_input(x + step, step=step)
            if checkpointed:
                output: Any = checkpoint(sae.training_forward_pass, given, use_reentrant=False)
            else:
                output = sae.training_forward_pass(given)
            output.loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            resample(output, sae, optimizer)
            assert ("resampled_latents" in output.metrics) == (step == 1)
        saes.append(sae)
    for (name, p), q in zip(
        saes[0].state_dict().items(), saes[1].state_dict().values(), strict=True
    ):
        torch.testing.assert_close(p, q, msg=name)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_autocast_and_half_precision(architecture: str, dtype: str) -> None:
    sae = sae_with_dead(architecture, dtype=dtype, resample_every_steps=1)
    trainer = build_trainer(sae, autocast=True)
    output = trainer.step(torch.randn(16, 8, dtype=getattr(torch, dtype)))
    assert output.metrics["resampled_latents"] == N_DEAD
    assert all(p.isfinite().all() for p in sae.parameters())
    lengths = sae.W_dec.float().norm(dim=-1)
    torch.testing.assert_close(
        lengths[:N_DEAD], lengths[N_DEAD:].mean().expand(N_DEAD), rtol=0.05, atol=0.02
    )


class StepOutput(torch.nn.Module):
    """What DistributedDataParallel wraps: its forward is the training step."""

    def __init__(self, sae: Any):
        super().__init__()
        self.sae = sae

    def forward(self, x: torch.Tensor, step: int) -> Any:
        output = self.sae.training_forward_pass(step_input(x, step=step))
        return output.loss, output


def train_on_a_rank(rank: int, n_ranks: int, folder: str, architecture: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=n_ranks
    )
    try:
        torch.manual_seed(0)
        sae = sae_with_dead(architecture, resample_every_steps=2)
        model = torch.nn.parallel.DistributedDataParallel(
            StepOutput(sae), find_unused_parameters=True
        )
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
        for step, x in enumerate(torch.randn(4, 8 * n_ranks, 8)):
            loss, output = model(x.chunk(n_ranks)[rank], step)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            resample(output, sae, optimizer)
            if step == 1:
                torch.save(output.new_latents._asdict(), f"{folder}/{rank}-new.pt")
        torch.save(sae.state_dict(), f"{folder}/{rank}.pt")
    finally:
        torch.distributed.destroy_process_group()


def test_ranks_resample_the_same_latents_from_the_rows_of_all(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(train_on_a_rank, (2, str(tmp_path), "auxk-topk"), nprocs=2)
    drawn, states = (
        [torch.load(tmp_path / f"{rank}{kind}.pt") for rank in (0, 1)] for kind in ("-new", "")
    )
    for a, b in (drawn, states):
        assert all(torch.equal(a[name], b[name]) for name in a)
    torch.manual_seed(0)
    sae = sae_with_dead("auxk-topk", resample_every_steps=2)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    for step, x in enumerate(torch.randn(4, 16, 8)[:2]):
        output = forward(sae, x, step=step)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(output.new_latents.latents, drawn[0]["latents"])
    torch.testing.assert_close(output.new_latents.decoder, drawn[0]["decoder"])


def test_other_saes_go_through_the_trainer_as_before() -> None:
    sae = build_sae("topk")
    assert "resampled_latents" not in build_trainer(sae).step(torch.randn(16, 8)).metrics


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
    assert (details["resample_every_steps"], details["resample_stop_step"]) == (3, None)
