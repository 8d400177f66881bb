"""Quantisers: what their grids hold to the bit, whose errors are least, and what happens where the Hessian is bad."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

torch = pytest.importorskip("torch")

from stretto.core.errors import FieldError  # noqa: E402
from stretto.kernels.packed import pack  # noqa: E402
from stretto.models.quantize import Grid, clip, gptq, magnitude_mask, round_to_nearest  # noqa: E402
from stretto.models.quantize.gptq import inverse_factor, two_of_four  # noqa: E402
from stretto.models.quantize.grid import GROUPS, Scales, padded_groups  # noqa: E402
from stretto.models.quantized import Quantised, pack_words, unpack_words  # noqa: E402

GRIDS = [Grid(bits=b, group=g, symmetric=s) for b in (4, 8) for g in GROUPS for s in (True, False)]


def correlated(rows: int, length: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight, and the Hessian of inputs whose channels go together and differ in size."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, length, generator=generator) * 0.05
    mix = torch.randn(length, length, generator=generator) / length**0.5 + 0.5 * torch.eye(length)
    sizes = torch.rand(length, generator=generator) * 3 + 0.1
    x = torch.randn(4 * length, length, generator=generator) @ mix * sizes
    return weight, 2 / len(x) * x.T @ x


def loss(weight: torch.Tensor, found: Quantised, hessian: torch.Tensor) -> float:
    error = (weight - found.dequantize()).double()
    return float(((error @ hessian.double()) * error).sum())


def random_hessian(length: int) -> torch.Tensor:
    return correlated(1, length)[1]


@pytest.mark.parametrize("grid", GRIDS)
def test_rounding_errs_by_half_a_step_at_most(grid: Grid) -> None:
    weight, _ = correlated(5, 150)
    found = round_to_nearest(weight, grid)
    inner = grid.padded(150)
    assert found.values.shape == (5, inner)
    assert found.scales.shape == (5, inner // grid.width(150))
    assert found.scales.dtype == torch.float16
    steps = found.scales.float().repeat_interleave(found.group, 1)[:, :150]
    # The largest weight of a symmetric group lies half a step beyond the grid; fp16 scales move edges a little, and
    # asymmetric 4-bit scales have 7 bits.
    slack = 1.0 + (0.07 if not grid.symmetric else 0.01) * grid.top / 8
    assert ((weight - found.dequantize()).abs() <= steps * 0.5 * slack + 1e-7).all()
    stored = Scales(found.scales.float(), None if found.zeros is None else found.zeros.float())
    again = grid.encode(padded_groups(weight, grid), stored)
    assert torch.equal(again.view(5, -1).to(torch.uint8), found.values)  # by the scales as they are stored
    packed = unpack_words(pack_words(found.values, grid.bits), grid.bits)
    assert torch.equal(packed[:, :inner], found.values)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("method", ["rtn", "clip", "gptq"])
def test_what_lies_on_the_grid_comes_back_to_the_bit(grid: Grid, method: str) -> None:
    """Weights made of stored numbers, with the ends of each group's range among them."""
    generator = torch.Generator().manual_seed(3)
    length, rows = 256, 4
    width = grid.width(length)
    values = torch.randint(0, grid.top + 1, (rows, length // width, width), generator=generator)
    values[..., 0], values[..., 1] = 0, grid.top
    scale = 2.0 ** torch.randint(-8, -2, values.shape[:2], generator=generator)
    zero = torch.randint(1, grid.top, values.shape[:2], generator=generator)
    weight = ((values - (grid.middle if grid.symmetric else zero[..., None])) * scale[..., None]).view(rows, length)
    if grid.symmetric:  # a symmetric scale is found from a range of top / 2 steps to either side
        weight = weight.clamp(min=-(scale * grid.top / 2).repeat_interleave(width, 1))
    found = {
        "rtn": lambda: round_to_nearest(weight, grid),
        "clip": lambda: clip(weight, grid, shrinks=1),
        "gptq": lambda: gptq(weight, torch.eye(length), grid, shrinks=1),
    }[method]()
    if grid.symmetric:
        again = found.dequantize()
        edge = weight.abs() >= (scale * grid.top / 2).repeat_interleave(width, 1)
        assert torch.equal(again[~edge], weight[~edge])
    else:
        assert torch.equal(found.dequantize(), weight)


def test_all_stored_values_are_used_and_stand_for_what_they_should() -> None:
    weight = ((torch.arange(16.0) - 8).clamp(min=-7.5) * 0.25).repeat(1, 2)
    found = round_to_nearest(weight, Grid(group=32))
    assert found.scales.item() == 0.25
    assert found.values[0].tolist() == [*range(16), *range(16)]
    assert found.dequantize()[0].tolist() == [(q - 8) * 0.25 for q in (*range(16), *range(16))]


@pytest.mark.parametrize("grid", GRIDS)
def test_zeros_stay_zero_and_tiny_or_huge_weights_stay_finite(grid: Grid) -> None:
    weight = torch.zeros(4, 100)
    weight[1], weight[2], weight[3] = 1e-30, 1e30, -3e-7
    for found in (
        round_to_nearest(weight, grid),
        clip(weight, grid, hessian=random_hessian(100)),
        gptq(weight, random_hessian(100), grid),
    ):
        whole = found.dequantize()
        assert torch.isfinite(whole).all()
        assert torch.equal(whole[0], torch.zeros(100))
        assert torch.equal(whole[1], torch.zeros(100))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", GROUPS)
def test_packed_kernels_hold_the_very_same_numbers(symmetric: bool, group: int) -> None:
    weight, hessian = correlated(20, 96)
    found = gptq(weight + 0.03, hessian, Grid(group=group, symmetric=symmetric))
    packed = pack(found.values, found.scales, found.minima, bits=4, length=96)
    assert torch.equal(packed.dequantize(), found.dequantize())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", GROUPS)
def test_searched_scales_err_less_than_rounding_and_gptq_less_than_both(symmetric: bool, group: int) -> None:
    for seed in range(3):
        weight, hessian = correlated(24, 160, seed)
        grid = Grid(group=group, symmetric=symmetric)
        rounded = loss(weight, round_to_nearest(weight, grid), hessian)
        clipped = loss(weight, clip(weight, grid, hessian=hessian), hessian)
        corrected = loss(weight, gptq(weight, hessian, grid), hessian)
        assert corrected < 0.8 * clipped
        assert clipped < rounded


def test_searched_scales_never_err_more_where_all_weights_count_alike() -> None:
    weight, _ = correlated(24, 160)
    for grid in GRIDS:
        errors = [
            (weight - found.dequantize()).square().sum()
            for found in (clip(weight, grid), round_to_nearest(weight, grid))
        ]
        assert errors[0] <= errors[1]


def test_eight_bits_err_far_less_than_four() -> None:
    weight, hessian = correlated(16, 128)
    four, eight = (loss(weight, gptq(weight, hessian, Grid(bits=bits)), hessian) for bits in (4, 8))
    assert eight < four / 100


def test_blocks_change_nothing_but_the_order_of_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    module = importlib.import_module("stretto.models.quantize.gptq")
    weight, hessian = correlated(8, 256)
    whole = gptq(weight, hessian, Grid(group=32))
    monkeypatch.setattr(module, "BLOCK", 32)
    parts = gptq(weight, hessian, Grid(group=32))
    same = (whole.values == parts.values).float().mean()
    assert same > 0.99  # rounding differs where a weight lies between two values
    assert loss(weight, parts, hessian) == pytest.approx(loss(weight, whole, hessian), rel=0.02)


def test_gptq_is_one_column_after_another() -> None:
    """Against the textbook form: after each column, the rest of the inverse Hessian is eliminated anew."""
    weight, hessian = correlated(6, 32)
    grid = Grid(group=32)
    found = gptq(weight, hessian, grid, shrinks=1)
    scale = found.scales.float()
    damped = hessian.double() + 0.1 * hessian.diagonal().mean() * torch.eye(32)
    left = weight.double().clone()
    for j in range(32):
        inverse = torch.linalg.inv(damped[j:, j:])
        q = ((left[:, j] / scale[:, 0]).round() + 8).clamp(0, 15)
        assert torch.equal(q.to(torch.uint8), found.values[:, j])
        error = left[:, j] - (q - 8) * scale[:, 0]
        left[:, j:] -= error[:, None] / inverse[0, 0] * inverse[0][None]


def test_the_largest_inputs_first_helps_where_inputs_differ_much() -> None:
    weight, hessian = correlated(24, 256, seed=5)
    sizes = torch.ones(256)
    sizes[-20:] = 30.0
    hessian = hessian * sizes * sizes[:, None]
    plain = loss(weight, gptq(weight, hessian, Grid(group=128)), hessian)
    ordered = loss(weight, gptq(weight, hessian, Grid(group=128), act_order=True), hessian)
    assert ordered < plain


@pytest.mark.parametrize(
    "hessian",
    [torch.zeros(64, 64), torch.full((64, 64), float("nan")), -torch.eye(64), torch.eye(64) * float("inf")],
    ids=["zero", "nan", "negative", "infinite"],
)
@pytest.mark.parametrize("sparse", [None, "2:4"])
def test_without_a_factor_weights_are_rounded_and_the_result_says_so(hessian: torch.Tensor, sparse: str | None) -> None:
    weight, _ = correlated(4, 64)
    found = gptq(weight, hessian, Grid(), sparse=sparse)  # type: ignore[arg-type]
    kept = magnitude_mask(weight) if sparse else None
    plain = round_to_nearest(weight, Grid(), kept=kept)
    assert found.method == "rtn"
    assert torch.equal(found.values, plain.values)
    assert torch.isfinite(clip(weight, Grid(), hessian=hessian).dequantize()).all()


def test_inputs_that_are_always_zero_touch_no_other_column() -> None:
    weight, hessian = correlated(6, 64)
    hessian[10], hessian[:, 10] = 0.0, 0.0
    changed = weight.clone()
    changed[:, 10] = 0.0
    grid = Grid(group=-1)
    found, other = (gptq(w, hessian, grid, shrinks=1) for w in (weight, changed))
    keep = [i for i in range(64) if i != 10]
    same = (found.scales == other.scales)[:, 0]  # rows whose range the column does not set
    assert same.any()
    assert torch.equal(found.values[same][:, keep], other.values[same][:, keep])


def test_the_factor_is_that_of_the_inverse() -> None:
    hessian = random_hessian(40)
    upper = inverse_factor(hessian, 0.1)
    assert upper is not None
    damped = hessian + 0.1 * hessian.diagonal().mean() * torch.eye(40)
    torch.testing.assert_close(upper.T @ upper @ damped, torch.eye(40), atol=1e-3, rtol=0)
    assert torch.equal(upper, upper.triu())


@pytest.mark.parametrize("symmetric", [True, False])
def test_two_of_four_are_kept_and_the_others_are_zero(symmetric: bool) -> None:
    weight, hessian = correlated(24, 150)
    grid = Grid(group=64, symmetric=symmetric)
    found = gptq(weight, hessian, grid, sparse="2:4")
    by_size = round_to_nearest(weight, grid, kept=magnitude_mask(weight))
    for matrix in (found, by_size):
        assert matrix.kept is not None
        assert (matrix.kept[:, :148].view(24, -1, 4).sum(-1) == 2).all()
        assert (matrix.dequantize()[~matrix.kept[:, :150]] == 0).all()
    assert loss(weight, found, hessian) < 0.8 * loss(weight, by_size, hessian)


def test_the_mask_takes_the_best_of_each_four() -> None:
    scores = torch.tensor([[3.0, 1.0, 2.0, 4.0, 1.0, 1.0, 1.0, 0.0, 5.0, 6.0]])
    assert two_of_four(scores).int().tolist() == [[1, 0, 0, 1, 1, 1, 0, 0, 1, 1]]


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    length=st.integers(1, 140),
    grid=st.sampled_from(GRIDS),
    sparse=st.sampled_from([None, "2:4"]),
    seed=st.integers(0, 99),
)
def test_any_shape(rows: int, length: int, grid: Grid, sparse: str | None, seed: int) -> None:
    weight, hessian = correlated(rows, length, seed)
    found = gptq(weight, hessian, grid, sparse=sparse, shrinks=3)  # type: ignore[arg-type]
    assert found.method == "gptq"
    whole = found.dequantize()
    assert whole.shape == (rows, length)
    assert torch.isfinite(whole).all()
    assert int(found.values.max()) <= grid.top
    behind = found.values[:, length:]
    zero = torch.full_like(behind, grid.middle) if found.zeros is None else found.zeros[:, -1:].expand(behind.shape)
    assert torch.equal(behind, zero)
    order = torch.randperm(rows)
    assert torch.equal(found.rows(order).dequantize(), whole[order])


def test_mistakes_are_named() -> None:
    weight, hessian = correlated(4, 64)
    for bad in (float("nan"), float("inf")):
        spoilt = weight.clone()
        spoilt[1, 2] = bad
        with pytest.raises(FieldError, match="weight"):
            round_to_nearest(spoilt, Grid())
    with pytest.raises(FieldError, match="hessian"):
        gptq(weight, hessian[:32, :32], Grid())
    with pytest.raises(FieldError, match="act_order"):
        gptq(weight, hessian, Grid(), act_order=True, sparse="2:4")
    with pytest.raises(FieldError, match="group is 48"):
        Grid(group=48)
    with pytest.raises(FieldError, match="bits is 3"):
        Grid(bits=3)
    with pytest.raises(FieldError, match="weight"):
        round_to_nearest(torch.zeros(0, 4), Grid())


def test_a_small_weight_of_a_large_input_is_kept() -> None:
    weight = torch.tensor([[0.3, 1.0, 0.9, 0.8]]).repeat(3, 16)
    hessian = torch.tensor([100.0, 1.0, 1.0, 1.0]).repeat(16).diag()
    found = gptq(weight, hessian, Grid(), sparse="2:4")
    assert found.kept is not None
    assert torch.equal(found.kept, torch.tensor([True, True, False, False]).repeat(3, 16))
