"""Which latents a process holds, and the operations that go over all of them.

A training step is written for the latents that a process holds. To compare or sum over all latents,
it uses :class:`AllLatents` in an ordinary run, where nothing needs to be exchanged, or a
:class:`Shard`.
"""

from dataclasses import dataclass, field, fields
from typing import Any

import torch

from sae_lens_auxk.ops.selected import Pairs
from sae_lens_auxk.sharded.collectives import gather, largest_over, sum_in_backward, sum_over


class AllLatents:
    """All latents are here."""

    start: int = 0
    """The first latent that this process holds."""

    def own(self, of_latents: torch.Tensor) -> torch.Tensor:
        """(n, ...): the entries of ``of_latents`` (d_sae, ...) for the latents held here."""
        return of_latents

    def own_slice(self, latents: slice) -> slice:
        """The part of a range of latents that is held here, counted from the first held here."""
        return latents

    def own_among(self, latents: torch.Tensor) -> tuple[slice | torch.Tensor, torch.Tensor]:
        """Which of ``latents`` (m,) are held here, and these, counted from the first held here."""
        return slice(None), latents

    def own_bound(self, among: torch.Tensor, bound: int) -> int:  # noqa: ARG002
        """An upper bound on how many of ``among`` (n,), those held here, are True.

        Args:
            among: (n,) bool.
            bound: the same for all latents.
        """
        return bound

    def of_all(self, own: torch.Tensor) -> torch.Tensor:
        """(d_sae,): ``own`` (n,) at the latents held here, 0 elsewhere; with its graph."""
        return own

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of ``x``, a sum over the latents of each process, over the processes.

        Every process computes the same from it, so its gradient is the same in each.
        """
        return x

    def max(self, x: torch.Tensor) -> torch.Tensor:
        """The largest ``x`` of the processes; no graph."""
        return x

    def replicated(self, parameter: torch.Tensor) -> torch.Tensor:
        """A parameter that all hold, for use with each process's own latents.

        Its gradient is the sum of the processes'.
        """
        return parameter

    def keep_largest(self, h: torch.Tensor, by: torch.Tensor, k: int) -> torch.Tensor:  # noqa: ARG002
        """``h`` where ``by`` is among the ``k`` largest of the row over all processes, else -inf.

        Args:
            h: (B, m).
            by: (B, m), m at most k.
            k: how many.
        """
        return h


ALL_LATENTS = AllLatents()


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


@dataclass(frozen=True)
class Shard(AllLatents):
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
    def start(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.rank * self.n

    def own(self, of_latents: torch.Tensor) -> torch.Tensor:
        return of_latents[self.start : self.start + self.n]

    def own_slice(self, latents: slice) -> slice:
        start, stop, _ = latents.indices(self.d_sae)
        first = min(max(start - self.start, 0), self.n)
        return slice(first, max(first, min(stop - self.start, self.n)))

    def own_among(self, latents: torch.Tensor) -> tuple[slice | torch.Tensor, torch.Tensor]:
        is_own = (latents >= self.start) & (latents < self.start + self.n)
        return is_own, latents[is_own] - self.start

    def own_bound(self, among: torch.Tensor, bound: int) -> int:
        # Never 0: what has no column has no largest one.
        return max(1, min(bound, self.n) if among.is_cuda else int(among.sum()))

    def of_all(self, own: torch.Tensor) -> torch.Tensor:
        after = self.d_sae - self.start - self.n
        return torch.nn.functional.pad(own, (self.start, after))

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        return sum_over(x, self.group)

    def max(self, x: torch.Tensor) -> torch.Tensor:
        return largest_over(x, self.group)

    def replicated(self, parameter: torch.Tensor) -> torch.Tensor:
        return sum_in_backward(parameter, self.group)

    @torch.no_grad()
    def keep_largest(self, h: torch.Tensor, by: torch.Tensor, k: int) -> torch.Tensor:
        m = by.shape[1]
        # Processes may have different numbers of candidates.
        by = torch.nn.functional.pad(by, (0, k - m), value=-torch.inf)
        everywhere = gather(by, self.group)
        kth = _kth_largest(everywhere.transpose(0, 1).flatten(1), k)
        room = k - (everywhere > kth).sum(dim=(0, 2))
        room -= (everywhere[: self.rank] == kth).sum(dim=(0, 2))
        ties = by == kth
        chosen = (by > kth) | (ties & (ties.cumsum(dim=1) <= room.unsqueeze(1)))
        return h.where(chosen[:, :m], -torch.inf)

    @torch.no_grad()
    def choose(
        self, h: torch.Tensor, by: torch.Tensor, selected: Pairs, n: int
    ) -> tuple[torch.Tensor, OwnPairs]:
        """Choose the ``n`` candidates of all processes with the largest ``by``.

        Args:
            h: (N,) this process's candidates.
            by: (N,) what they are compared by.
            selected: (N,) which they are, ascending within a bag.
            n: how many in all rows together; the same number in each row if ``selected`` has that.

        Returns:
            (N,) ``h``, -inf for those that were not chosen, and the pairs.
        """
        n_races = 1 if selected.per_bag is None else selected.offsets.numel()
        columns = {"h": h, "latents": (selected.latents + self.start).int()}
        if n_races == 1:
            columns["rows"] = selected.rows.int()
        if by is not h:
            columns["by"] = by
        # (races, candidates of all processes, those of the lowest latents first) each
        offered = {
            name: gather(column.view(n_races, -1), self.group).transpose(0, 1).flatten(1)
            for name, column in columns.items()
        }
        by_all = offered.get("by", offered["h"])
        kth = _kth_largest(by_all, n // n_races)
        room = n // n_races - (by_all > kth).sum(dim=1, keepdim=True)
        ties = by_all == kth
        chosen = (by_all > kth) | (ties & (ties.cumsum(dim=1, dtype=torch.int32) <= room))
        # The number is known, so nothing waits for the device.
        places = chosen.flatten().nonzero_static(size=n, fill_value=0).squeeze(1)
        at = {name: values.flatten()[places] for name, values in offered.items()}
        rows = at["rows"].long() if n_races == 1 else places // chosen.shape[1]
        fired = Fired(rows, at["latents"].long(), at["h"])
        own = chosen.unflatten(1, (self.group.size(), -1))[:, self.rank].flatten()
        pairs = {each.name: getattr(selected, each.name) for each in fields(Pairs)}
        return h.where(own, -torch.inf), OwnPairs(**pairs, fired=fired)


def _kth_largest(x: torch.Tensor, k: int) -> torch.Tensor:
    """(B, 1): the k-th largest entry of each row."""
    return x.topk(min(k, x.shape[1]), dim=1, sorted=False).values.amin(dim=1, keepdim=True)
