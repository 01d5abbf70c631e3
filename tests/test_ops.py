"""The operations of the sparse step: torch references against plain loops, Triton against them.

Triton runs on the CPU by its interpreter, in a process of its own: it reads TRITON_INTERPRET
when a kernel is defined. On a GPU the kernels are compiled.
"""

import copy
import gc
import io
import os
import subprocess
import sys
import textwrap
import weakref
from importlib.util import find_spec

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_lens_auxk.ops.activations import SelectedActivations
from sae_lens_auxk.ops.decoder import Decoder
from sae_lens_auxk.ops.gradient import LatentGradient, handle, transposed
from sae_lens_auxk.ops.selected import InColumns, Pairs
from sae_lens_auxk.ops.topk import group_size, top_k, top_k_of_batch
from tests.helpers import VARIANTS, build_sae, build_trainer, kill_latents


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
    for by_bag, among in ((True, bags), (False, rows)):
        gradient = LatentGradient(W)
        expected = torch.zeros(10, 4)
        for _ in range(2):  # to a new buffer, and to one that is there
            pairs.add_to(gradient, values, x, by_bag)
            expected.index_add_(0, latents, values.unsqueeze(1) * x[among])
        torch.testing.assert_close(gradient.take(), expected)


@pytest.mark.parametrize("n", [1, 128, 300])
def test_transposing(n: int) -> None:
    x = torch.randn(n, 7)
    assert torch.equal(transposed(x), x.T)
    assert transposed(x).is_contiguous()


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
    """Rows, pairs, an outer product, a multiple of W: their sum, in either layout."""
    W = torch.randn(5, 3)
    rows, a, b, along = torch.randn(2, 3), torch.randn(5), torch.randn(3), torch.randn(5)
    x, values = torch.randn(4, 3), torch.randn(2)
    latents = torch.tensor([3, 3])
    expected = W * along.unsqueeze(1) + torch.outer(a, b)
    expected.index_add_(0, latents, rows)
    expected[1] += values[0] * x[2] + values[1] * x[0]
    for transpose in (False, True):
        matrix = (W.T if transpose else W).clone().requires_grad_()
        gradient = LatentGradient(matrix, transpose)

        def add(gradient: LatentGradient = gradient) -> None:
            gradient.add_rows(rows, latents)
            starts = torch.tensor([0, 0, 2, 2, 2, 2])
            gradient.add_pairs(values, x, torch.tensor([2, 0]), torch.tensor([1, 1]), starts)
            gradient.add_outer(a, b)
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


KERNEL_TESTS = textwrap.dedent(
    """
    import torch
    from sae_lens_auxk.ops import triton_kernels as kernels

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = torch.randn(3, 640, device=device).to(dtype)
        for size in (4, 16, 128):
            assert torch.equal(kernels.group_max(x, size), x.unflatten(1, (-1, size)).amax(-1))
        columns = torch.randperm(640, device=device)[:77].sort().values
        assert torch.equal(kernels.gather_columns(x, columns), x[:, columns])
        some = kernels.gather_columns(x, columns, torch.tensor(50, device=device))
        assert torch.equal(some[:, :50], x[:, columns[:50]]) and some[:, 50:].isneginf().all()
        assert torch.equal(kernels.transposed(x), x.T)
    x = torch.full((2, 64), -torch.inf, device=device)
    x[0, 5] = 1.0
    assert torch.equal(kernels.group_max(x, 16), x.unflatten(1, (-1, 16)).amax(-1))

    W, scale = torch.randn(5, 300, device=device), torch.rand(300, device=device)
    assert torch.equal(kernels.scaled_cast(W, scale, torch.float32), W * scale)
    of_row = torch.rand(5, 1, device=device)
    assert torch.equal(kernels.scaled_cast(W, of_row, torch.float32), W * of_row)
    # the interpreter cuts where a GPU rounds: one unit of bfloat16's last place
    torch.testing.assert_close(
        kernels.scaled_cast(W, scale, torch.bfloat16), (W * scale).bfloat16(), rtol=2**-7, atol=0
    )

    x = torch.randn(6, 20, device=device)
    # Latents with so many pairs that several programs share them, beside some with none and few.
    for counts in ([3, 0, 1, 0, 0, 2, 0, 0, 1, 0], [3, 200, 64, 0, 65, 129, 1, 0, 300, 0]):
        counts = torch.tensor(counts, device=device)
        latents = torch.arange(10, device=device).repeat_interleave(counts)
        rows, values = torch.randint(0, 6, latents.shape, device=device), torch.randn(len(latents))
        values = values.to(device)
        starts = torch.searchsorted(latents, torch.arange(11, device=device))
        expected = torch.zeros(10, 20, device=device).index_add_(
            0, latents, values.unsqueeze(1) * x[rows]
        )
        pairs = values, rows, latents, starts, x
        torch.testing.assert_close(kernels.outer_sums(*pairs), expected)
        out = kernels.outer_sums(*pairs, torch.ones(10, 20, device=device))
        torch.testing.assert_close(out, expected + 1)
    torch.use_deterministic_algorithms(True)
    assert torch.equal(kernels.outer_sums(*pairs), kernels.outer_sums(*pairs))
    torch.testing.assert_close(kernels.outer_sums(*pairs), expected)
    torch.use_deterministic_algorithms(False)
    scale, W = torch.randn(21, device=device), torch.randn(21, 20, device=device)
    sparse = scale.clone()
    sparse[::3] = 0
    unread = W.clone()
    unread[::3] = torch.nan
    transposed = torch.randn(20, 21, device=device).T
    cases = (scale, W), (sparse, unread), (scale, W[0].expand(21, 20)), (scale, transposed)
    for scale, W in (*cases, (scale[:1].expand(21), W)):
        expected = (scale.unsqueeze(1) * W).where(scale.unsqueeze(1) != 0, 0)
        torch.testing.assert_close(kernels.add_multiples(scale, W), expected)
        out = kernels.add_multiples(scale, W, torch.ones(21, 20, device=device))
        torch.testing.assert_close(out, expected + 1)
    among = torch.rand(640, device=device) < 0.3
    x = torch.randn(3, 640, device=device)
    assert torch.equal(
        kernels.group_max(x, 16, among),
        x.masked_fill(~among, -torch.inf).unflatten(1, (-1, 16)).amax(-1),
    )

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for ties in (False, True):
            x = torch.randn(3, 200, device=device)
            x = (x.round() if ties else x).to(dtype)
            x[1] = -x[1].abs() - 1
            some = torch.arange(200, device=device) % 3 == 0
            groups = torch.stack([torch.randperm(25, device=device)[:11] for _ in range(3)])
            within = torch.zeros(3, 25, 8, dtype=torch.bool, device=device)
            within[torch.arange(3, device=device).unsqueeze(1), groups] = True
            for among, g in ((None, None), (some, None), (None, groups), (some, groups)):
                values, indices = kernels.largest(x, 20, among, g, 8)
                counts = torch.ones_like(x, dtype=torch.bool)
                if among is not None:
                    counts &= among
                if g is not None:
                    counts &= within.flatten(1)
                expected = x.masked_fill(~counts, -torch.inf).topk(20).values
                assert torch.equal(values.sort(descending=True).values, expected)
                assert torch.equal(x.gather(1, indices), values)
                assert all(len(set(row)) == 20 for row in indices.tolist())
    few = torch.arange(200, device=device) < 5
    values, indices = kernels.largest(torch.randn(2, 200, device=device), 20, few)
    assert torch.equal(values.isinf().sum(dim=1), torch.full((2,), 15, device=device))

    W = torch.randn(50, 300, device=device)
    latents = torch.randint(0, 50, (4, 21), device=device)
    values = torch.randn(4, 21, device=device)
    x = torch.randn(4, 300, device=device)
    for dtype in (torch.float32, torch.bfloat16):
        rounded = W.to(dtype).float()
        torch.testing.assert_close(
            kernels.weighted_sums(values, latents, W.to(dtype)),
            torch.einsum("bk,bkd->bd", values, rounded[latents]),
        )
        torch.testing.assert_close(
            kernels.dots(x.to(dtype), latents, W.to(dtype)),
            torch.einsum("bd,bkd->bk", x.to(dtype).float(), rounded[latents]),
            rtol=1e-5, atol=1e-4,
        )

    W, scale = torch.randn(300, 90, device=device).T, torch.rand(90, device=device)
    latents, n_rows = torch.randperm(90, device=device)[:40], torch.tensor(37, device=device)
    for among, n in ((latents, 37), (latents, 40), (None, 90)):
        rows = torch.randn(n if n != 37 else 40, 308, device=device)[:, :300]
        at = slice(None) if among is None else among[:n]
        expected = torch.zeros(90, 300, device=device)
        expected[at] = rows[:n] * scale[at].unsqueeze(1)
        for out, more in ((None, 0), (torch.ones(90, 300, device=device), 1)):
            out, found = kernels.add_scaled(
                rows, scale, among, n_rows if n == 37 else None, W, out
            )
            torch.testing.assert_close(out, expected + more)
            expected_found = torch.linalg.vecdot(rows[:n].double(), W[at].double()).float()
            torch.testing.assert_close(found[:n], expected_found)
    columns, n_columns = torch.arange(1, 200, 3, device=device), torch.tensor(40, device=device)
    for dtype in (torch.float32, torch.bfloat16):
        h = torch.randn(5, 200, device=device).to(dtype)
        for threshold in (torch.tensor(0.3, device=device), torch.rand(5, 1, device=device)):
            total, below = kernels.shortfall(h, threshold, columns, n_columns, torch.bfloat16)
            missing = (threshold - h.float())[:, columns[:40]].relu()
            torch.testing.assert_close(total, missing.sum(dim=1))
            assert torch.equal(below[:, :40], (missing > 0).bfloat16()) and not below[:, 40:].any()
    print("kernels are right")
    """
)


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_triton_kernels_equal_torch() -> None:
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        environment["TRITON_INTERPRET"] = "1"
    result = subprocess.run(
        [sys.executable, "-c", KERNEL_TESTS],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert "kernels are right" in result.stdout, result.stderr


SPARSE_STEP_TEST = textwrap.dedent(
    """
    import sys
    import torch
    from tests.helpers import build_sae, forward, gradients_of

    d_sae, architectures, variants = int(sys.argv[1]), sys.argv[2], sys.argv[3]
    for architecture in architectures.split():
        for variant in variants.split():
            results = []
            for sparse in (True, False):
                torch.manual_seed(0)
                sae = build_sae(
                    architecture, d_in=6, d_sae=d_sae, k=4, k_aux=16, aux_variant=variant,
                    dead_criterion="steps", randomize=False,
                )
                if not sparse:
                    sae._can_be_sparse = lambda sae_in: False
                output = forward(sae, torch.randn(8, 6), torch.arange(d_sae) % 2 == 0)
                results.append((output, gradients_of(output.loss, sae)))
            (a, grads_a), (b, grads_b) = results
            torch.testing.assert_close(a.loss, b.loss)
            torch.testing.assert_close(a.feature_acts, b.feature_acts)
            for name, gradient in grads_b.items():
                torch.testing.assert_close(
                    grads_a[name], gradient, rtol=1e-4, atol=1e-5, msg=name
                )
    print("steps are equal")
    """
)


@pytest.mark.parametrize(
    ("interpreted", "cases"),
    [
        # Rows long enough for a selection in two levels, more dead latents than k_aux.
        (
            "0",
            [
                "8192",
                "auxk-topk auxk-batchtopk auxk-matryoshka-batchtopk",
                "auxk straight_through reanimation pre_activation ghost_gradients multi_topk",
            ],
        ),
        # The interpreter takes a millisecond for each program of a kernel.
        ("1", ["256", "auxk-topk auxk-batchtopk", "auxk"]),
        ("1", ["96", "auxk-topk", "reanimation ghost_gradients pre_activation straight_through"]),
    ],
)
def test_the_sparse_step_equals_the_dense_one(interpreted: str, cases: list[str]) -> None:
    if interpreted == "1" and (find_spec("triton") is None or torch.cuda.is_available()):
        pytest.skip("no Triton to interpret, or a GPU to run it on")
    result = subprocess.run(
        [sys.executable, "-c", SPARSE_STEP_TEST, *cases],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TRITON_INTERPRET": interpreted},
    )
    assert "steps are equal" in result.stdout, result.stderr[-3000:]


def test_the_kernels_can_be_turned_off() -> None:
    script = (
        "import torch; from sae_lens_auxk.ops import use_triton; print(use_triton(torch.ones(1)))"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "SAE_LENS_AUXK_OPS": "torch"}
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment
    )
    assert result.stdout.strip() == "False"
    environment["SAE_LENS_AUXK_OPS"] = "fast"
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=environment
    )
    assert "SAE_LENS_AUXK_OPS='fast' is not allowed" in result.stderr


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
