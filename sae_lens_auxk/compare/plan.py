"""What is compared: the fields of a comparison, and the cases that they stand for."""

import itertools
import re
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from math import ceil, isfinite
from pathlib import Path
from typing import Any

import torch
import yaml
from sae_lens.multi_sae_training_runner import MultiSAETrainingRunnerConfig
from sae_lens.registry import get_sae_training_class
from sae_lens.saes.sae import TrainingSAEConfig
from sae_lens.synthetic import SyntheticModelConfig, ZipfianFiringProbabilityConfig
from simple_parsing import field

from sae_lens_auxk.architectures import ARCHITECTURES
from sae_lens_auxk.aux_config import AuxConfig
from sae_lens_auxk.aux_losses import AUX_LOSSES
from sae_lens_auxk.validation import (
    reject,
    require_choice,
    require_choices,
    require_int,
    require_known,
    require_list,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

STOCK = {name: name.removeprefix("auxk-").replace("-", "_") for name in ARCHITECTURES}
"""SAELens's own architecture that each of this package's extends."""

PRESETS: dict[str, tuple[dict[str, Any], ...]] = {
    "saelens": ({},),
    "variants": tuple(
        {"aux_variant": variant}
        for variant in (
            "none",
            "auxk",
            "straight_through",
            "reanimation",
            "pre_activation",
            "ghost_gradients",
            "multi_topk",
        )
    ),
    "biases": (
        {"aux_variant": "auxk"},  # whose bias is "decoder"
        {"aux_variant": "auxk", "aux_bias": "matched"},
        {"aux_variant": "auxk", "aux_bias": "none"},
    ),
}
"""The fields of each preset's cases; those of "saelens" are SAELens's own architecture."""

SYNTHETIC_DEFAULTS: dict[str, Any] = {
    "k": [8],
    "d_sae": 256,
    "training_samples": 80_000,
    "batch_size": 256,
    "lr": 2e-3,
    "eval_samples": 10_000,
    "n_features": 512,
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

# What a comparison sets itself in SAELens's config of a run; the rest of its fields are free.
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


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """
    What is compared, on what, and for how long. None means a default that depends on the rest.

    Args:
        preset (list[str] | None): Sets of cases, one or more: "saelens" (SAELens's own
            architecture as it comes), "variants" (the seven aux variants at their published
            coefficients), "biases" (auxk with each aux_bias). None: all three, unless cases or
            aux_variant say what to compare.
        aux_variant (list[str] | None): Further cases: these variants, each with each value of
            aux_loss_coefficient.
        aux_loss_coefficient (list[float] | None): Coefficients for the variants in aux_variant.
            None: the published ones.
        architecture (list[str]): Architectures of this package, one or more. The preset
            "saelens" takes the one of SAELens that each extends.
        k (list[int] | None): Active latents per sample, one or more, for the TopK family.
            None: 8, for a language model 32.
        cases (list[dict]): In a configuration file only. Further cases, each a mapping of
            fields of the SAE's config, with "architecture" (this package's or SAELens's) and
            "name", both optional.
        sae (dict): In a configuration file only. Fields of the SAE's config that all cases
            have, where their architecture has them, and do not set themselves.
        seeds (list[int]): One pass over the data for each: it seeds the initial weights, the
            samples, and a synthetic model that has no seed of its own.
        d_sae (int | None): Latents. None: 256, for a language model 12288.
        training_samples (int | None): Activations (tokens) that each SAE is trained on. None:
            80000, for a language model 20 million.
        batch_size (int | None): Activations in a training step. None: 256, for a language
            model 4096.
        lr (float | None): Learning rate. None: 2e-3, for a language model 3e-4.
        dead_after (int | None): A latent that is silent for so many activations is dead, in
            the measurements of every case and, unless a case says otherwise, for its auxiliary
            loss. None: 10 million, or a twentieth of training_samples where that is less.
        eval_samples (int | None): Held-out activations that are measured on. None: 10000, for
            a language model 65536.
        device (str): Where to train: "cpu", "cuda", "cuda:1".
        autocast (bool): Train in bfloat16 where autocast allows it.
        n_features (int | None): True features of the synthetic model. None: 512.
        d_in (int | None): Width of the synthetic model's activations. None: 64. (That of a
            language model is read off it.)
        synthetic_model (dict | str | None): In a configuration file, the other fields of
            SAELens's SyntheticModelConfig; or the folder or Hub name of a saved model. On the
            command line a folder or name only.
        model_name (str | None): A language model to take activations from, by name or folder.
            None: a synthetic model.
        model_class_name (str): How to load it: "HookedTransformer" or "AutoModelForCausalLM".
        dataset_path (str | None): Text for the language model, by name or folder.
        hook_name (str | None): Where in the language model. None: the residual stream before
            the middle block of a HookedTransformer.
        context_size (int): Tokens in a prompt of the language model.
        language_model (dict): In a configuration file only. Further fields of SAELens's
            MultiSAETrainingRunnerConfig.
    """

    preset: list[str] | None = None
    aux_variant: list[str] | None = None
    aux_loss_coefficient: list[float] | None = None
    architecture: list[str] = field(default_factory=lambda: ["auxk-topk"])
    k: list[int] | None = None
    cases: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]], cmd=False)
    sae: dict[str, Any] = field(default_factory=dict[str, Any], cmd=False)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    d_sae: int | None = None
    training_samples: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    dead_after: int | None = None
    eval_samples: int | None = None
    device: str = "cpu"
    autocast: bool = False
    n_features: int | None = None
    d_in: int | None = None
    synthetic_model: Any = field(default=None, type=str)
    model_name: str | None = None
    model_class_name: str = "HookedTransformer"
    dataset_path: str | None = None
    hook_name: str | None = None
    context_size: int = 128
    language_model: dict[str, Any] = field(default_factory=dict[str, Any], cmd=False)

    def resolved(self) -> "Resolved":
        """The comparison with every default filled in, checked.

        Raises:
            ValueError: a field has a value that is not allowed; the message names the field,
                the value and what is allowed.
        """
        defaults = LANGUAGE_MODEL_DEFAULTS if self.model_name else SYNTHETIC_DEFAULTS
        if isinstance(self.synthetic_model, str):  # which knows its sizes
            defaults = {k: v for k, v in defaults.items() if k not in ("n_features", "d_in")}
        given = {name: value for name, value in vars(self).items() if value is not None}
        values: dict[str, Any] = vars(self) | defaults | given
        if self.preset is None:
            values["preset"] = [] if self.cases or self.aux_variant else list(PRESETS)
        n_samples = values["training_samples"]
        if self.dead_after is None and isinstance(n_samples, int):
            values["dead_after"] = max(1, min(10_000_000, n_samples // 20))
        resolved = Resolved(**values)
        _validate(resolved)
        return resolved

    def to_dict(self) -> dict[str, Any]:
        """All fields, plain enough for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Comparison":
        """Inverse of :meth:`to_dict`; an unknown field is a ValueError with the nearest name."""
        require_known(values, (f.name for f in fields(cls)), "a comparison")
        return cls(**values)

    @classmethod
    def from_file(cls, path: Path) -> "Comparison":
        """Read a YAML (.yaml, .yml) or TOML (.toml) file of the fields.

        Raises:
            ValueError: no such file, no such format, or an unknown field.
        """
        if not path.is_file():
            raise ValueError(f"config={str(path)!r} is not allowed: there is no such file.")
        try:
            match path.suffix:
                case ".yaml" | ".yml":
                    values = yaml.safe_load(path.read_text(encoding="utf-8"))
                case ".toml":
                    values = tomllib.loads(path.read_text(encoding="utf-8"))
                case suffix:
                    raise ValueError(
                        f"config={str(path)!r} is not allowed: it must end in .yaml, .yml or "
                        f".toml, not {suffix!r}."
                    )
        except (yaml.YAMLError, tomllib.TOMLDecodeError) as error:
            raise ValueError(f"config={str(path)!r} cannot be read: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"config={str(path)!r} is not allowed: it must hold fields and values")
        return cls.from_dict(values)


# Fields here have no default, unlike in the base; pyright would rather have one.
# pyright: reportGeneralTypeIssues=false


@dataclass(frozen=True, kw_only=True)
class Resolved(Comparison):
    """A comparison that says all; made by :meth:`Comparison.resolved`."""

    preset: list[str] = field()
    k: list[int] = field()
    d_sae: int = field()
    training_samples: int = field()
    batch_size: int = field()
    lr: float = field()
    dead_after: int = field()
    eval_samples: int = field()

    @property
    def dead_feature_window(self) -> int:
        """``dead_after`` in SAELens's count: silent for more than so many steps."""
        return ceil(self.dead_after / self.batch_size) - 1

    def synthetic_model_config(self, seed: int) -> SyntheticModelConfig | str:
        """What SAELens makes or loads the synthetic model of a pass from."""
        if isinstance(self.synthetic_model, str):
            return self.synthetic_model
        given: dict[str, Any] = {"seed": None, **(self.synthetic_model or {})}
        if given["seed"] is None:
            given["seed"] = seed
        # SAELens asks for a generator's name; a mapping without one means its default, Zipf.
        zipfian = ZipfianFiringProbabilityConfig.generator_name()
        probability: dict[str, Any] = {"generator_name": zipfian}
        probability |= given.get("firing_probability", {})
        return SyntheticModelConfig.from_dict(
            {
                **given,
                "num_features": self.n_features,
                "hidden_dim": self.d_in,
                "firing_probability": probability,
            }
        )


@dataclass(frozen=True)
class Case:
    """One thing that is compared: a label, an architecture and fields of its config."""

    name: str
    architecture: str
    fields: dict[str, Any]

    @property
    def k(self) -> float | None:
        """Active latents per sample, where the architecture has that."""
        return self.fields.get("k")

    @property
    def title(self) -> str:
        """The case with everything that tells it from the others."""
        parts = (self.name, self.architecture, *([] if self.k is None else [f"k {self.k:g}"]))
        return ", ".join(parts)

    @property
    def slug(self) -> str:
        """``title`` as the name of a folder."""
        return re.sub(r"[^a-z0-9.]+", "-", self.title.lower()).strip("-")

    def sae_config(self, comparison: Resolved, d_in: int) -> TrainingSAEConfig:
        """The config to train with; a ValueError names the case and what is wrong with it."""
        config_class = get_sae_training_class(self.architecture)[1]
        known = {f.name for f in fields(config_class)}
        values: dict[str, Any] = {
            "d_in": d_in,
            "d_sae": comparison.d_sae,
            "device": comparison.device,
        }
        if "dead_threshold_tokens" in known:
            values["dead_threshold_tokens"] = comparison.dead_after
        if "matryoshka_widths" in known:
            values["matryoshka_widths"] = _matryoshka_widths(comparison.d_sae)
        values |= {name: value for name, value in comparison.sae.items() if name in known}
        values |= self.fields
        try:
            return config_class(**values)
        except (TypeError, ValueError) as error:
            raise ValueError(f"case {self.title!r}: {error}") from error


def cases_of(comparison: Resolved) -> list[Case]:
    """All cases of a resolved comparison, each once, in the order in which they are shown."""
    cases: dict[tuple[str, str, Any], Case] = {}

    def add(name: str | None, architecture: str, given: dict[str, Any]) -> None:
        _, config_class = get_sae_training_class(architecture)
        known = {f.name for f in fields(config_class)}
        require_known(given, known - {"d_in", "d_sae", "device"}, f"a case of {architecture}")
        name = name or _label(architecture, given)
        ks = [given["k"]] if "k" in given else comparison.k if "k" in known else [None]
        for k in ks:
            case = Case(name, architecture, given if k is None else {**given, "k": k})
            same = cases.setdefault((name, architecture, k), case)
            if same != case:
                raise ValueError(f"cases: two that differ are called {case.title!r}; name them.")

    variants = [
        {"aux_variant": variant} | ({} if alpha is None else {"aux_loss_coefficient": alpha})
        for variant in comparison.aux_variant or []
        for alpha in comparison.aux_loss_coefficient or [None]
    ]
    sweep = itertools.chain(*(PRESETS[name] for name in comparison.preset), variants)
    for architecture, given in itertools.product(comparison.architecture, sweep):
        if not given:
            add(None, STOCK[architecture], {})
        elif not AUX_LOSSES[given["aux_variant"]].topk_only or "topk" in architecture:
            add(None, architecture, given)
    for explicit in comparison.cases:
        given = dict(explicit)
        architecture = given.pop("architecture", comparison.architecture[0])
        require_choice("architecture", architecture, [*ARCHITECTURES, *STOCK.values()])
        add(given.pop("name", None), architecture, given)
    return list(cases.values())


def _label(architecture: str, given: Mapping[str, Any]) -> str:
    """A short name that says what differs from the defaults."""
    short = {"aux_bias": "bias", "aux_loss_coefficient": "alpha"}
    if architecture in ARCHITECTURES:
        defaults = {f.name: f.default for f in fields(AuxConfig)}
        parts = [given.get("aux_variant", defaults["aux_variant"])]
    else:
        defaults = {}
        parts = [f"SAELens {architecture}"]
    for name, value in given.items():
        if name not in ("aux_variant", "k") and not (name in defaults and value == defaults[name]):
            shown = f"{value:g}" if isinstance(value, float) else str(value)
            parts.append(f"{short.get(name, name)} {shown}")
    return ", ".join(parts)


def _matryoshka_widths(d_sae: int) -> list[int]:
    """Levels of 1/32, 1/8, 1/2 and all of the latents."""
    return sorted({max(1, d_sae // part) for part in (32, 8, 2)} | {d_sae})


# --- validation ------------------------------------------------------------------------------


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
    lr = comparison.lr
    if isinstance(lr, bool) or not isinstance(lr, int | float) or not isfinite(lr) or lr <= 0:
        raise reject("lr", lr, "a finite number > 0")
    if not isinstance(comparison.autocast, bool):
        raise reject("autocast", comparison.autocast, "True or False")
    for name, minimum in (("seeds", 0), ("k", 1)):
        require_list(name, getattr(comparison, name))
        for value in getattr(comparison, name):
            require_int(name, value, minimum=minimum)
    for k in comparison.k:
        if k > (comparison.d_sae):
            raise reject("k", k, f"at most d_sae ({comparison.d_sae})")
    require_choices("architecture", comparison.architecture, ARCHITECTURES)
    if comparison.preset:
        require_choices("preset", comparison.preset, PRESETS)
    if comparison.aux_variant:
        require_choices("aux_variant", comparison.aux_variant, AUX_LOSSES)
    if comparison.aux_loss_coefficient and not comparison.aux_variant:
        raise reject(
            "aux_loss_coefficient",
            comparison.aux_loss_coefficient,
            "left out unless aux_variant says whose coefficient it is",
        )
    _validate_device(comparison.device)
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


def _validate_device(device: Any) -> None:
    allowed = "cpu, cuda or another device that torch has here"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"{reject('device', device, allowed)} ({error})") from error


def _validate_language_model(comparison: Resolved) -> None:
    if not comparison.dataset_path:
        raise reject("dataset_path", comparison.dataset_path, "a data set's name or folder")
    for name in ("n_features", "d_in", "synthetic_model"):
        if getattr(comparison, name) is not None:
            allowed = "left out with model_name: it is about synthetic models"
            raise reject(name, getattr(comparison, name), allowed)
    classes = ("HookedTransformer", "AutoModelForCausalLM")
    require_choice("model_class_name", comparison.model_class_name, classes)
    if comparison.hook_name is None and comparison.model_class_name != "HookedTransformer":
        allowed = "the name of a module of the model, such as model.layers.6"
        raise reject("hook_name", None, allowed)
    for name in comparison.language_model:
        if own := _OWN_RUN_FIELDS.get(name):
            raise ValueError(f"language_model: {name} is said by {own}.")
    known = {f.name for f in fields(MultiSAETrainingRunnerConfig) if not f.name.startswith("_")}
    require_known(comparison.language_model, known - set(_OWN_RUN_FIELDS), "language_model")


def _validate_synthetic_model(comparison: Resolved) -> None:
    for name in ("dataset_path", "hook_name"):
        if getattr(comparison, name) is not None:
            raise reject(name, getattr(comparison, name), "left out unless model_name is given")
    if comparison.language_model:
        raise reject(
            "language_model", comparison.language_model, "empty unless model_name is given"
        )
    source = comparison.synthetic_model
    if isinstance(source, str):
        for name in ("n_features", "d_in"):
            if getattr(comparison, name) is not None:
                allowed = "left out with a saved synthetic_model, which has it"
                raise reject(name, getattr(comparison, name), allowed)
        return
    if not isinstance(source, dict | None):
        raise reject("synthetic_model", source, "a mapping of fields, a folder or a Hub name")
    for name in ("n_features", "d_in"):
        require_int(name, getattr(comparison, name), minimum=1)
    known = {f.name for f in fields(SyntheticModelConfig)}
    sizes = {"num_features": "n_features", "hidden_dim": "d_in"}
    for name in source or {}:
        if own := sizes.get(name):
            raise ValueError(f"synthetic_model: {name} is said by {own}.")
    require_known(source or {}, known - set(sizes), "synthetic_model")
    try:
        comparison.synthetic_model_config(seed=0)
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f"synthetic_model: {error}") from error
