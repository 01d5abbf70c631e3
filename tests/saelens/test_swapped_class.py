"""What changes when SAELens's class is swapped for this package's: the table of getting-started.

Each test is a line of the table, or the settings below it.
"""

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from sae_lens import TrainingSAE
from sae_lens.registry import get_sae_training_class

from tests.helpers import STOCK, TOPK_ARCHITECTURES, build_config, build_trainer, forward

N_DEAD = 20
D_IN = 16
SAELENS_LOSS: dict[str, Any] = {
    "aux_loss_coefficient": 1.0,
    "k_aux": D_IN // 2,
    "aux_bias": "none",
    "dead_criterion": "steps",
}
"""The settings that give SAELens's own loss back."""


def config(architecture: str, **fields: Any) -> Any:
    return build_config(architecture, d_in=D_IN, d_sae=64, dtype="float64", **fields)


def trained(cfg: Any, n_dead: int = N_DEAD, n_steps: int = 200, **of_run: Any) -> Any:
    """An SAE after a short run in which ``n_dead`` latents never fire."""
    torch.manual_seed(0)
    sae = TrainingSAE.from_dict(cfg.to_dict())
    with torch.no_grad():
        if "abstopk" in cfg.architecture():  # whose latents fire negatively, too
            sae.W_enc[:, n_dead:] *= 100
        else:
            sae.b_enc[:n_dead] = -1e4
    of_run = {"dead_feature_window": 5, **of_run}
    trainer = build_trainer(sae, total_training_samples=n_steps * 16, lr=1e-3, **of_run)
    generator = torch.Generator().manual_seed(1)
    directions = torch.randn(48, D_IN, generator=generator, dtype=torch.float64)
    for _ in range(n_steps):
        acts = torch.rand(16, 48, generator=generator, dtype=torch.float64)
        acts = acts * (torch.rand(16, 48, generator=generator) < 0.1)
        trainer.step(acts @ directions)
        trainer.n_training_steps += 1
    return sae


@pytest.mark.parametrize("level_losses", [False, True])
@pytest.mark.parametrize("architecture", TOPK_ARCHITECTURES)
def test_the_settings_give_the_weights_of_saelens_after_200_steps(
    architecture: str, level_losses: bool
) -> None:
    """While at least d_in // 2 latents are dead, of each level where each has its own loss."""
    fields: dict[str, Any] = {"k": 12}  # with fewer, some latents would be dead now and then
    if level_losses:
        if "matryoshka" not in architecture:
            return
        # The first level holds the dead latents; SAELens leaves out a level without one.
        fields |= {"use_matryoshka_aux_loss": True, "matryoshka_widths": [32, 64]}
    # A window that only these latents are silent for.
    of_run = {"n_dead": 24, "dead_feature_window": 100}
    ours = trained(config(architecture, **SAELENS_LOSS, **fields), **of_run)
    theirs = trained(config(STOCK[architecture], **fields), **of_run)
    for name, value in theirs.named_parameters():
        found = dict(ours.named_parameters())[name]
        torch.testing.assert_close(found, value, rtol=0, atol=1e-6, msg=name)
    fields["use_matryoshka_aux_loss"] = False
    if "matryoshka" not in architecture:
        del fields["use_matryoshka_aux_loss"]
    without = trained(config(architecture, aux_variant="none", **fields), **of_run)
    assert (without.W_dec - theirs.W_dec).abs().max() > 1e-3, "the loss would not be seen"


@pytest.mark.parametrize("architecture", ["auxk-topk", "auxk-batchtopk", "auxk-abstopk"])
def test_saelens_makes_its_loss_smaller_while_few_are_dead(architecture: str) -> None:
    """The one difference that stays: a factor of ``n_dead / k_aux``, at most 1."""
    x = torch.randn(16, D_IN, dtype=torch.float64)
    for n_dead, factor in ((2, 2 / 8), (6, 6 / 8), (8, 1.0), (30, 1.0)):
        losses = []
        for name, fields in ((architecture, SAELENS_LOSS), (STOCK[architecture], {})):
            torch.manual_seed(0)
            sae = TrainingSAE.from_dict(config(name, **fields).to_dict())
            output = forward(sae, x, torch.arange(64) < n_dead)
            losses.append(output.losses["auxiliary_reconstruction_loss"])
        torch.testing.assert_close(losses[1], factor * losses[0])


@pytest.mark.parametrize("architecture", TOPK_ARCHITECTURES)
def test_the_loss_and_its_coefficient(architecture: str) -> None:
    assert config(STOCK[architecture]).aux_loss_coefficient == 1
    cfg = config(architecture)
    assert (cfg.aux_variant, cfg.resolved_aux_coefficient) == ("auxk", 1 / 32)
    assert cfg.aux_bias == "decoder"


@pytest.mark.parametrize(
    ("d_in", "d_sae", "k_aux"),
    [(768, 24576, 512), (128, 4096, 64), (576, 9216, 256), (640, 10240, 256), (2304, 4096, 1024),
     (768, 100, 100), (2, 8, 1), (1, 8, 1)],
)  # fmt: skip
def test_k_aux_is_a_power_of_two_near_half_of_d_in(d_in: int, d_sae: int, k_aux: int) -> None:
    cfg = build_config("auxk-topk", d_in=d_in, d_sae=d_sae, k=1)
    assert cfg.k_aux is None
    assert cfg.resolved_k_aux == k_aux


def test_dead_is_silent_for_the_runs_own_window() -> None:
    """SAELens's mask has the latents silent for more steps than the window, before the step."""
    ours, theirs = config("auxk-topk"), config("topk")
    sae = trained(ours, n_steps=20)
    assert sae.cfg.resolved_dead_criterion == "tokens"
    assert sae.cfg.resolved_dead_threshold_tokens == 5 * 16
    assert sae.cfg.metadata.fitted == {"dead_threshold_tokens": 80}
    first: list[int] = []
    for cfg in (ours, theirs):
        torch.manual_seed(0)
        sae = TrainingSAE.from_dict(cfg.to_dict())
        sae.b_enc.data[:N_DEAD] = -1e4
        trainer = build_trainer(sae, total_training_samples=3200, dead_feature_window=5)
        for step in range(10):
            output = trainer.step(torch.randn(16, D_IN, dtype=torch.float64))
            trainer.n_training_steps += 1
            if output.losses["auxiliary_reconstruction_loss"] > 0:
                first.append(step + 1)
                break
    assert first == [5, 7]


def test_a_window_longer_than_half_of_the_run_is_a_twentieth_with_a_warning() -> None:
    sae = TrainingSAE.from_dict(config("auxk-topk").to_dict())
    with pytest.warns(UserWarning, match=r"dead_feature_window=101 is 1616 .* of 3200: .* 160 "):
        build_trainer(sae, total_training_samples=3200, dead_feature_window=101)
    assert sae.cfg.resolved_dead_threshold_tokens == 160
    assert sae.cfg.dead_threshold_tokens is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        build_trainer(sae, total_training_samples=3200, dead_feature_window=100)
    assert sae.cfg.resolved_dead_threshold_tokens == 1600, "fitted anew by each trainer"


def test_without_a_trainer_ten_million_and_one_warning() -> None:
    sae = TrainingSAE.from_dict(config("auxk-topk").to_dict())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for step in range(3):
            forward(sae, torch.randn(4, D_IN, dtype=torch.float64), step=step)
        assert sae.cfg.resolved_dead_threshold_tokens == 10_000_000
    assert len(caught) == 1
    assert "dead_threshold_tokens=None without SAELens's SAETrainer" in str(caught[0].message)


def test_a_config_saved_with_a_number_keeps_it() -> None:
    saved = config("auxk-topk", dead_threshold_tokens=123).to_dict()
    sae = TrainingSAE.from_dict(saved)
    build_trainer(sae, total_training_samples=3200, dead_feature_window=5)
    assert sae.cfg.resolved_dead_threshold_tokens == 123


@pytest.mark.parametrize("architecture", ["auxk-standard", "auxk-jumprelu", "auxk-gated"])
def test_architectures_without_a_loss_for_dead_latents_get_one(architecture: str) -> None:
    """``aux_variant="none"`` gives SAELens's weights back, bit for bit."""
    states = []
    for name, fields in ((architecture, {"aux_variant": "none"}), (STOCK[architecture], {})):
        torch.manual_seed(0)
        sae = get_sae_training_class(name)[0](config(name, **fields))
        trainer = build_trainer(sae, total_training_samples=3200, dead_feature_window=5)
        for x in torch.randn(20, 16, D_IN, generator=torch.Generator().manual_seed(1)).double():
            trainer.step(x)
            trainer.n_training_steps += 1
        states.append(dict(sae.named_parameters()))
    for name, value in states[1].items():
        assert torch.equal(value, states[0][name]), name
    sae = trained_with_dead(architecture)
    assert sae.losses["aux_loss"] > 0


def trained_with_dead(architecture: str) -> Any:
    sae = TrainingSAE.from_dict(config(architecture, dead_criterion="steps").to_dict())
    return forward(sae, torch.randn(16, D_IN, dtype=torch.float64), torch.arange(64) < 9)


def test_rows_that_saelens_would_train_on_are_replaced() -> None:
    """A NaN in one row: SAELens's weights are NaN after it."""
    x = torch.randn(16, D_IN, dtype=torch.float64)
    x[3, 2] = torch.nan
    finite = []
    for name in ("auxk-topk", "topk"):
        sae = TrainingSAE.from_dict(config(name).to_dict())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            build_trainer(sae, total_training_samples=3200, dead_feature_window=5).step(x)
        finite.append(bool(sae.W_enc.isfinite().all()))
    assert finite == [True, False]


def test_what_was_fitted_stays_with_the_config() -> None:
    """Also where a field is replaced in mid-run, or a loop of one's own goes on from the config."""
    sae = trained(config("auxk-topk"), n_steps=20)
    assert replace(sae.cfg, k_aux=3).resolved_dead_threshold_tokens == 80
    again = TrainingSAE.from_dict(sae.cfg.to_dict())
    assert again.cfg.resolved_dead_threshold_tokens == 80
    build_trainer(again, total_training_samples=3200, dead_feature_window=7)
    assert again.cfg.resolved_dead_threshold_tokens == 7 * 16


def test_a_number_that_was_given_is_not_called_fitted() -> None:
    sae = trained(config("auxk-topk", dead_threshold_tokens=123), n_steps=2)
    assert sae.cfg.metadata.fitted == {}
