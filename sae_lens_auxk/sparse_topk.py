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

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
from sae_lens.saes.topk_sae import act_times_W_dec
from typing_extensions import override

from sae_lens_auxk.aux_losses import (
    AuxLossInputs,
    DeadActivations,
    MaskedColumns,
    keep_largest,
)
from sae_lens_auxk.aux_training import never_compiled
from sae_lens_auxk.ops import use_sparse_step
from sae_lens_auxk.ops.encoder import Encoder, gather_columns
from sae_lens_auxk.ops.selected import Selected, dots, weighted_sums
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
    selected: Selected
    values: torch.Tensor
    acts: torch.Tensor
    inner: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True)
class DeadPairs:
    """The dead latents nearest to firing as (B, k) pairs.

    ``pre`` (B, k) are pre-activations before the decoder norm, which is what decodes with the
    rows of W_dec as they are. On CUDA the products are dense over the dead latents, which the
    tensor cores do faster than memory serves rows; on CPU they read k rows a sample.
    """

    inputs: AuxLossInputs
    encoder: Encoder
    pre: torch.Tensor
    positions: torch.Tensor

    @property
    def latents(self) -> torch.Tensor:
        return self.inputs.dead_latents[self.positions]

    @property
    def h(self) -> torch.Tensor:
        norm = self.encoder.norm
        return self.pre if norm is None else self.pre * norm[self.latents]

    def relu(self) -> "DeadPairs":
        return replace(self, pre=self.pre.relu())

    def decode(self) -> torch.Tensor:
        W = self.inputs.W_dec
        if not W.is_cuda:
            pairs = Selected.per_row(self.latents, W.shape[0])
            return weighted_sums(self.pre.flatten(), W, pairs)
        compute = self.encoder.autocast or W.dtype
        n = self.inputs.dead_latents.numel()
        dense = torch.zeros(len(self.pre), n, dtype=compute, device=W.device)
        dense = dense.scatter(1, self.positions, self.pre.to(compute))
        return dense @ W.index_select(0, self.inputs.dead_latents).to(compute)

    @torch.no_grad()
    def project(self, x: torch.Tensor) -> torch.Tensor:
        W = self.inputs.W_dec
        if W.is_cuda:
            compute = self.encoder.autocast or W.dtype
            rows = W.index_select(0, self.inputs.dead_latents).to(compute)
            dots_ = (x.to(compute) @ rows.T).gather(1, self.positions).to(x.dtype)
        else:
            pairs = Selected.per_row(self.latents, W.shape[0])
            dots_ = dots(x.to(W.dtype), W, pairs).view_as(self.pre)
        norm = self.encoder.norm
        return dots_ if norm is None else dots_ / norm[self.latents]


# On CPU reading k rows a sample costs as much as a dense product over so many times k rows.
CPU_ROWS_WORTH_A_PAIR = 6


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
        encoder = Encoder(
            x=self.run_time_activation_norm_fn_in(x.to(self.dtype)),
            W_enc=self.W_enc,
            b_enc=self.b_enc,
            b_dec=self.b_dec if self.cfg.apply_b_dec_to_input else None,
            norm=self.W_dec.norm(dim=-1) if self.cfg.rescale_acts_by_decoder_norm else None,
        )
        selected = self._select(encoder.hidden_pre)
        values = encoder.selected(selected).relu()
        acts = encoder.hidden_pre[selected.rows, selected.latents].relu().to(values.dtype)
        pairs = torch.stack([selected.rows, selected.latents])
        shape = encoder.hidden_pre.shape
        acts = torch.sparse_coo_tensor(pairs, acts, shape, check_invariants=False)
        if shape.numel() <= MAX_DENSE_ENTRIES and not self.cfg.use_sparse_activations:
            acts = acts.to_dense()
        self._step = SparseStep(encoder, selected, values, acts)
        return acts, encoder.dense()

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
        return weighted_sums(step.values, self.W_dec, step.selected) + self.b_dec

    def _columns(self, hidden_pre: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        if self._step is None:
            return super()._columns(hidden_pre)
        return self._step.encoder.columns

    def _nearest(self) -> Callable[[AuxLossInputs, int], DeadActivations] | None:
        if self._step is None:
            return super()._nearest()
        return partial(_nearest_pairs, self._step.encoder)

    def _select(self, hidden_pre: torch.Tensor) -> Selected:
        """The k largest pre-activations of each row."""
        _, latents = top_k(hidden_pre, int(self.cfg.k))
        return Selected.per_row(latents, hidden_pre.shape[1])


def _nearest_pairs(encoder: Encoder, inputs: AuxLossInputs, k: int) -> DeadActivations:
    n_dead = inputs.dead_latents.numel()
    if not inputs.x.is_cuda and n_dead < CPU_ROWS_WORTH_A_PAIR * k:
        return MaskedColumns(inputs, keep_largest(inputs.dead_hidden_pre(), k))
    with torch.no_grad():
        h, positions = top_k(gather_columns(encoder.hidden_pre, inputs.dead_latents), k)
    if inputs.x.is_cuda:
        pre = encoder.pairs(h, inputs.dead_latents, positions)
    else:
        pairs = Selected.per_row(inputs.dead_latents[positions], inputs.d_sae)
        pre = encoder.selected(pairs).view_as(h)
    return DeadPairs(inputs, encoder, pre, positions)


class SparseBatchTopK(SparseTopK):
    """The same for BatchTopK: ``k`` a row on average, the largest of the batch."""

    @override
    def _select(self, hidden_pre: torch.Tensor) -> Selected:
        B, d_sae = hidden_pre.shape
        _, flat = top_k_of_batch(hidden_pre, int(self.cfg.k * B))
        flat = flat.sort().values
        rows = flat // d_sae
        return Selected.from_bags(rows, flat % d_sae, rows, B, d_sae)

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
    def _select(self, hidden_pre: torch.Tensor) -> Selected:
        selected = super()._select(hidden_pre)
        widths = torch.tensor(self.cfg.matryoshka_widths, device=hidden_pre.device)
        n_levels = len(self.cfg.matryoshka_widths)
        # Pairs ascend within a row, so the levels do.
        levels = torch.searchsorted(widths, selected.latents, right=True)
        bags = selected.rows * n_levels + levels
        n_bags = hidden_pre.shape[0] * n_levels
        return Selected.from_bags(selected.rows, selected.latents, bags, n_bags, selected.d_sae)

    @override
    def _sparse_decode(self, step: SparseStep) -> torch.Tensor:
        n_levels = len(self.cfg.matryoshka_widths)
        parts = weighted_sums(step.values, self.W_dec, step.selected)
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
