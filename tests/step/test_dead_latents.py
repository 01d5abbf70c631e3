"""The token counter and the criteria, against a plain Python count."""

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens.saes.sae import TrainingSAE

from sae_lens_auxk.step.dead import DeadCountAhead, fired_in_batch, soon_dead
from tests.helpers import ARCHITECTURES, build_sae, forward


def python_count(counts: list[int], feature_acts: torch.Tensor) -> list[int]:
    rows = feature_acts.to_dense().reshape(-1, len(counts)).tolist()
    return [
        0 if any(row[i] != 0 for row in rows) else count + len(rows)
        for i, count in enumerate(counts)
    ]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@settings(max_examples=10)
@given(
    batch_sizes=st.lists(st.integers(1, 9), min_size=1, max_size=6),
    threshold=st.integers(1, 25),
    checkpoint_after=st.integers(0, 5),
    seed=st.integers(0, 1000),
)
def test_counts_equal_a_plain_count(
    tmp_path_factory: Any,
    architecture: str,
    batch_sizes: list[int],
    threshold: int,
    checkpoint_after: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    sae = build_sae(architecture, dead_threshold_tokens=threshold)
    counts = [0] * sae.cfg.d_sae
    for i, batch_size in enumerate(batch_sizes):
        output = forward(sae, torch.randn(batch_size, 8), step=i)
        was_dead = [count >= threshold for count in counts]
        counts = python_count(counts, output.feature_acts)
        assert sae.tokens_since_fired.tolist() == counts
        assert output.metrics["dead_latents"] == sum(c >= threshold for c in counts)
        revived = sum(d and c == 0 for d, c in zip(was_dead, counts, strict=True))
        assert output.metrics["revived_latents"] == revived
        if i == checkpoint_after:
            path = tmp_path_factory.mktemp("checkpoint")
            sae.save_model(path)
            resumed = build_sae(architecture, dead_threshold_tokens=threshold)
            resumed.load_weights_from_checkpoint(path)
            sae = resumed


def test_criteria_choose_the_mask() -> None:
    x = torch.randn(6, 8)
    mask = torch.arange(24) < 5

    tokens = build_sae("auxk-topk", dead_threshold_tokens=6, k=1)
    output = forward(tokens, x, mask)
    silent = 24 - int((output.feature_acts > 0).any(dim=0).sum())
    assert output.metrics["dead_latents"] == silent

    steps = build_sae("auxk-topk", dead_criterion="steps", k=1)
    assert forward(steps, x, mask).metrics["dead_latents"] == 5
    assert forward(steps, x, None).metrics["dead_latents"] == 0
    assert forward(steps, x, None).losses["aux_loss"] == 0

    batch = build_sae("auxk-topk", dead_criterion="batch", dead_threshold_tokens=10**9, k=1)
    output = forward(batch, x, mask)
    silent = 24 - int((output.feature_acts > 0).any(dim=0).sum())
    assert output.metrics["dead_latents"] == silent
    assert output.metrics["dead_fraction"] == pytest.approx(silent / 24)


def test_reanimation_takes_the_batch_by_default_and_the_others_tokens() -> None:
    assert build_sae("auxk-topk", aux_variant="reanimation").cfg.resolved_dead_criterion == "batch"
    assert build_sae("auxk-topk", aux_variant="auxk").cfg.resolved_dead_criterion == "tokens"


def test_k_aux_used() -> None:
    sae = build_sae("auxk-topk", dead_criterion="steps", k_aux=4)
    x = torch.randn(6, 8)
    assert forward(sae, x, torch.arange(24) < 3).metrics["k_aux_used"] == 3
    assert forward(sae, x, torch.arange(24) < 9).metrics["k_aux_used"] == 4
    levels = build_sae(
        "auxk-matryoshka-batchtopk", dead_criterion="steps", k_aux=4, use_matryoshka_aux_loss=True
    )
    # 6 of the first level, 3 of the second, none of the third
    assert forward(levels, x, torch.arange(24) < 9).metrics["k_aux_used"] == 4 + 3
    off = build_sae("auxk-topk", dead_criterion="steps", aux_loss_coefficient=0.0)
    assert forward(off, x, torch.arange(24) < 9).metrics["k_aux_used"] == 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_counts_survive_saelens_loader_exactly(tmp_path: Path, dtype: str) -> None:
    """The loader casts every tensor of a checkpoint to the SAE's dtype."""
    sae = build_sae("auxk-topk", dtype=dtype)
    sae.tokens_since_fired.copy_(torch.arange(24) * 123_456_789_123)
    sae.training_steps.fill_(100_003)
    sae.save_model(tmp_path)
    loaded = TrainingSAE.load_from_disk(tmp_path)
    assert torch.equal(loaded.tokens_since_fired, sae.tokens_since_fired)
    assert loaded.tokens_since_fired.dtype == torch.int64
    assert int(loaded.training_steps) == 100_003


def test_counts_are_not_in_the_inference_model(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    sae = build_sae("auxk-topk")
    weights, _ = sae.save_inference_model(tmp_path)
    assert set(load_file(weights)) == {"W_enc", "W_dec", "b_enc", "b_dec"}


def test_a_negative_activation_is_one_too() -> None:
    acts = torch.zeros(4, 5)
    acts[0, 1], acts[1, 1], acts[2, 2] = 1.5, -1.5, -0.5  # the first two would cancel in a sum
    expected = [False, True, True, False, False]
    assert fired_in_batch(acts).tolist() == expected
    assert fired_in_batch(acts.to_sparse()).tolist() == expected


def test_sparse_activations_count_like_dense_ones() -> None:
    acts = torch.relu(torch.randn(7, 30) - 1.5)
    assert torch.equal(fired_in_batch(acts.to_sparse()), fired_in_batch(acts))
    torch.manual_seed(3)
    dense = build_sae("auxk-topk", k=2, dead_threshold_tokens=5)
    torch.manual_seed(3)
    sparse = build_sae("auxk-topk", k=2, dead_threshold_tokens=5, use_sparse_activations=True)
    for variant in ("auxk", "pre_activation"):
        dense.cfg.aux_variant = sparse.cfg.aux_variant = variant
        x = torch.randn(9, 8)
        a, b = forward(dense, x), forward(sparse, x)
        torch.testing.assert_close(a.losses["aux_loss"], b.losses["aux_loss"])
        assert torch.equal(dense.tokens_since_fired, sparse.tokens_since_fired)


@settings(max_examples=50)
@given(
    counts=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    threshold=st.integers(1, 40),
    noted=st.integers(1, 9),
    n_tokens=st.integers(1, 12),
)
def test_the_count_ahead_bounds_the_dead_latents_two_steps_later(
    counts: list[int], threshold: int, noted: int, n_tokens: int
) -> None:
    ahead, d_sae = DeadCountAhead(), len(counts)
    ahead.note(soon_dead(torch.tensor(counts), threshold, noted), threshold, noted)
    assert ahead.bound(threshold, n_tokens, d_sae) is None, "of the step after the next one"
    ahead.note(torch.tensor(0), threshold, n_tokens)
    bound = ahead.bound(threshold, n_tokens, d_sae)
    if n_tokens > noted:
        assert bound is None
        return
    assert bound is not None
    assert ahead.bound(threshold + 1, n_tokens, d_sae) is None, "another threshold"
    # Reached if nothing fires and both batches are as large as the one before.
    most = sum(count + 2 * noted >= threshold for count in counts)
    assert most <= bound <= d_sae
    assert bound < most + d_sae / 8
    assert (bound == 0) == (most == 0)


def test_the_bound_stays_where_the_number_changes_by_little() -> None:
    ahead, bounds = DeadCountAhead(), list[Any]()
    for n_dead in (*(15, 16, 15, 17, 15), 0, *(1,) * 60):
        ahead.note(torch.tensor(n_dead), 10, 4)
        bounds.append(ahead.bound(10, 4, 64))
    assert bounds[:7] == [None, 16, 16, 16, 24, 24, 0]
    assert bounds[7:] == [24] * 47 + [16] + [8] * 11
