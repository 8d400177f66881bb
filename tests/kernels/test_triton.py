"""The GPU twins: their layout, their numbers in Triton's interpreter, their machine code for targets not at hand."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.kernels.packed import PackedMatrix, pack
from stretto.kernels.triton.layout import repack, tile_depth, unrepack

SCRIPT = Path(__file__).with_name("interpreted.py")
BOUND = {"torch.bfloat16": 2e-3, "torch.float16": 2.5e-4, "int8": 1e-6}

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed; see the extra `triton`"
)


def matrix(columns: int, length: int, group: int, minimum: bool, seed: int = 0) -> PackedMatrix:
    generator = torch.Generator().manual_seed(seed)
    inner = -(-length // group) * group
    values = torch.randint(0, 16, (columns, inner), generator=generator).to(torch.uint8)
    scales = torch.randn(columns, inner // group, generator=generator).half()
    minima = torch.randn(columns, inner // group, generator=generator).half() if minimum else None
    return pack(values, scales, minima, bits=4, length=length)


# --- the layout, which needs no Triton


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 300), st.integers(1, 600), st.sampled_from([32, 64, 96, 128, 256]), st.booleans(), st.booleans())
def test_the_layout_is_a_bijection(columns: int, length: int, group: int, minimum: bool, fragments: bool) -> None:
    plain = matrix(columns, length, group, minimum)
    tiled = repack(plain, fragments=fragments)
    assert tiled.inner == plain.inner
    assert tiled.deep == tile_depth(group)
    back = unrepack(tiled)
    assert torch.equal(back.data, plain.data)
    assert (back.columns, back.length, back.group, back.minimum) == (columns, length, group, minimum)
    again = repack(back, fragments=fragments)
    assert torch.equal(again.weights, tiled.weights)
    assert torch.equal(again.scales, tiled.scales)


def test_where_an_element_lies() -> None:
    """Element 70 of column 130 with tiles 64 deep: column tile 1, inner tile 1, column 2, byte 6, the low half."""
    values = torch.zeros(140, 128, dtype=torch.uint8)
    values[130, 70] = 9
    values[130, 70 + 32] = 5
    tiled = repack(pack(values, torch.ones(140, 2).half(), bits=4))
    assert tiled.weights.shape == (2, 2, 128, 32)
    assert tiled.weights[1, 1, 2, 6] == 9 | 5 << 4
    assert int(tiled.weights.count_nonzero()) == 1
    assert tiled.scales.shape == (2, 2, 128)


def test_where_a_lane_finds_its_elements() -> None:
    """Lane 2 of four takes elements 4, 5, 12, 13 of each sixteen; with tiles 64 deep, those are bytes 16 to 23."""
    values = torch.zeros(16, 64, dtype=torch.uint8)
    values[3, :32] = torch.arange(32) % 16
    tiled = repack(pack(values, torch.ones(16, 1).half(), bits=4), fragments=True)
    assert tiled.weights[0, 0, 3, 16:24].tolist() == [4, 5, 12, 13, 4, 5, 12, 13]
    assert sorted(tiled.weights[0, 0, 3].tolist()) == sorted(values[3, :32].tolist())


def test_eight_bits_have_no_twin() -> None:
    wide = pack(torch.zeros(16, 32, dtype=torch.uint8), torch.ones(16, 1).half(), bits=8)
    with pytest.raises(ValueError, match="bits is 8; it must be 4"):
        repack(wide)


def test_the_package_does_not_import_triton() -> None:
    code = "import sys, stretto.kernels.triton.layout; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


# --- numbers


def interpreted(*options: str) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", str(SCRIPT), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout))


def judge(found: dict[str, Any]) -> None:
    kinds = set()
    for case, figure in found.items():
        kind = case.split(",")[0]
        kinds.add(kind)
        assert figure <= BOUND.get(kind, 0.0), case
    assert kinds >= set(BOUND)


@needs_triton
def test_numbers_in_the_interpreter() -> None:
    judge(interpreted())


@needs_triton
@pytest.mark.slow
def test_many_numbers_in_the_interpreter() -> None:
    judge(interpreted("--all"))


# --- machine code

MATRIX = {
    ("w4a16", "sm_80"): r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.bf16",
    ("w4a16", "sm_90"): r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k16\.f32\.bf16",
    ("w4a16", "gfx942"): r"v_mfma_f32_\d+x\d+x\d+_bf16",
    ("w4a8", "sm_80"): r"mma\.sync\.aligned\.m16n8k32\.row\.col\.(satfinite\.)?s32\.s8",
    ("w4a8", "sm_90"): r"wgmma\.mma_async\.sync\.aligned\.m64n\d+k32\.s32\.s8",
    ("w4a8", "gfx942"): r"v_mfma_i32_\d+x\d+x\d+_i8",
}
COPY = r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], 0x(8|10)"
WIDE_LOADS = {"sm_80": COPY, "sm_90": COPY, "gfx942": r"(global|buffer)_load_dwordx[24]"}
LOCAL = {"sm_80": r"(ld|st)\.local", "sm_90": r"(ld|st)\.local", "gfx942": r"scratch_(load|store)"}


@needs_triton
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("kernel", ["w4a16", "w4a8"])
@pytest.mark.parametrize(
    ("rows", "group", "minimum"), [(16, 128, False), (64, 128, True), (32, 4096, True), (16, 64, False)]
)
def test_machine_code(kernel: str, target: str, rows: int, group: int, minimum: bool) -> None:
    from stretto.kernels.triton.ahead import machine_code

    code = machine_code(kernel, target, rows=rows, group=group, minimum=minimum)
    assert code.count(MATRIX[kernel, target]) >= 4
    assert code.count(WIDE_LOADS[target]) >= 2
    assert code.count(LOCAL[target]) == 0
    assert code.spilled == code.local_bytes == 0
    assert code.registers <= 255
    assert 0 < code.shared_bytes <= (65_536 if target == "gfx942" else 163 * 1024)


@needs_triton
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942"])
@pytest.mark.parametrize("kernel", ["quantize", "sum"])
def test_machine_code_before_and_after_the_product(kernel: str, target: str) -> None:
    from stretto.kernels.triton.ahead import machine_code

    code = machine_code(kernel, target, rows=64)
    assert code.count(LOCAL[target]) == code.spilled == code.local_bytes == 0
    if kernel == "quantize" and target != "gfx942":
        # Rounding is an addition and a subtraction that no compiler may fold away, and quotients are exact.
        assert code.count(r"add\.(rn\.)?f32[^;]*0f4B400000") == 1
        assert code.count(r"add\.(rn\.)?f32[^;]*0fCB400000") == 1
        assert code.count(r"div\.rn\.f32") == 2


@needs_triton
@pytest.mark.parametrize("rows", [16, 32, 64])
def test_fragments_reach_the_matrix_unit_as_they_are_loaded(rows: int) -> None:
    """All loads are of 16 bytes, each lane reads its own, and nothing passes between lanes."""
    from stretto.kernels.triton.ahead import machine_code

    plain, code = (machine_code("w4a16", "sm_90", rows=rows, fragments=fragments) for fragments in (False, True))
    assert code.count(r"cp\.async\.ca") == 0 < plain.count(r"cp\.async\.ca")
    assert code.count(r"ld\.shared\.(v\d\.)?b8") == 0 < plain.count(r"ld\.shared\.(v\d\.)?b8")
    assert code.count(r"shfl") == 0
    assert code.count(r"st\.shared") <= plain.count(r"st\.shared")
    assert code.count(MATRIX["w4a16", "sm_90"]) == plain.count(MATRIX["w4a16", "sm_90"])
    assert code.registers < plain.registers
    assert code.spilled == code.local_bytes == 0


@needs_triton
def test_mistakes_are_told() -> None:
    from stretto.kernels.triton import w4a8, w4a16
    from stretto.kernels.triton.ahead import machine_code

    with pytest.raises(ValueError, match="kernel is 'w3a3'; it must be one of w4a16, w4a8, quantize, sum"):
        machine_code("w3a3", "sm_90", rows=16)
    with pytest.raises(ValueError, match="target is 'sm_10'; it must be one of sm_80, sm_90, gfx942"):
        machine_code("w4a16", "sm_10", rows=16)
    with pytest.raises(ValueError, match="rows is 8; it must be one of 16, 32, 64"):
        machine_code("w4a16", "sm_90", rows=8)
    tiled = repack(matrix(20, 64, 32, False))
    with pytest.raises(ValueError, match="workers is None; it must be given where the matrix is not on a GPU"):
        w4a16.matmul(torch.zeros(1, 64).half(), tiled)
    with pytest.raises(ValueError, match=r"x is \(1, 60\); it must be \[rows, 64\]"):
        w4a16.matmul(torch.zeros(1, 60).half(), tiled, workers=1)
    with pytest.raises(ValueError, match=r"x is torch\.float32; it must be one of torch\.bfloat16, torch\.float16"):
        w4a16.matmul(torch.zeros(1, 64), tiled, workers=1)
    lanes = repack(matrix(20, 64, 64, False), fragments=True)
    with pytest.raises(ValueError, match="fragments is True; it must be False"):
        w4a8.matmul(torch.zeros(1, 64), lanes, workers=1)
    with pytest.raises(ValueError, match="group is 32; it must be a multiple of 64"):
        w4a8.matmul(torch.zeros(1, 64), tiled, workers=1)
