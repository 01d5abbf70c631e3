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

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch
from transformer_lens.hook_points import HookPoint
from typing_extensions import override

from sae_lens_auxk.losses.access import Columns, Pointwise, decoder_rows
from sae_lens_auxk.ops import choice
from sae_lens_auxk.ops.encoder import Encoder, activations, smallest_active
from sae_lens_auxk.ops.matrices import Decoder
from sae_lens_auxk.ops.selection import (
    Pairs,
    Selected,
    beyond,
    has_sparse_operations,
    indices_of,
    largest_among,
    top_k,
    top_k_of_batch,
)
from sae_lens_auxk.saelens.names import (
    BatchTopK,
    SparseHookPoint,
    TopK,
    TrainStepOutput,
    act_times_W_dec,
)
from sae_lens_auxk.step import never_compiled
from sae_lens_auxk.step.inputs import SparseForward, UsableInput
from sae_lens_auxk.step.training import AuxTraining

if TYPE_CHECKING:
    from sae_lens import MatryoshkaBatchTopKTrainingSAE

    class _Base(AuxTraining, MatryoshkaBatchTopKTrainingSAE): ...  # type: ignore[misc]
else:
    _Base = AuxTraining


# Up to this size a dense tensor costs next to nothing, and it is what other code expects.
MAX_DENSE_ENTRIES = 2**22

REPLACED = (
    "encode_with_hidden_pre",
    "process_sae_in",
    "decode",
    "calculate_aux_loss",
    "_iterable_decode",
)
"""Methods that SAELens's step calls and the sparse step does not: it does their work itself."""

REPLACED_ATTRIBUTES = ("reshape_fn_in", "reshape_fn_out")
"""The same for functions that SAELens sets on an instance."""

HOOK_POINT_CLASSES = (HookPoint, SparseHookPoint)

HOOK_POINTS = ("hook_sae_input", "hook_sae_acts_pre", "hook_sae_acts_post", "hook_sae_recons")
"""The same for modules of TransformerLens that hand on what they are given."""


@dataclass(frozen=True)
class SparseActivations:
    """Selected entries of ``h``; see :class:`~sae_lens_auxk.losses.access.Activations`.

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

    @property
    def decoder(self) -> Decoder:
        return self.encoder.decoder

    @property
    def h(self) -> torch.Tensor:
        return self.decoder.times_norm(self.pre, self.selected)

    def map(self, function: Pointwise) -> "SparseActivations":
        return replace(self, pre=function(self.pre))

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
class SparseAccess:
    """See :class:`~sae_lens_auxk.losses.access.LatentAccess`."""

    encoder: Encoder
    nearness: Pointwise

    def columns(self, latents: torch.Tensor | None = None) -> torch.Tensor:
        return self.encoder.columns(latents)

    def columns_among(self, among: torch.Tensor, bound: int) -> Columns:
        latents, n_latents = indices_of(among, bound), among.sum()
        decoder = self.encoder.decoder
        return Columns(
            h=self.encoder.columns(latents, n_latents),
            rows=decoder_rows(decoder.W_dec, latents, decoder.norm is not None),
            latents=latents,
            real=~beyond(latents, n_latents),
        )

    def sums(self) -> torch.Tensor:
        encoder = self.encoder
        if self.nearness(encoder.x) is not encoder.x:  # not linear in x
            h = self.nearness(encoder.columns())
            return h.sum(dim=0, dtype=torch.promote_types(h.dtype, torch.float32))
        with torch.autocast(encoder.x.device.type, enabled=False):
            x, n = encoder.x.sum(dim=0), len(encoder.x)
            if encoder.b_dec is not None:  # encoder.x has no graph
                x = x - n * (encoder.b_dec - encoder.b_dec.detach())
            return encoder.decoder.times_norm(x @ encoder.W_enc + n * encoder.b_enc)

    def largest(self, k: int, among: torch.Tensor | None, bound: int) -> SparseActivations:
        return self._activations(*self._nearest(k, among, bound))

    def best_match(self, x: torch.Tensor, among: torch.Tensor, level: slice) -> SparseActivations:
        h, _, best = self._best(x, among, level)
        return self._activations(h, Pairs.per_row(best, self.encoder.W.shape[1]))

    def at_rows(self, rows: torch.Tensor) -> "SparseAccess":
        return replace(self, encoder=self.encoder.at_rows(rows))

    @torch.no_grad()
    def _nearest(
        self, k: int, among: torch.Tensor | None, bound: int
    ) -> tuple[torch.Tensor, Selected]:
        """(B, m) the ``k`` ``h`` nearest to firing, -inf for surplus ones, and where they are."""
        hidden_pre = self.encoder.hidden_pre
        nearness = self.nearness(hidden_pre)
        h, selected = largest_among(nearness, k, among, bound)
        if nearness is not hidden_pre:
            latents = selected.latents.view(-1, h.shape[1]).expand_as(h)
            h = hidden_pre.gather(1, latents).where(h.isfinite(), -torch.inf)
        return h, selected

    @torch.no_grad()
    def _best(
        self, x: torch.Tensor, among: torch.Tensor, level: slice
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, 1) each: ``h`` of the latent of best match or -inf, how well it matches, which."""
        products = self.encoder.decoder.all_matches(x, level)
        product, best = top_k(self.nearness(products), 1)
        best += level.start or 0
        h = self.encoder.hidden_pre.gather(1, best)
        return h.where(among[best], -torch.inf), product, best

    def _activations(self, h: torch.Tensor, selected: Selected) -> SparseActivations:
        """From values ``h`` (B, m), -inf for those that do not count."""
        pre = self.encoder.before_norm(h, selected)
        chosen = pre.isfinite()
        return SparseActivations(self.encoder, selected, chosen, pre.where(chosen, 0))


_Class = TypeVar("_Class", bound=type[Any])


def with_sparse_step(cls: _Class) -> _Class:
    """Note the functions whose work the sparse step does for a class; a decorator."""
    cls.replaced_methods = {
        name: _if_own(getattr(cls, name)) for name in REPLACED if hasattr(cls, name)
    }
    owners = [base for base in cls.__mro__ if base.__module__.startswith("sae_lens.")]
    functions = [(owner, "training_forward_pass") for owner in owners]
    functions += [(module, "forward") for module in (cls.activation_class, *HOOK_POINT_CLASSES)]
    cls.replaced_functions = [
        (owner, name, _if_own(vars(owner)[name]))
        for owner, name in functions
        if name in vars(owner)
    ]
    return cls


def _if_own(function: Any) -> Any:
    """``function``, or None if it is neither SAELens's nor this package's nor TransformerLens's."""
    known = ("sae_lens.", "sae_lens_auxk.", "transformer_lens.")
    return function if function.__module__.startswith(known) else None


class SparseTopK(_Base):
    """Mixin placed before SAELens's TopK, BatchTopK or Matryoshka training SAE.

    A step is sparse where it computes what SAELens's step would, and nothing needs the dense
    tensors: see :meth:`_can_be_sparse`.
    """

    # A shorter one loses to the living latents in every row: see resampling.py.
    resampled_length: ClassVar[float] = 1.0

    activation_class: ClassVar[type[torch.nn.Module]] = TopK
    """What SAELens selects with."""

    replaced_methods: ClassVar[dict[str, Any]] = {}
    """The methods that a sparse step makes up for, by name, as the package knows them."""

    replaced_functions: ClassVar[list[tuple[type[Any], str, Any]]] = []
    """The same for methods of SAELens's own classes and modules: owner, name, function."""

    def __init__(self, cfg: Any, use_error_term: bool = False):
        super().__init__(cfg, use_error_term)
        self.may_be_sparse = choice() != "dense"

    @property
    def n_selected(self) -> int:
        """How many latents of a row are selected: SAELens asks ``activation_fn``."""
        return int(getattr(self.activation_fn, "k", self.cfg.k))

    @never_compiled
    def _can_be_sparse(self, sae_in: torch.Tensor) -> bool:
        """Whether a sparse step is SAELens's step.

        All that SAELens's step calls, and the sparse step does not, has to be SAELens's or the
        package's own: methods of the class and of the instance, functions set on it, hook points,
        hooks, ``activation_fn``. The input must have no gradient and be on a device with the sparse
        operations, and the parameters be float32 or float64, since torch has no gradient of the
        sparse products in bfloat16.
        """
        own, cls, modules = vars(self), type(self), self._modules
        select = self.activation_fn
        return (
            self.may_be_sparse
            and has_sparse_operations(sae_in)
            and self.W_enc.dtype in (torch.float32, torch.float64)
            and not sae_in.requires_grad
            and not self.hook_z_reshaping_mode
            and all(getattr(cls, name) is m for name, m in self.replaced_methods.items())
            and all(getattr(owner, name) is f for owner, name, f in self.replaced_functions)
            and not any(name in own for name in REPLACED)
            and all(own[name].__module__.startswith("sae_lens.") for name in REPLACED_ATTRIBUTES)
            and type(select) is self.activation_class
            and getattr(select, "k", None) == self.cfg.k
            and all(type(modules[name]) in HOOK_POINT_CLASSES for name in HOOK_POINTS)
            and not any(map(_is_changed, modules.values()))
            and not torch.nn.modules.module._has_any_global_hook()
        )

    @never_compiled
    def _sparse_forward(self, batch: UsableInput) -> SparseForward | None:
        """Encode, select, fire, decode."""
        if not self._can_be_sparse(batch.sae_in):
            return None
        encoder = self._encoder(batch.sae_in, self.b_dec if self.cfg.apply_b_dec_to_input else None)
        h, selected = self._select(encoder.hidden_pre)
        h = h.to(self.W_enc.dtype)
        # After the graph begins: a latent that did not fire has no gradient.
        values = self.fire(encoder.before_norm(h, selected))
        acts = self._activations(values, self.fire(h), selected, encoder)
        levels = {
            width: self.run_time_activation_norm_fn_out(decoded)
            for width, decoded in self._decode_levels(encoder.decoder, values, selected).items()
        }
        sae_out = levels.pop(self.cfg.d_sae)
        access, target = self._access(encoder), batch.sae_in
        return SparseForward(access, acts, sae_out, levels, target, self.mse_loss_fn)

    def _encoder(self, sae_in: torch.Tensor, b_dec: torch.Tensor | None) -> Encoder:
        device = sae_in.device.type
        enabled = torch.is_autocast_enabled(device)
        autocast = torch.get_autocast_dtype(device) if enabled else None
        return Encoder(
            x=self.run_time_activation_norm_fn_in(sae_in.to(self.dtype)),
            W_enc=self.W_enc,
            b_enc=self.b_enc,
            b_dec=b_dec,
            decoder=self._decoder(autocast),
            autocast=autocast,
        )

    def _decoder(self, autocast: torch.dtype | None) -> Decoder:
        return Decoder(self.W_dec, self.cfg.rescale_acts_by_decoder_norm, autocast)

    def _access(self, encoder: Encoder) -> SparseAccess:
        return SparseAccess(encoder, self.nearness)

    def _activations(
        self, values: torch.Tensor, h: torch.Tensor, selected: Pairs, encoder: Encoder
    ) -> torch.Tensor:
        """(B, d_sae) the activations: ``h``, or ``values`` before the decoder norm, (N,) each."""
        shape = encoder.hidden_pre.shape
        dense = shape.numel() <= MAX_DENSE_ENTRIES and not self.cfg.use_sparse_activations
        return activations(values, h, selected, encoder.decoder, shape, dense)

    def _decode_levels(
        self, decoder: Decoder, values: torch.Tensor, selected: Pairs
    ) -> dict[int, torch.Tensor]:
        """Widths, ascending, and (B, d_in) the decoder's output with that many latents.

        One level, the whole SAE, except for Matryoshka.
        """
        return {self.cfg.d_sae: decoder.weighted_sums(values, selected) + self.b_dec}

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
        """(N,) the k pre-activations nearest to firing of each row, and where they are."""
        k = min(int(self.cfg.k), hidden_pre.shape[1])
        latents = top_k(self.nearness(hidden_pre), k)[1]
        h = hidden_pre.gather(1, latents).flatten()
        return h, Pairs.per_row(latents, hidden_pre.shape[1])

    @override
    def firing_threshold(self, feature_acts: torch.Tensor) -> torch.Tensor:
        """(B, 1): the nearness of each row's least active latent, 0 where nothing fired."""
        return smallest_active(feature_acts, self.n_selected)


def _is_changed(module: torch.nn.Module | None) -> bool:
    """Whether a module has a hook, or a ``forward`` that was set on it."""
    return module is not None and bool(
        "forward" in vars(module)
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


class SparseBatchTopK(SparseTopK):
    """The same for BatchTopK: the largest of the whole batch, ``k`` per row on average."""

    activation_class: ClassVar[type[torch.nn.Module]] = BatchTopK
    moved_by_step: ClassVar[tuple[str, ...]] = ("topk_threshold",)

    @override
    def _select(self, hidden_pre: torch.Tensor) -> tuple[torch.Tensor, Pairs]:
        B, d_sae = hidden_pre.shape
        h, flat = top_k_of_batch(hidden_pre, min(int(self.cfg.k * B), hidden_pre.numel()))
        flat, order = flat.sort()
        rows = flat // d_sae
        return h[order], Pairs.from_bags(rows, flat % d_sae, rows, B, d_sae)

    @override
    def _after_sparse_step(self, output: TrainStepOutput) -> None:
        self.update_topk_threshold(output.feature_acts)

    @override
    def firing_threshold(self, feature_acts: torch.Tensor) -> torch.Tensor:  # noqa: ARG002
        """(): ``topk_threshold``, the moving average that inference will use."""
        return self.topk_threshold.clone()  # which moves before the backward pass

    @override
    @torch.no_grad()
    def update_topk_threshold(self, acts_topk: torch.Tensor) -> None:
        # SAELens's asks the host whether anything fired, and rebinds the buffer.
        values = acts_topk._values() if acts_topk.is_sparse else acts_topk
        values = values.to(self.topk_threshold.dtype)
        smallest = torch.where(values > 0, values, torch.inf).min()
        lr = self.cfg.topk_threshold_lr
        moved = (1 - lr) * self.topk_threshold + lr * smallest
        self.topk_threshold.copy_(torch.where(smallest.isinf(), self.topk_threshold, moved))


class SparseMatryoshka(SparseBatchTopK):
    """The same for Matryoshka: one pass over the pairs gives every level's reconstruction."""

    first_latent: int = 0
    """The first latent that this process holds."""

    @override
    def _select(self, hidden_pre: torch.Tensor) -> tuple[torch.Tensor, Pairs]:
        h, selected = super()._select(hidden_pre)
        *inner, _ = widths = self.cfg.matryoshka_widths
        n_levels = len(widths)
        # Pairs ascend within a row, so the levels do. A tensor of the widths would wait for the
        # device at each step, and be lost where SAELens loads an SAE without initialising it.
        latents = selected.latents + self.first_latent
        levels = sum(((latents >= width).long() for width in inner), torch.zeros_like(latents))
        bags = selected.rows * n_levels + levels
        n_bags = hidden_pre.shape[0] * n_levels
        pairs = Pairs.from_bags(selected.rows, selected.latents, bags, n_bags, selected.d_sae)
        return h, pairs

    @override
    def _decode_levels(
        self, decoder: Decoder, values: torch.Tensor, selected: Pairs
    ) -> dict[int, torch.Tensor]:
        widths = self.cfg.matryoshka_widths
        parts = decoder.weighted_sums(values, selected).unflatten(0, (-1, len(widths)))
        levels = parts.cumsum(dim=1) + self.b_dec
        return dict(zip(widths, levels.unbind(dim=1), strict=True))
