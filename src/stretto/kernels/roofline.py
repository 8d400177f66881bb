"""For which numbers of rows packing pays: a bound that is known before anything is packed or run.

MARLIN (Frantar et al., 2024) lives on the roofline of Williams et al. (2009): a product takes what its weights take
to read or what its multiply-adds take, whichever is longer. Weights of 4 bits are read nearly four times as fast as
those of 16 until arithmetic catches up, at the knee. Reads of activations and writes of results are left out, as in
the publication: they are small while rows are few.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stretto.core.errors import require
from stretto.hardware.device import Device
from stretto.kernels.packed import PATHS, Path

_SCALE_BYTES = 2


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """The least seconds of one product, with packed weights and with plain ones of 16 bits.

    Attributes:
        packed_s, plain_s: seconds.
        knee: rows up to which reading the packed weights takes longer than computing with them (m* of the publication).
        bound: what the packed product is limited by at the rows asked for.
    """

    packed_s: float
    plain_s: float
    knee: float
    bound: Literal["memory", "arithmetic"]

    @property
    def speedup(self) -> float:
        return self.plain_s / self.packed_s


def bytes_per_weight(bits: int, group: int, minimum: bool = False) -> float:
    """What a weight takes with its share of the scale, and of the minimum where there is one.

    >>> bytes_per_weight(4, 128)
    0.515625
    """
    return bits / 8 + _SCALE_BYTES * (2 if minimum else 1) / group


def plan(
    rows: int,
    inner: int,
    columns: int,
    device: Device,
    *,
    bits: int = 4,
    group: int = 128,
    minimum: bool = False,
    path: Path | None = None,
    dtype: str = "bf16",
) -> Roofline:
    """The bound of x [rows, inner] times weights [columns, inner].

    Args:
        device: from the catalog, or measured by `stretto probe`.
        group: inner elements that share a scale; -1 for all of a column.
        path: how the CPU kernels of `kernels.packed` take the activations; None for products in `dtype`, as on a GPU.
        dtype: of the plain product.

    Raises:
        ValueError: naming the field that makes no sense, or the peak that the device lacks.

    >>> from stretto.hardware import catalog
    >>> few, many = (plan(rows, 4096, 4096, catalog.device("a100-sxm-80gb")) for rows in (16, 128))
    >>> round(few.speedup, 2), few.bound, round(many.speedup, 2), many.bound
    (3.88, 'memory', 1.2, 'arithmetic')
    """
    for name, value in (("rows", rows), ("inner", inner), ("columns", columns)):
        require(value >= 1, name, value, "at least 1")
    require(bits in (4, 8), "bits", bits, "4 or 8")
    require(group == -1 or group >= 1, "group", group, "at least 1, or -1 for one a column")
    require(path is None or path in PATHS, "path", path, f"one of {', '.join(PATHS)}")
    weight_bytes = bytes_per_weight(bits, inner if group == -1 else group, minimum)
    peak = _packed_peak(device, path, dtype)
    weights, operations = inner * columns, 2.0 * rows * inner * columns
    read_s, compute_s = weight_bytes * weights / device.bandwidth, operations / peak
    return Roofline(
        packed_s=max(read_s, compute_s),
        plain_s=max(2.0 * weights / device.bandwidth, operations / device.peak(dtype)),
        knee=peak * weight_bytes / (2 * device.bandwidth),
        bound="memory" if read_s >= compute_s else "arithmetic",
    )


def _packed_peak(device: Device, path: Path | None, dtype: str) -> float:
    """Operations/s of the packed product; 24 bits take three products of bytes, 12 or 16 bits two."""
    if path is None:
        return device.peak(dtype)
    if path == "fast":
        return device.peak("int8")
    return device.peak("int8") / 2 if path == "bf16" else device.peak("int8") / 3
