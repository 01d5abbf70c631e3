"""Each kernel against the torch expression that it stands for."""

from collections.abc import Iterator

import pytest
import torch

from sae_lens_auxk.ops import triton_kernels as kernels
from sae_lens_auxk.ops.matrices import unit_columns_

DTYPES = [torch.float32, torch.bfloat16, torch.float64]


@pytest.mark.parametrize("size", [4, 16, 128])
@pytest.mark.parametrize("dtype", DTYPES)
def test_group_max(dtype: torch.dtype, size: int) -> None:
    x = torch.randn(3, 640).to(dtype)
    assert torch.equal(kernels.group_max(x, size), x.unflatten(1, (-1, size)).amax(-1))


def test_group_max_where_all_of_a_group_is_minus_infinity() -> None:
    x = torch.full((2, 64), -torch.inf)
    x[0, 5] = 1.0
    assert torch.equal(kernels.group_max(x, 16), x.unflatten(1, (-1, 16)).amax(-1))


def test_group_max_among_some_columns() -> None:
    x, among = torch.randn(3, 640), torch.rand(640) < 0.3
    assert torch.equal(
        kernels.group_max(x, 16, among),
        x.masked_fill(~among, -torch.inf).unflatten(1, (-1, 16)).amax(-1),
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_gather_columns(dtype: torch.dtype) -> None:
    x = torch.randn(3, 640).to(dtype)
    columns = torch.randperm(640)[:77].sort().values
    assert torch.equal(kernels.gather_columns(x, columns), x[:, columns])
    some = kernels.gather_columns(x, columns, torch.tensor(50))
    assert torch.equal(some[:, :50], x[:, columns[:50]])
    assert some[:, 50:].isneginf().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_transposed(dtype: torch.dtype) -> None:
    x = torch.randn(3, 640).to(dtype)
    assert torch.equal(kernels.transposed(x), x.T)


@pytest.mark.parametrize("shape", [(300,), (5, 1)])
def test_scaled_cast(shape: tuple[int, ...]) -> None:
    W, scale = torch.randn(5, 300), torch.rand(shape)
    assert torch.equal(kernels.scaled_cast(W, scale, torch.float32), W * scale)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scaled_cast_in_place(dtype: torch.dtype) -> None:
    W, scale = torch.randn(5, 3000).to(dtype), torch.rand(3000)
    expected = (W * scale).to(dtype)
    assert kernels.scaled_cast(W, scale, dtype, out=W) is W
    rtol = 2**-7 if dtype == torch.bfloat16 else 0  # the interpreter cuts where a GPU rounds
    torch.testing.assert_close(W, expected, rtol=rtol, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_in_unit_columns(dtype: torch.dtype) -> None:
    products = torch.randn(30, 40).to(dtype)
    products[:, 3] = 0
    exact = products.double()
    expected = (exact / exact.norm(dim=0).where(products[0] != 0, 1)).to(dtype)
    rtol = 2**-7 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(unit_columns_(products), expected, rtol=rtol, atol=0)


def test_scaled_cast_that_rounds() -> None:
    W, scale = torch.randn(5, 300), torch.rand(300)
    # The interpreter cuts where a GPU rounds: one unit of bfloat16's last place.
    torch.testing.assert_close(
        kernels.scaled_cast(W, scale, torch.bfloat16), (W * scale).bfloat16(), rtol=2**-7, atol=0
    )


# Latents with so many pairs that several programs share them, beside some with none and few.
MANY_PAIRS = [3, 200, 64, 0, 65, 129, 1, 0, 300, 0]


def _pairs(counts: list[int]) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """The arguments of ``outer_sums`` for as many pairs of each latent, and the result."""
    x, latents = torch.randn(6, 20), torch.arange(10).repeat_interleave(torch.tensor(counts))
    rows, values = torch.randint(0, 6, latents.shape), torch.randn(len(latents))
    starts = torch.searchsorted(latents, torch.arange(11))
    expected = torch.zeros(10, 20).index_add_(0, latents, values.unsqueeze(1) * x[rows])
    return (values, rows, latents, starts, x), expected


@pytest.mark.parametrize("counts", [[3, 0, 1, 0, 0, 2, 0, 0, 1, 0], MANY_PAIRS])
def test_outer_sums(counts: list[int]) -> None:
    pairs, expected = _pairs(counts)
    torch.testing.assert_close(kernels.outer_sums(*pairs), expected)
    out = kernels.outer_sums(*pairs, torch.ones(10, 20))
    torch.testing.assert_close(out, expected + 1)


@pytest.fixture
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_deterministic")
def test_outer_sums_that_must_be_deterministic() -> None:
    pairs, expected = _pairs(MANY_PAIRS)
    sums = kernels.outer_sums(*pairs)
    assert torch.equal(sums, kernels.outer_sums(*pairs))
    torch.testing.assert_close(sums, expected)


@pytest.mark.parametrize("case", ["all", "sparse", "one row", "transposed", "one scale"])
def test_add_multiples(case: str) -> None:
    scale, W = torch.randn(21), torch.randn(21, 20)
    if case == "sparse":
        scale[::3] = 0
        W[::3] = torch.nan  # where the scale is 0 nothing is read
    elif case == "one row":
        W = W[0].expand(21, 20)
    elif case == "transposed":
        W = torch.randn(20, 21).T
    elif case == "one scale":
        scale = scale[:1].expand(21)
    expected = (scale.unsqueeze(1) * W).where(scale.unsqueeze(1) != 0, 0)
    torch.testing.assert_close(kernels.add_multiples(scale, W), expected)
    out = kernels.add_multiples(scale, W, torch.ones(21, 20))
    torch.testing.assert_close(out, expected + 1)


@pytest.mark.parametrize("in_groups", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_largest(dtype: torch.dtype, ties: bool, masked: bool, in_groups: bool) -> None:
    x = torch.randn(3, 200)
    x = (x.round() if ties else x).to(dtype)
    x[1] = -x[1].abs() - 1
    counts, among, groups = torch.ones_like(x, dtype=torch.bool), None, None
    if masked:
        among = torch.arange(200) % 3 == 0
        counts &= among
    if in_groups:
        groups = torch.stack([torch.randperm(25)[:11] for _ in range(3)])
        within = torch.zeros(3, 25, 8, dtype=torch.bool)
        within[torch.arange(3).unsqueeze(1), groups] = True
        counts &= within.flatten(1)
    values, indices = kernels.largest(x, 20, among, groups, 8)
    expected = x.masked_fill(~counts, -torch.inf).topk(20).values
    assert torch.equal(values.sort(descending=True).values, expected)
    assert torch.equal(x.gather(1, indices), values)
    assert all(len(set(row)) == 20 for row in indices.tolist())


def test_largest_among_fewer_than_it_asks_for() -> None:
    values, _ = kernels.largest(torch.randn(2, 200), 20, torch.arange(200) < 5)
    assert torch.equal(values.isinf().sum(dim=1), torch.full((2,), 15))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weighted_sums_and_dots(dtype: torch.dtype) -> None:
    W, latents = torch.randn(50, 300).to(dtype), torch.randint(0, 50, (4, 21))
    values, x = torch.randn(4, 21), torch.randn(4, 300).to(dtype)
    torch.testing.assert_close(
        kernels.weighted_sums(values, latents, W),
        torch.einsum("bk,bkd->bd", values, W.float()[latents]),
    )
    torch.testing.assert_close(
        kernels.dots(x, latents, W),
        torch.einsum("bd,bkd->bk", x.float(), W.float()[latents]),
        rtol=1e-5,
        atol=1e-4,
    )


@pytest.mark.parametrize("adds", [False, True])
@pytest.mark.parametrize("case", ["some of them count", "all of them count", "all latents"])
def test_add_scaled(case: str, adds: bool) -> None:
    W, scale = torch.randn(300, 90).T, torch.rand(90)
    latents, n_rows, n = torch.randperm(90)[:40], None, 40
    if case == "some of them count":
        n_rows, n = torch.tensor(37), 37
    elif case == "all latents":
        latents, n = None, 90
    rows = torch.randn(90 if latents is None else 40, 308)[:, :300]
    at = slice(None) if latents is None else latents[:n]
    expected = torch.full((90, 300), float(adds))
    expected[at] += rows[:n] * scale[at].unsqueeze(1)
    out = torch.ones(90, 300) if adds else None
    out, found = kernels.add_scaled(rows, scale, latents, n_rows, W, out)
    torch.testing.assert_close(out, expected)
    products = torch.linalg.vecdot(rows[:n].double(), W[at].double()).float()
    torch.testing.assert_close(found[:n], products)
