"""Seconds of operations on a device: the only place where work becomes time.

Where the device has a measured table for an operation's signature, the table is read; elsewhere the kernel
model is asked. Every estimate carries an interval and says how it came about, from "measured" over
"interpolated" and "modelled" to "extrapolated" (beyond what was measured).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from stretto.hardware import kernel_model
from stretto.hardware.device import Device
from stretto.hardware.operation import Operation
from stretto.hardware.table import BASES, Basis

_CACHED = 65536


@dataclass(frozen=True, slots=True)
class Estimate:
    """Seconds, the interval they most likely lie in, and how they came about (a sum: its weakest part)."""

    seconds: float
    low: float
    high: float
    basis: Basis

    def times(self, count: float) -> Estimate:
        """The same `count` times in a row."""
        return Estimate(self.seconds * count, self.low * count, self.high * count, self.basis)


def estimate(operation: Operation, device: Device, *, threads: int | None = None) -> Estimate:
    """Seconds of an operation, all of its `count` runs.

    Args:
        threads: how many of a CPU's cores work on it; None for all, or for a GPU.

    Raises:
        ValueError: if there is neither a table nor what the model needs, naming what is missing.
    """
    return _estimate(operation, device, threads)


def estimates(operations: Sequence[Operation], device: Device, *, threads: int | None = None) -> list[Estimate]:
    """`estimate` of many operations; those that need the model go through it together."""
    found = [_measured(op, device, threads) for op in operations]
    missing = [i for i, one in enumerate(found) if one is None]
    if missing:
        for i, one in zip(missing, _modelled([operations[i] for i in missing], device, threads), strict=True):
            found[i] = one
    return [one for one in found if one is not None]


def attention_law(operation: Operation, device: Device) -> kernel_model.Law:
    """Modelled seconds of attention like `operation` as a function of FLOPs and bytes, for simulations that ask often.

    It equals `estimate` where nothing was measured.
    """
    return kernel_model.attention_law(operation, device, kernel_model.fitted(device.kind))


def total(operations: Iterable[Operation], device: Device, *, threads: int | None = None) -> Estimate:
    """Seconds of operations one after another.

    A model errs alike on operations of one family, so their errors add up; errors of different families are
    taken as independent, so those add in squares.
    """
    listed = tuple(operations)
    found = (
        estimates(listed, device, threads=threads)
        if len(listed) > 1
        else [_estimate(op, device, threads) for op in listed]
    )
    below: dict[str, float] = {}
    above: dict[str, float] = {}
    for op, one in zip(listed, found, strict=True):
        family = kernel_model.family(op)
        below[family] = below.get(family, 0.0) + one.seconds - one.low
        above[family] = above.get(family, 0.0) + one.high - one.seconds
    seconds = math.fsum(one.seconds for one in found)
    basis: Basis = max((one.basis for one in found), key=BASES.index, default="measured")
    return Estimate(seconds, seconds - math.hypot(*below.values()), seconds + math.hypot(*above.values()), basis)


@lru_cache(maxsize=_CACHED)
def _estimate(operation: Operation, device: Device, threads: int | None) -> Estimate:
    return estimates([operation], device, threads=threads)[0]


def _measured(operation: Operation, device: Device, threads: int | None) -> Estimate | None:
    signature = operation.signature if threads is None else f"{operation.signature}@{threads}"
    table = device.measured.get(signature) if operation.signature else None
    if table is None:
        return None
    value, low, high, basis = table.at(*operation.at)
    return Estimate(value * operation.count, low * operation.count, high * operation.count, basis)


def _modelled(operations: Sequence[Operation], device: Device, threads: int | None) -> Iterator[Estimate]:
    constants = kernel_model.fitted(device.kind)
    seconds = kernel_model.seconds(operations, device, constants, threads=threads)
    for op, once in zip(operations, seconds.tolist(), strict=True):
        wide = 1 + kernel_model.share(constants.spread, op)
        yield Estimate(once, once / wide, once * wide, "modelled").times(op.count)
