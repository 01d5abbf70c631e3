"""What an auxiliary loss may see, and the registry that finds it by name.

An auxiliary loss is a pure function ``loss(inputs, cfg) -> scalar tensor``: it reads one
:class:`AuxLossInputs` record and the SAE's config and knows no module, trainer or logger.
The scheduled coefficient is applied by the caller. The package's own losses are one file
each in this folder; :func:`register_aux_loss` adds another.

Notation, as in the formulas of every file here: ``B`` rows in the batch, ``x`` the SAE's
input, ``h`` the pre-activations, ``D`` the dead latents, ``W_i`` the decoder row of latent
``i`` (divided by its norm where SAELens's ``rescale_acts_by_decoder_norm`` is on), ``b``
the decoder bias, ``r = stopgrad(x - sae_out)`` the residual. Losses are summed over
``d_in`` and averaged over the batch, as SAELens's MSE is, so that a coefficient means
against that MSE what its source meant against its own.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch

from sae_lens_auxk.latent_access import Activations, Columns, LatentAccess

DeadCriterion = Literal["tokens", "steps", "batch"]


@dataclass(frozen=True)
class AuxLossInputs:
    """One training step, as an auxiliary loss sees it.

    Floating-point tensors other than the pre-activations and parameters are in at least
    float32, also under autocast.

    Attributes:
        x: (B, d_in) what the SAE is to reconstruct. Under ``normalize_activations=
            "layer_norm"`` each row's mean is taken off, as it is from what the decoder gives.
        residual: (B, d_in) ``r``, detached.
        dead: (d_sae,) bool, the dead latents by the config's ``dead_criterion``.
        max_dead: a number that the dead latents are no more than, known without waiting for
            the device.
        access: the way to ``h`` and ``W_i``; the methods below use it.
        W_dec: (d_sae, d_in) decoder weights as they are stored.
        b_dec: (d_in,) decoder bias.
        output_scale: (B, 1) factor from the decoder's output to the units of ``x``, or None.
            It is there under the two run-time modes of ``normalize_activations``.
        firing_threshold: gives what ``h`` must exceed for a latent to fire, in a shape that
            broadcasts to (B, d_sae). A function because TopK must search for it.
        d_sae: number of latents that a mean over latents runs over. It is larger than
            ``dead.numel()`` where the record is one level of a Matryoshka SAE.
    """

    x: torch.Tensor
    residual: torch.Tensor
    dead: torch.Tensor
    max_dead: int
    access: LatentAccess
    W_dec: torch.Tensor
    b_dec: torch.Tensor
    output_scale: torch.Tensor | None
    firing_threshold: Callable[[], torch.Tensor]
    d_sae: int

    @property
    def hidden_pre(self) -> torch.Tensor:
        """(B, d_sae) ``h``, with its graph: it leads to W_enc, b_enc, to b_dec where
        ``apply_b_dec_to_input``, and to the decoder norm where ``h`` is rescaled by it. Its
        gradient is as large as itself; the methods below are cheaper."""
        return self.access.columns()

    @cached_property
    def dead_latents(self) -> torch.Tensor:
        """(n_dead,) int64, the dead latents as indices, ascending.

        Never empty where the loss was registered with ``uses_dead_latents=True``. To ask for it
        is to wait for the device.
        """
        return self.dead.nonzero().squeeze(1)

    def dead_hidden_pre(self) -> torch.Tensor:
        """(B, n_dead): the columns of ``h`` that belong to dead latents, with their graph."""
        return self.access.columns(self.dead_latents)

    def dead_columns(self) -> Columns:
        """``h`` of the dead latents, and a way to decode with them, without waiting for how many.

        For a loss that needs all of them and must be fast: there may be more columns than dead
        latents, -inf each.
        """
        return self.access.columns_among(self.dead, self.max_dead)

    def dead_threshold(self) -> torch.Tensor:
        """What ``h`` of the dead latents must exceed to fire, broadcastable to (B, n_dead).

        For :meth:`dead_hidden_pre`; :meth:`dead_columns` are more.
        """
        threshold = self.firing_threshold()
        if threshold.ndim == 0 or threshold.shape[-1] == 1:
            return threshold
        return threshold.index_select(-1, self.dead_latents)

    def dead_shortfall(self) -> torch.Tensor:
        """(B,): the sum of ``relu(threshold - h)`` over the dead latents, with its graph."""
        return self.access.shortfall(self.firing_threshold(), self.dead, self.max_dead)

    def hidden_pre_sums(self) -> torch.Tensor:
        """(d_sae,): ``h`` summed over the batch, with its graph."""
        return self.access.sums()

    def nearest_dead(self, k: int) -> Activations:
        """The ``min(k, n_dead)`` dead latents with the largest ``h`` in each row: ``T_b``."""
        return self.access.largest(k, self.dead, self.max_dead)

    def best_dead_match(self, x: torch.Tensor) -> Activations:
        """The latent of each row with the largest ``W_i . x_b`` (B, d_in), if it is a dead one."""
        return self.access.best_match(x, self.dead, slice(None))

    def largest(self, k: int) -> Activations:
        """The ``k`` latents, dead or alive, with the largest ``h`` in each row."""
        n = self.dead.numel()
        return self.access.largest(min(k, n), None, n)

    def to_output_units(self, reconstruction: torch.Tensor) -> torch.Tensor:
        """Bring a decoder output (B, d_in) to the units and precision of ``x``."""
        reconstruction = reconstruction.to(self.x.dtype)
        if self.output_scale is None:
            return reconstruction
        return reconstruction * self.output_scale

    def at_rows(self, rows: torch.Tensor) -> "AuxLossInputs":
        """The same step, seen by some rows (m,) of its batch only."""

        def threshold() -> torch.Tensor:
            of_all = self.firing_threshold()
            return of_all.index_select(0, rows) if of_all.ndim == 2 else of_all

        return replace(
            self,
            x=self.x.index_select(0, rows),
            residual=self.residual.index_select(0, rows),
            access=self.access.at_rows(rows),
            output_scale=None
            if self.output_scale is None
            else self.output_scale.index_select(0, rows),
            firing_threshold=threshold,
        )


AuxLossFn = Callable[[AuxLossInputs, Any], torch.Tensor]


@dataclass(frozen=True)
class AuxLoss:
    """A registered auxiliary loss and what the SAE must know to call it.

    Attributes:
        function: ``(inputs, cfg) -> scalar``, without the coefficient.
        default_coefficient: used where the config says ``aux_loss_coefficient=None``.
        default_dead_criterion: used where the config says ``dead_criterion=None``.
        uses_dead_latents: where True the loss is skipped (0) while no latent is dead.
        uses_k_aux: where True it takes the ``k_aux`` dead latents with the largest ``h``
            of each row, where False all dead latents; only the metric ``k_aux_used`` asks.
        topk_only: where True only architectures of the TopK family can serve it.
        by_mask: where True it never asks for ``dead_latents`` or what is made of them, so that
            no step has to wait for the device; it must then be defined, though it is not used,
            where no latent is dead.
    """

    function: AuxLossFn
    default_coefficient: float
    default_dead_criterion: DeadCriterion = "tokens"
    uses_dead_latents: bool = True
    uses_k_aux: bool = False
    topk_only: bool = False
    by_mask: bool = False


AUX_LOSSES: dict[str, AuxLoss] = {}


def register_aux_loss(
    name: str,
    function: AuxLossFn | None = None,
    *,
    default_coefficient: float = 1.0,
    default_dead_criterion: DeadCriterion = "tokens",
    uses_dead_latents: bool = True,
    uses_k_aux: bool = False,
    topk_only: bool = False,
    by_mask: bool = False,
) -> Any:
    """Make ``function`` available as ``aux_variant=name``, directly or as a decorator.

    Args:
        name: the value that ``aux_variant`` takes.
        function: ``(inputs: AuxLossInputs, cfg) -> scalar tensor``, without its coefficient.
            Left out, the call returns a decorator.
        default_coefficient: the coefficient where the config names none.
        default_dead_criterion: the criterion where the config names none.
        uses_dead_latents: False for a loss that is meant also while no latent is dead.
        uses_k_aux: True for a loss over the ``k_aux`` dead latents with the largest ``h``
            (:meth:`AuxLossInputs.nearest_dead`); only a metric asks.
        topk_only: True to refuse architectures without a ``k``.
        by_mask: see :class:`AuxLoss`.

    Returns:
        The function, unchanged (or the decorator).

    Raises:
        ValueError: another function has this name already. The same one again is no error,
            nor is a new version of it, as when a notebook's cell is run once more.

    Example:
        >>> @register_aux_loss("firing_margin", default_coefficient=1e-3)
        ... def firing_margin(inputs, cfg):
        ...     missing = inputs.dead_threshold() - inputs.dead_hidden_pre()
        ...     return missing.relu().square().sum(dim=-1).mean()
    """
    if function is None:
        return lambda fn: register_aux_loss(
            name,
            fn,
            default_coefficient=default_coefficient,
            default_dead_criterion=default_dead_criterion,
            uses_dead_latents=uses_dead_latents,
            uses_k_aux=uses_k_aux,
            topk_only=topk_only,
            by_mask=by_mask,
        )
    entry = AuxLoss(
        function=function,
        default_coefficient=default_coefficient,
        default_dead_criterion=default_dead_criterion,
        uses_dead_latents=uses_dead_latents,
        uses_k_aux=uses_k_aux,
        topk_only=topk_only,
        by_mask=by_mask,
    )
    taken = AUX_LOSSES.get(name)
    if taken is not None and _origin(taken.function) != _origin(function):
        raise ValueError(
            f"aux_variant {name!r} is registered already, to another loss; "
            f"taken names: {', '.join(sorted(AUX_LOSSES))}"
        )
    AUX_LOSSES[name] = entry
    return function


def _origin(function: AuxLossFn) -> tuple[str, str]:
    return function.__module__, function.__qualname__


# Each file registers its loss when it is imported; the order is that of messages and docs.
# pyright: reportUnusedImport=false
from sae_lens_auxk.aux_losses import (  # noqa: E402, F401, I001
    auxk,
    reanimation,
    straight_through,
    pre_activation,
    ghost_gradients,
    multi_topk,
    none,
)
