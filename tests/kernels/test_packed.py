"""Packed matrices and their products, against what they stand for, at every level of instructions this machine has."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stretto.kernels import _native
from stretto.kernels.levels import BEST_LEVEL, LEVELS
from stretto.kernels.packed import PACKED_LEVELS, PATHS, PackedMatrix, concatenate, pack, pack_numbers

AVAILABLE = [level for level in PACKED_LEVELS if level in LEVELS[LEVELS.index(BEST_LEVEL) :]]
BOUND = {"exact": 1e-6, "bf16": 3e-3, "fast": 1e-2}
QUANTISED = [(4, True), (4, False), (8, False)]
KINDS = [*QUANTISED, (16, False)]
ROWS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 24, 33, 64, 70)


def matrix(columns: int, inner: int, group: int, bits: int, minimum: bool, seed: int = 0) -> PackedMatrix:
    generator = torch.Generator().manual_seed(seed)
    if bits == 16:
        return pack_numbers(torch.randn(columns, inner, generator=generator).bfloat16())
    top = 1 << bits
    values = torch.randint(0, top, (columns, inner), generator=generator, dtype=torch.int64).to(torch.uint8)
    groups = inner // group
    scales = (torch.rand(columns, groups, generator=generator) * 0.1).half()
    minima = torch.randn(columns, groups, generator=generator).half() if minimum else None
    return pack(values, scales, minima, bits=bits)


def error(found: torch.Tensor, x: torch.Tensor, weights: torch.Tensor) -> float:
    wanted = x.double() @ weights.double().T
    return float((found - wanted).abs().mean() / wanted.abs().mean())


@pytest.mark.parametrize(("bits", "minimum"), QUANTISED)
@pytest.mark.parametrize(
    ("columns", "inner", "group"), [(1, 32, 32), (16, 64, 32), (70, 96, 32), (33, 256, 64), (48, 128, 128)]
)
def test_unpacking_gives_back_what_was_packed(columns: int, inner: int, group: int, bits: int, minimum: bool) -> None:
    generator = torch.Generator().manual_seed(columns)
    values = torch.randint(0, 1 << bits, (columns, inner), generator=generator, dtype=torch.int64).to(torch.uint8)
    scales = torch.randn(columns, inner // group, generator=generator).half()
    minima = torch.randn(columns, inner // group, generator=generator).half() if minimum else None
    packed = pack(values, scales, minima, bits=bits)
    found = packed.unpack()
    assert torch.equal(found[0], values)
    assert torch.equal(found[1], scales)
    assert (found[2] is None) == (minima is None)
    if minima is not None:
        assert torch.equal(found[2], minima)  # type: ignore[arg-type]
    panels = -(-columns // 16)
    numbers = panels * 16 * (inner // group) * 2 * (2 if minimum else 1)
    assert packed.data.numel() == packed.native.bytes == panels * 16 * inner * bits // 8 + numbers


def test_what_is_packed_need_not_be_contiguous() -> None:
    weights = matrix(48, 256, 32, 4, True)
    parts = [part.T.contiguous().T for part in weights.unpack() if part is not None]
    assert not any(part.is_contiguous() for part in parts)
    values, scales, minima = parts
    assert torch.equal(pack(values, scales, minima, bits=4).data, weights.data)


@pytest.mark.parametrize("level", AVAILABLE)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("bits", "minimum"), KINDS)
@pytest.mark.parametrize(("columns", "inner", "group"), [(70, 96, 32), (48, 256, 64), (16, 256, 256)])
def test_products(level: str, path: str, bits: int, minimum: bool, columns: int, inner: int, group: int) -> None:
    weights = matrix(columns, inner, group, bits, minimum)
    whole = weights.dequantize()
    for rows in ROWS:
        x = torch.randn(rows, inner, generator=torch.Generator().manual_seed(rows))
        found = weights.multiply(x, path=path, level=level)  # type: ignore[arg-type]
        few = 2 if rows < 16 else 1  # the mean over a few sums is not the mean over many
        assert error(found, x, whole) < few * BOUND[path]


@pytest.mark.parametrize("level", AVAILABLE)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("bits", "minimum"), KINDS)
def test_a_row_is_the_same_in_any_company_and_on_any_number_of_threads(
    level: str, path: str, bits: int, minimum: bool
) -> None:
    weights = matrix(100, 192, 32, bits, minimum)
    x = torch.randn(70, 192)
    alone = torch.cat([weights.multiply(x[i : i + 1], path=path, level=level) for i in range(70)])  # type: ignore[arg-type]
    for rows in ROWS:
        for threads in (1, 2, 3):
            found = weights.multiply(x[:rows].contiguous(), path=path, level=level, threads=threads)  # type: ignore[arg-type]
            assert torch.equal(found, alone[:rows])


@pytest.mark.parametrize("level", AVAILABLE)
@pytest.mark.parametrize("path", PATHS)
def test_inner_elements_beyond_the_length_do_not_count(level: str, path: str) -> None:
    whole = matrix(20, 128, 64, 4, True)
    values, scales, minima = whole.unpack()
    cut = pack(values, scales, minima, bits=4, length=100)
    x = torch.randn(5, 100)
    padded = torch.cat([x, torch.zeros(5, 28)], dim=1)
    assert torch.equal(cut.multiply(x, path=path, level=level), whole.multiply(padded, path=path, level=level))  # type: ignore[arg-type]
    assert cut.dequantize().shape == (20, 100)


@pytest.mark.parametrize("level", AVAILABLE)
@pytest.mark.parametrize("path", PATHS)
def test_what_is_not_finite_stays_in_its_row(level: str, path: str) -> None:
    weights = matrix(32, 64, 32, 4, True)
    x = torch.randn(6, 64)
    clean = weights.multiply(x, path=path, level=level)  # type: ignore[arg-type]
    for wrong in (float("nan"), float("inf"), float("-inf")):
        spoilt = x.clone()
        spoilt[2, 40] = wrong
        found = weights.multiply(spoilt, path=path, level=level)  # type: ignore[arg-type]
        assert not torch.isfinite(found[2]).any()
        keep = [0, 1, 3, 4, 5]
        assert torch.equal(found[keep], clean[keep])


@pytest.mark.parametrize("level", AVAILABLE)
@pytest.mark.parametrize("path", PATHS)
def test_zeros_tiny_and_huge_activations(level: str, path: str) -> None:
    weights = matrix(32, 64, 32, 4, True)
    whole = weights.dequantize()
    x = torch.randn(4, 64)
    x[0] = 0.0
    x[1] *= 1e-30
    x[2] *= 1e30
    x[3, :32] *= 1e-41  # a group of numbers too small for a scale counts as zero
    found = weights.multiply(x, path=path, level=level)  # type: ignore[arg-type]
    assert torch.equal(found[0], torch.zeros(32))
    for row in (1, 2, 3):
        assert error(found[row : row + 1], x[row : row + 1], whole) < 4 * BOUND[path]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("bits", "minimum"), QUANTISED)
@pytest.mark.parametrize(("columns", "inner", "group"), [(40, 32, 32), (70, 160, 32), (33, 256, 64), (12, 288, 288)])
def test_all_levels_give_the_same_bits(
    path: str, bits: int, minimum: bool, columns: int, inner: int, group: int
) -> None:
    weights = matrix(columns, inner, group, bits, minimum)
    x = torch.randn(17, inner) * torch.rand(17, 1) ** 8
    wanted = weights.multiply(x, path=path, level="plain")  # type: ignore[arg-type]
    for level in AVAILABLE:
        for rows in (1, 2, 3, 4, 7, 17):
            found = weights.multiply(x[:rows].contiguous(), path=path, level=level)  # type: ignore[arg-type]
            assert torch.equal(found, wanted[:rows])


@pytest.mark.parametrize("level", AVAILABLE)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bits", [4, 8])
def test_the_largest_sums_of_bytes_fit(level: str, path: str, bits: int) -> None:
    """Weights as large as there are, activations whose digits all are as far from zero as they can be."""
    values = torch.full((20, 128), 2**bits - 1, dtype=torch.uint8)
    weights = pack(values, torch.ones(20, 2).half(), bits=bits)
    for high, middle, low in ((127, -128, -128), (126, 127, 127), (-127, 127, -128)):
        x = torch.full((5, 128), float(high * 65536 + middle * 256 + low))
        x[:, ::64] = 0x7F7F00  # the largest, which makes the scale 1
        for signed in (x, -x):
            found, wanted = (weights.multiply(signed, path=path, level=each) for each in (level, "plain"))  # type: ignore[arg-type]
            assert torch.equal(found, wanted)
            assert error(found, signed, weights.dequantize()) < BOUND[path]


def test_a_level_that_this_machine_does_not_run_is_refused() -> None:
    for better in LEVELS[: LEVELS.index(_native.best_level())]:
        with pytest.raises(ValueError, match=f"level is {better}; this machine runs up to {_native.best_level()}"):
            matrix(16, 32, 32, 4, True).multiply(torch.zeros(1, 32), level=better)


@pytest.mark.parametrize("path", PATHS)
def test_levels_agree_on_bf16_weights(path: str) -> None:
    weights = matrix(48, 96, 32, 16, False)
    x = torch.randn(7, 96)
    found = [weights.multiply(x, path=path, level=level) for level in AVAILABLE]  # type: ignore[arg-type]
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], atol=1e-4, rtol=1e-5)


@pytest.mark.skipif("amx" not in AVAILABLE, reason="needs AMX")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(("bits", "minimum"), QUANTISED)
@pytest.mark.parametrize(("columns", "inner", "group"), [(40, 32, 32), (70, 160, 32), (33, 256, 64), (48, 288, 96)])
def test_tiles_give_the_bits_of_vectors(
    path: str, bits: int, minimum: bool, columns: int, inner: int, group: int
) -> None:
    weights = matrix(columns, inner, group, bits, minimum)
    for rows in (8, 9, 15, 16, 17, 31, 64, 70, 137):
        x = torch.randn(rows, inner) * torch.rand(rows, 1) ** 8
        tiles, vectors = (weights.multiply(x, path=path, level=level) for level in ("amx", "avx512bf16"))  # type: ignore[arg-type]
        assert torch.equal(tiles, vectors)


def test_eight_bit_activations_are_exact_in_whole_numbers() -> None:
    """Activations that are whole multiples of one scale lose nothing."""
    weights = matrix(32, 64, 32, 4, False)
    values, scales, _ = weights.unpack()
    whole = torch.randint(-127, 128, (3, 64))
    whole[:, 0] = whole[:, 32] = 127
    found = weights.multiply(whole.float(), path="fast")
    groups = (values.long().view(32, 2, 32) - 8) * whole.view(3, 1, 2, 32)
    wanted = (groups.sum(-1).double() * scales.double()).sum(-1)
    torch.testing.assert_close(found.double(), wanted, atol=1e-3, rtol=1e-5)


def test_concatenation_and_mistakes() -> None:
    parts = [matrix(columns, 64, 32, 4, True, seed=columns) for columns in (16, 32, 20)]
    whole = concatenate(parts)
    x = torch.randn(3, 64)
    assert torch.equal(whole.multiply(x), torch.cat([part.multiply(x) for part in parts], dim=1))
    with pytest.raises(ValueError, match="whole panels"):
        concatenate([parts[2], parts[0]])
    with pytest.raises(ValueError, match="one length"):
        concatenate([parts[0], matrix(16, 96, 32, 4, True)])
    with pytest.raises(ValueError, match=r"\[rows, 64\]"):
        parts[0].multiply(torch.randn(2, 63))
    with pytest.raises(ValueError, match="contiguous fp32"):
        parts[0].multiply(torch.randn(64, 2).T)
    with pytest.raises(ValueError, match="path"):
        parts[0].multiply(x, path="half")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="groups of 32"):
        pack(torch.zeros(16, 48, dtype=torch.uint8), torch.zeros(16, 1).half(), bits=4)
    with pytest.raises(ValueError, match=r"values is torch.int64"):
        pack(torch.zeros(16, 32, dtype=torch.int64), torch.zeros(16, 1).half(), bits=4)
    with pytest.raises(ValueError, match=r"scales is torch.float32"):
        pack(torch.zeros(16, 32, dtype=torch.uint8), torch.zeros(16, 1), bits=4)
    with pytest.raises(ValueError, match=r"scales is \(15, 1\); it must be \[16, groups\]"):
        pack(torch.zeros(16, 32, dtype=torch.uint8), torch.zeros(15, 1).half(), bits=4)
    with pytest.raises(ValueError, match=r"minima is \(16, 2\)"):
        pack(torch.zeros(16, 32, dtype=torch.uint8), torch.zeros(16, 1).half(), torch.zeros(16, 2).half(), bits=4)
    with pytest.raises(ValueError, match="for 4 bits alone"):
        pack(torch.zeros(16, 32, dtype=torch.uint8), torch.zeros(16, 1).half(), torch.zeros(16, 1).half(), bits=8)
    with pytest.raises(ValueError, match="level is mmx"):
        parts[0].multiply(x, level="mmx")
    assert parts[0].multiply(torch.empty(0, 64)).shape == (0, 16)


@pytest.mark.parametrize(("columns", "length"), [(1, 1), (16, 32), (70, 45)])
def test_bf16_numbers_are_kept_as_they_are(columns: int, length: int) -> None:
    values = torch.randn(columns, length, generator=torch.Generator().manual_seed(columns)).bfloat16()
    packed = pack_numbers(values)
    assert torch.equal(packed.dequantize(), values.float())
    assert packed.data.numel() == packed.native.bytes == -(-columns // 16) * 16 * packed.inner * 2


def fmpq(columns: int, length: int, bits: int, eights: int) -> PackedMatrix:
    """Sorted at random, with some places left empty, and the first `eights` groups of 128 in 8 bits."""
    generator = torch.Generator().manual_seed(length)
    groups = -(-length // 128) + 1
    order = torch.full((groups * 128,), -1)
    order[torch.randperm(groups * 128, generator=generator)[:length]] = torch.randperm(length, generator=generator)
    steps = torch.full((groups,), 7)
    steps[:eights] = 127
    return matrix(columns, groups * 128, 128, bits, False, seed=length).mixed(order, steps, length)


@pytest.mark.parametrize("level", AVAILABLE)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("length", "eights"), [(576, 0), (576, 2), (576, 6), (60, 1)])
def test_mixed_precision_is_whole_numbers_of_4_and_8_bits(level: str, bits: int, length: int, eights: int) -> None:
    weights = fmpq(40, length, bits, eights)
    assert weights.order is not None
    assert weights.steps is not None
    values, scales, _ = weights.unpack()
    q = values.view(40, -1, 128).long() - (8 if bits == 4 else 128)
    for rows in (1, 3, 8, 300):
        x = torch.randn(rows, length, generator=torch.Generator().manual_seed(rows))
        sorted_x = torch.where(weights.order >= 0, x[:, weights.order.clamp(min=0).long()], 0.0).view(rows, -1, 128)
        scale = sorted_x.abs().amax(2) / weights.steps
        whole = torch.round(sorted_x * (weights.steps / sorted_x.abs().amax(2))[..., None]).long()
        sums = torch.einsum("cgk,rgk->rcg", q, whole)  # exact
        wanted = (sums.double() * scale[:, None].double() * scales[None].double()).sum(2)
        found = weights.multiply(x, path="fast", level=level)
        torch.testing.assert_close(found.double(), wanted, rtol=2e-5, atol=2e-5 * float(wanted.abs().max()))


@pytest.mark.parametrize("level", AVAILABLE)
@pytest.mark.parametrize("path", PATHS)
def test_sorting_changes_no_exact_product(level: str, path: str) -> None:
    weights = fmpq(40, 576, 4, 5)
    x = torch.randn(9, 576)
    found = weights.multiply(x, path=path, level=level)  # type: ignore[arg-type]
    few = 20 if path == "fast" else 2  # groups of 4 bits are rough
    assert error(found, x, weights.dequantize()) < few * BOUND[path]


def test_more_groups_of_8_bits_are_nearer() -> None:
    x = torch.randn(64, 576) * (1 + 20 * (torch.arange(576) % 97 == 0))
    errors = []
    for eights in (0, 2, 4, 6):
        weights = fmpq(64, 576, 4, eights)
        errors.append(error(weights.multiply(x, path="fast"), x, weights.dequantize()))
    assert errors == sorted(errors, reverse=True)


def test_an_order_or_steps_that_do_not_fit_are_refused() -> None:
    plain = matrix(16, 256, 128, 4, False)
    with pytest.raises(ValueError, match="order"):
        plain.mixed(torch.arange(255), torch.tensor([7, 127]), 256)
    with pytest.raises(ValueError, match="order"):
        plain.mixed(torch.arange(256), torch.tensor([7, 127]), 255)
    with pytest.raises(ValueError, match="steps"):
        plain.mixed(torch.arange(256), torch.tensor([7, 128]), 256)


@pytest.mark.parametrize("level", AVAILABLE)
def test_sums_over_wide_groups_do_not_overflow(level: str) -> None:
    """A row of ones has the largest whole numbers everywhere, and a minimum meets their sum."""
    values = torch.zeros(16, 8192, dtype=torch.uint8)
    weights = pack(values, torch.ones(16, 1).half(), torch.ones(16, 1).half(), bits=4)
    torch.testing.assert_close(weights.multiply(torch.ones(2, 8192), level=level), torch.full((2, 16), 8192.0))


def test_what_native_code_would_take_on_trust_is_checked() -> None:
    values, scales = torch.zeros(16, 128, dtype=torch.uint8), torch.ones(16, 4).half()
    for length in (0, 96, 129, 4096):
        with pytest.raises(ValueError, match=f"length is {length}; it must be at most 128"):
            pack(values, scales, bits=4, length=length)
    with pytest.raises(ValueError, match="values is '16 or more'; it must be from 0 to 15"):
        pack(values + 16, scales, bits=4)
    with pytest.raises(ValueError, match="at least one group"):
        pack(values, scales[:, :0], bits=4)
    whole = pack(values, scales, bits=4)
    for threads in (0, -1):
        with pytest.raises(ValueError, match=f"threads is {threads}; it must be at least 1"):
            whole.multiply(torch.zeros(1, 128), threads=threads)
    with pytest.raises(ValueError, match="contiguous fp32 on the CPU"):
        whole.multiply(torch.zeros(1, 128, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"data is .*the \d+ bytes of such a matrix"):
        replace(whole, data=whole.data[:-1]).multiply(torch.zeros(1, 128))
