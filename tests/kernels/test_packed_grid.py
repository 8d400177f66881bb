"""Matrices on one grid of whole numbers a column, and their products, which have the same bits at every level."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stretto.core.errors import FieldError
from stretto.kernels.linear import QuantLinear
from stretto.kernels.ops import packed_matmul
from stretto.kernels.packed import PackedMatrix, concatenate, pack
from tests.kernels.test_packed import AVAILABLE, ROWS, error, matrix

SHAPES = [(70, 96, 32), (33, 576, 64), (48, 1536, 1536), (16, 32, 32), (20, 8320, 64), (17, 16640, 128)]
"""Columns, inner elements, group: an odd number of pieces of 32, a group for all of a row, two and three sections."""
INNER_OF_A_SECTION = 8192
DIGIT = 127


def largest(inner: int) -> int:
    """The largest whole number that a weight may be, so that sums with digits of a section fit 32 bits."""
    steps = -(-inner // 64)
    sections = -(-inner // INNER_OF_A_SECTION)
    return min(32767, (2**31 - 1) // (-(-steps // sections) * 64 * DIGIT))


def rows_of(count: int, length: int) -> torch.Tensor:
    """Rows with some channels a hundred times as large as others, as models have them."""
    generator = torch.Generator().manual_seed(count)
    channels = torch.exp(torch.randn(length, generator=generator))
    return torch.randn(count, length, generator=generator) * channels


@pytest.mark.parametrize("minimum", [True, False])
@pytest.mark.parametrize(("columns", "inner", "group"), SHAPES)
def test_weights_move_by_at_most_the_rounding_of_their_scales(
    columns: int, inner: int, group: int, minimum: bool
) -> None:
    given = matrix(columns, inner, group, 4, minimum)
    made = given.on_grid()
    assert made.units is not None
    values, scales, minima = made.unpack()
    whole = scales.int().repeat_interleave(group, 1) * (values.int() - 8)
    if minima is not None:
        whole += minima.int().repeat_interleave(group, 1)
    units = made.units[:columns, None]
    assert torch.allclose(made.dequantize(), whole * units, rtol=1e-6, atol=0)
    assert torch.equal(values, given.unpack()[0])
    bound = largest(inner)
    assert int(whole.abs().max()) <= bound
    # As fine as that allows: the largest that some group may stand for, whether or not its values do, is close to it.
    reach = 8 * scales.int().abs() + (0 if minima is None else minima.int().abs())
    assert torch.all(reach.amax(1) >= bound - 10)
    moved = (made.dequantize() - given.dequantize()).abs()
    assert torch.all(moved <= (4.5 if minimum else 4.0) * units * 1.001)


@pytest.mark.parametrize("level", AVAILABLE)
@pytest.mark.parametrize("minimum", [True, False])
@pytest.mark.parametrize(("columns", "inner", "group"), SHAPES)
def test_products(level: str, columns: int, inner: int, group: int, minimum: bool) -> None:
    made = matrix(columns, inner, group, 4, minimum).on_grid()
    whole = made.dequantize()
    for rows in (1, 2, 5, 9, 16, 33) if inner > 1000 else ROWS:
        x = torch.randn(rows, inner, generator=torch.Generator().manual_seed(rows))
        assert error(made.multiply(x, path="bf16", level=level), x, whole) < 3e-4


@pytest.mark.parametrize("minimum", [True, False])
@pytest.mark.parametrize(("columns", "inner", "group"), SHAPES)
def test_all_levels_give_the_same_bits_for_a_row_in_any_company(
    columns: int, inner: int, group: int, minimum: bool
) -> None:
    made = matrix(columns, inner, group, 4, minimum).on_grid()
    x = rows_of(70, inner)
    alone = torch.cat([made.multiply(row[None], path="bf16", level="plain") for row in x[:35]])
    for level in AVAILABLE:
        for rows in (1, 2, 3, 4, 8, 9, 15, 17, 31, 32, 33, 70):
            for threads in (1, 3):
                found = made.multiply(x[:rows].contiguous(), path="bf16", level=level, threads=threads)
                assert torch.equal(found[:35], alone[:rows])


@pytest.mark.parametrize("level", AVAILABLE)
@pytest.mark.parametrize("inner", [64, 576, 8192, 8256, 16384])
@pytest.mark.parametrize("value", [0, 15])
def test_the_largest_sums_that_there_are_fit(level: str, inner: int, value: int) -> None:
    """All weights as far from zero as their grid goes, all activations as large as the largest: both digits 127."""
    values = torch.full((16, inner), value, dtype=torch.uint8)
    minima = torch.full((16, inner // 32), -0.8 if value == 0 else 0.7).half()
    made = pack(values, torch.full((16, inner // 32), 0.1).half(), minima, bits=4).on_grid()
    weight = float(made.dequantize()[0, 0])
    for rows in (1, 2, 4, 8, 20):
        found = made.multiply(torch.ones(rows, inner), path="bf16", level=level)
        assert torch.allclose(found, torch.full_like(found, weight * inner), rtol=1e-5, atol=0)
        assert torch.equal(-found, made.multiply(-torch.ones(rows, inner), path="bf16", level=level))


@pytest.mark.parametrize("level", AVAILABLE)
def test_inner_elements_beyond_the_length_do_not_count(level: str) -> None:
    values, scales, minima = matrix(20, 128, 64, 4, True).unpack()
    cut = pack(values, scales, minima, bits=4, length=100).on_grid()
    whole = pack(values, scales, minima, bits=4).on_grid()
    for rows in (1, 3, 12):
        x = rows_of(rows, 100)
        padded = torch.cat([x, torch.zeros(rows, 28)], dim=1)
        assert torch.equal(cut.multiply(x, path="bf16", level=level), whole.multiply(padded, path="bf16", level=level))
    assert torch.equal(cut.dequantize(), whole.dequantize()[:, :100])


@pytest.mark.parametrize("level", AVAILABLE)
@pytest.mark.parametrize("rows", [3, 12])
def test_what_is_not_finite_stays_in_its_row_and_in_its_column(level: str, rows: int) -> None:
    given = matrix(32, 64, 32, 4, True)
    made = given.on_grid()
    x = rows_of(rows, 64)
    clean = made.multiply(x, path="bf16", level=level)
    for wrong in (float("nan"), float("inf"), float("-inf")):
        spoilt = x.clone()
        spoilt[1, 40] = wrong
        found = made.multiply(spoilt, path="bf16", level=level)
        assert torch.isnan(found[1]).all()
        keep = [row for row in range(rows) if row != 1]
        assert torch.equal(found[keep], clean[keep])
        values, scales, minima = given.unpack()
        assert minima is not None
        scales[5, 1] = wrong
        found = pack(values, scales, minima, bits=4).on_grid().multiply(x, path="bf16", level=level)
        assert torch.isnan(found[:, 5]).all()
        keep = [column for column in range(32) if column != 5]
        assert torch.equal(found[:, keep], clean[:, keep])


@pytest.mark.parametrize("level", AVAILABLE)
def test_zeros_and_very_small_and_large_activations(level: str) -> None:
    made = matrix(32, 64, 32, 4, True).on_grid()
    whole = made.dequantize()
    for size in (0.0, 1e-44, 1e-36):
        assert made.multiply(torch.full((2, 64), size), path="bf16", level=level).abs().max() <= 1e-33
    for size in (1e-30, 1e30):
        x = rows_of(10, 64) * size
        assert error(made.multiply(x, path="bf16", level=level), x, whole) < 3e-4
    nothing = pack(torch.full((16, 32), 3, dtype=torch.uint8), torch.zeros(16, 1).half(), bits=4).on_grid()
    assert not nothing.dequantize().any()
    assert not nothing.multiply(rows_of(9, 32), path="bf16", level=level).any()


@pytest.mark.parametrize("level", AVAILABLE)
def test_scales_may_be_negative(level: str) -> None:
    """Blocks of GGUF's Q4_0 have them."""
    values, scales, _ = matrix(32, 64, 32, 4, False).unpack()
    scales[::2] *= -1
    made = pack(values, scales, bits=4).on_grid()
    assert torch.allclose(made.dequantize(), pack(values, scales, bits=4).dequantize(), atol=1e-4)
    x = rows_of(12, 64)
    assert error(made.multiply(x, path="bf16", level=level), x, made.dequantize()) < 3e-4


def test_what_makes_no_sense_is_refused() -> None:
    given = matrix(32, 64, 32, 4, True)
    made = given.on_grid()
    x = torch.randn(2, 64)
    for path in ("exact", "fast"):
        with pytest.raises(FieldError, match=r"path is .*; it must be bf16"):
            made.multiply(x, path=path)  # type: ignore[arg-type]
    with pytest.raises(FieldError, match="as it was packed"):
        made.on_grid()
    with pytest.raises(FieldError, match="bits is 8"):
        matrix(32, 64, 32, 8, False).on_grid()
    sorted_matrix = given.mixed(torch.arange(64), torch.full((2,), 127), 64)
    for wrong in (made, sorted_matrix):
        with pytest.raises(FieldError, match="as it was packed"):
            QuantLinear.from_packed(wrong)
        with pytest.raises(FieldError, match="as it was packed"):
            packed_matmul(x, wrong)
        with pytest.raises(FieldError, match="as they were packed"):
            concatenate([wrong, given])
    assert isinstance(replace(made, units=None), PackedMatrix)
    short = replace(made, units=made.units[:16] if made.units is not None else None)
    with pytest.raises(FieldError, match="units"):
        short.multiply(x, path="bf16")
