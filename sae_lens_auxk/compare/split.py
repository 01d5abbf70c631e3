"""Is a feature split between two latents?

A latent that holds a feature explains the feature's activation, alone. Where a second latent holds
a part of it (the strong activations, the rows on which a parent is silent, or a correction of the
first latent's size), the two explain it better than either of them alone.
"""

from collections.abc import Iterable

import torch

TINY = 1e-12
COLLINEAR = 1e-4
"""A latent with a smaller share of its variance unexplained by another adds nothing to it."""
SPLIT_TENSORS = 14
"""At most this many float32 tensors (n, d_sae) are held at once."""


@torch.no_grad()
def split_gain(
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    latents: torch.Tensor,
    signed: bool = True,
) -> torch.Tensor:
    """How much better two latents explain a target than the better of them alone.

    For each latent i with target y it is ``R2(y; i, j) - max(R2(y; i), R2(y; j))``, where R2 is the
    share of y's variance that least squares with a constant explains, and the partner j is the
    latent that adds most to i. Both must have positive coefficients: a suppressor, which only takes
    away what the other has too much, holds no part of the target. Every second row chooses the
    partner and the others measure, since the best of many partners explains some noise on the rows
    that it was chosen on.

    Compared with i alone, a corrector and a poor copy of another latent would look split: their
    partner then explains all of the target.

    Args:
        batches: pairs of activations (B, d_sae) of all latents and targets (B, n): column m is
            what latent ``latents[m]`` should explain. With true features it is the activation of
            the nearest one, without them for instance that of the nearest latent of an SAE
            trained with another seed.
        latents: (n,) int64.
        signed: whether coefficients must be positive. Of latents that fire in both directions, none
            has a sign that tells a part from a suppressor, so there suppressors count.

    Returns:
        (n,) gains between 0 and 1; NaN where the target does not vary.
    """
    choose, judge = _Moments(latents, signed), _Moments(latents, signed)
    for acts, targets in batches:
        choose.add(acts[::2], targets[::2])
        judge.add(acts[1::2], targets[1::2])
    partner = choose.added().argmax(dim=1, keepdim=True)
    own, added, alone = judge.own(), judge.added(), judge.alone()
    both = own + added.gather(1, partner).squeeze(1)
    gain = both - torch.maximum(own, alone.gather(1, partner).squeeze(1))
    # Where the partner may not be used, the better one alone can be the partner.
    return gain.clamp(min=0).masked_fill(judge.target_variance <= 0, torch.nan)


class _Moments:
    """Sums over rows, and from them shares of the targets' variance, centred.

    Plain sums of squares lose a variance that is small relative to the mean, so all sums are
    centred on the means of the first batch.
    """

    def __init__(self, latents: torch.Tensor, signed: bool) -> None:
        self.latents = latents
        self.signed = signed
        self.row = torch.arange(latents.numel(), device=latents.device)
        self.n_rows = 0
        self.sums: list[torch.Tensor] = []
        self.about: tuple[torch.Tensor, torch.Tensor] | None = None

    def add(self, acts: torch.Tensor, targets: torch.Tensor) -> None:
        c, y = acts.float(), targets.float()
        if self.about is None:
            self.about = c.mean(0), y.mean(0)
        c, y = c - self.about[0], y - self.about[1]
        own = c[:, self.latents]
        sums = [c.sum(0), y.sum(0), (c**2).sum(0), (y**2).sum(0), y.T @ c, own.T @ c]
        self.sums = [a + b for a, b in zip(self.sums, sums, strict=True)] if self.sums else sums
        self.n_rows += c.shape[0]

    @property
    def variance(self) -> torch.Tensor:
        """(d_sae,) of the latents, times the number of rows."""
        return self.sums[2] - self.sums[0] ** 2 / self.n_rows

    @property
    def target_variance(self) -> torch.Tensor:
        """(n,) of the targets, times the number of rows."""
        return self.sums[3] - self.sums[1] ** 2 / self.n_rows

    @property
    def with_target(self) -> torch.Tensor:
        """(n, d_sae) covariances of targets and latents, times the number of rows."""
        return self.sums[4] - self.sums[1][:, None] * self.sums[0] / self.n_rows

    @property
    def with_own(self) -> torch.Tensor:
        """(n, d_sae) covariances of each target's own latent and all latents, times the rows."""
        return self.sums[5] - self.sums[0][self.latents][:, None] * self.sums[0] / self.n_rows

    def alone(self) -> torch.Tensor:
        """(n, d_sae): the R2 of each latent alone."""
        scale = self.target_variance[:, None] * self.variance
        return self.with_target**2 / scale.clamp(min=TINY)

    def own(self) -> torch.Tensor:
        """(n,): the R2 of each target's own latent alone."""
        return self.alone()[self.row, self.latents]

    def added(self) -> torch.Tensor:
        """(n, d_sae): what each latent adds to the R2 of the target's own latent."""
        with_target, with_own, variance = self.with_target, self.with_own, self.variance
        slope = with_own / variance[self.latents].clamp(min=TINY)[:, None]
        left = variance - slope * with_own
        target_of_own = with_target[self.row, self.latents][:, None]
        new = with_target - slope * target_of_own
        added = new**2 / (left * self.target_variance[:, None]).clamp(min=TINY)
        added[left <= COLLINEAR * variance] = 0.0
        added[self.row, self.latents] = 0.0
        if self.signed:
            of_own = target_of_own - with_own / variance.clamp(min=TINY) * with_target
            added[(new <= 0) | (of_own <= 0)] = 0.0
        return added
