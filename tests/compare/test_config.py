"""The fields of a comparison, its presets, and what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sae_lens.synthetic import SyntheticModelConfig

from sae_lens_auxk.compare.cases import cases_of, folders_of
from sae_lens_auxk.compare.checks import resolve
from sae_lens_auxk.compare.config import Comparison
from tests.compare.conftest import tiny
from tests.helpers import ARCHITECTURES, STOCK, VARIANTS

ROOT = Path(__file__).parent.parent.parent


def names(comparison: Any) -> list[str]:
    return [case.name for case in cases_of(comparison)]


def test_the_default_is_the_six_that_the_readme_is_about() -> None:
    comparison = resolve(Comparison())
    assert (comparison.preset, comparison.seeds) == (["main"], [0, 1, 2])
    assert [(case.name, case.architecture, case.fields) for case in cases_of(comparison)] == [
        ("SAELens topk", "topk", {"k": 8}),
        (
            "SAELens topk, unit rows, no loss",
            "topk",
            {"decoder_init_norm": 1.0, "aux_loss_coefficient": 0.0, "k": 8},
        ),
        (
            "unit rows, mean, no loss",
            "auxk-topk",
            {"aux_variant": "none", "decoder_init_norm": 1.0, "b_dec_init": "mean", "k": 8},
        ),
        ("auxk", "auxk-topk", {"aux_variant": "auxk", "k": 8}),
        ("pursuit", "auxk-topk", {"aux_variant": "pursuit", "k": 8}),
        ("pursuit, mean", "auxk-topk", {"aux_variant": "pursuit", "b_dec_init": "mean", "k": 8}),
    ]


def test_the_default_on_a_language_model_is_the_same_six() -> None:
    comparison = resolve(Comparison(model_name="gpt2", dataset_path="text"))
    assert names(comparison) == names(resolve(Comparison()))


def test_presets_beside_each_other_have_each_case_once() -> None:
    comparison = resolve(Comparison(preset=["main", "saelens", "variants", "biases"]))
    others = [name for name in VARIANTS if name not in ("auxk", "pursuit")]
    biases = ["auxk, bias matched", "auxk, bias none"]
    assert names(comparison) == [*names(resolve(Comparison())), *others, *biases]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_default_of_every_architecture(architecture: str) -> None:
    comparison = tiny(aux_variant=None, architecture=[architecture])
    configs: list[Any] = [case.sae_config(comparison, 12) for case in cases_of(comparison)]
    assert len(configs) == 6
    assert [c.architecture() for c in configs] == [STOCK[architecture]] * 2 + [architecture] * 4
    assert [c.decoder_init_norm for c in configs[:2]] == [configs[3].decoder_init_norm, 1.0]
    assert not getattr(configs[1], "aux_loss_coefficient", 0)


def test_saelens_comes_as_it_comes() -> None:
    stock: Any = cases_of(tiny(aux_variant=None, preset=["saelens"]))[0].sae_config(tiny(), 12)
    assert stock.architecture() == "topk"
    assert stock.aux_loss_coefficient == 1.0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_and_its_counterpart(architecture: str) -> None:
    comparison = tiny(
        aux_variant=None, preset=["saelens", "variants"], architecture=[architecture], k=[2, 3]
    )
    cases = cases_of(comparison)
    has_k = "topk" in architecture
    assert [case.k for case in cases[:2]] == ([2, 3] if has_k else [None, None])
    assert cases[0].architecture == STOCK[architecture]
    assert ("multi_topk" in names(comparison)) == has_k
    for case in cases:
        config: Any = case.sae_config(comparison, d_in=12)
        assert (config.architecture(), config.d_in, config.d_sae) == (case.architecture, 12, 24)
    assert list(folders_of(cases)) == [case.slug for case in cases]


def test_every_case_has_a_folder_of_its_own() -> None:
    given = [{"name": name} for name in ("A+", "a-", "学习", "率", "b", "B, c")]
    given += [{"name": "large", "k": k} for k in (1_000_000, 1_000_001)]
    cases = cases_of(
        tiny(cases=[{**case, "aux_variant": "auxk"} for case in given], d_sae=1_000_001)
    )
    folders = folders_of(cases)
    assert list(folders.values()) == cases
    by_name = {case.name: folder for folder, case in folders.items()}
    # Those that share no folder keep the name that they always had.
    assert (by_name["b"], by_name["B, c"]) == ("b-auxk-topk-k-2", "b-c-auxk-topk-k-2")
    # The name is that of every process: a folder must be found again.
    assert by_name["A+"] == "a-auxk-topk-k-2--acabf59f"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x" * 300, "name='x{300}' is not allowed: it must be shorter"),
        ("\x1b[2J", r"name='\\x1b\[2J' is not allowed: it must be a string without control"),
    ],
)
def test_names_that_no_folder_or_terminal_takes(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(cases=[{"name": name, "aux_variant": "auxk"}])


def test_dead_after_is_one_span_for_all() -> None:
    """SAELens's mask and this package's begin with the same batch."""
    comparison = tiny(dead_after=100, batch_size=32)
    config: Any = cases_of(comparison)[1].sae_config(comparison, 12)
    assert config.dead_threshold_tokens == 100
    n_steps_silent = next(n for n in range(100) if n * 32 >= 100)
    first_dead_step = next(n for n in range(100) if n > comparison.dead_feature_window)
    assert first_dead_step == n_steps_silent == 4


def test_the_default_run_is_long_enough_for_latents_to_die() -> None:
    comparison = resolve(Comparison())
    assert comparison.dead_after * 5 < comparison.training_samples
    assert comparison.dead_feature_window * 5 < (
        comparison.training_samples / comparison.batch_size
    )


def test_coefficients_are_swept() -> None:
    comparison = tiny(aux_variant=["auxk", "none"], aux_loss_coefficient=[0.01, 1.0])
    assert names(comparison) == [
        "auxk, alpha 0.01",
        "auxk, alpha 1",
        "none, alpha 0.01",
        "none, alpha 1",
    ]


def test_explicit_cases_and_shared_fields() -> None:
    comparison = tiny(
        aux_variant=None,
        cases=[
            {"name": "mine", "aux_variant": "auxk", "k_aux": 3},
            {"architecture": "jumprelu", "l0_coefficient": 0.5},
            {"aux_variant": "auxk", "k": 5, "aux_bias": "none", "lr": 0.004},
            {"aux_variant": "none", "resample_every_steps": 100, "resample_stop_step": 400},
        ],
        sae={"apply_b_dec_to_input": False, "k_aux": 7},
    )
    mine, jumprelu, last, resampled = cases_of(comparison)
    assert resampled.name == "none, resample every 100, resample until 400"
    assert (mine.name, jumprelu.name) == ("mine", "SAELens jumprelu, l0_coefficient 0.5")
    assert (last.name, last.k, last.lr) == ("auxk, bias none, lr 0.004", 5, 0.004)
    configs: list[Any] = [case.sae_config(comparison, 12) for case in (mine, jumprelu, last)]
    assert [config.apply_b_dec_to_input for config in configs] == [False] * 3
    assert (configs[0].k_aux, configs[2].k_aux) == (3, 7)


@pytest.mark.parametrize("suffix", [".yaml", ".yml"])
def test_a_file_says_the_same_as_the_fields(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"comparison{suffix}"
    path.write_text(
        "seeds: [3]\nlr: 1.0e-2\ncases:\n  - aux_variant: none\nsynthetic_model:\n  bias: false\n"
    )
    assert Comparison.from_file(path) == Comparison(
        seeds=[3], lr=1e-2, cases=[{"aux_variant": "none"}], synthetic_model={"bias": False}
    )


def test_numpy_numbers_of_a_sweep() -> None:
    comparison = tiny(lr=np.float32(0.5), seeds=list(np.arange(2)))
    assert json.loads(json.dumps(comparison.to_dict()))["seeds"] == [0, 1]


def test_a_field_without_a_value_has_its_default(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("".join(f"{name}:\n" for name in vars(Comparison())))
    assert Comparison.from_file(path) == Comparison()


def test_numpy_numbers_of_a_case() -> None:
    comparison = tiny(cases=[{"k_aux": np.int64(8)}], sae={"aux_batch_fraction": np.float32(0.5)})
    assert json.loads(json.dumps(comparison.to_dict())) == comparison.to_dict()


def test_the_published_benchmark() -> None:
    """Every value of SynthSAEBench-16k's published table."""
    comparison = resolve(Comparison.from_file(ROOT / "studies" / "rivals" / "synthsaebench.yaml"))
    model: Any = comparison.synthetic_model_config(seed=7)
    assert isinstance(model, SyntheticModelConfig)
    assert (model.num_features, model.hidden_dim, model.seed) == (16384, 768, 42)
    zipf: Any = model.firing_probability
    assert (zipf.exponent, zipf.max_prob, zipf.min_prob) == (0.5, 0.4, 5e-4)
    hierarchy: Any = model.hierarchy
    assert (hierarchy.total_root_nodes, hierarchy.branching_factor) == (128, 4)
    assert (hierarchy.max_depth, hierarchy.mutually_exclusive_portion) == (3, 1.0)
    correlation: Any = model.correlation
    assert (correlation.rank, correlation.correlation_scale) == (25, 0.1)
    orthogonalization: Any = model.orthogonalization
    assert (orthogonalization.num_steps, orthogonalization.lr) == (100, 3e-4)
    means: Any = model.mean_firing_magnitudes
    spread: Any = model.std_firing_magnitudes
    assert (means.start, means.end, spread.mean, spread.std) == (5.0, 4.0, 0.5, 0.5)
    assert (comparison.d_sae, comparison.batch_size, comparison.lr) == (4096, 1024, 3e-4)
    assert comparison.training_samples == 200_000_000


@pytest.mark.parametrize("given", [None, {}, {"bias": False}])
def test_all_seeds_share_one_model(given: Any) -> None:
    comparison = tiny(synthetic_model=given)
    models: list[Any] = [comparison.synthetic_model_config(seed) for seed in (0, 7)]
    assert [model.seed for model in models] == [0, 0]
    assert comparison.synthetic_model == {"seed": 0} | (given or {})


def test_seeds_with_a_model_each() -> None:
    comparison = tiny(synthetic_model={"seed": None})
    model: Any = comparison.synthetic_model_config(seed=7)
    assert model.seed == 7
    assert not comparison.has_one_model


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"preset": ["variant"]}, "preset='variant' is not allowed.*Did you mean variants"),
        ({"architecture": ["auxk-topkk"]}, "architecture='auxk-topkk'.*Did you mean auxk-topk"),
        ({"aux_variant": ["aukx"]}, "aux_variant='aukx'.*Did you mean auxk"),
        ({"aux_loss_coefficient": 0.1}, "aux_loss_coefficient=0.1 .*a list of one or more"),
        ({"seeds": [[1]]}, r"seeds=\[1\] .*an integer >= 0"),
        ({"k": "abc"}, "k='abc' .*a list of one or more"),
        ({"cases": [{"name": 5}]}, "name=5 .*a string"),
        ({"cases": [{"k": "abc"}]}, "k='abc' .*a finite number > 0"),
        ({"cases": [{"lr": 0}]}, "lr=0 .*a finite number > 0"),
        ({"aux_variant": None, "aux_loss_coefficient": [0.1]}, "aux_loss_coefficient.*aux_variant"),
        ({"aux_loss_coefficient": [-1.0]}, "aux_loss_coefficient=-1.0 .*finite numbers >= 0"),
        ({"k": [0]}, "k=0 is not allowed: it must be an integer >= 1"),
        ({"k": [25]}, r"k=25 is not allowed: it must be at most d_sae \(24\)"),
        ({"k": []}, "k=.*one or more"),
        ({"seeds": [1, 1]}, "seeds=.*each once"),
        ({"d_sae": 0}, "d_sae=0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"batch_size": 5000}, r"batch_size=5000.*training_samples \(1600\)"),
        ({"dead_after": 1600}, "dead_after=1600.*no latent is ever dead"),
        ({"device": "cudda"}, "device='cudda'"),
        ({"device": None}, "device=None is not allowed"),
        ({"device": 10**30}, "device=10+ is not allowed"),
        ({"model_name": "gpt2"}, "dataset_path=None"),
        ({"hook_name": "x"}, "hook_name='x'.*model_name"),
        ({"model_name": "gpt2", "dataset_path": "x"}, "n_features=32.*synthetic"),
        ({"synthetic_model": {"hierachy": {}}}, "hierachy.*Did you mean hierarchy"),
        ({"synthetic_model": {"hidden_dim": 3}}, "hidden_dim is set by d_in"),
        ({"synthetic_model": {"firing_probability": {"x": 1}}}, "synthetic_model: .*'x'"),
        ({"synthetic_model": "somewhere/model"}, "n_features=32.*saved synthetic_model"),
        ({"sae": True}, "sae=True is not allowed: it must be a mapping of fields"),
        ({"cases": ["auxk"]}, "cases=.*a list of mappings"),
        ({"sae": {"k_auxx": 3}}, "k_auxx is not a field.*Did you mean k_aux"),
        (
            {"cases": [{"aux_varient": "none"}]},
            "aux_varient is not a field.*Did you mean aux_variant",
        ),
        ({"cases": [{"architecture": "topkk"}]}, "architecture='topkk'.*Did you mean"),
        (
            {"cases": [{"name": "a"}, {"name": "a", "k_aux": 2}]},
            "two different cases are both 'a",
        ),
        ({"aux_variant": None, "preset": []}, "nothing to compare"),
        ({"model_name": 0.5}, "model_name=0.5 is not allowed: it must be None or a string"),
        ({"model_name": np.array([1, 2])}, "model_name=array.*None or a string"),
        ({"model_class_name": float("nan")}, "model_class_name=nan.*a string"),
        ({"hook_name": print}, "hook_name=<built-in.*None or a string"),
        ({"aux_variant": np.array([1, 2])}, "aux_variant=array.*a list of one or more"),
        ({"preset": np.array([1, 2]), "aux_variant": None}, "preset=array.*a list of one or more"),
        ({"aux_loss_coefficient": [10**400]}, "aux_loss_coefficient=10+ .*finite numbers >= 0"),
        ({"sae": {"l1_coefficient": float("nan")}}, "sae=.*nan.*made of JSON types"),
        ({"cases": [{"dtype": {1}}]}, "cases=.*made of JSON types"),
    ],
)
def test_what_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**fields)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "seedz: [1]", "seedz is not a field of a comparison. Did you mean seeds"),
        ("a.yaml", "- 1", "must hold fields"),
        ("a.yaml", "a: [", "cannot be read"),
        ("a.toml", "seeds = [1]", "must end in .yaml or .yml"),
        ("a.json", "{}", "must end in .yaml"),
        (None, "", "there is no such file"),
    ],
)
def test_files_that_are_refused(name: str | None, text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / (name or "missing.yaml")
    if name:
        path.write_text(text)
    with pytest.raises(ValueError, match=message):
        Comparison.from_file(path)


@pytest.mark.parametrize("name", ["docs/compare.md", "examples/compare_smollm2.yaml"])
def test_what_is_shown_is_allowed(name: str, tmp_path: Path) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    path = tmp_path / "comparison.yaml"
    path.write_text(text.split("```yaml\n")[-1].split("```")[0], encoding="utf-8")
    assert len(cases_of(resolve(Comparison.from_file(path)))) >= 3
