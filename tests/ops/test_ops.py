"""The operations of the sparse step: torch references against plain loops.

The Triton kernels have their tests in ``kernels/``.
"""

import copy
import gc
import io
import os
import subprocess
import sys
import weakref
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lens_auxk import ops
from sae_lens_auxk.ops.encoder import SelectedActivations
from sae_lens_auxk.ops.matrices import Decoder, LatentGradient, handle, transposed, unit_columns_
from sae_lens_auxk.ops.selection import InColumns, Pairs, group_size, top_k, top_k_of_batch
from tests.helpers import (
    TOPK_ARCHITECTURES,
    VARIANTS,
    assert_sparse_step_equals_dense,
    build_sae,
    build_trainer,
    kill_latents,
)


@settings(max_examples=40)
@given(
    B=st.integers(1, 4),
    n=st.sampled_from([5, 8192, 12_288, 16_384, 20_000]),
    k=st.integers(1, 64),
    ties=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_top_k_is_that_of_torch(B: int, n: int, k: int, ties: bool, seed: int) -> None:
    torch.manual_seed(seed)
    k = min(k, n)
    x = torch.randn(B, n)
    if ties:
        x = x.round()
    values, indices = top_k(x, k)
    expected = x.topk(k, dim=-1).values
    assert torch.equal(values.sort(dim=-1, descending=True).values, expected)
    assert torch.equal(x.gather(1, indices), values)
    assert all(len(set(row)) == k for row in indices.tolist())


def test_top_k_among_some_columns() -> None:
    x, among = torch.randn(4, 16_384), torch.rand(16_384) < 0.3
    values, indices = top_k(x, 50, among)
    expected = x.masked_fill(~among, -torch.inf).topk(50, dim=-1).values
    assert torch.equal(values.sort(dim=-1, descending=True).values, expected)
    assert torch.equal(x.gather(1, indices), values)
    few = torch.arange(16_384) < 3
    for columns in (16_384, 100):  # in two levels and in one
        values, indices = top_k(x[:, :columns].contiguous(), 5, few[:columns])
        assert torch.equal(values.isinf().sum(dim=1), torch.full((4,), 2))
        assert set(indices[~values.isinf()].tolist()) == {0, 1, 2}


def test_both_levels_are_used_where_rows_are_long() -> None:
    assert group_size(131_072, 32) >= 32
    assert group_size(65_536, 512) >= 8
    assert group_size(100, 5) == 1


def test_top_k_of_batch_takes_the_largest_of_all_rows() -> None:
    x = torch.randn(40, 1000)
    values, flat = top_k_of_batch(x, 120)
    assert torch.equal(values.sort().values, x.flatten().topk(120).values.sort().values)
    assert torch.equal(x.flatten()[flat], values)


def test_ragged_selections() -> None:
    """As BatchTopK makes them: some rows without a pair, others with many."""
    flat = torch.tensor([3, 4, 9, 21, 22, 23, 24, 49])
    rows = flat // 10
    pairs = Pairs.from_bags(rows, flat % 10, rows, n_bags=5, d_sae=10)
    values = torch.randn(8, dtype=torch.float64, requires_grad=True)
    W = torch.randn(10, 4, dtype=torch.float64, requires_grad=True)
    x = torch.randn(5, 4, dtype=torch.float64)
    dense = torch.zeros(50, dtype=torch.float64).index_put((flat,), values).view(5, 10)
    torch.testing.assert_close(pairs.dots(x, W.detach()), (x @ W.T).flatten()[flat])
    assert torch.equal(pairs.sum_by_latent(values), dense.sum(dim=0))
    torch.testing.assert_close(
        Decoder(W, rescaled=False, autocast=None).weighted_sums(values, pairs), dense @ W
    )
    torch.autograd.gradcheck(
        lambda v, w: Decoder(w, rescaled=False, autocast=None).weighted_sums(v, pairs), (values, W)
    )


def test_selections_with_levels() -> None:
    """As Matryoshka makes them: a bag is one level of a row, some without a pair."""
    rows, latents = torch.tensor([0, 0, 0, 2]), torch.tensor([1, 7, 8, 2])
    bags = rows * 2 + (latents >= 5)
    pairs = Pairs.from_bags(rows, latents, bags, n_bags=6, d_sae=10)
    W, x = torch.randn(10, 4), torch.randn(6, 4)
    torch.testing.assert_close(pairs.dots(x, W), (x @ W.T)[bags, latents])
    values = torch.randn(4)
    for of_which, among in ((x, bags), (x[:3], rows)):  # a row for each bag, or for each row
        gradient = LatentGradient(W)
        expected = torch.zeros(10, 4)
        for _ in range(2):  # to a new buffer, and to one that is there
            gradient.add_selected(pairs, values, of_which)
            expected.index_add_(0, latents, values.unsqueeze(1) * of_which[among])
        torch.testing.assert_close(gradient.take(), expected)


@pytest.mark.parametrize("n", [1, 128, 300])
def test_transposing(n: int) -> None:
    x = torch.randn(n, 7)
    assert torch.equal(transposed(x), x.T)
    assert transposed(x).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_products_are_relative_to_the_norm_of_their_column(dtype: torch.dtype) -> None:
    products = torch.randn(300, 40).to(dtype)
    products[:, 3], products[:, 4] = 0, 1e-30  # the square of 1e-30 is 0 in float32
    exact = products.double()
    expected = exact / exact.norm(dim=0).where(exact.abs().amax(dim=0) > 0, 1)
    if dtype != torch.float64:
        expected[:, 4] = 0
    tolerance = {"rtol": 0, "atol": 0} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(unit_columns_(products), expected.to(dtype), **tolerance)


def test_both_forms_of_a_selection_are_the_same() -> None:
    columns, positions = torch.tensor([1, 4, 5, 8]), torch.stack([torch.randperm(4)[:3]] * 2)
    forms = [InColumns(columns, positions, 10), Pairs.per_row(columns[positions], 10)]
    W = torch.randn(10, 6, dtype=torch.float64, requires_grad=True)
    results = []
    for selected in forms:
        values = torch.arange(6.0).double().view(2, 3).requires_grad_()
        decoder = Decoder(W, rescaled=True, autocast=None)
        out = decoder.weighted_sums(decoder.times_norm(values, selected), selected)
        products = decoder.dots(torch.ones(2, 6).double(), selected).view(2, 3)
        sums = selected.sum_by_latent(values.detach())
        results.append((out, products, sums, *torch.autograd.grad(out.square().sum(), (values, W))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_one_buffer_collects_a_gradient() -> None:
    """Rows, pairs, all rows, a multiple of W: their sum, in either layout."""
    W = torch.randn(5, 3)
    rows, a, b, along = torch.randn(2, 3), torch.randn(5), torch.randn(3), torch.randn(5)
    x, values = torch.randn(4, 3), torch.randn(2)
    latents = torch.tensor([3, 3])
    expected = W * along.unsqueeze(1) + torch.outer(a, b)
    expected.index_add_(0, latents, rows)
    expected[1] += values[0] * x[0] + values[1] * x[2]
    bags = torch.tensor([0, 2])
    pairs = Pairs.from_bags(bags, torch.tensor([1, 1]), bags, n_bags=4, d_sae=5)
    for transpose in (False, True):
        matrix = (W.T if transpose else W).clone().requires_grad_()
        gradient = LatentGradient(matrix, transpose)

        def add(gradient: LatentGradient = gradient) -> None:
            gradient.add_rows(rows, latents)
            gradient.add_selected(pairs, values, x)
            gradient.add_rows(torch.outer(a, b))
            if not gradient.transpose:
                gradient.add_along(along)

        stand_in = handle(matrix, gradient)
        loss = _Adds.apply(torch.ones((), requires_grad=True), stand_in, add)
        (found,) = torch.autograd.grad(loss, matrix, retain_graph=True)
        reference = expected - W * along.unsqueeze(1) if transpose else expected
        torch.testing.assert_close(found, reference.T if transpose else reference)
        (again,) = torch.autograd.grad(loss, matrix)
        assert torch.equal(again, found), "nothing is left over from the pass before"


class _Adds(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, stand_in, add):  # type: ignore[no-untyped-def]
        ctx.add = add
        return x.clone()

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        ctx.add()
        return grad, None, None


def test_sums_of_a_pass_that_does_not_lead_to_the_matrix_are_dropped() -> None:
    W_dec = torch.randn(6, 3, requires_grad=True)
    values = torch.ones(2, 2, requires_grad=True)
    decoder = Decoder(W_dec, rescaled=False, autocast=None)
    pairs = Pairs.per_row(torch.tensor([[0, 1], [1, 2]]), 6)
    loss = decoder.weighted_sums(values, pairs).sum()
    torch.autograd.grad(loss, values, retain_graph=True)
    (gradient,) = torch.autograd.grad(loss, W_dec)
    assert torch.equal(gradient, torch.tensor([1.0, 2, 1, 0, 0, 0]).unsqueeze(1).expand(6, 3))


def test_selected_activations_are_a_sparse_tensor_with_dense_sums_over_rows() -> None:
    rows, latents = torch.tensor([0, 0, 1, 2]), torch.tensor([1, 3, 3, 0])
    values = torch.tensor([1.0, 0.0, 2.0, 3.0])
    acts = SelectedActivations.of(rows, latents, values, torch.Size((3, 5)))
    dense = torch.zeros(3, 5).index_put_((rows, latents), values)
    assert acts.is_sparse
    assert torch.equal(acts.to_dense(), dense)
    fired = acts.bool().float()  # as SAELens's trainer asks
    for sums in (fired.sum(-2), fired.sum(0), fired.sum(dim=0), fired.sum(dim=-2)):
        assert type(sums) is torch.Tensor
        assert torch.equal(sums, torch.tensor([1.0, 1, 0, 1, 0]))
    assert torch.equal(fired.sum(-1).to_dense(), torch.tensor([1.0, 1, 1]))
    assert torch.equal(acts @ torch.eye(5), dense)
    assert torch.equal(acts.bool().sum(0).to_dense(), torch.tensor([1, 1, 0, 1, 0]))
    buffer = io.BytesIO()
    torch.save(acts, buffer)
    buffer.seek(0)
    for copied in (copy.deepcopy(acts), copy.copy(acts), torch.load(buffer)):
        assert torch.equal(copied.to_dense(), dense)


# Rows long enough for a selection in two levels, more dead latents than k_aux.
@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "none"])
@pytest.mark.parametrize("architecture", TOPK_ARCHITECTURES)
def test_the_sparse_step_equals_the_dense_one(
    architecture: str, variant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert_sparse_step_equals_dense(architecture, variant, d_sae=8192)


def _pytest(*arguments: str, first: str = "", **environment: str) -> str:
    """What pytest prints in a process that runs the statements ``first`` before all else."""
    result = subprocess.run(
        [sys.executable, "-c", f"{first}\nimport pytest, sys; sys.exit(pytest.main(sys.argv[1:]))"]
        + ["-q", "-p", "no:cacheprovider", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env={**os.environ, **environment},
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU runs tests/ops/kernels itself")
def test_the_kernels_by_the_interpreter() -> None:
    assert "skipped" not in _pytest("tests/ops/kernels", TRITON_INTERPRET="1")


def test_without_triton_all_tests_are_collected_and_a_sparse_step_runs() -> None:
    """Doctests are collected from every module of the package, so that it is imported."""
    blocked = "import sys; sys.modules['triton'] = None"
    assert "1 passed" in _pytest("-k", test_a_step_leaves_nothing_behind.__name__, first=blocked)


def test_the_kernels_and_the_sparse_step_can_be_turned_off(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    new, x = type(ops.KERNELS), torch.randn(4, 8)  # looked up once: another one looks again
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("SAE_LENS_AUXK_OPS", "torch")
    assert new()["cpu"] is new()["cuda"] is None
    sparse = build_sae("auxk-topk")
    monkeypatch.setenv("SAE_LENS_AUXK_OPS", "dense")
    assert new()["cpu"] is new()["cuda"] is None
    dense = build_sae("auxk-topk")
    assert (sparse._can_be_sparse(x), dense._can_be_sparse(x)) == (True, False)
    monkeypatch.setenv("SAE_LENS_AUXK_OPS", "fast")
    with pytest.raises(ValueError, match="SAE_LENS_AUXK_OPS='fast' is not allowed"):
        new()["cpu"]
    with pytest.raises(ValueError, match="SAE_LENS_AUXK_OPS='fast' is not allowed"):
        build_sae("auxk-topk")


def test_the_kernels_are_for_a_gpu_and_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    new, imported = type(ops.KERNELS), object()
    monkeypatch.delenv("SAE_LENS_AUXK_OPS", raising=False)
    monkeypatch.setattr(ops, "import_module", lambda name: imported)
    monkeypatch.setattr(ops, "find_spec", lambda name: name)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert [new()[device] for device in ("cuda", "cpu", "mps")] == [imported, None, None]
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert new()["cpu"] is imported
    monkeypatch.setattr(ops, "find_spec", lambda name: None)
    assert new()["cuda"] is None


def test_a_step_leaves_nothing_behind() -> None:
    """The buffers go with the step, without waiting for Python to look for cycles."""
    alive: list[weakref.ref[LatentGradient]] = []
    make = LatentGradient.__init__

    def note(self: LatentGradient, *args: object, **kwargs: object) -> None:
        make(self, *args, **kwargs)  # type: ignore[arg-type]
        alive.append(weakref.ref(self))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LatentGradient, "__init__", note)
        gc.disable()
        try:
            for variant in VARIANTS:
                sae = build_sae("auxk-topk", aux_variant=variant, dead_threshold_tokens=16)
                kill_latents(sae, 10)
                trainer = build_trainer(sae)
                for _ in range(3):
                    trainer.step(torch.randn(16, 8))
        finally:
            gc.enable()
    assert len(alive) == 2 * 3 * len(VARIANTS)
    assert not [ref for ref in alive if ref() is not None]
