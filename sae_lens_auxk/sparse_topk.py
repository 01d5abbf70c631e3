"""The TopK family's training step, on the selected latents only.

SAELens computes with all of (B, d_sae) several times: a dense activation tensor forward, a
dense gradient backward. Here the encoder's product is the one dense operation. The selected
activations are a short list of (row, latent) pairs; the decoder and both gradients touch only the
rows of those pairs.

The step computes the same as SAELens's: same selection, same losses, same gradients. With
``rescale_acts_by_decoder_norm`` SAELens multiplies a pre-activation by its decoder norm, selects,
and divides by it again to decode; the norm's gradients cancel, so here it is used for the selection
only.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

import torch
from sae_lens.saes.sae import TrainStepOutput
from sae_lens.saes.topk_sae import act_times_W_dec
from typing_extensions import override

from sae_lens_auxk.aux_training import AUX_LOSS_KEY, never_compiled
from sae_lens_auxk.ops import use_sparse_step
from sae_lens_auxk.ops.activations import activations
from sae_lens_auxk.ops.columns import gather_columns, indices_of
from sae_lens_auxk.ops.decoder import Decoder
from sae_lens_auxk.ops.encoder import Encoder
from sae_lens_auxk.ops.selected import InColumns, Pairs, Selected
from sae_lens_auxk.ops.topk import top_k, top_k_of_batch
from sae_lens_auxk.sharded.latents import AllLatents
from sae_lens_auxk.step_data import AuxStepInput

if TYPE_CHECKING:
    from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE

    from sae_lens_auxk.aux_training import AuxTraining

    class _Base(AuxTraining, MatryoshkaBatchTopKTrainingSAE): ...  # type: ignore[misc]
else:
    _Base = object


# Up to this size a dense tensor costs next to nothing, and it is what other code expects.
MAX_DENSE_ENTRIES = 2**22


@dataclass(frozen=True)
class SparseActivations:
    """Selected entries of ``h``; see :class:`~sae_lens_auxk.latent_access.Activations`.

    Attributes:
        encoder: where they come from.
        selected: which they are.
        chosen: (B, k) bool, which of them count. Surplus ones do not if fewer than k could be
            chosen, nor does one with a decoder row of 0 if ``h`` is divided by its norm.
        pre: (B, k) pre-activations before the decoder norm, which is what decodes with the rows
            of W_dec as they are; 0 where not chosen.
    """

    encoder: Encoder
    selected: Selected
    chosen: torch.Tensor
    pre: torch.Tensor

    @staticmethod
    def of(encoder: Encoder, h: torch.Tensor, selected: Selected) -> "SparseActivations":
        """From values ``h`` (B, k), -inf for those that do not count."""
        pre = encoder.before_norm(h, selected)
        chosen = pre.isfinite()
        return SparseActivations(encoder, selected, chosen, pre.where(chosen, 0))

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
        products = products / self.decoder.norm_at(self.selected, products)
        return products.where(self.chosen, 0)

    def norm(self) -> torch.Tensor | float:
        return self.decoder.length_at(self.selected, self.pre)


@dataclass(frozen=True)
class SparseColumns:
    """See :class:`~sae_lens_auxk.latent_access.Columns`.

    ``latents`` (n,) int64 are the latents of the columns; only the first ``n_latents`` () count.
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
    by_magnitude: bool
    latents: AllLatents

    def columns(self, latents: torch.Tensor | None = None) -> torch.Tensor:
        return self.encoder.columns(latents)

    def columns_among(self, among: torch.Tensor, bound: int) -> "SparseColumns":
        latents, n_latents = self._own(among, bound)
        h = self.encoder.columns(latents, n_latents)
        return SparseColumns(h, self.encoder.decoder, latents, n_latents)

    def sums(self) -> torch.Tensor:
        if self.by_magnitude:  # not linear in x
            h = self.encoder.columns().abs()
            sums = h.sum(dim=0, dtype=torch.promote_types(h.dtype, torch.float32))
        else:
            sums = self.encoder.sums()
        return self.latents.of_all(sums)

    def largest(self, k: int, among: torch.Tensor | None, bound: int) -> SparseActivations:
        hidden_pre, d_sae = self.encoder.hidden_pre, self.encoder.W.shape[1]
        selected: Selected
        if among is not None:
            among = self.latents.own(among)
            bound = self.latents.own_bound(among, bound)
        with torch.no_grad():
            if self.by_magnitude:
                hidden_pre = hidden_pre.abs()
            dense = bound <= COLUMNS_WORTH_A_PAIR[hidden_pre.is_cuda] * k
            if among is not None and (dense or not hidden_pre.is_cuda):
                latents = indices_of(among, bound)
                h = gather_columns(hidden_pre, latents, among.sum())
                positions = None
                if k < len(latents):
                    h, positions = top_k(h, k)
                selected = InColumns(latents, positions, d_sae)
                if not dense:
                    selected = Pairs.per_row(selected.latents, d_sae)
            else:
                h, latents = top_k(hidden_pre, min(k, d_sae), among)
                selected = Pairs.per_row(latents, d_sae)
            h = self.latents.keep_largest(h, h, k)
            if self.by_magnitude:
                latents = selected.latents.view(-1, h.shape[1]).expand_as(h)
                h = self.encoder.hidden_pre.gather(1, latents).where(h.isfinite(), -torch.inf)
        return SparseActivations.of(self.encoder, h, selected)

    def best_match(self, x: torch.Tensor, among: torch.Tensor, level: slice) -> SparseActivations:
        encoder, among, level = self.encoder, self.latents.own(among), self.latents.own_slice(level)
        with torch.no_grad():
            products = encoder.decoder.all_dots(x, level)
            if self.by_magnitude:
                products = products.abs_()
            if products.shape[1] == 0:  # another process holds the level
                products = products.new_full((len(x), 1), -torch.inf)
                level = slice(0)
            product, best = top_k(products, 1)
            best += level.start or 0
            h = encoder.hidden_pre.gather(1, best).where(among[best], -torch.inf)
            h = self.latents.keep_largest(h, product, 1)
        return SparseActivations.of(encoder, h, Pairs.per_row(best, encoder.W.shape[1]))

    def shortfall(self, threshold: torch.Tensor, among: torch.Tensor, bound: int) -> torch.Tensor:
        if self.by_magnitude:
            h = self.columns_among(among, bound).h.abs()  # infinite where no latent is
            missing = (threshold.to(h.dtype) - h).relu()
            total = missing.sum(dim=-1, dtype=torch.promote_types(h.dtype, torch.float32))
        else:
            total = self.encoder.shortfall(threshold, *self._own(among, bound))
        return self.latents.sum(total)

    def at_rows(self, rows: torch.Tensor) -> "SparseAccess":
        return replace(self, encoder=self.encoder.at_rows(rows))

    def _own(self, among: torch.Tensor, bound: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The given latents that this process holds (n,), and how many of them count ()."""
        among = self.latents.own(among)
        return indices_of(among, self.latents.own_bound(among, bound)), among.sum()


# With up to this many times k_aux dead latents, a dense product is faster than pairs. Measured per
# device type, on a CPU and on an H100 (docs/performance.md).
COLUMNS_WORTH_A_PAIR = {False: 6, True: 64}


class SparseTopK(_Base):
    """Mixin placed before SAELens's TopK, BatchTopK or Matryoshka training SAE.

    A step is sparse unless something needs the dense tensors: hooks on the SAE, an input with a
    gradient, or parameters in half precision, for which torch has no gradient of the products.
    """

    # A shorter one loses to the living latents in every row: see resampling.py.
    resampled_length: ClassVar[float] = 1.0

    @override
    def _forward(self, step_input: AuxStepInput) -> TrainStepOutput:
        if not self._can_be_sparse(step_input.sae_in):
            return super()._forward(step_input)
        return self._sparse_forward(step_input)

    @never_compiled
    def _can_be_sparse(self, sae_in: torch.Tensor) -> bool:
        return (
            use_sparse_step()
            and self.W_enc.dtype in (torch.float32, torch.float64)
            and not sae_in.requires_grad
            and not self.hook_z_reshaping_mode
            and not any(map(_has_hook, self.children()))
        )

    @never_compiled
    def _sparse_forward(self, step_input: AuxStepInput) -> TrainStepOutput:
        """SAELens's ``training_forward_pass``, on the selected latents only."""
        encoder = self._encoder(step_input.sae_in)

        h, selected = self._select(encoder.hidden_pre)
        h = h.to(self.W_enc.dtype)
        # After the graph begins: a latent that did not fire has no gradient.
        values = self._fire(encoder.before_norm(h, selected))
        acts = self._activations(values, self._fire(h), selected, encoder)

        levels = {
            width: self.run_time_activation_norm_fn_out(decoded)
            for width, decoded in self._decode_levels(encoder.decoder, values, selected)
        }
        *inner, sae_out = levels.values()

        losses = {"mse_loss": self._mse(sae_out, step_input)}
        losses[AUX_LOSS_KEY], metrics = self._aux_loss(
            step_input, acts, SparseAccess(encoder, self.by_magnitude, self.latents), sae_out, inner
        )
        for width, reconstruction in zip(levels, inner, strict=False):
            losses[f"inner_mse_loss_{width}"] = self._mse(reconstruction, step_input)
        return TrainStepOutput(
            sae_in=step_input.sae_in,
            sae_out=sae_out,
            feature_acts=acts,
            hidden_pre=encoder.columns(),
            loss=sum(losses.values(), start=sae_out.new_zeros(())),
            losses=losses,
            metrics=metrics,
        )

    def _encoder(self, sae_in: torch.Tensor) -> Encoder:
        device = sae_in.device.type
        enabled = torch.is_autocast_enabled(device)
        autocast = torch.get_autocast_dtype(device) if enabled else None
        return Encoder(
            x=self.run_time_activation_norm_fn_in(sae_in.to(self.dtype)),
            W_enc=self.W_enc,
            b_enc=self.b_enc,
            b_dec=self.latents.replicated(self.b_dec) if self.cfg.apply_b_dec_to_input else None,
            decoder=Decoder(
                self.W_dec, self.cfg.rescale_acts_by_decoder_norm, autocast, self.latents
            ),
            autocast=autocast,
        )

    def _activations(
        self, values: torch.Tensor, h: torch.Tensor, selected: Pairs, encoder: Encoder
    ) -> torch.Tensor:
        """(B, d_sae) the activations: ``h``, or ``values`` before the decoder norm, (N,) each."""
        shape = encoder.hidden_pre.shape
        dense = shape.numel() <= MAX_DENSE_ENTRIES and not self.cfg.use_sparse_activations
        return activations(values, h, selected, encoder.decoder, shape, dense)

    def _mse(self, sae_out: torch.Tensor, step_input: AuxStepInput) -> torch.Tensor:
        return self.mse_loss_fn(sae_out, step_input.sae_in).sum(dim=-1).mean()

    def _decode_levels(
        self, decoder: Decoder, values: torch.Tensor, selected: Pairs
    ) -> Iterable[tuple[int, torch.Tensor]]:
        """Widths, ascending, and (B, d_in) the decoder's output with that many latents.

        One level, the whole SAE, except for Matryoshka.
        """
        return [(self.cfg.d_sae, decoder.weighted_sums(values, selected) + self.b_dec)]

    @override
    def decode(self, feature_acts: torch.Tensor) -> torch.Tensor:
        if not (feature_acts.is_sparse and self.cfg.rescale_acts_by_decoder_norm):
            return super().decode(feature_acts)
        # SAELens divides sparse activations by the norms, which torch 2.11 and 2.13 cannot
        # differentiate. The rows of W_dec divided instead give the same.
        rows = self.W_dec / self.W_dec.norm(dim=-1, keepdim=True)
        sae_out_pre = act_times_W_dec(feature_acts, rows, False) + self.b_dec
        sae_out_pre = self.run_time_activation_norm_fn_out(self.hook_sae_recons(sae_out_pre))
        return self.reshape_fn_out(sae_out_pre, self.d_head)

    def _select(self, hidden_pre: torch.Tensor) -> tuple[torch.Tensor, Pairs]:
        """(N,) the k largest pre-activations of each row, and where they are."""
        k = min(int(self.cfg.k), hidden_pre.shape[1])
        if self.by_magnitude:
            latents = top_k(hidden_pre.abs(), k)[1]
            h = hidden_pre.gather(1, latents)
        else:
            h, latents = top_k(hidden_pre, k)
        return h.flatten(), Pairs.per_row(latents, hidden_pre.shape[1])

    def _fire(self, h: torch.Tensor) -> torch.Tensor:
        """The activations of selected pre-activations."""
        return h if self.by_magnitude else h.relu()


def _has_hook(module: torch.nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


class SparseBatchTopK(SparseTopK):
    """The same for BatchTopK: the largest of the whole batch, ``k`` per row on average."""

    @override
    def _select(self, hidden_pre: torch.Tensor) -> tuple[torch.Tensor, Pairs]:
        B, d_sae = hidden_pre.shape
        h, flat = top_k_of_batch(hidden_pre, min(int(self.cfg.k * B), hidden_pre.numel()))
        flat, order = flat.sort()
        rows = flat // d_sae
        return h[order], Pairs.from_bags(rows, flat % d_sae, rows, B, d_sae)

    @override
    def _sparse_forward(self, step_input: AuxStepInput) -> TrainStepOutput:
        output = super()._sparse_forward(step_input)
        self.update_topk_threshold(output.feature_acts)
        return output

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
        levels = torch.searchsorted(widths - self.latents.start, selected.latents, right=True)
        bags = selected.rows * n_levels + levels
        n_bags = hidden_pre.shape[0] * n_levels
        pairs = Pairs.from_bags(selected.rows, selected.latents, bags, n_bags, selected.d_sae)
        return h, pairs

    @override
    def _decode_levels(
        self, decoder: Decoder, values: torch.Tensor, selected: Pairs
    ) -> Iterable[tuple[int, torch.Tensor]]:
        widths = self.cfg.matryoshka_widths
        parts = decoder.weighted_sums(values, selected).unflatten(0, (-1, len(widths)))
        levels = parts.cumsum(dim=1) + self.b_dec
        return zip(widths, levels.unbind(dim=1), strict=True)
