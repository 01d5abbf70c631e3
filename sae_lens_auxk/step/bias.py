"""The first value of ``b_dec``, from the first batch of a run.

Sources: Bricken et al. 2023, "Towards Monosemanticity", start it at the geometric median of the
data; Gao et al. 2024, appendix A.1, do the same. SAELens starts it at 0.
"""

import torch

MAX_NORM_MULTIPLE = 10.0
"""Rows with more than so many times the median norm do not count: attention sinks."""

MAX_ITERATIONS = 100
TOLERANCE = 1e-6


@torch.no_grad()
def initial_b_dec(rows: torch.Tensor, how: str) -> torch.Tensor:
    """(d_in,) the mean or the geometric median of the rows with an ordinary norm.

    Args:
        rows: (B, d_in) the input, after scaling and normalisation.
        how: "mean" or "geometric_median".
    """
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    norms = rows.norm(dim=-1)
    rows = rows[norms <= MAX_NORM_MULTIPLE * norms.median()]
    return rows.mean(dim=0) if how == "mean" else _geometric_median(rows)


def _geometric_median(rows: torch.Tensor) -> torch.Tensor:
    """(d,) the point with the least sum of distances to the rows: Weiszfeld's iteration."""
    median = rows.mean(dim=0)
    tiny = torch.finfo(rows.dtype).tiny
    for _ in range(MAX_ITERATIONS):
        weights = 1 / (rows - median).norm(dim=-1, keepdim=True).clamp(min=tiny**0.5)
        before, median = median, (rows * weights).sum(dim=0) / weights.sum()
        if (median - before).norm() <= TOLERANCE * median.norm():
            break
    return median
