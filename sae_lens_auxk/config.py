"""The config fields that every architecture of this package adds, and their validation."""

import warnings
from copy import copy
from dataclasses import dataclass, fields
from math import log2
from typing import Any, ClassVar, Literal, get_args

from sae_lens import (
    BatchTopKTrainingSAEConfig,
    MatryoshkaBatchTopKTrainingSAEConfig,
    TopKTrainingSAEConfig,
)

from sae_lens_auxk.checks import (
    python_value,
    reject,
    require_bool,
    require_choice,
    require_int,
    require_number,
)
from sae_lens_auxk.losses.registry import (
    AUX_LOSSES,
    AuxLoss,
    DeadCriterion,
    find_aux_loss,
)
from sae_lens_auxk.saelens.names import SAEMetadata

AuxBias = Literal["decoder", "matched", "none"]
BDecInit = Literal["zeros", "mean", "geometric_median"]

DEFAULT_THRESHOLD = 10_000_000
"""Tokens of silence that make a latent dead (Gao et al. 2024, section 2.2)."""


@dataclass(kw_only=True)
class AuxConfig:
    """
    Fields that choose and schedule the auxiliary loss. A mixin for SAELens's training configs.

    Every loss is summed over d_in and averaged over the batch, as SAELens's MSE is.

    Args:
        aux_variant (str): The auxiliary loss: the name of a file in sae_lens_auxk/losses
            ("auxk", "pursuit", "none", ...), which gives its formula, or a name given to
            register_aux_loss.
        aux_loss_coefficient (float | None): The factor of the auxiliary loss, alpha, at most 1e10.
            None: the variant's default, which is its source's value or was chosen by measurement.
            SAELens's own TopK loss, which this replaces, uses 1. SAELens's trainer takes it when it
            is made.
        k_aux (int | None): How many dead latents auxk, straight_through and pursuit use in each
            row; they take those with the largest pre-activations. None (on the command line, the
            flag without a value): the power of two nearest to d_in / 2 (Gao et al. 2024, appendix
            B.1), 512 where d_in is 768, and never more than d_sae. SAELens's own loss takes
            d_in // 2.
        aux_bias (Literal["decoder", "matched", "none"]): What auxk adds to the dead latents'
            reconstruction of the residual r. "decoder": b_dec, so that dead latents are pulled
            toward r - b_dec (sparsify removed the same term as a bug, #132 and #134). "matched":
            b_dec, and a constant b_dec added to r, as in Gao et al.'s code: the same value as
            "none", with a gradient to b_dec. "none": nothing, as in Gao et al.'s paper and SAELens.
        aux_relu (bool): Whether auxk passes its activations through a ReLU, as Gao et al.'s code
            does. False: negative pre-activations count as they are.
        aux_normalize (bool): Whether to divide auxk by the variance of its target relative to the
            input's variance, as in Gao et al.'s code, so that it weighs more as the SAE gets
            better. False: auxk is in the units of SAELens's MSE, as in Gao et al.'s paper.
        dead_criterion (Literal["tokens", "steps", "batch"] | None): When a latent is dead.
            "tokens": silent for dead_threshold_tokens. "steps": by SAELens's own mask (silent
            for more than dead_feature_window steps). "batch": silent in this batch. None:
            "batch" for reanimation, else "tokens".
        dead_threshold_tokens (int | None): Tokens of silence after which a latent is dead, with
            dead_criterion="tokens". Gao et al. 2024 set 10_000_000. None: the run's own
            dead_feature_window x train_batch_size_samples if that is at most half of the run, else
            a twentieth of the run, with a warning. The number is fitted when a trainer is created,
            anew for each, and saved in the metadata under "fitted". A loop without SAELens's
            trainer has 10 million, with a warning. No latent can die in a run shorter than the
            threshold; such a run gives a warning.
        aux_batch_fraction (float): The share of each batch's rows that the auxiliary loss is
            computed on, a new random sample at every step. It cuts the cost to that share, and the
            mean over the sample is an unbiased estimate of the mean over the batch, except for
            ghost_gradients, whose scale is a ratio of two means, and pursuit, which compares a row
            with the others of the sample. Dead latents are counted over all rows.
        aux_warm_up_steps (int): Steps over which the coefficient grows linearly from 0.
        aux_decay_start_step (int | None): Step at which the coefficient starts to fall
            linearly to 0. None: never. Needs aux_decay_steps.
        aux_decay_steps (int): Number of steps over which the coefficient falls to 0.
        resample_every_steps (int | None): Reset dead latents every this many training steps to rows
            of the batch that are reconstructed badly (Bricken et al. 2023 used 25000), in addition
            to the auxiliary loss. dead_criterion says which latents are dead, except that "batch"
            counts tokens here. SAELens's trainers do this by themselves; your own training loop
            must call sae_lens_auxk.resample_with once, and gets a warning if it does not. None:
            never.
        resample_stop_step (int | None): The last training step, counted from 1, after which dead
            latents may be resampled (Bricken et al. 2023: 100000). None: the last step that leaves
            a resampled latent a full dead window before the run ends. It is fitted and saved as
            dead_threshold_tokens is.
        b_dec_init (Literal["zeros", "mean", "geometric_median"]): The first value of b_dec.
            "zeros": SAELens's. "mean", "geometric_median": that of the rows of a run's first
            batch, after scaling, without rows above ten times the median norm. It is set once, at
            the first training step of a run that begins, and not after a load.
    """

    aux_variant: str = "auxk"
    aux_loss_coefficient: float | None = None
    k_aux: int | None = None
    aux_bias: AuxBias = "decoder"
    aux_relu: bool = False
    aux_normalize: bool = False
    dead_criterion: DeadCriterion | None = None
    dead_threshold_tokens: int | None = None
    aux_batch_fraction: float = 1.0
    aux_warm_up_steps: int = 0
    aux_decay_start_step: int | None = None
    aux_decay_steps: int = 0
    resample_every_steps: int | None = None
    resample_stop_step: int | None = None
    b_dec_init: BDecInit = "zeros"

    unsupported_normalizations: ClassVar[tuple[str, ...]] = ()
    """Values of ``normalize_activations`` that the architecture cannot be trained with."""

    def __post_init__(self) -> None:
        for field in fields(self):
            setattr(self, field.name, python_value(getattr(self, field.name)))
        _validate(self)
        metadata: Any = self.metadata
        if isinstance(metadata, dict):  # SAEConfig.from_dict passes a dict
            self.metadata = SAEMetadata(**metadata)
        super().__post_init__()  # type: ignore[misc]

    @property
    def aux_loss(self) -> AuxLoss:
        """The registered loss that ``aux_variant`` names."""
        return AUX_LOSSES[self.aux_variant]

    @property
    def resolved_aux_coefficient(self) -> float:
        """``aux_loss_coefficient``, or the variant's own if it is None; 0 for ``"none"``."""
        if self.aux_variant == "none":
            return 0.0
        alpha = self.aux_loss_coefficient
        return self.aux_loss.default_coefficient if alpha is None else alpha

    @property
    def resolved_k_aux(self) -> int:
        """``k_aux``, or the power of two nearest to ``d_in / 2`` (Gao et al. 2024, B.1)."""
        d_in, d_sae = self.d_in, self.d_sae  # type: ignore[attr-defined]
        if self.k_aux is not None:
            return self.k_aux
        return min(max(1, 2 ** round(log2(d_in / 2))), d_sae)

    @property
    def resolved_dead_threshold_tokens(self) -> int:
        """``dead_threshold_tokens``, or what the last trainer fitted; 10 million without one."""
        threshold = self.dead_threshold_tokens
        if threshold is None:
            threshold = self._fitted("dead_threshold_tokens")
        if threshold is None:
            # Without a number and from one line, so that Python shows it once.
            warnings.warn(
                "dead_threshold_tokens=None without SAELens's SAETrainer, which fits it to a run: "
                "a latent is dead after 10 million silent tokens (Gao et al. 2024). Set it",
                stacklevel=1,
            )
            threshold = DEFAULT_THRESHOLD
        return threshold

    @property
    def resolved_resample_stop_step(self) -> int | None:
        """``resample_stop_step``, or what the last trainer fitted; None without one."""
        stop = self.resample_stop_step
        return self._fitted("resample_stop_step") if stop is None else stop

    def _fitted(self, name: str) -> int | None:
        metadata: Any = self.metadata  # type: ignore[attr-defined]
        return (metadata.fitted or {}).get(name)

    @property
    def resolved_dead_criterion(self) -> DeadCriterion:
        """``dead_criterion``, or the variant's own if it is None."""
        return self.dead_criterion or self.aux_loss.default_dead_criterion

    def fitted_to_run(self, **numbers: int) -> Any:
        """A copy whose ``resolved_*`` are ``numbers`` where a field is None.

        The fields stay as they are, so that the next trainer fits them anew. The numbers stand in
        the metadata, which is saved, as ``fitted``.
        """
        fitted = copy(self)
        metadata: Any = self.metadata  # type: ignore[attr-defined]
        left_open = {name: n for name, n in numbers.items() if getattr(self, name) is None}
        fitted.metadata = SAEMetadata(**{**metadata.to_dict(), "fitted": left_open})
        return fitted

    def aux_decay_at(self, step: int) -> float:
        """The factor of the coefficient at a training step, counted from 0: 1, then down to 0."""
        if self.aux_decay_start_step is None or step < self.aux_decay_start_step:
            return 1.0
        decayed = (step - self.aux_decay_start_step) / self.aux_decay_steps
        return max(0.0, 1.0 - decayed)

    def resamples_after(self, step: int) -> bool:
        """Whether dead latents are resampled after a training step, counted from 0."""
        every, n_steps = self.resample_every_steps, step + 1
        if every is None or n_steps % every != 0:
            return False
        stop = self.resolved_resample_stop_step
        return stop is None or n_steps <= stop


def _validate(cfg: Any) -> None:
    """Raise a ValueError that names the field, its value and what is allowed."""
    loss = find_aux_loss(cfg.aux_variant)
    is_topk = issubclass(type(cfg), TopKTrainingSAEConfig)
    if loss.topk_only and not is_topk:
        allowed = ", ".join(name for name, other in AUX_LOSSES.items() if not other.topk_only)
        no_k = f"for {cfg.architecture()}, which has no k"
        raise reject("aux_variant", cfg.aux_variant, f"one of {allowed} {no_k}")

    require_int("d_in", cfg.d_in, minimum=1)
    require_int("d_sae", cfg.d_sae, minimum=1)
    if str(cfg.dtype).removeprefix("torch.") in ("float16", "fp16", "half"):
        allowed = "float32, bfloat16 or float64, as float16 overflows (bfloat16 autocast may be on)"
        raise reject("dtype", cfg.dtype, allowed)
    if cfg.aux_loss_coefficient is not None:
        # Times a larger one a loss or gradient can overflow, and then the weights become NaN.
        allowed, given = "None or a number from 0 to 1e10", cfg.aux_loss_coefficient
        require_number("aux_loss_coefficient", given, allowed, lambda alpha: 0 <= alpha <= 1e10)
    require_int("k_aux", cfg.k_aux, minimum=1, optional=True)
    require_choice("aux_bias", cfg.aux_bias, get_args(AuxBias))
    require_bool("aux_relu", cfg.aux_relu)
    require_bool("aux_normalize", cfg.aux_normalize)
    if cfg.dead_criterion is not None:
        require_choice("dead_criterion", cfg.dead_criterion, get_args(DeadCriterion), " or None")
    require_int("dead_threshold_tokens", cfg.dead_threshold_tokens, minimum=1, optional=True)
    allowed = "more than 0 and at most 1"
    require_number(
        "aux_batch_fraction", cfg.aux_batch_fraction, allowed, lambda share: 0 < share <= 1
    )
    require_int("aux_warm_up_steps", cfg.aux_warm_up_steps, minimum=0)
    require_int("aux_decay_start_step", cfg.aux_decay_start_step, minimum=0, optional=True)
    require_int("aux_decay_steps", cfg.aux_decay_steps, minimum=0)
    if cfg.aux_decay_steps > 0 and cfg.aux_decay_start_step is None:
        allowed = "0 unless aux_decay_start_step is set"
        raise reject("aux_decay_steps", cfg.aux_decay_steps, allowed)
    if cfg.aux_decay_start_step is not None:
        if cfg.aux_decay_steps == 0:
            raise reject("aux_decay_steps", 0, ">= 1 where aux_decay_start_step is set")
        if cfg.aux_decay_start_step < cfg.aux_warm_up_steps:
            allowed = f">= aux_warm_up_steps ({cfg.aux_warm_up_steps}): warm-up must end first"
            raise reject("aux_decay_start_step", cfg.aux_decay_start_step, allowed)

    require_choice("b_dec_init", cfg.b_dec_init, get_args(BDecInit))
    every, stop = cfg.resample_every_steps, cfg.resample_stop_step
    require_int("resample_every_steps", every, minimum=1, optional=True)
    require_int("resample_stop_step", stop, minimum=1, optional=True)
    if stop is not None and (every is None or stop < every):
        allowed = (
            "None unless resample_every_steps is set"
            if every is None
            else f"None or >= resample_every_steps ({every}), the first step that it could allow"
        )
        raise reject("resample_stop_step", stop, allowed)

    if is_topk:
        allowed = f"more than 0 and at most d_sae ({cfg.d_sae})"
        require_number("k", cfg.k, allowed, lambda k: 0 < k <= cfg.d_sae)
        if not issubclass(type(cfg), BatchTopKTrainingSAEConfig):
            require_int("k", cfg.k, minimum=1)
    if issubclass(type(cfg), MatryoshkaBatchTopKTrainingSAEConfig):
        _validate_matryoshka(cfg, loss)
    if cfg.normalize_activations in cfg.unsupported_normalizations:
        excluded = " and ".join(cfg.unsupported_normalizations)
        allowed = (
            f"anything but {excluded} for {cfg.architecture()}: SAELens's training step for this "
            "architecture fails or is wrong with them"
        )
        raise reject("normalize_activations", cfg.normalize_activations, allowed)


def _validate_matryoshka(cfg: Any, loss: AuxLoss) -> None:
    widths = cfg.matryoshka_widths
    increasing = (
        isinstance(widths, list)
        and all(type(width) is int for width in widths)  # True is an int as well
        and widths == sorted(set(widths))
        and all(1 <= width <= cfg.d_sae for width in widths)
    )
    if not increasing:
        allowed = f"a list of strictly increasing integers from 1 to d_sae ({cfg.d_sae})"
        raise reject("matryoshka_widths", widths, allowed)
    require_bool("use_matryoshka_aux_loss", cfg.use_matryoshka_aux_loss)
    if cfg.use_matryoshka_aux_loss and not loss.uses_dead_latents:
        allowed = (
            f"False with aux_variant={cfg.aux_variant!r}, which has no dead latents to assign "
            "to levels"
        )
        raise reject("use_matryoshka_aux_loss", True, allowed)
