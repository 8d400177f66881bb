"""Seconds of one kernel from its FLOPs, bytes and shape, and a device's data sheet: the model behind `cost`.

A kernel's time is the p-norm of its compute time and its memory time, plus a launch: order infinity would
mean that the two overlap wholly, order 1 not at all (the roofline of Williams et al., 2009, with its corner
rounded). A matrix product on a GPU is cut into tiles which the multiprocessors take in waves, so its compute
time moves in steps; libraries pick among tile shapes and cut long inner dimensions into splits, so the best
of a few is taken. Memory time has one share of the data sheet's bandwidth for each family of kernels. The
constants are fitted (`benchmarks/fit_gpu_constants.py`) and stand in `fitted.yaml`; everything is computed
for many operations at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from stretto.core.errors import require
from stretto.hardware.device import Device
from stretto.hardware.operation import Operation

Floats = NDArray[np.float64]

TILES = ((256, 128), (128, 256), (128, 128), (128, 64), (64, 128), (64, 64))
"""Rows and columns of the tiles that a matrix product may be cut into: CUTLASS's for tensor cores."""

SPLITS = (1, 2, 3, 4)
"""In how many parts the inner dimension may be cut."""


@dataclass(frozen=True, kw_only=True)
class Constants:
    """What a data sheet does not say of one kind of device.

    Attributes:
        order: of the p-norm that joins compute and memory time, at least 1.
        launch_s: overhead of one operation where the device states none.
        matmul_setup_s: what a matrix product takes on top, before its first tile and after its last.
        compute: reached share of the peak, by family of kernels.
        bandwidth: reached share of the memory bandwidth, by family of kernels.
        cached: of the largest cache's bytes, the share that a streaming kernel (not a matrix product, not
            attention) finds there already, as the kernel before it left them.
        tile_edge: how many rows and columns a tile's edges cost: a tile of r by c runs at 1 / (1 + edge/r +
            edge/c).
        tile_fill: inner steps that a tile takes before its pipeline is full.
        spread: relative uncertainty of the model, by family of kernels.
        fitted_on: names of the models whose measured rows were used, empty where none were.
        source: where these are from.
    """

    order: float
    launch_s: float
    matmul_setup_s: float
    compute: Mapping[str, float]
    bandwidth: Mapping[str, float]
    cached: float
    tile_edge: float
    tile_fill: float
    spread: Mapping[str, float]
    fitted_on: tuple[str, ...]
    source: str

    def __post_init__(self) -> None:
        require(self.order >= 1, "order", self.order, "at least 1")
        for field in ("launch_s", "matmul_setup_s", "tile_edge", "tile_fill"):
            require(getattr(self, field) >= 0, field, getattr(self, field), "not negative")
        require(0 <= self.cached < 1, "cached", self.cached, "in [0, 1)")
        for field in ("compute", "bandwidth"):
            for name, share_ in getattr(self, field).items():
                require(0 < share_ <= 1, f"{field}.{name}", share_, "in (0, 1]")

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Constants:
        """The constants that a file holds."""
        return cls(**{**plain, "fitted_on": tuple(plain["fitted_on"])})

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a file."""
        return {**asdict(self), "fitted_on": list(self.fitted_on)}


@cache
def fitted(kind: str) -> Constants:
    """The product's constants for a kind of device, "cpu" or "gpu"."""
    document = yaml.safe_load((files("stretto.hardware") / "fitted.yaml").read_text(encoding="utf-8"))
    return Constants.from_dict(document[kind])


def family(operation: Operation) -> str:
    """The family of kernels that an operation belongs to: the head of its signature, or else its kind.

    >>> family(Operation(name="rope", kind="elementwise", dtype="bf16", flops=0, bytes=8, signature="rope/bf16/h8"))
    'rope'
    """
    return operation.signature.partition("/")[0] or operation.kind


def share(shares: Mapping[str, float], operation: Operation) -> float:
    """The share for an operation's family, or else its kind.

    Raises:
        ValueError: if there is neither, naming the operation.
    """
    found = shares.get(family(operation), shares.get(operation.kind))
    if found is None:
        raise ValueError(
            f"operation {operation.name}: no constants for kind {operation.kind!r}; known are {', '.join(shares)}"
        )
    return found


def seconds(
    operations: Sequence[Operation], device: Device, constants: Constants, *, threads: int | None = None
) -> Floats:
    """Modelled seconds of each operation, run once.

    Raises:
        ValueError: if the device has no peak for an operation's type, or nothing is known of its kind.
    """
    compute_scale, memory_scale = _thread_shares(device, threads)
    peak = np.array([device.peak(_arithmetic(op)) if op.flops else 1.0 for op in operations]) * compute_scale
    flops = np.array([op.flops for op in operations], np.float64)
    cache_bytes = device.caches[-1].bytes if device.caches else 0.0
    moved = np.array([_from_memory(op, cache_bytes, constants.cached) for op in operations])
    reached = np.array([share(constants.compute, op) if op.flops else 1.0 for op in operations])
    memory = moved / (device.bandwidth * memory_scale * np.array([share(constants.bandwidth, op) for op in operations]))

    compute = flops / (peak * reached)
    tiled = [i for i, op in enumerate(operations) if op.kind == "matmul" and device.kind == "gpu" and op.flops > 0]
    if tiled:
        shapes = np.array([_matmul_shape(operations[i]) for i in tiled], np.float64)
        compute[tiled] *= tile_stretch(shapes, device.units, constants)
    launch = np.full(len(operations), constants.launch_s if device.launch_s is None else device.launch_s)
    launch[[i for i, op in enumerate(operations) if op.kind == "matmul"]] += constants.matmul_setup_s
    return launch + _norm(compute, memory, constants.order)


@dataclass(frozen=True, kw_only=True, slots=True)
class Law:
    """Seconds of operations of one family on one device, as a function of their FLOPs and bytes alone.

    Attributes:
        launch_s: of each operation.
        flop_s, byte_s: seconds a FLOP and seconds a byte.
        order: of the p-norm that joins the two.
    """

    launch_s: float
    flop_s: float
    byte_s: float
    order: float

    def seconds(self, flops: float, bytes_: float) -> float:
        """Of one operation."""
        compute, memory = flops * self.flop_s, bytes_ * self.byte_s
        return self.launch_s + float((compute**self.order + memory**self.order) ** (1 / self.order))


def attention_law(operation: Operation, device: Device, constants: Constants) -> Law:
    """The law of attention like `operation`, whose FLOPs and bytes do not matter; nothing of it is cut into tiles."""
    require(operation.kind == "attention", "kind", operation.kind, "attention, whose seconds depend on no tiles")
    return Law(
        launch_s=constants.launch_s if device.launch_s is None else device.launch_s,
        flop_s=1 / (device.peak(operation.dtype) * share(constants.compute, operation)),
        byte_s=1 / (device.bandwidth * share(constants.bandwidth, operation)),
        order=constants.order,
    )


def tile_stretch(shapes: Floats, units: int, constants: Constants) -> Floats:
    """How many times longer than at full use matrix products of `shapes` (rows, inner, columns) compute.

    The best of all tile shapes and splits: waves of whole tiles, slower small tiles, filling the pipeline,
        padding.
    """
    m, k, n = (shapes[:, axis, None, None] for axis in range(3))
    tile = np.array(TILES, np.float64)
    rows, columns = tile[None, :, 0, None], tile[None, :, 1, None]
    splits = np.array(SPLITS, np.float64)[None, None, :]
    waves = np.ceil(np.ceil(m / rows) * np.ceil(n / columns) * splits / units)
    slow = 1 + constants.tile_edge / rows + constants.tile_edge / columns
    inner = np.ceil(k / splits) + constants.tile_fill
    padded = waves * units * rows * columns * inner * slow
    stretch = (padded / (m * k * n)).reshape(len(shapes), -1).min(axis=1)
    return np.asarray(stretch, np.float64)


def _from_memory(operation: Operation, cache_bytes: float, cached: float) -> float:
    """Bytes that reach the memory; less than in all where the kernel before left some in the cache."""
    if operation.kind in ("matmul", "attention"):
        return operation.bytes
    return operation.bytes - cached * min(operation.bytes, cache_bytes)


def _arithmetic(operation: Operation) -> str:
    """The type that is computed in: matrix units take the operation's own, vector units work in fp32."""
    return operation.dtype if operation.kind in ("matmul", "attention") else "fp32"


def _norm(compute: Floats, memory: Floats, order: float) -> Floats:
    """The p-norm of two times; scaled by the larger, so that no power underflows."""
    larger = np.maximum(compute, memory)
    safe = np.where(larger > 0, larger, 1.0)
    return larger * ((compute / safe) ** order + (memory / safe) ** order) ** (1 / order)


def _matmul_shape(operation: Operation) -> tuple[int, ...]:
    if len(operation.shape) != 3:
        raise ValueError(
            f"operation {operation.name}: shape {operation.shape} must be (rows, inner, columns) of a matmul"
        )
    return operation.shape


def _thread_shares(device: Device, threads: int | None) -> tuple[float, float]:
    """Shares of the peak and of the bandwidth that `threads` reach: measured, else in proportion."""
    if threads is None:
        return 1.0, 1.0
    if not 1 <= threads <= device.units:
        raise ValueError(f"threads is {threads}; {device.name} has 1 to {device.units}")
    plain = threads / device.units
    compute, memory = (device.efficiency.get(curve) for curve in ("compute@threads", "bandwidth@threads"))
    return compute.at(threads).value if compute else plain, memory.at(threads).value if memory else plain
