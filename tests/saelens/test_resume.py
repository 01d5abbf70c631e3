"""``resume_from_checkpoint``: another SAE is refused before the model is loaded."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from sae_lens import LanguageModelSAERunnerConfig, LanguageModelSAETrainingRunner, TrainingSAE

from sae_lens_auxk import runner_config
from sae_lens_auxk.architectures import ARCHITECTURES
from sae_lens_auxk.config import AuxConfig
from sae_lens_auxk.saelens.resume import FILES, SAME_IN_RUN, SAME_IN_SAE, require_resumable
from tests import tiny_model
from tests.helpers import STOCK, build_trainer

Saved = Callable[[str], str]

MAY_CHANGE_IN_SAE = {
    *("device", "metadata", "use_sparse_activations"),
    # initial weights
    *("decoder_init_norm", "jumprelu_init_threshold"),
    # losses, and how they are scheduled
    *("topk_threshold_lr", "use_matryoshka_aux_loss", "l1_coefficient", "lp_norm"),
    *("l1_warm_up_steps", "l0_coefficient", "l0_warm_up_steps", "pre_act_loss_coefficient"),
    *("jumprelu_bandwidth", "jumprelu_sparsity_loss_mode", "jumprelu_tanh_scale"),
    *("jumprelu_ste_to_input", "target_l0"),
    *(field.name for field in dataclasses.fields(AuxConfig)),
}


def config(architecture: str, **fields: Any) -> Any:
    given: dict[str, Any] = {"dead_threshold_tokens": 200} if "auxk" in architecture else {}
    if "topk" in architecture:
        given["k"] = 4
    if "matryoshka" in architecture:
        given["matryoshka_widths"] = [12, 48]
    return runner_config(architecture, **tiny_model.run_fields(**given, **fields))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """The checkpoint of a run of an architecture."""

    @cache
    def saved(architecture: str) -> str:
        folder = tmp_path_factory.mktemp(architecture)
        tiny_model.run(config(architecture, n_checkpoints=1, checkpoint_path=str(folder)))
        return str(next(folder.glob("*/*")))

    return saved


def start(path: str, architecture: str, **fields: Any) -> LanguageModelSAETrainingRunner:
    """The runner, without a model: a refusal comes before one is loaded."""
    cfg = config(architecture, resume_from_checkpoint=path, **fields)
    return LanguageModelSAETrainingRunner(cfg, override_dataset=tiny_model.tokens())


@pytest.mark.parametrize(
    ("field", "here", "there"),
    [
        ("k", 2, 4),
        ("d_sae", 24, 48),
        ("d_in", 8, 16),
        ("dtype", "float64", "float32"),
        ("rescale_acts_by_decoder_norm", False, True),
        ("apply_b_dec_to_input", False, True),
        ("normalize_activations", "layer_norm", "none"),
        ("normalize_activations", "expected_average_only_in", "none"),
        ("hook_name", "blocks.0.hook_resid_pre", "blocks.1.hook_resid_pre"),
        ("hook_head_index", 1, None),
    ],
)
@pytest.mark.parametrize("source", ["auxk-topk", "topk"])
def test_another_value_is_refused(
    source: str, field: str, here: Any, there: Any, checkpoint: Saved
) -> None:
    path = checkpoint(source)
    fields = {"k": 4, "dead_threshold_tokens": 200, field: here}
    cfg = runner_config("auxk-topk", **tiny_model.run_fields(**fields, resume_from_checkpoint=path))
    with pytest.raises(ValueError, match="is of another SAE") as refused:
        LanguageModelSAETrainingRunner(cfg, override_dataset=tiny_model.tokens())
    message = str(refused.value)
    assert message.startswith(f"resume_from_checkpoint={path!r} is of another SAE: ")
    assert f": {field}={here!r} must be {there!r}. Give it" in message
    assert "from_pretrained_path" in message


@pytest.mark.parametrize(
    "widths",
    [[12], [12, 48], (12, 48)],
)
def test_the_same_config_resumes_its_own_run(widths: Any, checkpoint: Saved) -> None:
    """SAELens appends d_sae to the widths when it builds the SAE, which comes later."""
    path = checkpoint("auxk-matryoshka-batchtopk")
    cfg = config("auxk-matryoshka-batchtopk", resume_from_checkpoint=path)
    cfg.sae = dataclasses.replace(cfg.sae, matryoshka_widths=widths, k=4.0)
    require_resumable(cfg, cfg.sae)


def test_a_renamed_model_is_warned_about(checkpoint: Saved) -> None:
    cfg = config("auxk-topk", resume_from_checkpoint=checkpoint("topk"), model_name="x/renamed")
    with pytest.warns(UserWarning, match="model_name='x/renamed', but .* is of 'tiny'"):
        require_resumable(cfg, cfg.sae)


@pytest.mark.parametrize("architecture", ["auxk-abstopk", "auxk-batchtopk", "auxk-standard"])
@pytest.mark.parametrize("source", ["auxk-topk", "topk", "gated", "auxk-jumprelu"])
def test_another_architecture_is_refused(source: str, architecture: str, checkpoint: Saved) -> None:
    path = checkpoint(source)
    with pytest.raises(ValueError, match=f"architecture='{architecture}' must be '{source}'"):
        start(path, architecture)


def test_other_widths_and_all_that_differs_are_named(checkpoint: Saved) -> None:
    path = checkpoint("auxk-matryoshka-batchtopk")
    cfg = config("auxk-matryoshka-batchtopk", resume_from_checkpoint=path)
    cfg.sae = dataclasses.replace(cfg.sae, matryoshka_widths=[24, 48], k=3)
    message = r"k=3 must be 4.*matryoshka_widths=\[24, 48\] must be \[12, 48\]"
    with pytest.raises(ValueError, match=message):
        LanguageModelSAETrainingRunner(cfg, override_dataset=tiny_model.tokens())


def test_the_sae_that_a_runner_is_given_counts(checkpoint: Saved) -> None:
    path = checkpoint("auxk-topk")
    cfg = config("auxk-topk", resume_from_checkpoint=path)
    sae = TrainingSAE.from_dict({**cfg.sae.to_dict(), "k": 2})
    with pytest.raises(ValueError, match="k=2 must be 4"):
        LanguageModelSAETrainingRunner(cfg, tiny_model.tokens(), tiny_model.gpt2(), sae)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_what_is_about_training_may_change(architecture: str, checkpoint: Saved) -> None:
    path = checkpoint(STOCK[architecture])
    fields = {
        "training_tokens": 30 * 64,
        "lr": 1e-3,
        "seed": 3,
        "aux_variant": "pursuit",
        "aux_loss_coefficient": 0.5,
        "train_batch_size_tokens": 32,
        "model_name": "elsewhere/tiny",
        "decoder_init_norm": 0.3,
        "dead_feature_window": 3,
    }
    cfg = config(architecture, resume_from_checkpoint=path, **fields)
    assert tiny_model.run(cfg).cfg.aux_variant == "pursuit"


def test_a_folded_checkpoint_is_not_one_of_scaled_activations(tmp_path: Path) -> None:
    """SAELens folds the scaling into the weights before it saves the final checkpoint."""
    scaled = {"normalize_activations": "expected_average_only_in", "n_batches_for_norm_estimate": 2}
    cfg = config("auxk-topk", checkpoint_path=str(tmp_path), save_final_checkpoint=True, **scaled)
    tiny_model.run(cfg)
    path = str(next(tmp_path.glob("*/final_*")))
    message = "normalize_activations='expected_average_only_in' must be 'none'"
    with pytest.raises(ValueError, match=message):
        start(path, "auxk-topk", **scaled)


@pytest.mark.parametrize("name", FILES)
def test_what_is_missing_is_named(name: str, checkpoint: Saved, tmp_path: Path) -> None:
    path = str(shutil.copytree(checkpoint("auxk-topk"), tmp_path / "copy"))
    Path(path, name).unlink()
    with pytest.raises(ValueError, match=f"is no complete checkpoint: there is no {name}"):
        start(path, "auxk-topk")


@pytest.fixture
def copied(checkpoint: Saved, tmp_path: Path) -> Path:
    return shutil.copytree(checkpoint("auxk-topk"), tmp_path / "copy")


@pytest.mark.parametrize("part", [0, 0.2, 0.5])
@pytest.mark.parametrize("name", FILES)
def test_what_is_damaged_is_named(name: str, part: float, copied: Path) -> None:
    whole = (copied / name).read_bytes()
    (copied / name).write_bytes(whole[: int(part * len(whole))])
    with pytest.raises(ValueError, match=f"{name} cannot be read: "):
        start(str(copied), "auxk-topk")


def test_a_missing_whitening_is_named(tmp_path: Path) -> None:
    fields = {"normalize_activations": "covariance_whitening", "n_batches_for_norm_estimate": 2}
    cfg = config("auxk-topk", checkpoint_path=str(tmp_path), n_checkpoints=1, **fields)
    tiny_model.run(cfg)
    path = next(tmp_path.glob("*/*"))
    cfg = config("auxk-topk", resume_from_checkpoint=str(path), **fields)
    require_resumable(cfg, cfg.sae)
    (path / "activation_whitening.safetensors").unlink()
    with pytest.raises(ValueError, match=r"there must be .*activation_whitening\.safetensors"):
        require_resumable(cfg, cfg.sae)


@pytest.mark.parametrize("name", ["architecture", "k", "d_in", "d_sae"])
def test_a_field_that_the_checkpoint_lacks_is_named(name: str, copied: Path) -> None:
    change(copied / "cfg.json", name)
    with pytest.raises(ValueError, match=rf"cfg\.json has no {name}\."):
        start(str(copied), "auxk-topk")


@pytest.mark.parametrize(
    ("name", "ours", "default"),
    [
        ("apply_b_dec_to_input", False, True),
        ("normalize_activations", "layer_norm", "none"),
        ("rescale_acts_by_decoder_norm", True, False),
        ("dtype", "float64", "float32"),
    ],
)
def test_another_field_that_it_lacks_is_the_default(
    name: str, ours: Any, default: Any, copied: Path
) -> None:
    change(copied / "cfg.json", name)
    cfg = config("auxk-topk", resume_from_checkpoint=str(copied), **{name: ours})
    with pytest.raises(ValueError, match=f"{name}={ours!r} must be {default!r}"):
        require_resumable(cfg, cfg.sae)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("cfg.json", "[]", "of type dict"),
        ("runner_cfg.json", "[]", "of type dict"),
        ("runner_cfg.json", '{"model_name": null}', "of type str"),
        ("activation_scaler.json", "[]", "cannot be read"),
    ],
)
def test_json_of_something_else_is_named(name: str, text: str, message: str, copied: Path) -> None:
    (copied / name).write_text(text)
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        start(str(copied), "auxk-topk")


def change(path: Path, without: str) -> None:
    content = json.loads(path.read_text())
    del content[without]
    path.write_text(json.dumps(content))


def test_without_a_runner_too(checkpoint: Saved) -> None:
    """As SAELens's MultiSAETrainer and a loop of one's own load a checkpoint."""
    path = checkpoint("auxk-topk")
    cfg = config("auxk-topk").sae
    sae = TrainingSAE.from_dict({**cfg.to_dict(), "rescale_acts_by_decoder_norm": False})
    build_trainer(sae).load_trainer_state(path)
    with pytest.raises(ValueError, match="rescale_acts_by_decoder_norm=False must be True"):
        sae.load_weights_from_checkpoint(path)


def test_every_field_is_one_that_may_change_or_not() -> None:
    """A new field of SAELens's needs a decision."""
    for _, config_class in ARCHITECTURES.values():
        names = {field.name for field in dataclasses.fields(config_class)}
        assert names <= {*SAME_IN_SAE} | MAY_CHANGE_IN_SAE, names
    assert not {*SAME_IN_SAE} & MAY_CHANGE_IN_SAE
    run = {field.name for field in dataclasses.fields(LanguageModelSAERunnerConfig)}
    assert {*SAME_IN_RUN} <= run


def test_a_damaged_config_is_named(checkpoint: Saved, tmp_path: Path) -> None:
    path = str(shutil.copytree(checkpoint("auxk-topk"), tmp_path / "copy"))
    Path(path, "cfg.json").write_text(json.dumps({"k": 4})[:-2])
    with pytest.raises(ValueError, match=r"cfg\.json cannot be read"):
        start(path, "auxk-topk")


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ({"aux_warm_up_steps": 20}, [step / 20 for step in range(11, 20)]),
        (
            {"aux_decay_start_step": 5, "aux_decay_steps": 10},
            [max(0, 1 - (step - 5) / 10) for step in range(11, 20)],
        ),
    ],
)
@pytest.mark.parametrize("source", ["topk", "auxk-topk"])
def test_the_schedules_go_on_where_the_run_is(
    source: str, schedule: dict[str, Any], expected: list[float], checkpoint: Saved
) -> None:
    """Also those that a checkpoint of SAELens's own architecture, of 11 of 20 steps, lacks."""
    cfg = config(
        "auxk-topk",
        resume_from_checkpoint=checkpoint(source),
        aux_loss_coefficient=1.0,
        **schedule,
    )
    runner = LanguageModelSAETrainingRunner(cfg, tiny_model.tokens(), tiny_model.gpt2())
    coefficients: list[float] = []
    own = runner.sae.training_forward_pass

    def noting(step_input: Any) -> Any:
        output = own(step_input=step_input)
        coefficients.append(float(output.metrics["aux_coefficient"]))
        return output

    runner.sae.training_forward_pass = noting  # type: ignore[method-assign]
    runner.run()
    assert coefficients == pytest.approx(expected)
