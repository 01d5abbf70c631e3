"""The registry that finds auxiliary losses by name.

An auxiliary loss is a pure function ``loss(inputs, cfg) -> scalar tensor``. It reads one
:class:`~sae_lens_auxk.losses.record.AuxLossInputs` and the SAE's config, and does not see modules,
the trainer or the logger. The caller applies the scheduled coefficient. The package's own losses
are one file each in this folder; :func:`register_aux_loss` adds another.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

import torch

from sae_lens_auxk.checks import require_choice
from sae_lens_auxk.losses.record import AuxLossInputs

ENTRY_POINTS = "sae_lens_auxk.aux_losses"
"""The entry-point group in which an installed package declares its losses."""

DeadCriterion = Literal["tokens", "steps", "batch"]

AuxLossFn = Callable[[AuxLossInputs, Any], torch.Tensor]


@dataclass(frozen=True)
class AuxLoss:
    """A registered auxiliary loss.

    Attributes:
        function: ``(inputs, cfg) -> scalar``, without the coefficient.
        default_coefficient: the coefficient where the config has ``aux_loss_coefficient=None``.
        default_dead_criterion: the criterion where the config has ``dead_criterion=None``.
        uses_dead_latents: whether the loss is 0 while no latent is dead. False: it is computed
            anyway.
        uses_k_aux: whether the loss takes the ``k_aux`` dead latents with the largest ``h`` of
            each row (:meth:`AuxLossInputs.nearest_dead`) rather than all of them. Only the metric
            ``k_aux_used`` asks.
        topk_only: whether it works only with architectures of the TopK family.
        sync_free: whether it avoids ``dead_latents`` and everything computed from them, so that no
            step waits for the device. Such a loss is also called when no latent is dead, and must
            not fail then; its value is not used.
        capturable: whether a step with the loss may be captured as a CUDA graph: it never waits for
            the device, and does nothing that only Python sees.
        shardable: whether the loss is the same where latents are shared among processes: it is
            ``sync_free``, sums over latents by :meth:`AuxLossInputs.total` only, and compares them
            by :meth:`AuxLossInputs.largest_of` and the methods of the record. Otherwise it is
            refused there.
    """

    function: AuxLossFn
    default_coefficient: float = 1.0
    default_dead_criterion: DeadCriterion = "tokens"
    uses_dead_latents: bool = True
    uses_k_aux: bool = False
    topk_only: bool = False
    sync_free: bool = False
    capturable: bool = False
    shardable: bool = False


AUX_LOSSES: dict[str, AuxLoss] = {}


def register_aux_loss(name: str, function: AuxLossFn | None = None, **properties: Any) -> Any:
    """Make ``function`` available as ``aux_variant=name``, directly or as a decorator.

    The module that calls this must be imported before a config names the loss. On the command
    line, ``sae-lens-auxk train --import my_losses`` and ``compare --import my_losses`` do that. A
    package that declares the loss is imported as soon as a config names it, without a flag::

        [project.entry-points."sae_lens_auxk.aux_losses"]
        mine = "my_package.losses"

    The entry point's name is the loss's, and its value the module that registers it.

    Args:
        name: the value that ``aux_variant`` takes.
        function: ``(inputs: AuxLossInputs, cfg) -> scalar tensor``, without its coefficient.
            Left out, the call returns a decorator.
        properties: the attributes of :class:`AuxLoss`, each with its default there.

    Returns:
        The function, unchanged (or the decorator).

    Raises:
        ValueError: another function has this name already. Registering the same one again is
            allowed, and so is a new version of it, as when a notebook's cell is run once more.

    Example:
        >>> @register_aux_loss("firing_margin", default_coefficient=1e-3)
        ... def firing_margin(inputs, cfg):
        ...     h = inputs.dead_hidden_pre()
        ...     missing = inputs.dead_threshold() - inputs.nearness(h)
        ...     return missing.relu().square().sum(dim=-1).mean()
    """
    if function is None:
        return partial(register_aux_loss, name, **properties)
    taken = AUX_LOSSES.get(name)
    if taken is not None and _origin(taken.function) != _origin(function):
        raise ValueError(
            f"aux_variant {name!r} is already registered for another loss; "
            f"taken names: {', '.join(sorted(AUX_LOSSES))}"
        )
    AUX_LOSSES[name] = AuxLoss(function, **properties)
    return function


def find_aux_loss(name: Any) -> AuxLoss:
    """Find the loss named by ``aux_variant=name``, in an installed package if necessary.

    Raises:
        ValueError: no loss has this name, or the package that declares it cannot be imported.
    """
    if not isinstance(name, str) or name not in AUX_LOSSES:
        declared = entry_points(group=ENTRY_POINTS)
        names = dict.fromkeys([*AUX_LOSSES, *sorted(declared.names)])
        require_choice("aux_variant", name, names, _HOW_TO_IMPORT)
        for entry_point in declared.select(name=name):
            _load(entry_point)
    return AUX_LOSSES[name]


_HOW_TO_IMPORT = (
    " (a loss of your own: import the module that registers it first, on the command line with "
    "--import MODULE)"
)


def _load(entry_point: EntryPoint) -> None:
    """Import the module that an entry point names, which registers a loss of that name."""
    package = entry_point.dist.name if entry_point.dist else "an unknown package"
    which = (
        f"aux_variant={entry_point.name!r} cannot be used: its entry point in the group "
        f"{ENTRY_POINTS}, {entry_point.value!r} of {package},"
    )
    try:
        entry_point.load()
    # The import runs other people's code, which may raise anything.
    except Exception as error:
        raise ValueError(f"{which} cannot be loaded: {type(error).__name__}: {error}") from error
    if entry_point.name not in AUX_LOSSES:
        raise ValueError(f"{which} registers no loss of that name.")


def _origin(function: AuxLossFn) -> tuple[str, str]:
    return function.__module__, function.__qualname__
