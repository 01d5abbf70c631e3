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
from typing import Any, Literal, Protocol

import torch

from sae_lens_auxk.ops.topk import top_k

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
        hidden_pre: (B, d_sae) ``h``, with its graph: it leads to W_enc, b_enc, to b_dec where
            ``apply_b_dec_to_input``, and to the decoder norm where ``h`` is rescaled by it.
        columns: ``latents (n,) -> (B, n)``, columns of ``h`` with their graph. Cheaper than to
            index ``hidden_pre``, whose gradient is as large as itself.
        dead: (d_sae,) bool, the dead latents by the config's ``dead_criterion``.
        dead_latents: (n_dead,) int64, the same as indices, ascending. Never empty where the
            loss was registered with ``uses_dead_latents=True``.
        W_dec: (d_sae, d_in) decoder weights as they are stored.
        b_dec: (d_in,) decoder bias.
        rescaled: whether SAELens multiplies ``h`` by the norms of W_dec's rows and divides the
            rows by them (``rescale_acts_by_decoder_norm``).
        output_scale: (B, 1) factor from the decoder's output to the units of ``x``, or None.
            It is there under the two run-time modes of ``normalize_activations``.
        firing_threshold: gives what ``h`` must exceed for a latent to fire, in a shape that
            broadcasts to (B, d_sae). A function because TopK must search for it.
        d_sae: number of latents that a mean over latents runs over. It is larger than
            ``hidden_pre.shape[1]`` where the record is one level of a Matryoshka SAE.
        nearest: a faster way to :meth:`nearest_dead` with k < n_dead, where there is one.
    """

    x: torch.Tensor
    residual: torch.Tensor
    hidden_pre: torch.Tensor
    columns: Callable[[torch.Tensor], torch.Tensor]
    dead: torch.Tensor
    dead_latents: torch.Tensor
    W_dec: torch.Tensor
    b_dec: torch.Tensor
    rescaled: bool
    output_scale: torch.Tensor | None
    firing_threshold: Callable[[], torch.Tensor]
    d_sae: int
    nearest: "Callable[[AuxLossInputs, int], DeadActivations] | None" = None

    def dead_hidden_pre(self) -> torch.Tensor:
        """(B, n_dead): the columns of ``h`` that belong to dead latents, with their graph."""
        return self.columns(self.dead_latents)

    def dead_decoder(self) -> torch.Tensor:
        """(n_dead, d_in): the rows ``W_i`` of the dead latents, with their graph."""
        rows = self.W_dec.index_select(0, self.dead_latents)
        return rows / rows.norm(dim=-1, keepdim=True) if self.rescaled else rows

    def nearest_dead(self, k: int) -> "DeadActivations":
        """The ``min(k, n_dead)`` dead latents with the largest ``h`` in each row: ``T_b``."""
        if self.nearest is not None and k < self.dead_latents.numel():
            return self.nearest(self, k)
        return MaskedColumns(self, keep_largest(self.dead_hidden_pre(), k))

    def to_output_units(self, reconstruction: torch.Tensor) -> torch.Tensor:
        """Bring a decoder output (B, d_in) to the units and precision of ``x``."""
        reconstruction = reconstruction.to(self.x.dtype)
        if self.output_scale is None:
            return reconstruction
        return reconstruction * self.output_scale


class DeadActivations(Protocol):
    """Pre-activations of some dead latents in each row, and what can be done with them.

    ``h`` is (B, m), with its graph; an entry that does not belong to the selection is 0.
    """

    @property
    def h(self) -> torch.Tensor: ...

    def relu(self) -> "DeadActivations":
        """The same with negative values set to 0."""
        ...

    def decode(self) -> torch.Tensor:
        """(B, d_in): the sum of ``h_bi W_i`` over the selection, with its graph."""
        ...

    def project(self, x: torch.Tensor) -> torch.Tensor:
        """(B, m): ``x_b . W_i`` for each entry of ``h``, without a graph."""
        ...


@dataclass(frozen=True)
class MaskedColumns:
    """A selection as (B, n_dead), zeros outside of it: dense products over the dead latents."""

    inputs: AuxLossInputs
    h: torch.Tensor

    def relu(self) -> "MaskedColumns":
        return replace(self, h=self.h.relu())

    def decode(self) -> torch.Tensor:
        return self.h @ self.inputs.dead_decoder()

    @torch.no_grad()
    def project(self, x: torch.Tensor) -> torch.Tensor:
        W = self.inputs.dead_decoder()
        return x.to(W.dtype) @ W.T


def keep_largest(h: torch.Tensor, k: int) -> torch.Tensor:
    """(B, n): ``h`` with all but the ``k`` largest entries of each row set to 0.

    Where ``k >= n`` this is ``h`` itself.
    """
    if k >= h.shape[1]:
        return h
    with torch.no_grad():
        _, indices = top_k(h, k)
    return torch.zeros_like(h).scatter(-1, indices, h.gather(-1, indices))


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
    """

    function: AuxLossFn
    default_coefficient: float
    default_dead_criterion: DeadCriterion = "tokens"
    uses_dead_latents: bool = True
    uses_k_aux: bool = False
    topk_only: bool = False


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
            (see :func:`sae_lens_auxk.aux_losses.auxk.keep_largest`).
        topk_only: True to refuse architectures without a ``k``.

    Returns:
        The function, unchanged (or the decorator).

    Raises:
        ValueError: another function has this name already. The same one again is no error,
            nor is a new version of it, as when a notebook's cell is run once more.

    Example:
        >>> @register_aux_loss("firing_margin", default_coefficient=1e-3)
        ... def firing_margin(inputs, cfg):
        ...     margin = inputs.firing_threshold().expand_as(inputs.hidden_pre)
        ...     missing = margin.index_select(1, inputs.dead_latents) - inputs.dead_hidden_pre()
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
        )
    entry = AuxLoss(
        function=function,
        default_coefficient=default_coefficient,
        default_dead_criterion=default_dead_criterion,
        uses_dead_latents=uses_dead_latents,
        uses_k_aux=uses_k_aux,
        topk_only=topk_only,
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
