"""Whole runs through SAELens's own runners and trainer."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, LanguageModelSAERunnerConfig
from sae_lens.config import LoggingConfig
from sae_lens.multi_sae_training_runner import (
    MultiSAETrainingRunner,
)
from sae_lens.synthetic import SyntheticModelConfig
from sae_lens.synthetic.synthetic_sae_runner import SyntheticSAERunner, SyntheticSAERunnerConfig

from sae_lens_auxk import runner_config
from tests import tiny_model
from tests.helpers import (
    ARCHITECTURES,
    PAIRS,
    TOPK_ARCHITECTURES,
    build_config,
    build_sae,
    build_trainer,
    forward,
    kill_latents,
)
from tests.tiny_model import run

# With every SAELens: each architecture once.
PAIRS_TO_TRAIN = [
    pytest.param(*pair, marks=[pytest.mark.oldest] if pair[1] == "auxk" else []) for pair in PAIRS
]


def architecture_fields(architecture: str) -> dict[str, Any]:
    fields: dict[str, Any] = {"dead_threshold_tokens": 200}
    if "topk" in architecture:
        fields["k"] = 4
    if "matryoshka" in architecture:
        fields.update(matryoshka_widths=[12, 24, 48], use_matryoshka_aux_loss=True)
    return fields


@pytest.mark.parametrize("dense", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_log_of_the_topk_family_has_saelens_key_too(architecture: str, dense: bool) -> None:
    """A panel of Weights & Biases shows runs that have its key."""
    sae = build_sae(architecture, dead_criterion="steps")
    sae.may_be_sparse = not dense
    output = forward(sae, torch.randn(16, 8), torch.arange(24) < 9)
    log = build_trainer(sae).build_train_step_log_dict(output, 16)
    assert log["losses/aux_loss"] > 0
    if architecture in TOPK_ARCHITECTURES:  # Gated has that key too, for a loss of its own
        assert log.pop("losses/auxiliary_reconstruction_loss") == log["losses/aux_loss"]
    total = sum(loss for key, loss in log.items() if key.startswith("losses/"))
    assert total - log["losses/overall_loss"] == pytest.approx(log["losses/overall_loss"])


@pytest.mark.parametrize(("architecture", "variant"), PAIRS_TO_TRAIN)
def test_a_resumed_run_is_bit_equal_to_one_never_interrupted(
    architecture: str, variant: str, tmp_path: Path
) -> None:
    fields = architecture_fields(architecture)
    if variant == "multi_topk":
        fields.pop("use_matryoshka_aux_loss", None)
    fields.update(
        aux_variant=variant,
        aux_warm_up_steps=4,
        aux_decay_start_step=8,
        aux_decay_steps=30,
        lr_warm_up_steps=3,
    )

    def config(**more: Any) -> Any:
        return runner_config(architecture, **tiny_model.run_fields(**fields, **more))

    output = tmp_path / "output"
    fields["output_path"] = str(output)
    whole, checkpoint, resume = tiny_model.run_to_resume(config, tmp_path / "checkpoints")
    assert 0 < int(checkpoint.name) < 20 * 64
    resumed = resume()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert int(resumed.training_steps) == 20
    assert all(p.isfinite().all() for p in resumed.parameters())
    loaded = SAE.load_from_disk(output)
    assert loaded.cfg.metadata.training_architecture_details["aux_variant"] == variant
    runner_dict = json.loads((output / "runner_cfg.json").read_text())
    again = LanguageModelSAERunnerConfig.from_dict(runner_dict)
    cfg = config(resume_from_checkpoint=str(checkpoint))
    assert json.loads(json.dumps(again.to_dict())) == json.loads(json.dumps(cfg.to_dict()))


def test_a_new_run_on_loaded_weights_starts_its_schedule_anew(tmp_path: Path) -> None:
    fields: dict[str, Any] = {"aux_decay_start_step": 2, "aux_decay_steps": 2}
    sae = build_sae("auxk-topk", **fields)
    for step in range(6):
        forward(sae, torch.randn(16, 8), step=step)
    sae.save_model(tmp_path)
    sae.load_weights_from_checkpoint(tmp_path)
    assert forward(sae, torch.randn(16, 8), step=0).metrics["aux_coefficient"] == 1 / 32


def test_batch_size_may_change_on_the_way(tmp_path: Path) -> None:
    sae = build_sae("auxk-topk", dead_threshold_tokens=40)
    forward(sae, torch.randn(16, 8))
    sae.save_model(tmp_path)
    resumed = build_sae("auxk-topk", dead_threshold_tokens=40)
    resumed.load_weights_from_checkpoint(tmp_path)
    kill_latents(resumed, 5)
    before = resumed.tokens_since_fired.clone()
    for batch_size in (8, 31):
        forward(resumed, torch.randn(batch_size, 8))
    assert torch.equal(resumed.tokens_since_fired[:5], before[:5] + 39)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("mode", ["expected_average_only_in", "covariance_whitening", "layer_norm"])
def test_normalisation_is_right_or_refused_at_once(
    architecture: str, mode: str, tmp_path: Path
) -> None:
    """The saved model, on raw activations, gives what the trained one gives."""
    fields = architecture_fields(architecture)
    try:
        cfg = runner_config(
            architecture,
            **tiny_model.run_fields(
                normalize_activations=mode,
                n_batches_for_norm_estimate=4,
                output_path=str(tmp_path),
                **fields,
            ),
        )
    except ValueError as error:
        assert "normalize_activations" in str(error)  # noqa: PT017
        assert mode == "layer_norm"
        return
    sae = run(cfg)
    loaded = SAE.load_from_disk(tmp_path)
    x = torch.randn(32, tiny_model.D_MODEL)
    if "batchtopk" not in architecture:
        torch.testing.assert_close(loaded(x), sae(x), rtol=1e-3, atol=1e-3)
    assert loaded(x).isfinite().all()


def test_hook_z_run(tmp_path: Path) -> None:
    cfg = runner_config(
        "auxk-topk",
        **tiny_model.run_fields(
            hook_name="blocks.1.attn.hook_z",
            reshape_activations="hook_z",
            output_path=str(tmp_path),
            k=4,
            dead_threshold_tokens=200,
        ),
    )
    run(cfg)
    loaded = SAE.load_from_disk(tmp_path)
    z = torch.randn(3, 5, 2, 8)
    assert loaded(z).shape == z.shape


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize(("architecture", "variant"), PAIRS)
def test_dtypes(architecture: str, variant: str, dtype: str) -> None:
    sae = build_sae(architecture, aux_variant=variant, dtype=dtype, dead_threshold_tokens=16)
    kill_latents(sae, 9)
    trainer = build_trainer(sae)
    for _ in range(3):
        output = trainer.step(torch.randn(16, 8, dtype=getattr(torch, dtype)))
    expected = torch.float64 if dtype == "float64" else torch.float32
    if variant != "none":
        assert output.losses["aux_loss"].dtype == expected
    assert all(p.isfinite().all() for p in sae.parameters())
    assert output.metrics["dead_latents"] >= 9


@pytest.mark.parametrize(("architecture", "variant"), PAIRS)
def test_autocast_computes_the_loss_in_float32(architecture: str, variant: str) -> None:
    fields: dict[str, Any] = {"aux_variant": variant, "dead_criterion": "steps"}
    sae = build_sae(architecture, d_in=32, d_sae=96, **fields)
    x, dead = torch.randn(64, 32), torch.arange(96) < 30
    full = copy.deepcopy(sae)
    expected = forward(full, x, dead).losses["aux_loss"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = forward(sae, x, dead)
    output.loss.backward()
    if variant != "none":
        assert output.losses["aux_loss"].dtype == torch.float32
    torch.testing.assert_close(output.losses["aux_loss"].float(), expected, rtol=3e-2, atol=1e-4)


def test_autocast_run() -> None:
    cfg = runner_config(
        "auxk-topk", **tiny_model.run_fields(autocast=True, k=4, dead_threshold_tokens=200)
    )
    assert all(p.isfinite().all() for p in run(cfg).parameters())


@pytest.mark.parametrize("architecture", TOPK_ARCHITECTURES)
def test_the_trainer_counts_sparse_activations_like_dense_ones(architecture: str) -> None:
    counts = []
    for sparse in (False, True):
        torch.manual_seed(0)
        sae = build_sae(architecture, use_sparse_activations=sparse, randomize=False)
        trainer = build_trainer(sae, lr=1e-3)
        for x in torch.randn(5, 16, 8):
            output = trainer.step(x)
        assert output.feature_acts.is_sparse == sparse
        assert trainer.dead_neurons.dtype == torch.bool
        counts.append((trainer.act_freq_scores, trainer.n_forward_passes_since_fired))
    assert counts[0][0].sum() > 0
    for dense, sparse in zip(*counts, strict=True):
        assert torch.equal(dense, sparse)


@pytest.mark.oldest
def test_multi_sae_run(tmp_path: Path) -> None:
    cfg = tiny_model.multi_sae_config(
        {
            name: build_config(name, d_in=tiny_model.D_MODEL, d_sae=48, dead_threshold_tokens=200)
            for name in ARCHITECTURES
        },
        n_checkpoints=1,
        checkpoint_path=str(tmp_path / "checkpoints"),
        output_path=str(tmp_path / "output"),
    )
    json.dumps(cfg.to_dict())
    overrides: dict[str, Any] = {
        "override_model": tiny_model.gpt2(),
        "override_dataset": tiny_model.tokens(),
    }
    saes = MultiSAETrainingRunner(cfg, **overrides).run()
    assert set(saes) == set(ARCHITECTURES)
    for name in ARCHITECTURES:
        SAE.load_from_disk(tmp_path / "output" / name)
    cfg.resume_from_checkpoint = str(next((tmp_path / "checkpoints").glob("*/*")))
    MultiSAETrainingRunner(cfg, **overrides).run()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_synthetic_run(architecture: str, tmp_path: Path) -> None:
    cfg = SyntheticSAERunnerConfig(
        synthetic_model=SyntheticModelConfig(num_features=32, hidden_dim=16, seed=0),
        sae=build_config(architecture, d_in=16, d_sae=24, dead_threshold_tokens=500),
        training_samples=3000,
        batch_size=100,
        eval_samples=500,
        output_path=str(tmp_path),
        checkpoint_path=None,
        logger=LoggingConfig(log_to_wandb=False),
    )
    again = SyntheticSAERunnerConfig.from_dict(cfg.to_dict())
    assert again.to_dict() == cfg.to_dict()
    result = SyntheticSAERunner(cfg).run()
    assert result.final_eval is not None
    assert SAE.load_from_disk(tmp_path).cfg.metadata.training_architecture == architecture


@pytest.mark.oldest
def test_metrics_go_through_saelens_logger(monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    logged: list[dict[str, Any]] = []
    monkeypatch.setattr(wandb, "init", lambda **_: None)
    monkeypatch.setattr(wandb, "finish", lambda: None)
    monkeypatch.setattr(wandb, "log", lambda d, **_: logged.append(d))
    cfg = runner_config(
        "auxk-topk",
        **tiny_model.run_fields(
            log_to_wandb=True, wandb_log_frequency=1, k=4, dead_threshold_tokens=200
        ),
    )
    run(cfg)
    steps = [entry for entry in logged if "losses/aux_loss" in entry]
    assert len(steps) == 20
    assert steps[-1]["metrics/dead_latents"] > 0
    for name in (
        "dead_latents",
        "dead_fraction",
        "aux_coefficient",
        "k_aux_used",
        "revived_latents",
        "nonfinite_rows",
    ):
        assert isinstance(steps[-1][f"metrics/{name}"], (int, float))
