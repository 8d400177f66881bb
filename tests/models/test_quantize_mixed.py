"""Mixed activations: permutations, whole-number products against int64, and where the 8 bits go."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from stretto.core.errors import FieldError  # noqa: E402
from stretto.models.quantize import Grid, gptq, round_to_nearest  # noqa: E402
from stretto.models.quantize.mixed import (  # noqa: E402
    MixedPlan,
    block_errors,
    fake_rows,
    outliers_first,
    packed,
    permuted,
    product,
    quantise_rows,
    restored,
)


def inputs(rows: int, length: int, seed: int = 0, outliers: int = 5) -> torch.Tensor:
    """Rows in which some channels are thirty times as large as the others."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, length, generator=generator)
    x[:, torch.randperm(length, generator=generator)[:outliers]] *= 30
    return x


def a_plan(length: int, bits: list[int] | None = None, seed: int = 0) -> MixedPlan:
    order = outliers_first(inputs(64, length, seed).abs().amax(0))
    blocks = len(order) // 128
    return MixedPlan(order=order, bits=torch.tensor(bits or [8] + [4] * (blocks - 1), dtype=torch.uint8))


@pytest.mark.parametrize("length", [1, 100, 128, 576, 577])
def test_the_order_is_a_permutation_and_has_an_inverse(length: int) -> None:
    plan = a_plan(length)
    x = inputs(7, length)
    assert plan.length == length
    assert len(plan.order) == -(-length // 128) * 128
    assert torch.equal(restored(permuted(x, plan), plan), x)
    assert (permuted(x, plan)[:, length:] == 0).all()


def test_outliers_come_first_the_largest_first_and_the_rest_as_they_were() -> None:
    peaks = torch.ones(200)
    peaks[[150, 3, 77]] = torch.tensor([9.0, 50.0, 20.0])
    order = outliers_first(peaks, threshold=8.0)
    assert order[:3].tolist() == [3, 77, 150]
    assert order[3:200].tolist() == [i for i in range(200) if i not in (3, 77, 150)]
    assert (order[200:] == -1).all()


def test_a_permuted_product_is_the_product() -> None:
    x, weight, plan = inputs(9, 576), torch.randn(40, 576), a_plan(576)
    found = permuted(x, plan).double() @ permuted(weight, plan).double().T
    torch.testing.assert_close(found, x.double() @ weight.double().T, rtol=1e-12, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 20),
    length=st.sampled_from([64, 128, 130, 576, 640]),
    eights=st.integers(0, 31),
    seed=st.integers(0, 50),
)
def test_products_are_exact_in_whole_numbers(rows: int, length: int, eights: int, seed: int) -> None:
    blocks = -(-length // 128)
    plan = a_plan(length, [8 if eights >> b & 1 else 4 for b in range(blocks)], seed)
    x = inputs(rows, length, seed)
    weight = round_to_nearest(permuted(torch.randn(12, length), plan), Grid(group=128))
    values, scales = quantise_rows(x, plan)
    top = np.where(plan.bits.numpy() == 8, 127, 7).repeat(128)
    assert (np.abs(values.numpy().astype(int)) <= top).all()

    found = product(values, scales, weight, plan)
    wanted = np.zeros((rows, 12), np.float32)
    for b in range(blocks):
        part = slice(128 * b, 128 * b + 128)
        whole = values.numpy()[:, part].astype(np.int64) @ (weight.values.numpy()[:, part].astype(np.int64) - 8).T
        assert np.abs(whole).max() <= 128 * 127 * 8 < 2**31
        wanted += whole.astype(np.float32) * (scales.numpy()[:, b, None] * weight.scales.float().numpy()[:, b])
    assert np.array_equal(found.numpy(), wanted)
    together = fake_rows(x, plan).double() @ restored(weight.dequantize(), plan).double().T
    torch.testing.assert_close(found.double(), together, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("rows", [1, 2, 8, 70, 300])
@pytest.mark.parametrize(("length", "bits"), [(576, [8, 4, 8, 4, 4]), (576, [4] * 5), (64, [8]), (1536, [8] * 12)])
def test_the_packed_kernel_multiplies_as_this_does(rows: int, length: int, bits: list[int]) -> None:
    plan = a_plan(length, bits)
    x = inputs(rows, length, seed=rows)
    weight = round_to_nearest(permuted(torch.randn(40, length), plan), Grid(group=128))
    found = packed(weight, plan).multiply(x, path="fast", threads=2)
    wanted = product(*quantise_rows(x, plan), weight, plan)
    # The two divide differently, so a value in some thousands lies on the other side of a tie.
    assert float((found - wanted).abs().mean() / wanted.abs().mean()) < 1e-4
    assert float((found - wanted).abs().max() / wanted.abs().max()) < 0.02
    torch.testing.assert_close(packed(weight, plan).dequantize(), restored(weight.dequantize(), plan))


def test_rounding_errs_by_half_a_step_and_constants_and_zeros_are_kept() -> None:
    plan = a_plan(576, [8, 4, 4, 4, 4])
    x = inputs(6, 576)
    x[0], x[1] = 0.0, 3.0
    x[2, 5] = 1e4
    steps = quantise_rows(x, plan)[1].repeat_interleave(128, 1)
    assert ((permuted(x, plan) - permuted(fake_rows(x, plan), plan)).abs() <= steps * 0.5001).all()
    assert torch.equal(fake_rows(x, plan)[0], x[0])
    torch.testing.assert_close(fake_rows(x, plan)[1], x[1])


@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_in_its_row(wrong: float) -> None:
    plan = a_plan(576, [8, 4, 8, 4, 4])
    weight = round_to_nearest(permuted(torch.randn(16, 576), plan), Grid(group=128))
    x = inputs(4, 576)
    clean = product(*quantise_rows(x, plan), weight, plan)
    x[1, 33] = wrong
    found = product(*quantise_rows(x, plan), weight, plan)
    assert not torch.isfinite(found[1]).any()
    keep = [0, 2, 3]
    assert torch.equal(found[keep], clean[keep])


def test_more_blocks_in_8_bits_err_less_and_the_chosen_ones_less_than_others() -> None:
    x, weight = inputs(200, 640, outliers=30), torch.randn(32, 640) * 0.05
    order = outliers_first(x.abs().amax(0))
    wanted = x @ weight.T

    def error(eight: tuple[int, ...]) -> float:
        bits = torch.tensor([8 if b in eight else 4 for b in range(5)], dtype=torch.uint8)
        return float((fake_rows(x, MixedPlan(order=order, bits=bits)) @ weight.T - wanted).square().sum())

    by_count = [error(tuple(range(count))) for count in range(6)]
    assert all(more < less for less, more in itertools.pairwise(by_count))
    assert by_count[1] < 0.2 * min(error((b,)) for b in range(1, 5))
    parts = [block_errors(x, weight, order, bits, 128) for bits in (4, 8)]
    assert float(parts[0].sum()) == pytest.approx(by_count[0], rel=0.2)  # errors of blocks hardly go together
    assert int((parts[0] - parts[1]).argmax()) == 0


def test_gathering_outliers_errs_less_than_leaving_them_where_they_are() -> None:
    x, weight = inputs(200, 640, outliers=12), torch.randn(32, 640) * 0.05
    bits = torch.tensor([8, 4, 4, 4, 4], dtype=torch.uint8)
    errors = [
        float((fake_rows(x, MixedPlan(order=order, bits=bits)) - x).matmul(weight.T).square().sum())
        for order in (outliers_first(x.abs().amax(0)), torch.arange(640))
    ]
    assert errors[0] < 0.1 * errors[1]


def test_bytes_and_shares() -> None:
    plan = a_plan(576, [8, 4, 4, 4, 4])
    assert plan.int8_share == pytest.approx(0.2)
    assert plan.row_bytes == 128 + 4 * 64
    hessian = torch.eye(576)
    channels = plan.order[:576]
    weight = gptq(torch.randn(16, 576)[:, channels], hessian, Grid(group=128))
    assert weight.nbytes == 16 * 576 // 2 + 2 * 16 * 5


@pytest.mark.parametrize(
    ("order", "bits", "field"),
    [
        (torch.arange(100), [4], "order"),
        (torch.zeros(128, dtype=torch.int64), [4], "order"),
        (torch.arange(128) - 1, [4], "order"),
        (torch.arange(128), [4, 4], "bits"),
        (torch.arange(128), [5], "bits"),
    ],
)
def test_plans_that_fit_no_product_are_refused(order: torch.Tensor, bits: list[int], field: str) -> None:
    with pytest.raises(FieldError, match=field):
        MixedPlan(order=order, bits=torch.tensor(bits, dtype=torch.uint8))
