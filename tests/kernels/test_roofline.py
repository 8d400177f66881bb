"""The roofline against the publication's ideal curve and by hand."""

from __future__ import annotations

import pytest

from stretto.hardware import catalog
from stretto.hardware.device import Device
from stretto.kernels.packed import Path
from stretto.kernels.roofline import bytes_per_weight, plan

A10 = Device(
    name="NVIDIA A10",
    kind="gpu",
    memory_bytes=24e9,
    bandwidth=600e9,
    peak_flops={"fp16": 125e12},
    units=72,
)


@pytest.mark.parametrize(("rows", "ideal"), [(1, 3.88), (8, 3.88), (16, 3.88), (32, 3.88), (64, 3.27), (128, 1.65)])
def test_the_published_ideal_on_an_a10(rows: int, ideal: float) -> None:
    """72k x 18k in groups of 128; the figures are read off a plot."""
    assert plan(rows, 18432, 73728, A10, dtype="fp16").speedup == pytest.approx(ideal, rel=0.015)


@pytest.mark.parametrize("name", sorted(catalog.devices()))
@pytest.mark.parametrize("group", [32, 128, -1])
def test_the_knee_is_where_arithmetic_takes_over(name: str, group: int) -> None:
    device = catalog.device(name)
    dtype = "bf16" if "bf16" in device.peak_flops else "fp16"
    found = plan(1, 4096, 11008, device, group=group, dtype=dtype)
    below, above = (plan(round(found.knee * x), 4096, 11008, device, group=group, dtype=dtype) for x in (0.95, 1.05))
    assert (below.bound, above.bound) == ("memory", "arithmetic")
    assert below.packed_s == found.packed_s < above.packed_s
    assert 3.0 < found.speedup <= 4.0
    last = plan(100_000, 4096, 11008, device, group=group, dtype=dtype)
    assert last.speedup == 1.0


CPU = Device(
    name="two cores",
    kind="cpu",
    memory_bytes=8e9,
    bandwidth=40e9,
    peak_flops={"fp32": 234e9, "bf16": 468e9, "int8": 936e9},
)


@pytest.mark.parametrize(
    ("path", "bits", "rate"),
    [("exact", 4, 312e9), ("bf16", 4, 468e9), ("fast", 4, 936e9), ("exact", 8, 312e9), ("bf16", 8, 468e9)],
)
def test_each_way_of_taking_activations_has_its_own_peak(path: Path, bits: int, rate: float) -> None:
    found = plan(4096, 1024, 2048, CPU, path=path, bits=bits, group=32)
    assert found.packed_s == pytest.approx(2 * 4096 * 1024 * 2048 / rate)
    assert found.plain_s == pytest.approx(2 * 4096 * 1024 * 2048 / 468e9)
    one = plan(1, 1024, 2048, CPU, path=path, bits=bits, group=32, minimum=True)
    assert one.packed_s == pytest.approx(1024 * 2048 * (bits / 8 + 4 / 32) / 40e9)


def test_bytes_of_a_weight() -> None:
    assert bytes_per_weight(4, 32) == 0.5625
    assert bytes_per_weight(4, 32, minimum=True) == 0.625
    assert bytes_per_weight(8, 64) == 1.03125
    assert plan(1, 512, 64, CPU, group=-1) == plan(1, 512, 64, CPU, group=512)


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"rows": 0}, "rows is 0"),
        ({"inner": 0}, "inner is 0"),
        ({"columns": -1}, "columns is -1"),
        ({"bits": 3}, "bits is 3; it must be 4 or 8"),
        ({"group": 0}, "group is 0"),
        ({"path": "slow"}, "path is 'slow'; it must be one of exact, bf16, fast"),
        ({"dtype": "fp8"}, "two cores has no peak_flops for 'fp8'"),
    ],
)
def test_mistakes_are_told(fields: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        plan(**{"rows": 1, "inner": 64, "columns": 64, "device": CPU, **fields})  # type: ignore[arg-type]
