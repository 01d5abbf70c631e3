"""The record of one training step that an auxiliary loss gets.

Its symbols: ``B`` the rows of the batch, ``h`` the pre-activations, ``D`` the dead latents, ``W_i``
the decoder row of latent ``i`` (divided by its norm where SAELens's
``rescale_acts_by_decoder_norm`` is on), ``b`` the decoder bias, ``r = stopgrad(x - sae_out)`` the
residual. Losses are summed over ``d_in`` and averaged over the batch, as SAELens's MSE is, so that
a coefficient has the same weight relative to that MSE as in its source.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from sae_lens_auxk.losses.access import Activations, Columns, LatentAccess, Pointwise


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
        firing_threshold: returns what ``nearness(h)`` must exceed for a latent to fire,
            broadcastable to (B, d_sae). It is a function because TopK must search for the value.
        nearness: the SAE's function of any ``h``: how near to firing it is. ``h`` itself;
            ``|h|`` for AbsTopK, whose latents fire in both directions.
        fire: the SAE's function of any ``h``: its activation if it is selected. ``relu(h)``;
            ``h`` itself for AbsTopK.
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
    nearness: Pointwise
    fire: Pointwise
    level: slice

    @property
    def d_sae(self) -> int:
        """The number of latents of the whole SAE, even for one Matryoshka level."""
        return self.dead.numel()

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
        latents: :class:`~sae_lens_auxk.losses.access.Columns` says which are real.
        """
        return self.access.columns_among(self.dead, self.dead_bound)

    def dead_threshold(self, columns: Columns | None = None) -> torch.Tensor:
        """What the dead latents must exceed to fire, broadcastable to their ``h``.

        Args:
            columns: where ``h`` is from :meth:`dead_columns`, these; None where it is from
                :meth:`dead_hidden_pre`.
        """
        threshold = self.firing_threshold()
        if threshold.ndim == 0 or threshold.shape[-1] == 1:
            return threshold
        latents = self.dead_latents if columns is None else columns.latents
        return threshold.index_select(-1, latents)

    def hidden_pre_sums(self) -> torch.Tensor:
        """(d_sae,): ``nearness(h)`` summed over the batch, with its graph."""
        return self.access.sums()

    def nearest_dead(self, k: int) -> Activations:
        """The ``min(k, n_dead)`` dead latents of largest ``nearness(h)`` in each row: ``T_b``."""
        return self.access.largest(k, self.dead, self.dead_bound)

    def best_dead_match(self, x: torch.Tensor) -> Activations:
        """Each row's latent of largest relative match, if that latent is dead.

        A match is ``nearness(W_i . x_b)``, relative to the root mean square of ``W_i . x`` over
        the rows of the batch.

        Args:
            x: (B, d_in).

        Returns:
            One entry per row, or none for a row whose best match is alive.
        """
        return self.access.best_match(x, self.dead, self.level)

    def largest(self, k: int) -> Activations:
        """The ``k`` latents, dead or alive, of largest ``nearness(h)`` in each row."""
        return self.access.largest(min(k, self.d_sae), None, self.d_sae)

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of ``x`` (..., m) over its last dimension, which are latents: (...).

        In at least float32. If latents are shared among processes, ``x`` has this process's
        latents, and the sum is over all processes.
        """
        return x.sum(dim=-1, dtype=torch.promote_types(x.dtype, torch.float32))

    def largest_of(self, x: torch.Tensor) -> torch.Tensor:
        """(..., 1): the largest entry of ``x`` (..., m) as :meth:`total` is its sum; no graph."""
        return x.detach().amax(dim=-1, keepdim=True)

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
