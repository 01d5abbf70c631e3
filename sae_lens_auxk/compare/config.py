"""The fields of a comparison, and the file that they can be read from."""

from dataclasses import asdict, dataclass, fields
from math import ceil
from pathlib import Path
from typing import Any

import yaml
from simple_parsing import field

from sae_lens_auxk.checks import require_known
from sae_lens_auxk.saelens.names import SyntheticModelConfig, ZipfianFiringProbabilityConfig


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """
    What to compare, on what data, and for how long. None means a default that depends on the rest.

    Args:
        preset (list[str] | None): Sets of cases, one or more: "main" (SAELens's own architecture
            with its defaults, and with unit decoder rows and no loss; this package's with these,
            b_dec at the mean and no loss; auxk; pursuit, and pursuit with b_dec at the mean),
            "saelens" (SAELens's own architecture with its defaults), "variants" (the eight aux
            variants at their published coefficients), "biases" (auxk with each aux_bias). None:
            "main", unless cases or aux_variant say what to compare.
        aux_variant (list[str] | None): Further cases: each of these variants with each value of
            aux_loss_coefficient.
        aux_loss_coefficient (list[float] | None): Coefficients for the variants in aux_variant.
            None: the published ones.
        architecture (list[str]): One or more of this package's architectures. The preset
            "saelens" takes the SAELens architecture that each of them extends.
        k (list[int] | None): Active latents per sample, one or more values, for the TopK family.
            None: 8, for a language model 32.
        cases (list[dict]): In a configuration file only. Further cases, each a mapping of
            fields of the SAE's config, with "architecture" (this package's or SAELens's), "name"
            and "lr", its own learning rate, all three optional.
        sae (dict): In a configuration file only. Fields of the SAE's config for all cases whose
            architecture has them; a case can override them.
        seeds (list[int]): One pass over the data for each. It seeds the initial weights, and the
            samples or the order of the text.
        d_sae (int | None): Number of latents. None: 256, for a language model 12288.
        training_samples (int | None): Activations (tokens) that each SAE is trained on. None:
            200000, for a language model 20 million.
        batch_size (int | None): Activations per training step. None: 256, for a language
            model 4096.
        lr (float | None): Learning rate of the cases that have none of their own. None: 2e-3, for
            a language model 3e-4.
        dead_after (int | None): A latent that is silent for this many activations is dead, in
            the measurements of every case and, unless a case says otherwise, for its auxiliary
            loss. None: 10 million or a twentieth of training_samples, whichever is less.
        eval_samples (int | None): Held-out activations to measure on. None: 10000, for a
            language model 65536.
        max_norm_multiple (float | None): Rows whose norm is above this many times the median norm
            of the held-out rows are left out of training and measuring, in all cases alike. None:
            no row is; dictionary_learning takes 10.
        effect (bool): Also measure what single latents do: how the loss of the language model and
            the MSE rise where a latent is taken out.
        device (str): Where to train: "cpu", "cuda", "cuda:1".
        autocast (bool): Train in bfloat16 where autocast allows it.
        n_features (int | None): Number of true features of the synthetic model. None: 256.
        d_in (int | None): Width of the synthetic model's activations. None: 64. (The width of a
            language model is read from the model.)
        synthetic_model (dict | str | None): In a configuration file, the other fields of
            SAELens's SyntheticModelConfig; or the folder or Hub name of a saved model. On the
            command line, only a folder or name. All seeds share one model, unless its own "seed"
            (0) is null: then each seed makes another.
        model_name (str | None): Name or folder of the language model to take activations from.
            None: a synthetic model.
        model_class_name (str): How to load it: "HookedTransformer" or "AutoModelForCausalLM".
        dataset_path (str | None): Name or folder of the text for the language model.
        hook_name (str | None): Hook point in the language model. None: the residual stream
            before the middle block of a HookedTransformer.
        context_size (int): Tokens per prompt of the language model.
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
    max_norm_multiple: float | None = None
    effect: bool = False
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

    def to_dict(self) -> dict[str, Any]:
        """All fields, in types that JSON has."""
        return asdict(self)

    @classmethod
    def from_file(cls, path: Path) -> "Comparison":
        """Read a YAML file (.yaml, .yml) of the fields.

        Raises:
            ValueError: there is no such file, it is not YAML, or it has an unknown field; the
                message suggests the nearest name.
        """
        shown = f"config={str(path)!r}"
        if not path.is_file():
            raise ValueError(f"{shown} is not allowed: there is no such file.")
        if path.suffix not in (".yaml", ".yml"):
            raise ValueError(f"{shown} is not allowed: it must end in .yaml or .yml.")
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except yaml.YAMLError as error:
            raise ValueError(f"{shown} cannot be read: {error}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{shown} is not allowed: it must hold fields and values.")
        require_known(values, (f.name for f in fields(cls)), "a comparison")
        # A field without a value, as one may leave it in YAML, means its default.
        return cls(**{name: value for name, value in values.items() if value is not None})


# pyright objects to fields without a default after fields with one, but all are keyword-only.
# pyright: reportGeneralTypeIssues=false


@dataclass(frozen=True, kw_only=True)
class Resolved(Comparison):
    """A comparison with every default filled in, as ``resolve`` makes it."""

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
        """``dead_after`` in steps, as SAELens counts: a latent silent for more steps is dead."""
        return ceil(self.dead_after / self.batch_size) - 1

    @property
    def has_one_model(self) -> bool:
        """Whether all seeds share one model; a synthetic one with seed None is made for each."""
        if self.model_name:
            return True
        return self.synthetic_model_config(seed=0) == self.synthetic_model_config(seed=1)

    def synthetic_model_config(self, seed: int) -> SyntheticModelConfig | str:
        """SAELens's config, or the folder or name, of the synthetic model of a pass."""
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
