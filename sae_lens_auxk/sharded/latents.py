"""Which latents a process holds, and what compares or sums over those of all processes.

A training step is written for the latents that a process holds. The classes here put the processes
together where it looks at more: the ``k`` largest, sums over latents, decoded rows.
"""

from dataclasses import dataclass, field, fields
from typing import Any

import torch
from typing_extensions import override

from sae_lens_auxk.losses.access import Columns
from sae_lens_auxk.losses.record import AuxLossInputs
from sae_lens_auxk.ops.matrices import Decoder
from sae_lens_auxk.ops.selection import Pairs, Selected
from sae_lens_auxk.sharded.collectives import gather, largest_over, sum_over
from sae_lens_auxk.step.sparse import SparseAccess


@dataclass(frozen=True)
class Shard:
    """The latents are shared among the processes of a group, in the order of their ranks.

    Equal values go to the lowest latent, as far as the processes have offered them.

    Attributes:
        group: the process group.
        d_sae: the number of latents, which the number of processes divides.
    """

    group: Any
    d_sae: int

    @property
    def rank(self) -> int:
        return self.group.rank()

    @property
    def n(self) -> int:
        """How many latents a process holds."""
        return self.d_sae // self.group.size()

    @property
    def start(self) -> int:
        """The first latent that this process holds."""
        return self.rank * self.n

    def local(self, of_latents: torch.Tensor) -> torch.Tensor:
        """(n, ...): the entries of ``of_latents`` (d_sae, ...) for the latents held here."""
        return of_latents[self.start : self.start + self.n]

    def local_slice(self, latents: slice) -> slice:
        """The part of a range of latents that is held here, counted from the first held here."""
        start, stop, _ = latents.indices(self.d_sae)
        first = min(max(start - self.start, 0), self.n)
        return slice(first, max(first, min(stop - self.start, self.n)))

    def is_local(self, latents: torch.Tensor) -> torch.Tensor:
        """(m,) bool: which of ``latents`` (m,) are held here."""
        return (latents >= self.start) & (latents < self.start + self.n)

    def bound(self, among: torch.Tensor, bound: int) -> int:
        """Upper bound on ``among.sum()`` (n,) on this rank, from one for all latents."""
        # Never 0: what has no column has no largest one.
        return max(1, min(bound, self.n) if among.is_cuda else int(among.sum()))

    def pad_to_global(self, local: torch.Tensor) -> torch.Tensor:
        """(d_sae,): ``local`` (n,) at the latents held here, 0 elsewhere; with its graph."""
        return torch.nn.functional.pad(local, (self.start, self.d_sae - self.start - self.n))

    @torch.no_grad()
    def keep_largest(self, h: torch.Tensor, by: torch.Tensor, k: int) -> torch.Tensor:
        """``h`` where ``by`` is among the ``k`` largest of the row over all processes, else -inf.

        Args:
            h: (B, m).
            by: (B, m), m at most k.
            k: how many.
        """
        m = by.shape[1]
        # Processes may have different numbers of candidates.
        by = torch.nn.functional.pad(by, (0, k - m), value=-torch.inf)
        everywhere = gather(by, self.group).transpose(0, 1).flatten(1)
        mine = topk_mask(everywhere, k).unflatten(1, (-1, k))[:, self.rank]
        return h.where(mine[:, :m], -torch.inf)

    @torch.no_grad()
    def choose(
        self, h: torch.Tensor, by: torch.Tensor, selected: Pairs, n: int
    ) -> tuple[torch.Tensor, "OwnPairs"]:
        """Choose the ``n`` candidates of all processes with the largest ``by``.

        Args:
            h: (N,) this process's candidates.
            by: (N,) what they are compared by.
            selected: (N,) which they are, ascending within a bag.
            n: how many in all rows together; the same number in each row if ``selected`` has that.

        Returns:
            (N,) ``h``, -inf for those that were not chosen, and the pairs.
        """
        n_rows = 1 if selected.per_bag is None else selected.offsets.numel()
        columns = {"h": h, "latents": (selected.latents + self.start).int()}
        if n_rows == 1:
            columns["rows"] = selected.rows.int()
        if by is not h:
            columns["by"] = by
        # (rows, candidates of all processes, those of the lowest latents first) each
        offered = {
            name: gather(column.view(n_rows, -1), self.group).transpose(0, 1).flatten(1)
            for name, column in columns.items()
        }
        chosen = topk_mask(offered.get("by", offered["h"]), n // n_rows)
        # The number is known, so nothing waits for the device.
        places = chosen.flatten().nonzero_static(size=n, fill_value=0).squeeze(1)
        at = {name: values.flatten()[places] for name, values in offered.items()}
        rows = at["rows"].long() if n_rows == 1 else places // chosen.shape[1]
        fired = Fired(rows, at["latents"].long(), at["h"])
        mine = chosen.unflatten(1, (self.group.size(), -1))[:, self.rank].flatten()
        pairs = {each.name: getattr(selected, each.name) for each in fields(Pairs)}
        return h.where(mine, -torch.inf), OwnPairs(**pairs, fired=fired)


def topk_mask(by: torch.Tensor, k: int) -> torch.Tensor:
    """(B, m) bool: the ``k`` largest of each row of ``by`` (B, m); equal ones go to the first."""
    kth = by.topk(min(k, by.shape[1]), dim=1, sorted=False).values.amin(dim=1, keepdim=True)
    above, equal = by > kth, by == kth
    room = k - above.sum(dim=1, keepdim=True)
    return above | (equal & (equal.cumsum(dim=1, dtype=torch.int32) <= room))


@dataclass(frozen=True)
class Fired:
    """The selected entries of ``h`` of all latents, the same on every process.

    Attributes:
        rows: (N,) int64.
        latents: (N,) int64.
        h: (N,), without a graph.
    """

    rows: torch.Tensor
    latents: torch.Tensor
    h: torch.Tensor


@dataclass(frozen=True)
class OwnPairs(Pairs):
    """The candidates of this process, with what was chosen among all processes'."""

    fired: Fired = field(kw_only=True)


class ShardedDecoder(Decoder):
    """The rows of W_dec that a process holds; sums of rows are over those of all processes."""

    def __init__(self, W_dec: torch.Tensor, rescaled: bool, autocast: Any, shard: Shard):
        super().__init__(W_dec, rescaled, autocast)
        self._shard = shard

    @override
    def weighted_sums(self, values: torch.Tensor, selected: Selected) -> torch.Tensor:
        return sum_over(super().weighted_sums(values, selected), self._shard.group)


@dataclass(frozen=True)
class ShardedColumns(Columns):
    """The columns that a process holds; what they decode to is the sum over all processes."""

    shard: Shard

    @override
    def decode(self, acts: torch.Tensor) -> torch.Tensor:
        return sum_over(super().decode(acts), self.shard.group)


@dataclass(frozen=True)
class ShardedAccess(SparseAccess):
    """``h`` and the results computed from it cover only this process's latents.

    Masks, levels and decoded outputs cover all latents.
    """

    shard: Shard

    @override
    def columns_among(self, among: torch.Tensor, bound: int) -> Columns:
        among = self.shard.local(among)
        columns = super().columns_among(among, self.shard.bound(among, bound))
        return ShardedColumns(**vars(columns), shard=self.shard)

    @override
    def sums(self) -> torch.Tensor:
        """(d_sae,): 0 for a latent that another process holds."""
        return self.shard.pad_to_global(super().sums())

    @override
    @torch.no_grad()
    def _nearest(
        self, k: int, among: torch.Tensor | None, bound: int
    ) -> tuple[torch.Tensor, Selected]:
        if among is not None:
            among = self.shard.local(among)
            bound = self.shard.bound(among, bound)
        h, selected = super()._nearest(k, among, bound)
        nearness = self.nearness(h).where(h > -torch.inf, -torch.inf)
        return self.shard.keep_largest(h, nearness, k), selected

    @override
    @torch.no_grad()
    def _best(
        self, x: torch.Tensor, among: torch.Tensor, level: slice
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        among, level = self.shard.local(among), self.shard.local_slice(level)
        if level.start == level.stop:  # another process holds the level
            best = torch.zeros(len(x), 1, dtype=torch.int64, device=x.device)
            product = x.new_full((len(x), 1), -torch.inf)
            h = product.to(self.encoder.hidden_pre.dtype)
        else:
            h, product, best = super()._best(x, among, level)
        return self.shard.keep_largest(h, product, 1), product, best


class ShardedInputs(AuxLossInputs):
    """The record of a step whose latents are shared: sums and maxima go over all processes.

    ``dead`` covers all latents, ``h`` those of this process, so what joins the two is refused.
    """

    @property
    def dead_latents(self) -> torch.Tensor:  # pyright: ignore[reportIncompatibleVariableOverride]
        raise RuntimeError(
            "dead_latents, dead_hidden_pre() and dead_threshold() without columns are not there "
            "where latents are shared among processes: use dead_columns(), and dead_threshold(them)"
        )

    @override
    def total(self, x: torch.Tensor) -> torch.Tensor:
        return sum_over(super().total(x), self._group)

    @override
    def largest_of(self, x: torch.Tensor) -> torch.Tensor:
        return largest_over(super().largest_of(x), self._group)

    @property
    def _group(self) -> Any:
        access = self.access
        assert isinstance(access, ShardedAccess)
        return access.shard.group
