"""What of SAELens the package uses: names that are exported, those of ``names.py``, and members."""

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import sae_lens

import sae_lens_auxk

PACKAGE = Path(sae_lens_auxk.__file__).parent
NAMES = PACKAGE / "saelens" / "names.py"
OTHERS = sorted(path for path in PACKAGE.rglob("*.py") if path != NAMES)
pytestmark = pytest.mark.oldest
WITH_SHARDED = pytest.mark.skipif(
    not (PACKAGE / "sharded").is_dir(), reason="the layer is not here, which uses some of them"
)

MEMBERS: dict[str, tuple[str, ...]] = {
    "saes.sae.TrainStepInput": (
        *("sae_in", "coefficients", "dead_neuron_mask", "n_training_steps"),
    ),
    "saes.sae.TrainStepOutput": (
        *("sae_in", "sae_out", "feature_acts", "hidden_pre", "loss", "losses", "metrics"),
    ),
    "saes.sae.SAE": (
        *("activation_fn", "d_head", "dtype", "device", "initialize_weights"),
        *("fold_W_dec_norm", "fold_activation_norm_scaling_factor", "fold_activation_whitening"),
        *("hook_sae_recons", "hook_z_reshaping_mode", "process_sae_in"),
        *("process_state_dict_for_loading", "process_state_dict_for_saving"),
        *("reshape_fn_in", "reshape_fn_out"),
        *("run_time_activation_norm_fn_in", "run_time_activation_norm_fn_out"),
    ),
    "saes.sae.TrainingSAE": (
        *("calculate_aux_loss", "encode_with_hidden_pre", "get_coefficients", "mse_loss_fn"),
        *("load_weights_from_checkpoint", "process_state_dict_for_saving_inference"),
        "training_forward_pass",
    ),
    "saes.sae.TrainingSAEConfig": (
        *("decoder_init_norm", "get_inference_config_class", "get_inference_sae_cfg_dict"),
    ),
    "saes.sae.SAEMetadata": ("to_dict",),
    "saes.topk_sae.TopK": ("k",),
    "saes.abstopk_sae.AbsTopK": ("k",),
    "saes.batchtopk_sae.BatchTopK": ("k",),
    "saes.batchtopk_sae.BatchTopKTrainingSAE": ("topk_threshold", "update_topk_threshold"),
    "saes.batchtopk_sae.BatchTopKTrainingSAEConfig": ("topk_threshold_lr",),
    "saes.jumprelu_sae.JumpReLUTrainingSAE": ("threshold",),
    "saes.jumprelu_sae.JumpReLUTrainingSAEConfig": ("jumprelu_init_threshold",),
    "saes.matryoshka_batchtopk_sae.MatryoshkaBatchTopKTrainingSAE": ("_iterable_decode",),
    "saes.matryoshka_batchtopk_sae.MatryoshkaBatchTopKTrainingSAEConfig": (
        *("matryoshka_widths", "use_matryoshka_aux_loss"),
    ),
    "config.SAETrainerConfig": (
        *("checkpoint_path", "dead_feature_window", "device"),
        *("total_training_samples", "train_batch_size_samples"),
    ),
    "config.LanguageModelSAERunnerConfig": (
        *("from_pretrained_path", "get_training_sae_cfg_dict", "resume_from_checkpoint"),
    ),
    "llm_sae_training_runner.LanguageModelSAETrainingRunner": (
        *("__init__", "activations_store", "run_trainer_with_interruption_handling"),
        "save_checkpoint",
    ),
    "multi_sae_training_runner.MultiSAETrainingRunner": (
        *("_set_sae_metadata", "activations_store"),
    ),
    "multi_sae_training_runner.MultiSAETrainingRunnerConfig": (
        *("hook_names_per_sae", "to_sae_trainer_config"),
    ),
    "training.activation_scaler.ActivationScaler": ("load", "scaling_factor", "whitening"),
    "training.activation_scaler.ActivationWhitening": ("inverse_matrix", "matrix", "mean"),
    "training.activations_store.ActivationsStore": (
        *("_get_filtered_multi_hook_llm_batch", "_iterate_tokenized_sequences"),
        *("cached_activation_dataset", "dataset", "exclude_special_tokens", "get_batch_tokens"),
        *("get_multi_hook_data_loader", "iterable_sequences", "load", "n_dataset_processed"),
        *("reset_input_dataset", "shuffle_input_dataset", "train_batch_size_tokens"),
    ),
    "training.optim.CoefficientScheduler": ("load_state_dict",),
    "training.sae_trainer.SAETrainer": (
        *("__init__", "_train_step", "act_freq_scores", "activation_scaler"),
        *("coefficient_schedulers", "data_provider", "evaluator", "fit", "load_trainer_state"),
        *("log_feature_sparsity", "n_forward_passes_since_fired", "n_training_steps", "optimizer"),
        *("set_final_sae_metadata", "step"),
    ),
    "training.multi_sae_trainer.MultiSAETrainer": (
        *("_estimate_scaling_factors", "_maybe_log_sparsity", "n_training_samples", "trainers"),
    ),
    "synthetic.SyntheticModel": ("activation_generator", "feature_dict", "load_from_source"),
    "synthetic.SyntheticSAERunnerConfig": ("to_sae_trainer_config",),
}
"""Members that the package uses of SAELens's classes and that are private or not guaranteed."""

ALL_MEMBERS = [f"sae_lens.{owner}.{name}" for owner, names in MEMBERS.items() for name in names]


def look_up(name: str) -> None:
    """An AssertionError with the name unless the installed SAELens has it."""
    parts = name.split(".")
    n = next(n for n in range(len(parts), 0, -1) if is_module(".".join(parts[:n])))
    found: Any = importlib.import_module(".".join(parts[:n]))
    for part in parts[n:]:
        in_instances = inspect.isclass(found) and sets_on_itself(found, part)
        assert in_instances or hasattr(found, part), f"SAELens {sae_lens.__version__} has no {name}"
        found = getattr(found, part, None)


def is_module(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        return False
    return True


def sets_on_itself(cls: type, attribute: str) -> bool:
    """Whether a class of SAELens or one of its bases annotates or assigns an attribute."""
    pattern = re.compile(rf"^\s+(self\.)?{attribute}\b(: .*| = .*)$", re.M)
    bases = [base for base in cls.__mro__ if base.__module__.startswith("sae_lens.")]
    return any(pattern.search(inspect.getsource(base)) for base in bases)


@pytest.mark.parametrize("name", ALL_MEMBERS)
def test_saelens_has_the_member(name: str) -> None:
    look_up(name)


@cache
def used_in_code() -> set[str]:
    """Attributes, arguments, fields and methods by name, and names in strings."""
    found: set[str] = set()
    for path in OTHERS:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            match node:
                case ast.Attribute(attr=name) | ast.FunctionDef(name=name):
                    found.add(name)
                case ast.keyword(arg=str(name)) | ast.Constant(value=str(name)):
                    found.add(name)
                case _:
                    pass
    return found


@WITH_SHARDED
@pytest.mark.parametrize("name", ALL_MEMBERS)
def test_the_member_is_used(name: str) -> None:
    assert name.rpartition(".")[2] in used_in_code()


@pytest.mark.parametrize("name", ["sae_lens.gone", "sae_lens.gone.Gone", "sae_lens.SAE.gone"])
def test_what_is_gone_is_named(name: str) -> None:
    with pytest.raises(AssertionError, match="has no sae_lens"):
        look_up(name)


# --- imports ---------------------------------------------------------------------------------


def imports(path: Path) -> Iterator[tuple[str, str]]:
    """Module and name of each ``from module import name``; of ``import module``, name ``""``."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from ((node.module or "", alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)


def of_saelens(path: Path) -> set[tuple[str, str]]:
    return {found for found in imports(path) if found[0].partition(".")[0] == "sae_lens"}


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_imports_from_saelens_what_saelens_exports(path: Path) -> None:
    exported = {("sae_lens", name) for name in sae_lens.__all__}
    assert of_saelens(path) <= exported, "import it through sae_lens_auxk.saelens.names"


def test_names_has_nothing_that_saelens_exports() -> None:
    names = of_saelens(NAMES)
    assert len(names) > 20
    assert not {name for _, name in names} & {"", *sae_lens.__all__}


@WITH_SHARDED
def test_every_one_of_the_names_is_used() -> None:
    here = {name for _, name in of_saelens(NAMES)}
    used = {
        name
        for path in OTHERS
        for module, name in imports(path)
        if module == "sae_lens_auxk.saelens.names"
    }
    assert used == here


def test_nothing_is_imported_by_a_string() -> None:
    for path in OTHERS:
        strings = re.findall(r"[\"']sae_lens\.[\w.]+[\"']", path.read_text(encoding="utf-8"))
        assert not set(strings) - {'"sae_lens."'}, path


def test_every_private_method_of_saelens_that_is_called_is_listed() -> None:
    ours = "".join(path.read_text(encoding="utf-8") for path in OTHERS)
    theirs = "".join(
        path.read_text(encoding="utf-8") for path in Path(sae_lens.__file__).parent.rglob("*.py")
    )
    called = set(re.findall(r"\.(_[a-z]\w+)\b", ours)) | set(re.findall(r'"(_[a-z]\w+)"', ours))
    listed = {name.rpartition(".")[2] for name in ALL_MEMBERS}
    private = called & set(re.findall(r"def (_[a-z]\w+)", theirs))
    assert "_iterable_decode" in private
    assert private <= listed
