"""Dead latents resampled, against a plain version of the procedure."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch

from sae_lens_auxk import resample_with
from sae_lens_auxk.step.resampling import NewLatents, resampled
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


# --- by value --------------------------------------------------------------------------------


def plain_version(
    before: dict[str, torch.Tensor],
    sae_in: torch.Tensor,
    sae_out: torch.Tensor,
    factor: float,
    step: int,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Encoder and decoder rows of the new latents, one after the other."""
    residuals = [x - out for x, out in zip(sae_in, sae_out, strict=True)]
    squared = [(residual**2).sum().item() ** 2 for residual in residuals]
    generator = torch.Generator().manual_seed(step)
    shares = torch.tensor(squared, dtype=torch.float64)
    order = torch.multinomial(shares / shares.sum(), N_DEAD, generator=generator)
    encoder_length = sum(row.pow(2).sum().sqrt() for row in before["W_enc"][N_DEAD:])
    decoder_length = sum(row.pow(2).sum().sqrt() for row in before["W_dec"][N_DEAD:])
    n_alive = len(before["W_enc"]) - N_DEAD
    encoder, decoder = [], []
    for drawn in order.tolist():
        direction = residuals[drawn] / residuals[drawn].pow(2).sum().sqrt()
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
        trainer.n_training_steps = other.n_training_steps = step
        output = trainer.step(x)
        other.step(x)
        n_resampled = output.metrics["resampled_latents"]
        assert [n_resampled(), n_resampled()] == [N_DEAD if step == 2 else 0, 0]
        assert sae.drawn is None
    factor = 1.0 if architecture in TOPK_ARCHITECTURES else 0.2
    encoder, decoder = plain_version(before, output.sae_in, output.sae_out.detach(), factor, step)
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
    sae.put_in(NewLatents(latents, torch.randn(2, 8), torch.randn(2, 8), 0), optim)
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
    return resampled(inputs, losses, dead, (torch.tensor(2.0), torch.tensor(3.0)), 0.5, seed)


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
    new = draw(losses, torch.tensor([False, *[True] * 9]), inputs, seed=17)
    assert new.latents.tolist() == [1, 2, 3]
    assert sorted(new.decoder.argmax(dim=1).tolist()) == [0, 1, 2]
    assert new.step == 17
    # 0.5 times the encoder's length, and the decoder's
    torch.testing.assert_close(new.encoder.norm(dim=1), torch.full((3,), 1.0))
    torch.testing.assert_close(new.decoder.norm(dim=1), torch.full((3,), 3.0))


@pytest.mark.parametrize(
    ("losses", "dead"), [([0.0, 0.0], [True, True]), ([1.0, 1.0], [False, False])]
)
def test_nothing_to_draw_or_to_resample_is_nothing(losses: list[float], dead: list[bool]) -> None:
    assert draw(torch.tensor(losses), torch.tensor(dead), torch.eye(2)) is None


def test_lengths_are_those_of_the_living_or_of_all_where_none_lives() -> None:
    sae = build_sae("auxk-topk", dtype="bfloat16")
    alive = torch.arange(24) >= N_DEAD
    for counts, mask in ((alive, alive), (torch.zeros_like(alive), torch.ones_like(alive))):
        encoder, decoder = sae.mean_lengths(counts)
        assert encoder.dtype == decoder.dtype == torch.float32
        torch.testing.assert_close(encoder, sae.W_enc.detach().float().norm(dim=0)[mask].mean())
        torch.testing.assert_close(decoder, sae.W_dec.detach().float().norm(dim=1)[mask].mean())


def test_where_all_latents_are_dead_their_own_lengths_count() -> None:
    sae = sae_with_dead("auxk-standard", d_sae=9, resample_every_steps=1)
    with torch.no_grad():
        sae.W_enc.copy_(torch.ones(8, 9))
        sae.W_dec.copy_(torch.full((9, 8), 3.0))
    forward(sae, torch.randn(16, 8))
    torch.testing.assert_close(sae.drawn.encoder.norm(dim=1), torch.full((9,), 0.2 * 8**0.5))
    torch.testing.assert_close(sae.drawn.decoder.norm(dim=1), torch.full((9,), 3 * 8**0.5))


def test_float64_is_only_made_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """MPS has none."""
    moved: list[torch.dtype] = []

    def cpu(tensor: torch.Tensor) -> torch.Tensor:
        moved.append(tensor.dtype)
        return tensor

    monkeypatch.setattr(torch.Tensor, "cpu", cpu)
    assert draw(torch.ones(4), torch.tensor([False, True]), torch.eye(4)) is not None
    assert moved == [torch.float32]


def test_bad_rows_are_not_drawn() -> None:
    sae = sae_with_dead("auxk-topk", resample_every_steps=1)
    x = torch.randn(12, 8)
    x[3:, 1] = torch.nan
    with pytest.warns(UserWarning, match="9 rows"):
        output = forward(sae, x)
    new = sae.drawn
    assert len(new.latents) == 3
    residuals = (x - output.sae_out.detach())[:3]
    directions = residuals / residuals.norm(dim=-1, keepdim=True)
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
    assert sae.drawn.latents.sort().values.tolist() == expected.nonzero().T[0].tolist()
    if criterion == "steps":
        forward(sae, torch.randn(16, 8))
        assert sae.drawn is None


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
            assert output.metrics["resampled_latents"]() >= 20
    assert (sae.tokens_since_fired[:24] < 64 * 30).sum() >= 0.8 * 24
    assert all(p.isfinite().all() for p in sae.parameters())


# --- around a step ---------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_loop_of_ones_own_resamples_as_the_trainer_does(architecture: str) -> None:
    states: list[dict[str, torch.Tensor]] = []
    batches = torch.randn(4, 16, 8)
    for own_loop in (False, True):
        torch.manual_seed(0)
        sae = sae_with_dead(architecture, resample_every_steps=2)
        trainer = build_trainer(sae, lr_scheduler_name="constant")
        optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
        if own_loop:
            resample_with(sae, optimizer)
        for step, x in enumerate(batches):
            if own_loop:
                given = step_input(x, step=step)
                given.coefficients = trainer.get_coefficients()
                output = sae.training_forward_pass(given)
                output.loss.backward()
                torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            else:
                trainer.n_training_steps = step
                output = trainer.step(x)
            n_resampled = output.metrics["resampled_latents"]()
            assert n_resampled == N_DEAD if step == 1 else n_resampled < N_DEAD
            assert sae.drawn is None
        states.append(sae.state_dict())
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_autocast_and_half_precision(architecture: str, dtype: str) -> None:
    sae = sae_with_dead(architecture, dtype=dtype, resample_every_steps=1)
    trainer = build_trainer(sae, autocast=True)
    output = trainer.step(torch.randn(16, 8, dtype=getattr(torch, dtype)))
    assert output.metrics["resampled_latents"]() == N_DEAD
    assert all(p.isfinite().all() for p in sae.parameters())
    lengths = sae.W_dec.float().norm(dim=-1)
    torch.testing.assert_close(
        lengths[:N_DEAD], lengths[N_DEAD:].mean().expand(N_DEAD), rtol=0.05, atol=0.02
    )


def test_other_saes_go_through_the_trainer_as_before() -> None:
    sae = build_sae("topk")
    assert "resampled_latents" not in build_trainer(sae).step(torch.randn(16, 8)).metrics
