"""The cost model: intervals, monotonicity, tables before the model, refusals that name what is missing."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.hardware import catalog, cost, kernel_model
from stretto.hardware.device import Device
from stretto.hardware.operation import Operation
from stretto.hardware.table import Table

A100 = catalog.device("a100-sxm-80gb")
CPU = Device(name="c", kind="cpu", memory_bytes=1e9, bandwidth=2e10, peak_flops={"fp32": 1e11, "bf16": 2e11}, units=4)


def matmul(m: int, k: int, n: int, **fields: object) -> Operation:
    moved = 2.0 * (m * k + k * n + m * n)
    plain = {
        "name": "m",
        "kind": "matmul",
        "dtype": "bf16",
        "flops": 2.0 * m * k * n,
        "bytes": moved,
        "shape": (m, k, n),
    }
    return Operation(**{**plain, **fields})  # type: ignore[arg-type]


def stream(bytes_: float, family: str = "add") -> Operation:
    return Operation(
        name=family, kind="elementwise", dtype="bf16", flops=bytes_, bytes=bytes_, signature=f"{family}/bf16"
    )


sizes = st.integers(1, 20000)
operations = st.one_of(
    st.builds(matmul, sizes, sizes, sizes),
    st.builds(stream, st.floats(0, 1e11), st.sampled_from(["add", "rope", "kv-write"])),
)


@given(st.lists(operations, max_size=6), st.sampled_from([A100, CPU]))
def test_interval_holds_the_estimate_and_a_sum_is_no_wider_than_its_parts(ops: list[Operation], device: Device) -> None:
    parts = cost.estimates(ops, device)
    whole = cost.total(ops, device)
    assert whole.seconds == pytest.approx(sum(part.seconds for part in parts))
    assert sum(part.low for part in parts) <= whole.low * (1 + 1e-9) + 1e-15
    assert whole.low <= whole.seconds <= whole.high <= sum(part.high for part in parts) * (1 + 1e-9) + 1e-15
    assert all(part.low <= part.seconds <= part.high and part.seconds > 0 for part in parts)


@given(operations, st.sampled_from([A100, CPU]), st.floats(1, 8), st.floats(1, 8))
def test_a_device_that_is_better_in_everything_is_never_slower(
    op: Operation, device: Device, bandwidth: float, peak: float
) -> None:
    better = replace(
        device,
        bandwidth=device.bandwidth * bandwidth,
        peak_flops={dtype: value * peak for dtype, value in device.peak_flops.items()},
    )
    assert cost.estimate(op, better).seconds <= cost.estimate(op, device).seconds * (1 + 1e-9)


@given(st.integers(1, 8000), st.integers(1, 8000), st.sampled_from([A100, CPU]))
def test_more_rows_never_take_less(rows: int, more: int, device: Device) -> None:
    a, b = (cost.estimate(matmul(m, 4096, 4096), device).seconds for m in (rows, rows + more))
    assert a <= b * (1 + 1e-9)


@given(operations)
def test_no_estimate_beats_the_data_sheet(op: Operation) -> None:
    cached = kernel_model.fitted("gpu").cached
    bound = max(op.flops / A100.peak("bf16"), (1 - cached) * op.bytes / A100.bandwidth)
    if op.kind == "matmul":
        assert cost.estimate(op, A100).seconds >= bound


def test_batched_equals_one_by_one() -> None:
    ops = [matmul(7, 512, 512), stream(1e6), matmul(4096, 4096, 11008, count=3), stream(3e8, "rope")]
    together = [one.seconds for one in cost.estimates(ops, A100)]
    np.testing.assert_allclose(together, [cost.estimate(op, A100).seconds for op in ops], rtol=1e-12)


def test_a_measured_table_goes_before_the_model() -> None:
    table = Table.line("rows", [(1, 1.0), (4, 2.0)], spread=0.1)
    device = A100.with_measured({"matmul/x": table, "matmul/x@2": Table.line("rows", [(1, 5.0)])})
    op = matmul(4, 8, 8, signature="matmul/x", at=(4.0,), count=3)
    found = cost.estimate(op, device)
    assert (found.seconds, found.basis) == (6.0, "measured")
    assert (found.low, found.high) == (pytest.approx(6.0 / 1.1), pytest.approx(6.0 * 1.1))
    assert cost.estimate(replace(op, at=(2.0,)), device).basis == "interpolated"
    assert cost.estimate(replace(op, at=(8.0,)), device).basis == "extrapolated"
    assert cost.estimate(replace(op, at=(1.0,)), device, threads=2).seconds == 15.0
    assert cost.estimate(op, A100).basis == "modelled"
    assert cost.total([op, matmul(4, 8, 8)], device).basis == "modelled"


def test_fewer_threads_are_slower() -> None:
    one, two, all_of_them = (cost.estimate(matmul(512, 512, 512), CPU, threads=t).seconds for t in (1, 2, 4))
    assert one > two > all_of_them == cost.estimate(matmul(512, 512, 512), CPU).seconds
    curve = Table.line("threads", [(1, 0.9), (4, 1.0)], beyond="constant")
    sharing = replace(CPU, efficiency={"bandwidth@threads": curve})
    assert cost.estimate(stream(1e9), sharing, threads=1).seconds < cost.estimate(stream(1e9), CPU, threads=1).seconds


def test_waves_make_steps() -> None:
    """108 multiprocessors: one more tile than a wave holds costs a whole wave."""
    constants = kernel_model.fitted("gpu")
    full, over = kernel_model.tile_stretch(np.array([[128 * 108, 65536, 128], [128 * 109, 65536, 128]]), 108, constants)
    assert over * 109 / 108 > 1.3 * full


def test_what_is_missing_is_named() -> None:
    with pytest.raises(ValueError, match=r"a100-sxm-80gb has no peak_flops for 'fp8'"):
        cost.estimate(matmul(1, 2, 3, dtype="fp8"), A100)
    with pytest.raises(ValueError, match="no constants for kind 'host'"):
        cost.estimate(Operation(name="h", kind="host", dtype="bf16", flops=0, bytes=0), A100)
    with pytest.raises(ValueError, match=r"shape \(1,\) must be"):
        cost.estimate(matmul(1, 2, 3, shape=(1,)), A100)
    with pytest.raises(ValueError, match="threads is 9"):
        cost.estimate(matmul(1, 2, 3), CPU, threads=9)
