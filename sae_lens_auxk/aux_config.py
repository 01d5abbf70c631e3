"""The config fields that every architecture of this package adds, and their validation."""

from dataclasses import dataclass
from math import isfinite
from numbers import Integral, Real
from typing import Any, ClassVar, Literal, get_args

from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAEConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.topk_sae import TopKTrainingSAEConfig

from sae_lens_auxk.aux_losses.registry import AUX_LOSSES, AuxLoss, DeadCriterion
from sae_lens_auxk.dead_latents import DEFAULT_THRESHOLD

AuxBias = Literal["decoder", "matched", "none"]


@dataclass(kw_only=True)
class AuxConfig:
    """
    Fields that choose and schedule the auxiliary loss. A mixin for SAELens's training configs.

    Every loss is summed over d_in and averaged over the batch, as SAELens's MSE is.

    Args:
        aux_variant (str): The auxiliary loss: the name of a file in sae_lens_auxk/aux_losses
            ("auxk", "pursuit", "none", ...), where its formula stands, or a name given to
            register_aux_loss.
        aux_loss_coefficient (float | None): The factor of the auxiliary loss, alpha. None: the
            variant's default, its source's value or one chosen by measurement. SAELens's own TopK
            loss, which this replaces, has 1.
        k_aux (int | None): How many dead latents, those with the largest pre-activation, auxk
            and straight_through use in each row. None (on the command line, the flag without a
            value): d_in // 2 (Gao et al. 2024, B.1).
        aux_bias (Literal["decoder", "matched", "none"]): What auxk adds to the dead latents'
            reconstruction of the residual r. "decoder": b_dec, so that dead latents are pulled
            toward r - b_dec (sparsify removed its own as a bug, #132 and #134). "matched":
            b_dec there and a constant b_dec on r, as in Gao et al.'s code: the value of "none",
            with a gradient to b_dec. "none": nothing, as in Gao et al.'s paper and SAELens.
        aux_relu (bool): Whether auxk passes its activations through a ReLU, as Gao et al.'s code
            does. False: negative pre-activations count as they are.
        dead_criterion (Literal["tokens", "steps", "batch"] | None): When a latent is dead.
            "tokens": silent for dead_threshold_tokens. "steps": by SAELens's own mask (silent
            for more than dead_feature_window steps). "batch": silent in this batch. None:
            "batch" for reanimation, else "tokens".
        dead_threshold_tokens (int | None): Tokens of silence after which a latent is dead, with
            dead_criterion="tokens". None: 10 million (Gao et al. 2024), or a twentieth of the
            run's training samples where that is less, fixed when the trainer is made and written
            into the saved metadata. No latent dies in a run shorter than the threshold, which
            causes a warning.
        aux_batch_fraction (float): The share of each batch's rows, a new random sample at every
            step, that the auxiliary loss is computed on. Its mean over them is an unbiased
            estimate of that over the batch (but for ghost_gradients, whose scale is a ratio of
            two means), at that share of the cost. Dead latents are counted in all rows.
        aux_warm_up_steps (int): Steps over which the coefficient grows linearly from 0.
        aux_decay_start_step (int | None): Step at which the coefficient starts to fall
            linearly to 0. None: never. Needs aux_decay_steps.
        aux_decay_steps (int): Steps that the fall to 0 takes.
    """

    aux_variant: str = "auxk"
    aux_loss_coefficient: float | None = None
    k_aux: int | None = 512
    aux_bias: AuxBias = "decoder"
    aux_relu: bool = False
    dead_criterion: DeadCriterion | None = None
    dead_threshold_tokens: int | None = None
    aux_batch_fraction: float = 1.0
    aux_warm_up_steps: int = 0
    aux_decay_start_step: int | None = None
    aux_decay_steps: int = 0

    unsupported_normalizations: ClassVar[tuple[str, ...]] = ()
    """Values of ``normalize_activations`` that the architecture cannot be trained with."""

    def __post_init__(self) -> None:
        _validate(self)
        metadata: Any = self.metadata
        if isinstance(metadata, dict):  # as SAEConfig.from_dict hands it over
            self.metadata = SAEMetadata(**metadata)
        super().__post_init__()  # type: ignore[misc]

    @property
    def aux_loss(self) -> AuxLoss:
        """The registered loss that ``aux_variant`` names."""
        return AUX_LOSSES[self.aux_variant]

    @property
    def resolved_k_aux(self) -> int:
        """``k_aux``, or ``d_in // 2`` (Gao et al. 2024, B.1) where that is None."""
        return self.d_in // 2 if self.k_aux is None else self.k_aux  # type: ignore[attr-defined]

    @property
    def resolved_dead_threshold_tokens(self) -> int:
        """``dead_threshold_tokens``, or 10 million where no trainer has fixed it yet."""
        threshold = self.dead_threshold_tokens
        return DEFAULT_THRESHOLD if threshold is None else threshold

    @property
    def resolved_dead_criterion(self) -> DeadCriterion:
        """``dead_criterion``, or the variant's own where that is None."""
        return self.dead_criterion or self.aux_loss.default_dead_criterion

    def aux_coefficient_at(self, step: int) -> float:
        """The scheduled coefficient at a training step, counted from 0.

        Warm-up is SAELens's: ``step / aux_warm_up_steps`` of the full value, so 0 at first.
        """
        if self.aux_variant == "none":
            return 0.0
        coefficient = self.aux_loss_coefficient
        if coefficient is None:
            coefficient = self.aux_loss.default_coefficient
        if step < self.aux_warm_up_steps:
            return coefficient * step / self.aux_warm_up_steps
        if self.aux_decay_start_step is None or step < self.aux_decay_start_step:
            return coefficient
        decayed = (step - self.aux_decay_start_step) / self.aux_decay_steps
        return coefficient * max(0.0, 1.0 - decayed)


def _validate(cfg: Any) -> None:
    """Raise a ValueError that names field, value and what is allowed."""
    if cfg.aux_variant not in AUX_LOSSES:
        _reject(
            cfg,
            "aux_variant",
            f"one of {', '.join(AUX_LOSSES)} (a loss of your own must be registered with "
            "register_aux_loss first)",
        )
    is_topk = issubclass(type(cfg), TopKTrainingSAEConfig)
    if cfg.aux_loss.topk_only and not is_topk:
        allowed = ", ".join(n for n, loss in AUX_LOSSES.items() if not loss.topk_only)
        _reject(cfg, "aux_variant", f"for {cfg.architecture()}, which has no k, one of {allowed}")

    _require_int(cfg, "d_in", minimum=1)
    _require_int(cfg, "d_sae", minimum=1)
    if cfg.aux_loss_coefficient is not None:
        _require_number(cfg, "aux_loss_coefficient", "None or a finite number >= 0")
        if cfg.aux_loss_coefficient < 0:
            _reject(cfg, "aux_loss_coefficient", "None or a finite number >= 0")
    _require_int(cfg, "k_aux", minimum=1, optional=True)
    _require_choice(cfg, "aux_bias", get_args(AuxBias))
    if not isinstance(cfg.aux_relu, bool):
        _reject(cfg, "aux_relu", "True or False")
    if cfg.dead_criterion is not None:
        _require_choice(cfg, "dead_criterion", (None, *get_args(DeadCriterion)))
    _require_int(cfg, "dead_threshold_tokens", minimum=1, optional=True)
    _require_number(cfg, "aux_batch_fraction", "more than 0 and at most 1")
    if not 0 < cfg.aux_batch_fraction <= 1:
        _reject(cfg, "aux_batch_fraction", "more than 0 and at most 1")
    _require_int(cfg, "aux_warm_up_steps", minimum=0)
    _require_int(cfg, "aux_decay_start_step", minimum=0, optional=True)
    _require_int(cfg, "aux_decay_steps", minimum=0)
    if cfg.aux_decay_steps > 0 and cfg.aux_decay_start_step is None:
        _reject(cfg, "aux_decay_steps", "0 unless aux_decay_start_step is set")
    if cfg.aux_decay_start_step is not None:
        if cfg.aux_decay_steps == 0:
            _reject(cfg, "aux_decay_steps", ">= 1 where aux_decay_start_step is set")
        if cfg.aux_decay_start_step < cfg.aux_warm_up_steps:
            _reject(
                cfg,
                "aux_decay_start_step",
                f">= aux_warm_up_steps ({cfg.aux_warm_up_steps}): warm-up must end first",
            )

    if is_topk:
        allowed = f"more than 0 and at most d_sae ({cfg.d_sae})"
        _require_number(cfg, "k", allowed)
        if not 0 < cfg.k <= cfg.d_sae:
            _reject(cfg, "k", allowed)
        if not issubclass(type(cfg), BatchTopKTrainingSAEConfig):
            _require_int(cfg, "k", minimum=1)
    if widths := getattr(cfg, "matryoshka_widths", None):
        increasing = all(isinstance(w, int) for w in widths) and list(widths) == sorted(set(widths))
        if not increasing or widths[0] < 1 or widths[-1] > cfg.d_sae:
            _reject(
                cfg,
                "matryoshka_widths",
                f"strictly increasing integers from 1 to d_sae ({cfg.d_sae})",
            )
    if cfg.normalize_activations in cfg.unsupported_normalizations:
        _reject(
            cfg,
            "normalize_activations",
            f"for {cfg.architecture()} anything but {' and '.join(cfg.unsupported_normalizations)}"
            ", under which SAELens's training step of this architecture fails or is wrong",
        )
    if getattr(cfg, "use_matryoshka_aux_loss", False) and not cfg.aux_loss.uses_dead_latents:
        _reject(
            cfg,
            "use_matryoshka_aux_loss",
            f"False with aux_variant={cfg.aux_variant!r}, which has no dead latents to assign "
            "to levels",
        )


def _reject(cfg: Any, field: str, allowed: str) -> None:
    raise ValueError(f"{field}={getattr(cfg, field)!r} is not allowed: it must be {allowed}.")


def _require_choice(cfg: Any, field: str, choices: tuple[Any, ...]) -> None:
    if getattr(cfg, field) not in choices:
        _reject(cfg, field, f"one of {', '.join(map(repr, choices))}")


def _require_number(cfg: Any, field: str, allowed: str) -> None:
    value = getattr(cfg, field)
    if isinstance(value, bool) or not isinstance(value, Real) or not isfinite(value):
        _reject(cfg, field, allowed)


def _require_int(cfg: Any, field: str, *, minimum: int, optional: bool = False) -> None:
    value = getattr(cfg, field)
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, Integral) or value < minimum:
        _reject(cfg, field, f"{'None or ' if optional else ''}an integer >= {minimum}")
