"""``from_pretrained_path``: what is taken over, by value, and what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from sae_lens import SAE, LanguageModelSAETrainingRunner
from sae_lens.llm_sae_training_runner import _parse_cfg_args
from sae_lens.registry import get_sae_training_class
from sae_lens.training.activation_scaler import ActivationScaler

from sae_lens_auxk import runner_config
from tests import tiny_model
from tests.helpers import (
    ARCHITECTURES,
    STOCK,
    TOPK_ARCHITECTURES,
    forward,
    randomize_parameters,
)
from tests.tiny_model import D_MODEL

D_SAE = 48


def fields_of(architecture: str) -> dict[str, Any]:
    fields: dict[str, Any] = {"d_in": D_MODEL, "d_sae": D_SAE}
    if "topk" in architecture:
        fields["k"] = 4
    if "matryoshka" in architecture:
        fields["matryoshka_widths"] = [12, 24, 48]
    return fields


def trained(architecture: str, **fields: Any) -> Any:
    """A training SAE with weights, and decoder norms, of its own."""
    sae_class, cfg_class = get_sae_training_class(architecture)
    sae = sae_class(cfg_class(**{**fields_of(architecture), **fields}))
    randomize_parameters(sae)
    return sae


def made_by_the_runner(architecture: str, path: Path, **fields: Any) -> Any:
    keywords = tiny_model.run_fields(
        **{**fields_of(architecture), "from_pretrained_path": str(path), **fields}
    )
    return LanguageModelSAETrainingRunner(
        runner_config(architecture, **keywords),
        override_model=tiny_model.gpt2(),
        override_dataset=tiny_model.tokens(),
    ).sae


def released(sae: Any, folder: Path) -> Any:
    sae.save_inference_model(folder)
    return SAE.load_from_disk(folder)


def assert_same_function(sae: Any, expected: Any, folder: Path) -> None:
    """As it trains, and as it is released; BatchTopK's threshold is for the latter only."""
    x = torch.randn(32, D_MODEL)
    torch.testing.assert_close(released(sae, folder)(x), expected(x), rtol=1e-4, atol=1e-4)
    if "batchtopk" not in sae.cfg.architecture():
        torch.testing.assert_close(sae(x), expected(x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(forward(sae, x).sae_out, expected(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("source", ["stock checkpoint", "own checkpoint", "stock release", "own"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_goes_on_from(architecture: str, source: str, tmp_path: Path) -> None:
    theirs = trained(STOCK[architecture] if "stock" in source else architecture)
    expected = released(theirs, tmp_path / "source")
    if "checkpoint" in source:
        theirs.save_model(tmp_path / "checkpoint")
    path = tmp_path / ("checkpoint" if "checkpoint" in source else "source")
    sae = made_by_the_runner(architecture, path, aux_variant="pursuit")
    assert type(sae) is get_sae_training_class(architecture)[0]
    assert sae.cfg.aux_variant == "pursuit"
    assert_same_function(sae, expected, tmp_path / "taken")


@pytest.mark.parametrize("apply_b_dec_to_input", [True, False])
@pytest.mark.parametrize("mode", ["expected_average_only_in", "covariance_whitening"])
@pytest.mark.parametrize("rescaled", [True, False])
@pytest.mark.parametrize("architecture", ["auxk-topk", "auxk-batchtopk", "auxk-jumprelu"])
def test_the_scale_of_a_checkpoints_data_is_folded(
    architecture: str, rescaled: bool, mode: str, apply_b_dec_to_input: bool, tmp_path: Path
) -> None:
    fields: dict[str, Any] = {"apply_b_dec_to_input": apply_b_dec_to_input}
    if "topk" in architecture:
        fields["rescale_acts_by_decoder_norm"] = rescaled
    theirs = trained(STOCK[architecture], normalize_activations=mode, **fields)
    scaler = ActivationScaler()
    data = iter(lambda: 3 * torch.randn(64, D_MODEL) + 1, None)
    if mode == "covariance_whitening":
        scaler.estimate_whitening(D_MODEL, data, 20)
    else:
        scaler.estimate_scaling_factor(D_MODEL, data, 20)
    theirs.save_model(tmp_path / "checkpoint")
    scaler.save(str(tmp_path / "checkpoint" / "activation_scaler.json"))
    inference = released(theirs, tmp_path / "release")

    def expected(x: torch.Tensor) -> torch.Tensor:
        return scaler.unscale(inference(scaler.scale(x)))

    if rescaled and mode == "covariance_whitening" and "topk" in architecture:
        # whitening changes the decoder rows' lengths, so SAELens folds them for good
        with pytest.raises(ValueError, match="rescale_acts_by_decoder_norm=True is not allowed"):
            made_by_the_runner(architecture, tmp_path / "checkpoint", **fields)
        fields["rescale_acts_by_decoder_norm"] = False
    sae = made_by_the_runner(architecture, tmp_path / "checkpoint", **fields)
    assert sae.cfg.normalize_activations == "none"
    assert_same_function(sae, expected, tmp_path / "taken")

    (tmp_path / "checkpoint" / "activation_scaler.json").unlink()
    with pytest.raises(ValueError, match=r"its scaling is missing.* activation_scaler\.json"):
        made_by_the_runner(architecture, tmp_path / "checkpoint", **fields)


@pytest.mark.parametrize("mode", ["layer_norm", "constant_norm_rescale"])
def test_a_run_time_normalisation_stays(mode: str, tmp_path: Path) -> None:
    theirs = trained("topk", normalize_activations=mode)
    expected = released(theirs, tmp_path / "release")
    sae = made_by_the_runner("auxk-topk", tmp_path / "release", normalize_activations=mode)
    assert_same_function(sae, expected, tmp_path / "taken")
    with pytest.raises(ValueError, match=f"normalize_activations='none' must be '{mode}'"):
        made_by_the_runner("auxk-topk", tmp_path / "release")


@pytest.mark.parametrize("architecture", TOPK_ARCHITECTURES)
def test_rescaling_can_be_left_off_but_not_put_on(architecture: str, tmp_path: Path) -> None:
    rescaled = trained(STOCK[architecture], rescale_acts_by_decoder_norm=True)
    rescaled.save_model(tmp_path / "rescaled")
    expected = released(rescaled, tmp_path / "release")
    without = {"rescale_acts_by_decoder_norm": False}
    sae = made_by_the_runner(architecture, tmp_path / "rescaled", **without)
    assert not sae.cfg.rescale_acts_by_decoder_norm
    assert_same_function(sae, expected, tmp_path / "folded")
    # rows of length 1 allow both
    for name, fields in (("on", {}), ("off", without)):
        sae = made_by_the_runner(architecture, tmp_path / "release", **fields)
        assert_same_function(sae, expected, tmp_path / name)

    plain = trained(STOCK[architecture], **without)
    plain.save_model(tmp_path / "plain")
    sae = made_by_the_runner(architecture, tmp_path / "plain", **without)
    assert_same_function(sae, released(plain, tmp_path / "plain release"), tmp_path / "again")
    for path in ("plain", "plain release"):
        with pytest.raises(ValueError, match="rescale_acts_by_decoder_norm=True is not allowed"):
            made_by_the_runner(architecture, tmp_path / path)


@pytest.mark.parametrize(
    ("source", "architecture", "allowed"),
    [
        ("standard", "auxk-gated", "auxk-gated, gated"),
        ("gated", "auxk-standard", "auxk-standard, standard"),
        ("topk", "auxk-jumprelu", "auxk-jumprelu, jumprelu"),
        ("topk", "auxk-batchtopk", "auxk-batchtopk, batchtopk, jumprelu"),
        ("auxk-jumprelu", "auxk-topk", "auxk-topk, topk"),
    ],
)
def test_weights_that_do_not_fit_are_refused(
    source: str, architecture: str, allowed: str, tmp_path: Path
) -> None:
    trained(source).save_model(tmp_path)
    with pytest.raises(ValueError, match=f"architecture {source},.*one of {allowed}"):
        made_by_the_runner(architecture, tmp_path)


def test_another_shape_or_function_is_refused_with_all_that_differs(tmp_path: Path) -> None:
    trained("topk", d_sae=24, apply_b_dec_to_input=False).save_model(tmp_path)
    with pytest.raises(ValueError, match="apply_b_dec_to_input=True must be False, d_sae=48 must"):
        made_by_the_runner("auxk-topk", tmp_path)


def test_learnt_thresholds_are_no_batchtopk(tmp_path: Path) -> None:
    released(trained("jumprelu"), tmp_path)
    with pytest.raises(ValueError, match="a threshold for each latent"):
        made_by_the_runner("auxk-batchtopk", tmp_path)


def test_a_config_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    trained("topk").save_model(tmp_path)
    (tmp_path / "cfg.json").write_text("{")
    with pytest.raises(ValueError, match=f"{tmp_path}/cfg.json cannot be read"):
        made_by_the_runner("auxk-topk", tmp_path)


def test_another_k_is_a_warning(tmp_path: Path) -> None:
    trained("topk").save_model(tmp_path)
    with pytest.warns(UserWarning, match=r"k=7, but the SAE in .* was trained with k=4"):
        assert made_by_the_runner("auxk-topk", tmp_path, k=7).cfg.k == 7


def test_counts_of_dead_latents_are_taken_over(tmp_path: Path) -> None:
    theirs = trained("auxk-topk")
    theirs.tokens_since_fired.copy_(torch.arange(D_SAE) * 1000)
    theirs.save_model(tmp_path)
    sae = made_by_the_runner("auxk-topk", tmp_path)
    assert torch.equal(sae.tokens_since_fired, theirs.tokens_since_fired)


def test_a_run_from_a_release_saves_what_its_config_says(tmp_path: Path) -> None:
    """By the command line's parser; runner_cfg.json and cfg.json agree."""
    released(trained("topk"), tmp_path / "release")
    cfg = _parse_cfg_args(
        f"--architecture auxk-topk --d_in {D_MODEL} --d_sae {D_SAE} --k 4 --model_name tiny "
        "--aux_variant pursuit --hook_name blocks.1.hook_resid_pre --context_size 16 "
        "--streaming false --prepend_bos false --training_tokens 512 --log_to_wandb false "
        "--train_batch_size_tokens 64 --store_batch_size_prompts 4 --n_batches_in_buffer 4 "
        f"--n_eval_batches 1 --lr 1e-3 --from_pretrained_path {tmp_path / 'release'} "
        f"--output_path {tmp_path / 'output'} --device cpu".split()
    )
    runner = LanguageModelSAETrainingRunner(
        cfg, override_model=tiny_model.gpt2(), override_dataset=tiny_model.tokens()
    )
    before = runner.sae.W_enc.detach().clone()
    runner.run()
    details = SAE.load_from_disk(tmp_path / "output").cfg.metadata
    assert details.training_architecture == "auxk-topk"
    assert details.training_architecture_details["aux_variant"] == "pursuit"
    assert not torch.equal(runner.sae.W_enc, before)


def test_a_config_of_saelens_is_left_alone(tmp_path: Path) -> None:
    theirs = trained("topk")
    theirs.save_model(tmp_path)
    assert type(made_by_the_runner("topk", tmp_path)) is type(theirs)
    given = trained("auxk-topk")
    cfg = runner_config("auxk-topk", **tiny_model.run_fields(k=4, from_pretrained_path="nowhere"))
    runner = LanguageModelSAETrainingRunner(
        cfg,
        override_model=tiny_model.gpt2(),
        override_dataset=tiny_model.tokens(),
        override_sae=given,
    )
    assert runner.sae is given
