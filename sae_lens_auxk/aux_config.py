"""The config fields that every architecture of this package adds, and their validation."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, get_args

from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.saes.topk_sae import TopKTrainingSAEConfig

from sae_lens_auxk.aux_losses.registry import (
    AUX_LOSSES,
    AuxLoss,
    DeadCriterion,
    find_aux_loss,
)
from sae_lens_auxk.dead_latents import DEFAULT_THRESHOLD
from sae_lens_auxk.validation import (
    python_value,
    reject,
    require_bool,
    require_choice,
    require_int,
    require_number,
)

AuxBias = Literal["decoder", "matched", "none"]


@dataclass(kw_only=True)
class AuxConfig:
    """
    Fields that choose and schedule the auxiliary loss. A mixin for SAELens's training configs.

    Every loss is summed over d_in and averaged over the batch, as SAELens's MSE is.

    Args:
        aux_variant (str): The auxiliary loss: the name of a file in sae_lens_auxk/aux_losses
            ("auxk", "pursuit", "none", ...), which gives its formula, or a name given to
            register_aux_loss.
        aux_loss_coefficient (float | None): The factor of the auxiliary loss, alpha. None: the
            variant's default, which is its source's value or was chosen by measurement. SAELens's
            own TopK loss, which this replaces, uses 1.
        k_aux (int | None): How many dead latents auxk and straight_through use in each row; they
            take those with the largest pre-activations. None (on the command line, the flag without
            a value): d_in // 2 (Gao et al. 2024, B.1).
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
            dead_criterion="tokens". None: 10 million (Gao et al. 2024), or a twentieth of the run's
            training samples if that is less. This is fixed when the trainer is created and is saved
            in the metadata. No latent can die in a run shorter than the threshold; such a run gives
            a warning.
        aux_batch_fraction (float): The share of each batch's rows that the auxiliary loss is
            computed on, a new random sample at every step. It cuts the cost to that share, and the
            mean over the sample is an unbiased estimate of the mean over the batch (except for
            ghost_gradients, whose scale is a ratio of two means). Dead latents are counted over all
            rows.
        aux_warm_up_steps (int): Steps over which the coefficient grows linearly from 0.
        aux_decay_start_step (int | None): Step at which the coefficient starts to fall
            linearly to 0. None: never. Needs aux_decay_steps.
        aux_decay_steps (int): Number of steps over which the coefficient falls to 0.
        resample_every_steps (int | None): Reset dead latents every this many training steps to rows
            of the batch that are reconstructed badly (Bricken et al. 2023 used 25000), in addition
            to the auxiliary loss. dead_criterion says which latents are dead, except that "batch"
            counts tokens here. SAELens's trainers do this by themselves; your own training loop
            must call sae_lens_auxk.resample, and gets a warning if it does not. None: never.
        resample_stop_step (int | None): The last training step, counted from 1, after which dead
            latents may be resampled (Bricken et al. 2023: 100000). None: the last step that leaves
            a resampled latent a full dead window before the run ends, fixed when the trainer is
            created and saved in the metadata.
    """

    aux_variant: str = "auxk"
    aux_loss_coefficient: float | None = None
    k_aux: int | None = 512
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
    def resolved_k_aux(self) -> int:
        """``k_aux``, or ``d_in // 2`` (Gao et al. 2024, B.1) if it is None."""
        return self.d_in // 2 if self.k_aux is None else self.k_aux  # type: ignore[attr-defined]

    @property
    def resolved_dead_threshold_tokens(self) -> int:
        """``dead_threshold_tokens``, or 10 million if no trainer has fixed it yet."""
        threshold = self.dead_threshold_tokens
        return DEFAULT_THRESHOLD if threshold is None else threshold

    @property
    def resolved_dead_criterion(self) -> DeadCriterion:
        """``dead_criterion``, or the variant's own if it is None."""
        return self.dead_criterion or self.aux_loss.default_dead_criterion

    def aux_coefficient_at(self, step: int) -> float:
        """The scheduled coefficient at a training step, counted from 0.

        Warm-up is as in SAELens: ``step / aux_warm_up_steps`` of the full value, starting at 0.
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

    def resamples_after(self, step: int) -> bool:
        """Whether dead latents are resampled after a training step, counted from 0."""
        every, stop, n_steps = self.resample_every_steps, self.resample_stop_step, step + 1
        return every is not None and n_steps % every == 0 and (stop is None or n_steps <= stop)


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
    if cfg.aux_loss_coefficient is not None:
        allowed = "None or a finite number >= 0"
        require_number(
            "aux_loss_coefficient", cfg.aux_loss_coefficient, allowed, lambda alpha: alpha >= 0
        )
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
