"""Seconds of a step of one model replica: the operations that `models` lists, priced by `hardware`, and the engine.

A step is known by the rows of each lane (a batch of one stage and attention replica), by what their attention reads and
by how many of them ask for a token. Everything but attention depends on the number of rows alone, so it is tabled once
for a device and a share of the model and read between its points; attention follows a law in FLOPs and bytes, so that
its cost grows with every cached position. While a batch does not change, a step's seconds grow by the same amount each
step, and thousands of steps are a sum in closed form.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple

import numpy as np

from stretto.hardware import collective, cost
from stretto.hardware.device import Device
from stretto.hardware.link import Link
from stretto.hardware.operation import Operation
from stretto.models.passes import PassShape
from stretto.models.spec import ModelSpec, bytes_of
from stretto.serve.deploy.engines import EngineConstants
from stretto.serve.deploy.layout import Layout, attention_share, experts_held, kv_bytes_per_token, mlp_width

_MLP = ("norm_mlp", "router", "gate_up", "activation", "down", "add_mlp")
_SAMPLE_MOVES = 6
"""Times that sampling reads or writes the logits, in fp32: to cast, scale, exponentiate, sum, divide and choose."""
_EAGER_ORDER = 2.0
"""Launches and kernels of an eager step overlap as compute and memory time of a kernel do: where kernels are short the
devices wait for launches, where they are long launches run ahead, and a step has both."""
GRAPH_ROWS = 256
"""Steps of more rows than this are not replayed as graphs."""


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


class Lane(NamedTuple):
    """One lane's part of a step.

    Attributes:
        rows: token rows; tokens: rows whose next token is drawn.
        sequences: requests of the step.
        decoders: rows that decode; cached: positions that these read, their own included.
        prompt_s: attention of its prompt chunks, seconds a layer.
        eager: whether it has prompt chunks.
    """

    rows: int = 0
    tokens: int = 0
    sequences: int = 0
    decoders: int = 0
    cached: int = 0
    prompt_s: float = 0.0
    eager: bool = False


class Parts(NamedTuple):
    """Seconds of a step by cause: kernels, messages between devices, the engine's host work and launches."""

    kernels: float
    messages: float
    engine: float

    @property
    def total(self) -> float:
        return self.kernels + self.messages + self.engine


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

    return at


@dataclass(frozen=True)
class _Kernels:
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
def _curves(
    spec: ModelSpec,
    share: ModelSpec,
    experts: int,
    width: int,
    spread_experts: float,
    device: Device,
    types: Types,
    most: int,
) -> tuple[Curve, Curve, Curve, float]:
    kernels = _Kernels(spec, share, experts, width, spread_experts, device, types)
    ends = kernels.curve(kernels.ends, min(most, 1024))
    return kernels.curve(kernels.attention, most), kernels.curve(kernels.mlp, most), ends, kernels.spread(64)


@lru_cache(maxsize=4096)
def _message_curve(messages: tuple[tuple[str, float, int, float], ...], machine: Machine, most: int) -> Curve:
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


class StepCosts:
    """Seconds of the steps of one replica of `spec` laid out by `layout`.

    Args:
        most_rows: rows of the largest step that will be asked for.
    """

    def __init__(
        self,
        *,
        spec: ModelSpec,
        layout: Layout,
        machine: Machine,
        types: Types,
        engine: EngineConstants,
        most_rows: int,
    ) -> None:
        self.spec, self.layout, self.machine, self.types, self.engine = spec, layout, machine, types, engine
        self.layers = spec.layers // layout.stages
        self._share = attention_share(spec, layout)
        most = max(1024, 1 << (most_rows - 1).bit_length())
        expert = layout.mlp_split == "expert"
        self._attention, self._mlp, self._ends, self._kernel_spread = _curves(
            spec,
            self._share,
            experts_held(spec, layout),
            mlp_width(spec, layout),
            1 / layout.mlp_ranks if expert else 1.0,
            machine.device,
            types,
            most,
        )
        width = bytes_of(types.arithmetic)
        self._messages = _message_curve(layer_messages(spec, layout, width), machine, most)
        head = (("all_gather", spec.vocab * width, layout.devices, 1.0),) if layout.devices > 1 else ()
        self._head_messages = _message_curve(head, machine, 1024)
        hop = layout.stages > 1 and (
            machine.far if layout.stages * layout.devices > machine.node_devices else machine.near
        )
        self._hop: Link | None = hop or None
        self._law = cost.attention_law(self._like, machine.device)

    @cached_property
    def _like(self) -> Operation:
        shape = PassShape(new_tokens=(1,), cached=(1,))
        operations = self._share.operations(shape, dtype=self.types.arithmetic, kv_dtype=self.types.kv)
        return next(op for op in operations if op.kind == "attention")

    def prompt_attention_s(self, new: int, cached: int) -> float:
        """Attention of a prompt chunk, one layer."""
        pairs = new * cached + new * (new + 1) // 2
        return self._attend(new, cached + new, pairs)

    def _attend(self, queries: int, context: int, pairs: int) -> float:
        share, dim = self._share, self.spec.head_dim
        moved = 2 * queries * share.heads * dim * bytes_of(self.types.arithmetic)
        moved += 2 * context * share.kv_width * bytes_of(self.types.kv)
        return self._law.seconds(4.0 * share.heads * dim * pairs, moved)

    def copy_s(self, positions: int) -> float:
        """Copying the keys and values of so many positions between a device and its host."""
        if not positions:
            return 0.0
        moved = positions * kv_bytes_per_token(self.spec, self.layout, self.types.kv)
        return collective.estimate("send_recv", moved, 2, self.machine.host).seconds

    def stage(self, lanes: Sequence[Lane]) -> Parts:
        """One stage's part of a step in which its attention replicas take `lanes` together; the last stage's ends are
        charged to every stage, since the slowest sets the pace.
        """
        rows = sum(lane.rows for lane in lanes)
        if not rows:
            return Parts(0.0, 0.0, 0.0)
        kernels = 0.0
        for lane in lanes:
            if lane.rows:
                own = self._attention(lane.rows) + lane.prompt_s
                if lane.decoders:
                    own += self._attend(lane.decoders, lane.cached, lane.cached)
                kernels = max(kernels, own)
        layout = self.layout
        kernels = self.layers * (kernels + self._mlp(rows / layout.mlp_replicas))
        messages = self.layers * self._messages(rows)
        tokens = sum(lane.tokens for lane in lanes)
        if tokens:
            kernels += self._ends(tokens)
            messages += self._head_messages(tokens) if layout.devices > 1 else 0.0
        kernels *= self.engine.kernel_pace
        if self._hop is not None:
            messages += collective.estimate(
                "send_recv", rows * self.spec.hidden * bytes_of(self.types.arithmetic), 2, self._hop
            ).seconds
        engine = self.engine
        host = engine.host_step_s / layout.stages
        host += engine.host_sequence_s * max(lane.sequences for lane in lanes) / layout.stages
        if any(lane.eager for lane in lanes) or rows > GRAPH_ROWS:
            launches = engine.eager_layer_s * self.layers
            devices = kernels + messages
            host += float((devices**_EAGER_ORDER + launches**_EAGER_ORDER) ** (1 / _EAGER_ORDER)) - devices
        return Parts(kernels, messages, host)

    def cycle(self, groups: Iterable[Sequence[Lane]]) -> Parts:
        """Every stage's group of lanes takes one step: the groups follow each other through the stages.

        A group needs all stages one after another; the slowest stage serves all groups one after another. The longer
        of the two is the cycle.
        """
        stages = [self.stage(lanes) for lanes in groups]
        longest = max(stages, key=lambda parts: parts.total)
        through, served = self.layout.stages * longest.total, sum(parts.total for parts in stages)
        if served > through:
            return Parts(*(sum(values) for values in zip(*stages, strict=True)))
        return Parts(*(self.layout.stages * value for value in longest))

    def spread(self, parts: Parts) -> float:
        """Relative uncertainty of seconds made up like `parts`: errors of its parts are independent."""
        link = self.machine.link(self.layout.devices) if self.layout.devices > 1 else self._hop
        messages = collective.fitted(link.kind).spread if link is not None else 0.0
        shares = np.array(parts) / max(parts.total, 1e-30)
        return float(np.hypot.reduce(shares * np.array([self._kernel_spread, messages, self.engine.spread])))
