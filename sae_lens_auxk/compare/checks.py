"""Fill in a comparison's defaults and refuse values that are not allowed."""

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from sae_lens import MultiSAETrainingRunnerConfig

from sae_lens_auxk.architectures import ARCHITECTURES
from sae_lens_auxk.checks import (
    python_value,
    reject,
    require_bool,
    require_choice,
    require_choices,
    require_device,
    require_int,
    require_known,
    require_list,
    require_number,
    require_text,
    require_writable,
)
from sae_lens_auxk.compare.cases import PRESETS, cases_of
from sae_lens_auxk.compare.config import Comparison, Resolved
from sae_lens_auxk.config import DEFAULT_THRESHOLD
from sae_lens_auxk.losses.registry import find_aux_loss
from sae_lens_auxk.saelens.names import SyntheticModelConfig

SYNTHETIC_DEFAULTS: dict[str, Any] = {
    "k": [8],
    "d_sae": 256,
    "training_samples": 200_000,
    "batch_size": 256,
    "lr": 2e-3,
    "eval_samples": 10_000,
    "n_features": 256,
    "d_in": 64,
}
LANGUAGE_MODEL_DEFAULTS: dict[str, Any] = {
    "k": [32],
    "d_sae": 12_288,
    "training_samples": 20_000_000,
    "batch_size": 4096,
    "lr": 3e-4,
    "eval_samples": 65_536,
}

# Fields of SAELens's run config that a comparison sets itself; the others are free.
_OWN_RUN_FIELDS = {
    "saes": "cases",
    "hook_names": "hook_name",
    "hook_head_indices": "cases",
    "model_name": "model_name",
    "model_class_name": "model_class_name",
    "dataset_path": "dataset_path",
    "training_tokens": "training_samples",
    "train_batch_size_tokens": "batch_size",
    "lr": "lr",
    "device": "device",
    "autocast": "autocast",
    "dead_feature_window": "dead_after",
    "seed": "seeds",
    "output_path": "--output",
    "checkpoint_path": "--output",
    "n_checkpoints": "--output",
    "save_final_checkpoint": "--output",
    "resume_from_checkpoint": "--output",
    "logger": "--output",
    "evaluator": "eval_samples",
    "prefetch_llm_batches": "nobody: a comparison reads its text batch by batch",
}


def resolve(comparison: Comparison) -> Resolved:
    """The comparison with every default filled in, checked.

    Raises:
        ValueError: a field has a value that is not allowed; the message names the field, the
            value and what is allowed.
    """
    given = {
        name: python_value(value) for name, value in vars(comparison).items() if value is not None
    }
    _require_types(given)
    defaults = LANGUAGE_MODEL_DEFAULTS if comparison.model_name else SYNTHETIC_DEFAULTS
    if isinstance(comparison.synthetic_model, str):  # which knows its sizes
        defaults = {k: v for k, v in defaults.items() if k not in ("n_features", "d_in")}
    values: dict[str, Any] = vars(comparison) | defaults | given
    if comparison.preset is None:
        values["preset"] = [] if comparison.cases or comparison.aux_variant else ["main"]
    if not comparison.model_name and isinstance(comparison.synthetic_model, dict | None):
        # One model for all seeds, so that they can find each other's latents.
        values["synthetic_model"] = {"seed": 0, **(comparison.synthetic_model or {})}
    n_samples = values["training_samples"]
    if comparison.dead_after is None and isinstance(n_samples, int):
        values["dead_after"] = max(1, min(DEFAULT_THRESHOLD, n_samples // 20))
    resolved = Resolved(**values)
    _validate(resolved)
    return resolved


def _require_types(given: Mapping[str, Any]) -> None:
    """Refuse values that have no truth value or cannot be saved, before they are used."""
    for name in ("model_name", "dataset_path", "hook_name", "model_class_name"):
        require_text(name, given.get(name), optional=True)
    for name in ("preset", "aux_variant", "aux_loss_coefficient", "cases"):
        if name in given and not isinstance(given[name], list):
            raise reject(name, given[name], "a list of one or more values")
    for name, value in given.items():
        require_writable(name, value)


def _validate(comparison: Resolved) -> None:
    for name in ("d_sae", "training_samples", "batch_size", "dead_after", "eval_samples"):
        require_int(name, getattr(comparison, name), minimum=1)
    require_int("context_size", comparison.context_size, minimum=2)
    if comparison.batch_size > comparison.training_samples:
        allowed = f"at most training_samples ({comparison.training_samples})"
        raise reject("batch_size", comparison.batch_size, allowed)
    if comparison.dead_after >= comparison.training_samples:
        allowed = (
            f"less than training_samples ({comparison.training_samples}): in a shorter run no "
            "latent is ever dead, and nothing is compared"
        )
        raise reject("dead_after", comparison.dead_after, allowed)
    require_number("lr", comparison.lr, "a finite number > 0", lambda lr: lr > 0)
    if comparison.max_norm_multiple is not None:
        allowed = "None or a finite number > 1"
        multiple = comparison.max_norm_multiple
        require_number("max_norm_multiple", multiple, allowed, lambda multiple: multiple > 1)
    require_bool("autocast", comparison.autocast)
    require_bool("effect", comparison.effect)
    for name, minimum in (("seeds", 0), ("k", 1)):
        require_list(name, getattr(comparison, name))
        for value in getattr(comparison, name):
            require_int(name, value, minimum=minimum)
    for k in comparison.k:
        if k > comparison.d_sae:
            raise reject("k", k, f"at most d_sae ({comparison.d_sae})")
    for name in ("sae", "language_model"):
        if not isinstance(getattr(comparison, name), dict):
            raise reject(name, getattr(comparison, name), "a mapping of fields")
    cases = comparison.cases
    if not isinstance(cases, list) or not all(isinstance(case, dict) for case in cases):
        raise reject("cases", cases, "a list of mappings of fields")
    require_choices("architecture", comparison.architecture, ARCHITECTURES)
    if comparison.preset:
        require_choices("preset", comparison.preset, PRESETS)
    if comparison.aux_variant:
        require_list("aux_variant", comparison.aux_variant)
        for variant in comparison.aux_variant:
            find_aux_loss(variant)
    if comparison.aux_loss_coefficient is not None:
        require_list("aux_loss_coefficient", comparison.aux_loss_coefficient)
        for alpha in comparison.aux_loss_coefficient:
            allowed = "a list of finite numbers >= 0"
            require_number("aux_loss_coefficient", alpha, allowed, lambda alpha: alpha >= 0)
        if not comparison.aux_variant:
            raise reject(
                "aux_loss_coefficient",
                comparison.aux_loss_coefficient,
                "left out unless aux_variant says whose coefficient it is",
            )
    require_device("device", comparison.device)
    if comparison.model_name:
        _validate_language_model(comparison)
    else:
        _validate_synthetic_model(comparison)

    cases = cases_of(comparison)
    if not cases:
        raise ValueError("nothing to compare: give preset, aux_variant or cases.")
    configs = [case.sae_config(comparison, comparison.d_in or 1) for case in cases]
    known = {f.name for config in configs for f in fields(config)}
    require_known(comparison.sae, known - {"d_in", "d_sae", "device", "k"}, "any case's SAE config")


def _validate_language_model(comparison: Resolved) -> None:
    if not comparison.dataset_path:
        raise reject("dataset_path", comparison.dataset_path, "a data set's name or folder")
    about = "left out with model_name: it is about synthetic models"
    _require_left_out(comparison, ("n_features", "d_in", "synthetic_model"), about)
    classes = ("HookedTransformer", "AutoModelForCausalLM")
    require_choice("model_class_name", comparison.model_class_name, classes)
    if comparison.hook_name is None and comparison.model_class_name != "HookedTransformer":
        allowed = "the name of a module of the model, such as model.layers.6"
        raise reject("hook_name", None, allowed)
    given, config_class = comparison.language_model, MultiSAETrainingRunnerConfig
    _require_free("language_model", given, config_class, _OWN_RUN_FIELDS)


def _validate_synthetic_model(comparison: Resolved) -> None:
    about = "left out unless model_name is given"
    _require_left_out(comparison, ("dataset_path", "hook_name"), about)
    if comparison.language_model:
        raise reject(
            "language_model", comparison.language_model, "empty unless model_name is given"
        )
    source = comparison.synthetic_model
    if isinstance(source, str):
        about = "left out with a saved synthetic_model, which has it"
        _require_left_out(comparison, ("n_features", "d_in"), about)
        return
    if not isinstance(source, dict | None):
        raise reject("synthetic_model", source, "a mapping of fields, a folder or a Hub name")
    for name in ("n_features", "d_in"):
        require_int(name, getattr(comparison, name), minimum=1)
    sizes = {"num_features": "n_features", "hidden_dim": "d_in"}
    _require_free("synthetic_model", source or {}, SyntheticModelConfig, sizes)
    try:
        comparison.synthetic_model_config(seed=0)
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"synthetic_model: {error}") from error


def _require_left_out(comparison: Resolved, names: Iterable[str], allowed: str) -> None:
    for name in names:
        if getattr(comparison, name) is not None:
            raise reject(name, getattr(comparison, name), allowed)


def _require_free(
    what: str, given: Iterable[str], config_class: type[Any], own: Mapping[str, str]
) -> None:
    """Raise a ValueError for a name that is not a config field or is set by the comparison."""
    for name in given:
        if name in own:
            raise ValueError(f"{what}: {name} is set by {own[name]}.")
    known = {f.name for f in fields(config_class) if not f.name.startswith("_")}
    require_known(given, known - set(own), what)
