"""The TopK family's training step, on the selected latents only.

SAELens computes with all of (B, d_sae) four times over: a dense activation tensor forward, a
dense gradient backward. Here the encoder's product is the one dense operation. The selected
activations are a short list of (row, latent) pairs; decoder, and both gradients, touch only
the rows of those pairs.

What the step computes is SAELens's: same selection, same losses, same gradients. With
``rescale_acts_by_decoder_norm`` SAELens multiplies a pre-activation by its decoder norm, selects,
and divides by it again to decode; the norm's gradients cancel, so that here it serves for the
selection only.
"""

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import act_times_W_dec
from typing_extensions import override

from sae_lens_auxk.aux_training import never_compiled
from sae_lens_auxk.latent_access import LatentAccess
from sae_lens_auxk.ops import use_sparse_step
from sae_lens_auxk.ops.activations import SelectedActivations
from sae_lens_auxk.ops.columns import gather_columns, indices_of
from sae_lens_auxk.ops.decoder import Decoder
from sae_lens_auxk.ops.encoder import Encoder
from sae_lens_auxk.ops.selected import InColumns, Pairs, Selected
from sae_lens_auxk.ops.topk import top_k, top_k_of_batch

if TYPE_CHECKING:
    from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE

    from sae_lens_auxk.aux_training import AuxTraining

    class _Base(AuxTraining, MatryoshkaBatchTopKTrainingSAE): ...  # type: ignore[misc]
else:
    _Base = object


# Up to this size a dense tensor costs next to nothing, and it is what other code expects.
MAX_DENSE_ENTRIES = 2**22


@dataclass
class SparseStep:
    """What one training step has selected.

    Attributes:
        encoder: the pre-activations.
        selected: the pairs.
        values: (N,) activations before the decoder norm, with their graph.
        acts: (B, d_sae) the activations as SAELens's trainer takes them: sparse COO, or dense
            where that is small.
        inner: Matryoshka's inner reconstructions, (B, d_in) each.
    """

    encoder: Encoder
    selected: Pairs
    values: torch.Tensor
    acts: torch.Tensor
    inner: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True)
class SparseActivations:
    """Selected entries of ``h``; see :class:`~sae_lens_auxk.latent_access.Activations`.

    ``pre`` (B, k) are pre-activations before the decoder norm, which is what decodes with the
    rows of W_dec as they are.
    """

    encoder: Encoder
    selected: Selected
    pre: torch.Tensor

    @property
    def decoder(self) -> Decoder:
        return self.encoder.decoder

    @property
    def h(self) -> torch.Tensor:
        return self.decoder.times_norm(self.pre, self.selected)

    def relu(self) -> "SparseActivations":
        return replace(self, pre=self.pre.relu())

    def decode(self) -> torch.Tensor:
        return self.decoder.weighted_sums(self.pre, self.selected)

    def decode_as(self, values: torch.Tensor) -> torch.Tensor:
        pre = values.to(self.pre.dtype) / self.decoder.norm_at(self.selected, values)
        return self.decoder.weighted_sums(pre, self.selected)

    @torch.no_grad()
    def project(self, x: torch.Tensor) -> torch.Tensor:
        products = self.decoder.dots(x, self.selected).view_as(self.pre)
        return products / self.decoder.norm_at(self.selected, products)


@dataclass(frozen=True)
class SparseColumns:
    """See :class:`~sae_lens_auxk.latent_access.Columns`.

    ``latents`` (n,) int64 are those of the columns, of which the first ``n_latents`` () count.
    """

    h: torch.Tensor
    decoder: Decoder
    latents: torch.Tensor
    n_latents: torch.Tensor

    def decode(self, acts: torch.Tensor) -> torch.Tensor:
        return self.decoder.of_columns(acts, self.latents, self.n_latents)


@dataclass(frozen=True)
class SparseAccess:
    """See :class:`~sae_lens_auxk.latent_access.LatentAccess`."""

    encoder: Encoder

    def columns(self, latents: torch.Tensor | None = None) -> torch.Tensor:
        return self.encoder.columns(latents)

    def columns_among(self, among: torch.Tensor, at_most: int) -> "SparseColumns":
        latents, n_latents = indices_of(among, at_most), among.sum()
        h = self.encoder.columns(latents, n_latents)
        return SparseColumns(h, self.encoder.decoder, latents, n_latents)

    def sums(self) -> torch.Tensor:
        return self.encoder.sums()

    def largest(self, k: int, among: torch.Tensor | None, at_most: int) -> SparseActivations:
        hidden_pre, d_sae = self.encoder.hidden_pre, self.encoder.W.shape[1]
        selected: Selected
        with torch.no_grad():
            dense = at_most <= COLUMNS_WORTH_A_PAIR[hidden_pre.is_cuda] * k
            if among is not None and (dense or not hidden_pre.is_cuda):
                latents = indices_of(among, at_most)
                h = gather_columns(hidden_pre, latents, among.sum())
                positions = None
                if k < len(latents):
                    h, positions = top_k(h, k)
                selected = InColumns(latents, positions, d_sae)
                if not dense:
                    selected = Pairs.per_row(selected.latents, d_sae)
            else:
                h, latents = top_k(hidden_pre, k, among)
                selected = Pairs.per_row(latents, d_sae)
            h = h.masked_fill_(h == -torch.inf, 0)
        return _activations(self.encoder, h, selected)

    def best_match(self, x: torch.Tensor, among: torch.Tensor, level: slice) -> SparseActivations:
        encoder = self.encoder
        with torch.no_grad():
            products = encoder.decoder.all_dots(x, level)
            best = top_k(products, 1)[1] + (level.start or 0)
            h = encoder.hidden_pre.gather(1, best).where(among[best], 0)
        return _activations(encoder, h, Pairs.per_row(best, encoder.W.shape[1]))

    def shortfall(self, threshold: torch.Tensor, among: torch.Tensor, at_most: int) -> torch.Tensor:
        return self.encoder.shortfall(threshold, indices_of(among, at_most), among.sum())

    def at_rows(self, rows: torch.Tensor) -> "SparseAccess":
        return SparseAccess(self.encoder.at_rows(rows))


def _activations(encoder: Encoder, h: torch.Tensor, selected: Selected) -> SparseActivations:
    """Selected values ``h`` (B, k); one that is 0 stands for nothing, and gets no gradient."""
    pre = encoder.before_norm(h, selected)
    return SparseActivations(encoder, selected, pre.where(h != 0, 0))


# Over up to so many times k_aux dead latents a dense product is faster than pairs. By device:
# measured on a CPU, and on an H100 (docs/performance.md).
COLUMNS_WORTH_A_PAIR = {False: 6, True: 64}


class SparseTopK(_Base):
    """Mixin in front of SAELens's TopK, BatchTopK or Matryoshka training SAE.

    A step is sparse unless something needs the dense tensors: hooks on the SAE, an input with a
    gradient, or parameters in half precision, for which torch has no gradient of the products.
    """

    _step: SparseStep | None = None
    _wants_sparse_step = False

    @override
    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        self._wants_sparse_step = self._can_be_sparse(step_input.sae_in)
        try:
            return super().training_forward_pass(step_input)
        finally:
            self._wants_sparse_step = False
            self._step = None

    @never_compiled
    def _can_be_sparse(self, sae_in: torch.Tensor) -> bool:
        return (
            use_sparse_step()
            and self.W_enc.dtype in (torch.float32, torch.float64)
            and not sae_in.requires_grad
            and not self.hook_z_reshaping_mode
            and not any(
                hook._forward_hooks or hook._backward_hooks for hook in self.hook_dict.values()
            )
        )

    @override
    def encode_with_hidden_pre(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if not self._wants_sparse_step:
            return super().encode_with_hidden_pre(x)
        return self._sparse_encode(x)

    @never_compiled
    def _sparse_encode(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        device = x.device.type
        enabled = torch.is_autocast_enabled(device)
        autocast = torch.get_autocast_dtype(device) if enabled else None
        encoder = Encoder(
            x=self.run_time_activation_norm_fn_in(x.to(self.dtype)),
            W_enc=self.W_enc,
            b_enc=self.b_enc,
            b_dec=self.b_dec if self.cfg.apply_b_dec_to_input else None,
            decoder=Decoder(self.W_dec, self.cfg.rescale_acts_by_decoder_norm, autocast),
            autocast=autocast,
        )
        h, selected = self._select(encoder.hidden_pre)
        h = h.to(self.W_enc.dtype).relu_()
        # Once more, for the gradient: what did not fire has none.
        values = encoder.before_norm(h, selected).relu()
        shape = encoder.hidden_pre.shape
        acts: torch.Tensor = SelectedActivations.of(selected.rows, selected.latents, h, shape)
        if shape.numel() <= MAX_DENSE_ENTRIES and not self.cfg.use_sparse_activations:
            acts = acts.to_dense()
        self._step = SparseStep(encoder, selected, values, acts)
        return acts, encoder.columns()

    @override
    def decode(self, feature_acts: torch.Tensor) -> torch.Tensor:
        step = self._step
        if step is not None and feature_acts is step.acts:
            sae_out_pre = self._sparse_decode(step)
        elif feature_acts.is_sparse and self.cfg.rescale_acts_by_decoder_norm:
            # SAELens divides sparse activations by the norms, which torch 2.11 and 2.13 cannot
            # differentiate. The rows of W_dec divided instead give the same.
            rows = self.W_dec / self.W_dec.norm(dim=-1, keepdim=True)
            sae_out_pre = act_times_W_dec(feature_acts, rows, False) + self.b_dec
        else:
            return super().decode(feature_acts)
        sae_out_pre = self.run_time_activation_norm_fn_out(self.hook_sae_recons(sae_out_pre))
        return self.reshape_fn_out(sae_out_pre, self.d_head)

    @never_compiled
    def _sparse_decode(self, step: SparseStep) -> torch.Tensor:
        return self._weighted_sums(step) + self.b_dec

    def _weighted_sums(self, step: SparseStep) -> torch.Tensor:
        return step.encoder.decoder.weighted_sums(step.values, step.selected)

    def _access(self, hidden_pre: torch.Tensor) -> LatentAccess:
        if self._step is None:
            return super()._access(hidden_pre)
        return SparseAccess(self._step.encoder)

    def _select(self, hidden_pre: torch.Tensor) -> tuple[torch.Tensor, Pairs]:
        """(N,) the k largest pre-activations of each row, and where they are."""
        h, latents = top_k(hidden_pre, int(self.cfg.k))
        return h.flatten(), Pairs.per_row(latents, hidden_pre.shape[1])


class SparseBatchTopK(SparseTopK):
    """The same for BatchTopK: ``k`` a row on average, the largest of the batch."""

    @override
    def _select(self, hidden_pre: torch.Tensor) -> tuple[torch.Tensor, Pairs]:
        B, d_sae = hidden_pre.shape
        h, flat = top_k_of_batch(hidden_pre, int(self.cfg.k * B))
        flat, order = flat.sort()
        rows = flat // d_sae
        return h[order], Pairs.from_bags(rows, flat % d_sae, rows, B, d_sae)

    @override
    @torch.no_grad()
    def update_topk_threshold(self, acts_topk: torch.Tensor) -> None:
        if not acts_topk.is_sparse:
            super().update_topk_threshold(acts_topk)
            return
        values = acts_topk._values().to(self.topk_threshold.dtype)
        smallest = torch.where(values > 0, values, torch.inf).min()
        lr = self.cfg.topk_threshold_lr
        moved = (1 - lr) * self.topk_threshold + lr * smallest
        self.topk_threshold = torch.where(smallest.isinf(), self.topk_threshold, moved)


class SparseMatryoshka(SparseBatchTopK):
    """The same for Matryoshka: one pass over the pairs gives every level's reconstruction."""

    @override
    def _select(self, hidden_pre: torch.Tensor) -> tuple[torch.Tensor, Pairs]:
        h, selected = super()._select(hidden_pre)
        # Made on the host first: torch.tensor(..., device=) waits for the device.
        widths = torch.tensor(self.cfg.matryoshka_widths)
        widths = widths.to(hidden_pre.device, non_blocking=True)
        n_levels = len(self.cfg.matryoshka_widths)
        # Pairs ascend within a row, so the levels do.
        levels = torch.searchsorted(widths, selected.latents, right=True)
        bags = selected.rows * n_levels + levels
        n_bags = hidden_pre.shape[0] * n_levels
        pairs = Pairs.from_bags(selected.rows, selected.latents, bags, n_bags, selected.d_sae)
        return h, pairs

    @override
    def _sparse_decode(self, step: SparseStep) -> torch.Tensor:
        n_levels = len(self.cfg.matryoshka_widths)
        parts = self._weighted_sums(step)
        levels = parts.unflatten(0, (-1, n_levels)).cumsum(dim=1) + self.b_dec
        *inner, outer = levels.unbind(dim=1)
        step.inner = tuple(inner)
        return outer

    @override
    def _iterable_decode(
        self, feature_acts: torch.Tensor, include_outer_loss: bool = False
    ) -> Generator[tuple[int, torch.Tensor], None, None]:
        step = self._step
        if step is None or feature_acts is not step.acts or include_outer_loss:
            yield from super()._iterable_decode(feature_acts, include_outer_loss)
            return
        yield from zip(self.cfg.matryoshka_widths[:-1], step.inner, strict=True)
