"""Seconds over rows of one share of a model on one device, and of the messages between devices: the tables of a step.

Everything but attention depends on the number of rows alone. Curves are computed once for a device and a share of the
model, dense where tiles make steps and 5 % apart beyond, and read between their points.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from stretto.hardware import collective, cost
from stretto.hardware.device import Device
from stretto.hardware.link import Link
from stretto.hardware.operation import Operation
from stretto.models.passes import PassShape
from stretto.models.spec import ModelSpec, bytes_of
from stretto.serve.deploy.layout import Layout

_MLP = ("norm_mlp", "router", "gate_up", "activation", "down", "add_mlp")
_SAMPLE_MOVES = 6
"""Times that sampling reads or writes the logits, in fp32: to cast, scale, exponentiate, sum, divide and choose."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The devices of a plan, all alike, and what joins them.

    Attributes:
        near: joins devices of one node; far: those of different nodes, None where nothing does.
        node_devices: how many a node has.
        host: joins a device to its host's memory.
    """

    device: Device
    near: Link | None
    far: Link | None
    node_devices: int
    host: Link

    def link(self, ranks: int) -> Link | None:
        """The slowest link within a group of `ranks` neighbours."""
        return self.near if ranks <= self.node_devices else self.far


@dataclass(frozen=True, kw_only=True)
class Types:
    """Number types: of arithmetic and activations, of the layers' matrices, of keys and values."""

    arithmetic: str
    weights: str
    kv: str


_REMEMBERED = 4096
"""Readings that a curve remembers: batches of the same size come again and again."""
Curve = Callable[[float], float]


def _grid(most: int) -> list[int]:
    """Row counts at which curves are computed: dense where tiles make steps, then 5 % apart."""
    points = [1, 2, 4, 8, 16, *range(32, 1025, 32)]
    while points[-1] < most:
        points.append(-(-int(points[-1] * 1.05) // 128) * 128)
    return points


def _read(xs: Sequence[int], ys: Sequence[float]) -> Curve:
    """Straight lines between points, and the last slope beyond."""

    def at(x: float) -> float:
        i = min(max(bisect_left(xs, x), 1), len(xs) - 1)
        return ys[i - 1] + (ys[i] - ys[i - 1]) * (x - xs[i - 1]) / (xs[i] - xs[i - 1])

    return lru_cache(maxsize=_REMEMBERED)(at)


@dataclass(frozen=True)
class Kernels:
    """Curves over rows of one share of the model on one device, a layer each, and of the two ends of the model."""

    spec: ModelSpec
    share: ModelSpec
    experts: int
    width: int
    spread_experts: float
    device: Device
    types: Types

    def _operations(self, rows: int, spec: ModelSpec, weights: str) -> tuple[Operation, ...]:
        return spec.operations(
            PassShape(new_tokens=(rows,), cached=(0,), logits_rows=rows),
            dtype=self.types.arithmetic,
            kv_dtype=self.types.kv,
            weight_dtype=weights,
        )

    def attention(self, rows: int) -> list[Operation]:
        """A layer's attention half, but for attention itself."""
        listed = self._operations(rows, self.share, self.types.weights)
        own = ("norm_attention", "qkv", "norm_qk", "rope", "kv_write", "out", "add_attention")
        return [replace(op, count=1) for op in listed if op.name in own]

    def mlp(self, rows: int) -> list[Operation]:
        """A layer's MLP half; experts compute the rows that are routed to them."""
        dense = replace(self.share, ffn=self.width, experts=0, top_k=0)
        listed = [op for op in self._operations(rows, dense, self.types.weights) if op.name in _MLP]
        if not self.spec.experts:
            return [replace(op, count=1) for op in listed]
        return [self._router(rows), *(replace(self._routed(op, rows), count=1) for op in listed)]

    def _router(self, rows: int) -> Operation:
        k, n = self.spec.hidden, self.spec.experts
        width = bytes_of(self.types.arithmetic)
        return Operation(
            name="router",
            kind="matmul",
            dtype=self.types.arithmetic,
            flops=2.0 * rows * k * n,
            bytes=(k * n + rows * (k + n)) * width,
            shape=(rows, k, n),
        )

    def _routed(self, op: Operation, rows: int) -> Operation:
        """`op` over the rows that reach this device's experts, whose weights are read if any row comes."""
        if op.name not in ("gate_up", "activation", "down"):
            return op
        each = rows * self.spec.top_k * self.spread_experts
        if op.kind != "matmul":
            return replace(op, flops=op.flops * each / rows, bytes=op.bytes * each / rows)
        _, k, n = op.shape
        hit = self.experts * (1 - (1 - self.spec.top_k / self.spec.experts) ** rows)
        moved = hit * k * n * bytes_of(self.types.weights) + each * (k + n) * bytes_of(self.types.arithmetic)
        return replace(op, flops=2.0 * each * k * n, bytes=moved, shape=(max(1, round(each)), k, n))

    def ends(self, rows: int) -> list[Operation]:
        """Embedding, final norm, head and sampling."""
        listed = self._operations(rows, self.share, self.types.arithmetic)
        elements = rows * self.spec.vocab
        sample = Operation(
            name="sample",
            kind="elementwise",
            dtype="fp32",
            flops=0.0,
            bytes=elements * 4.0 * _SAMPLE_MOVES,
            shape=(elements,),
        )
        return [*(op for op in listed if op.name in ("embed", "norm_final", "lm_head")), sample]

    def curve(self, of: Callable[[int], list[Operation]], most: int) -> Curve:
        """Seconds over rows."""
        points = _grid(most)
        listed = [of(rows) for rows in points]
        seconds = iter(cost.estimates([op for ops in listed for op in ops], self.device))
        return _read(points, [sum(next(seconds).seconds for _ in ops) for ops in listed])

    def spread(self, rows: int) -> float:
        """Relative uncertainty of the kernels of a step of so many rows."""
        found = cost.total([*self.attention(rows), *self.mlp(rows)], self.device)
        return max(found.high / found.seconds, found.seconds / found.low) - 1


@lru_cache(maxsize=256)
def kernel_curves(
    spec: ModelSpec,
    share: ModelSpec,
    experts: int,
    width: int,
    spread_experts: float,
    device: Device,
    types: Types,
    most: int,
) -> tuple[Curve, Curve, Curve, float]:
    kernels = Kernels(spec, share, experts, width, spread_experts, device, types)
    ends = kernels.curve(kernels.ends, min(most, 1024))
    return kernels.curve(kernels.attention, most), kernels.curve(kernels.mlp, most), ends, kernels.spread(64)


@lru_cache(maxsize=4096)
def message_curve(messages: tuple[tuple[str, float, int, float], ...], machine: Machine, most: int) -> Curve:
    """Seconds over rows of collectives (name, bytes a row, ranks, share of the rows in it)."""
    points = _grid(most)
    seconds = []
    for rows in points:
        found = 0.0
        for name, bytes_, ranks, share in messages:
            link = machine.link(ranks)
            assert link is not None, "nothing joins these devices"
            found += collective.estimate(name, bytes_ * rows * share, ranks, link).seconds
        seconds.append(found)
    return _read(points, seconds)


def layer_messages(spec: ModelSpec, layout: Layout, width: float) -> tuple[tuple[str, float, int, float], ...]:
    """Collectives of one layer: (name, bytes a row of all lanes, ranks, share of those rows in the message).

    Between cells of equally many replicas a sum over each; where replicas become more or fewer, a sum that leaves parts
    and a gathering of what the next cell needs; into experts and out of them, parts are exchanged.
    """
    rows_bytes = spec.hidden * width
    a, m = layout.attention_replicas, layout.mlp_replicas
    n_a, n_m = layout.attention_ranks, layout.mlp_ranks
    expert = layout.mlp_split == "expert" and n_m > 1
    found: list[tuple[str, float, int, float]] = []

    def add(name: str, ranks: int, share: float) -> None:
        if ranks > 1:
            found.append((name, rows_bytes, ranks, share))

    if expert:
        routed = spec.top_k / n_m  # a rank sends its part of the rows to top_k experts
        add("reduce_scatter", n_a, 1 / a)
        add("all_to_all", n_m, routed / m)
        add("all_to_all", n_m, routed / m)
        add("all_gather", n_a, 1 / a)
    elif a == m:
        add("all_reduce", n_a, 1 / a)
        add("all_reduce", n_m, 1 / m)
    else:
        add("reduce_scatter", n_a, 1 / a)
        add("all_gather", n_m, 1 / m)
        add("reduce_scatter", n_m, 1 / m)
        add("all_gather", n_a, 1 / a)
    return tuple(found)
