"""Seconds of a step of one model replica: the operations that `models` lists, priced by `hardware`, and the engine.

A step is known by the rows of each lane (a batch of one stage and attention replica), by what their attention reads and
by how many of them ask for a token. Everything but attention depends on the number of rows alone, so it is tabled once
for a device and a share of the model and read between its points; attention follows a law in FLOPs and bytes, so that
its cost grows with every cached position. While a batch does not change, a step's seconds grow by the same amount each
step, and thousands of steps are a sum in closed form.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from stretto.hardware import collective, cost
from stretto.hardware.link import Link
from stretto.hardware.operation import Operation
from stretto.models.passes import PassShape
from stretto.models.spec import ModelSpec, bytes_of
from stretto.serve.deploy.curves import Machine, Types, kernel_curves, layer_messages, message_curve
from stretto.serve.deploy.engines import EngineConstants
from stretto.serve.deploy.layout import (
    Layout,
    attention_share,
    experts_held,
    kv_bytes_per_token,
    mlp_width,
    stage_layers,
)

_EAGER_ORDER = 2.0
"""Launches and kernels of an eager step overlap as compute and memory time of a kernel do: where kernels are short the
devices wait for launches, where they are long launches run ahead, and a step has both."""
GRAPH_ROWS = 256
"""Steps of more rows than this are not replayed as graphs."""


class Lane(NamedTuple):
    """One lane's part of a step.

    Attributes:
        rows: token rows; tokens: rows whose next token is drawn.
        sequences: requests of the step.
        decoders: rows that decode; cached: positions that these read, their own included.
        prompt_s: attention of its prompt chunks, seconds a layer.
        eager: whether it has prompt chunks.
        pause_s: how long the replica had had nothing to do when the step began.
    """

    rows: int = 0
    tokens: int = 0
    sequences: int = 0
    decoders: int = 0
    cached: int = 0
    prompt_s: float = 0.0
    eager: bool = False
    pause_s: float = 0.0


class Parts(NamedTuple):
    """Seconds of a step by cause: kernels, messages between devices, the engine's host work and launches."""

    kernels: float
    messages: float
    engine: float

    @property
    def total(self) -> float:
        return self.kernels + self.messages + self.engine


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
        stages = stage_layers(spec.layers, layout.stages)
        self._most_layers, self._last_layers = stages[0], stages[-1]
        self._share = attention_share(spec, layout)
        most = max(1024, 1 << (most_rows - 1).bit_length())
        expert = layout.mlp_split == "expert"
        self._attention, self._mlp, self._ends, self._kernel_spread = kernel_curves(
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
        self._messages = message_curve(layer_messages(spec, layout, width), machine, most)
        head = (("all_gather", spec.vocab * width, layout.devices, 1.0),) if layout.devices > 1 else ()
        self._head_messages = message_curve(head, machine, 1024)
        far = layout.stages * layout.devices > machine.node_devices
        self._hop: Link | None = (machine.far if far else machine.near) if layout.stages > 1 else None
        self._hop_start_s, self._hop_row_s = self._hop_law(spec.hidden * width)
        self._law = cost.attention_law(self._like, machine.device)

    def _hop_law(self, row_bytes: float) -> tuple[float, float]:
        """Seconds of handing no row to the next stage, and of each row: a message takes a straight line of them."""
        if self._hop is None:
            return 0.0, 0.0
        start, one = (collective.estimate("send_recv", n * row_bytes, 2, self._hop).seconds for n in (0, 1))
        return start, one - start

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
        """The slowest stage's part of a step in which its attention replicas take `lanes` together, since it sets the
        pace: the last one, which has the head besides, or one with a layer more.
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
        kernels += self._mlp(rows / self.layout.mlp_replicas)
        layer = kernels * self.engine.kernel_pace, self._messages(rows)
        tokens = sum(lane.tokens for lane in lanes)
        last = self._stage_of(self._last_layers, layer, tokens, rows, lanes)
        if self._most_layers == self._last_layers:
            return last
        return max(last, self._stage_of(self._most_layers, layer, 0, rows, lanes), key=_total)

    def _stage_of(
        self, layers: int, layer: tuple[float, float], tokens: int, rows: int, lanes: Sequence[Lane]
    ) -> Parts:
        """A stage of so many layers, each of `layer` seconds (kernels, messages), that draws `tokens` next tokens."""
        kernels, messages = layers * layer[0], layers * layer[1]
        if tokens:
            kernels += self._ends(tokens) * self.engine.kernel_pace
            messages += self._head_messages(tokens) if self.layout.devices > 1 else 0.0
        messages += self._hop_start_s + rows * self._hop_row_s
        engine = self.engine
        host = engine.host_step_s / self.layout.stages
        host += engine.host_sequence_s * max(lane.sequences for lane in lanes) / self.layout.stages
        if any(lane.eager for lane in lanes) or rows > GRAPH_ROWS:
            launches = engine.eager_layer_s * layers
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


def _total(parts: Parts) -> float:
    return parts.total
