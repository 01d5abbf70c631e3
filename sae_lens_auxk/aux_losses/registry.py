"""The inputs of an auxiliary loss, and the registry that finds losses by name.

An auxiliary loss is a pure function ``loss(inputs, cfg) -> scalar tensor``. It reads one
:class:`AuxLossInputs` record and the SAE's config, and does not see modules, the trainer or the
logger. The caller applies the scheduled coefficient. The package's own losses are one file each in
this folder; :func:`register_aux_loss` adds another.

Notation in the formulas of every file here: ``B`` rows in the batch, ``x`` the SAE's input, ``h``
the pre-activations, ``D`` the dead latents, ``W_i`` the decoder row of latent ``i`` (divided by
its norm where SAELens's ``rescale_acts_by_decoder_norm`` is on), ``b`` the decoder bias, ``r =
stopgrad(x - sae_out)`` the residual. Losses are summed over ``d_in`` and averaged over the batch,
as SAELens's MSE is, so that a coefficient has the same weight relative to that MSE as in its
source.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Literal

import torch

from sae_lens_auxk.latent_access import Activations, Columns, LatentAccess
from sae_lens_auxk.validation import require_choice

ENTRY_POINTS = "sae_lens_auxk.aux_losses"
"""The entry-point group in which an installed package declares its losses."""

DeadCriterion = Literal["tokens", "steps", "batch"]


@dataclass(frozen=True)
class AuxLossInputs:
    """One training step, as an auxiliary loss sees it.

    Floating-point tensors other than the pre-activations and parameters are in at least
    float32, also under autocast.

    Attributes:
        x: (B, d_in) the target of the reconstruction. Under ``normalize_activations=
            "layer_norm"`` each row's mean is subtracted, as it is from the decoder's output.
        residual: (B, d_in) ``r``, detached.
        dead: (d_sae,) bool, the dead latents by the config's ``dead_criterion``; only those of one
            level if each Matryoshka level has its own loss.
        dead_bound: an upper bound on the number of dead latents, known without waiting for the
            device.
        access: gives ``h`` and ``W_i``; the methods below use it.
        W_dec: (d_sae, d_in) decoder weights as they are stored.
        b_dec: (d_in,) decoder bias.
        output_scale: (B, 1) factor from the decoder's output to the units of ``x``, or None. Only
            the two run-time modes of ``normalize_activations`` have one.
        firing_threshold: returns the value that ``h`` must exceed for a latent to fire,
            broadcastable to (B, d_sae). It is a function because TopK must search for the value.
        level: which latents compete: all, or those of one Matryoshka level.
    """

    x: torch.Tensor
    residual: torch.Tensor
    dead: torch.Tensor
    dead_bound: int
    access: LatentAccess
    W_dec: torch.Tensor
    b_dec: torch.Tensor
    output_scale: torch.Tensor | None
    firing_threshold: Callable[[], torch.Tensor]
    level: slice

    @property
    def d_sae(self) -> int:
        """The number of latents of the whole SAE, even for one Matryoshka level."""
        return self.dead.numel()

    @property
    def by_magnitude(self) -> bool:
        """Whether latents fire in both directions, as AbsTopK's do, and have no ReLU.

        If so, ``|h|`` measures nearness to firing, and the methods below that compare, sum or
        threshold ``h`` use ``|h|``.
        """
        return self.access.by_magnitude

    @property
    def hidden_pre(self) -> torch.Tensor:
        """(B, d_sae) ``h``, with its graph.

        The graph leads to W_enc, b_enc, to b_dec where ``apply_b_dec_to_input``, and to the
        decoder norm where ``h`` is rescaled by it. The gradient is as large as ``h`` itself; the
        methods below are cheaper.
        """
        return self.access.columns()

    @cached_property
    def dead_latents(self) -> torch.Tensor:
        """(n_dead,) int64, the indices of the dead latents, ascending.

        Never empty where the loss was registered with ``uses_dead_latents=True``. Reading it waits
        for the device.
        """
        return self.dead.nonzero().squeeze(1)

    @cached_property
    def n_dead(self) -> torch.Tensor:
        """() int64, the number of dead latents, on the device."""
        return self.dead.sum()

    def dead_hidden_pre(self) -> torch.Tensor:
        """(B, n_dead): the columns of ``h`` of the dead latents, with their graph."""
        return self.access.columns(self.dead_latents)

    def dead_columns(self) -> Columns:
        """``h`` of the dead latents, and a way to decode with them, without waiting for how many.

        For a loss that needs all of them and must be fast. There may be more columns than dead
        latents; those are -inf.
        """
        return self.access.columns_among(self.dead, self.dead_bound)

    def dead_threshold(self) -> torch.Tensor:
        """What ``h`` of the dead latents must exceed to fire, broadcastable to (B, n_dead).

        What ``|h|`` must exceed where ``by_magnitude``. It goes with :meth:`dead_hidden_pre`, not
        with :meth:`dead_columns`, which may be more.
        """
        threshold = self.firing_threshold()
        if threshold.ndim == 0 or threshold.shape[-1] == 1:
            return threshold
        return threshold.index_select(-1, self.dead_latents)

    def dead_shortfall(self) -> torch.Tensor:
        """(B,): the sum of ``relu(threshold - h)`` over the dead latents, with its graph.

        Of ``relu(threshold - |h|)`` where ``by_magnitude``.
        """
        return self.access.shortfall(self.firing_threshold(), self.dead, self.dead_bound)

    def hidden_pre_sums(self) -> torch.Tensor:
        """(d_sae,): ``h`` summed over the batch, with its graph; ``|h|`` where ``by_magnitude``."""
        return self.access.sums()

    def nearest_dead(self, k: int) -> Activations:
        """The ``min(k, n_dead)`` dead latents with the largest ``h`` in each row: ``T_b``.

        Those with the largest ``|h|`` where ``by_magnitude``; their ``h`` keeps its sign.
        """
        return self.access.largest(k, self.dead, self.dead_bound)

    def best_dead_match(self, x: torch.Tensor) -> Activations:
        """Each row's latent with the largest ``W_i . x_b / |W_i|``, if that latent is dead.

        It is the one with the largest ``|W_i . x_b| / |W_i|`` if ``by_magnitude``.

        Args:
            x: (B, d_in).

        Returns:
            One entry per row, or none for a row whose best match is alive.
        """
        return self.access.best_match(x, self.dead, self.level)

    def largest(self, k: int) -> Activations:
        """The ``k`` latents, dead or alive, with the largest ``h`` in each row, or ``|h|``."""
        return self.access.largest(min(k, self.d_sae), None, self.d_sae)

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of ``x`` (..., m) over its last dimension, which are latents: (...).

        If latents are shared among processes, ``x`` has this process's latents, and the sum is over
        all processes. With one process it is ``x.sum(dim=-1)``.
        """
        return self.access.latents.sum(x.sum(dim=-1))

    def largest_of(self, x: torch.Tensor) -> torch.Tensor:
        """(..., 1): the largest entry of ``x`` (..., m) as :meth:`total` is its sum; no graph."""
        return self.access.latents.max(x.detach().amax(dim=-1, keepdim=True))

    def to_output_units(self, reconstruction: torch.Tensor) -> torch.Tensor:
        """Bring a decoder output (B, d_in) to the units and precision of ``x``."""
        reconstruction = reconstruction.to(self.x.dtype)
        if self.output_scale is None:
            return reconstruction
        return reconstruction * self.output_scale

    def at_rows(self, rows: torch.Tensor) -> "AuxLossInputs":
        """The same step, restricted to some rows (m,) of its batch."""

        def threshold() -> torch.Tensor:
            of_all = self.firing_threshold()
            return of_all.index_select(0, rows) if of_all.ndim == 2 else of_all

        scale = self.output_scale
        return replace(
            self,
            x=self.x.index_select(0, rows),
            residual=self.residual.index_select(0, rows),
            access=self.access.at_rows(rows),
            output_scale=None if scale is None else scale.index_select(0, rows),
            firing_threshold=threshold,
        )


AuxLossFn = Callable[[AuxLossInputs, Any], torch.Tensor]


@dataclass(frozen=True)
class AuxLoss:
    """A registered auxiliary loss, called as ``loss(inputs, cfg)``.

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
        shardable: whether the loss sums over latents by :meth:`AuxLossInputs.total` only, and
            compares them by :meth:`AuxLossInputs.largest_of` and the methods of the record, so that
            it is the same where latents are shared among processes. Otherwise it is refused there.
    """

    function: AuxLossFn
    default_coefficient: float = 1.0
    default_dead_criterion: DeadCriterion = "tokens"
    uses_dead_latents: bool = True
    uses_k_aux: bool = False
    topk_only: bool = False
    sync_free: bool = False
    shardable: bool = False

    def __call__(self, inputs: AuxLossInputs, cfg: Any) -> torch.Tensor:
        """The loss of one record; 0 if it needs dead latents and there are none."""
        if self.uses_dead_latents and not self.sync_free and inputs.dead_latents.numel() == 0:
            return inputs.x.new_zeros(())
        loss = self.function(inputs, cfg)
        if self.uses_dead_latents and self.sync_free:
            loss = loss.where(inputs.n_dead > 0, 0)
        return loss


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
        ...     missing = inputs.dead_threshold() - inputs.dead_hidden_pre()
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
