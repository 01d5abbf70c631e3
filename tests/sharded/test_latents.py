"""Choosing among the latents of all processes, without processes."""

import pytest
import torch

from sae_lens_auxk.sharded.latents import ShardedInputs, topk_mask


def plain_mask(row: list[float], k: int) -> list[bool]:
    """The k largest, those of the lowest index first where they are equal."""
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    return [i in order[:k] for i in range(len(row))]


def test_the_largest_are_chosen_and_of_equal_ones_the_first() -> None:
    for seed in range(300):
        generator = torch.Generator().manual_seed(seed)
        m = int(torch.randint(1, 12, (), generator=generator))
        k = int(torch.randint(1, m + 3, (), generator=generator))
        by = torch.randn(4, m, generator=generator).round()  # many are equal
        by[torch.rand(4, m, generator=generator) < 0.2] = -torch.inf
        mask = topk_mask(by, k)
        assert mask.tolist() == [plain_mask(row, k) for row in by.tolist()]


def test_a_loss_cannot_join_all_latents_with_those_of_one_process() -> None:
    with pytest.raises(RuntimeError, match=r"use dead_columns\(\)"):
        _ = ShardedInputs.__new__(ShardedInputs).dead_latents
