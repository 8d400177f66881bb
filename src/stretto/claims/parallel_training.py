"""What Megatron-LM (SC21) states of its interleaved order and of weak scaling on A100 80 GB.

The order's bubble and its chunks in flight are counted on the tables that training runs. The weak-scaling rows are
played: each rank's 1F1B table, its passes by the kernel model, two sums of a layer's output a pass over NVLink, a full
recompute, gradients summed over InfiniBand (as many cards a node as the group has ranks there), the optimizer. Two
constants are fitted, on the smallest and the largest model: by how much all of it is slower than the kernel model
(elementwise kernels, launches), and how often a layer's materialised attention scores cross memory. The three rows
between are judged.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING

from stretto.claims.registry import Figure, claim
from stretto.core.order_schedule import lay_out
from stretto.core.orders import Action, Message, Order, order_of
from stretto.core.schedule import Schedule
from stretto.core.simulate import simulate

if TYPE_CHECKING:
    from stretto.hardware.device import Device

SEQUENCE, VOCABULARY = 2048, 51200
_NVLINK, _CARD = 300e9, 25e9
_NODE = 8
CONSTANTS = {
    "kernels": "hardware/fitted.yaml: fitted on other models' kernels on an A100 80 GB, not on this table",
    "NVLink 300 GB/s, InfiniBand 25 GB/s a card": "NVIDIA A100 data sheet (2021); 8 HDR cards a node, the publication",
    "micro-batch sizes": "16, 16, 4, 1, 1 sequences, the publication's text",
    "slowness, passes over the scores": "fitted on the rows of 1.7 and 1008 billion parameters",
}


@dataclass(frozen=True)
class _Row:
    layers: int
    hidden: int
    heads: int
    tp: int
    pp: int
    gpus: int
    batch: int
    micro_batch: int

    @property
    def data_ranks(self) -> int:
        return self.gpus // (self.tp * self.pp)

    @property
    def micro_batches(self) -> int:
        return self.batch // (self.data_ranks * self.micro_batch)

    @property
    def setting(self) -> str:
        return (
            f"{self.layers} layers of {self.hidden}, tp {self.tp}, pp {self.pp}, {self.gpus} A100, batch {self.batch}, "
            f"sequences of {SEQUENCE}"
        )

    @property
    def flops(self) -> float:
        """Of a step and a GPU, recompute included, as the publication counts them."""
        h, l = self.hidden, self.layers  # noqa: E741 (the publication's letters)
        wide = 1 + SEQUENCE / (6 * h) + VOCABULARY / (16 * l * h)
        return 96 * self.batch * SEQUENCE * l * h * h * wide / self.gpus

    @property
    def parameters(self) -> float:
        """Of a rank."""
        h, l = self.hidden, self.layers  # noqa: E741
        whole = 12 * l * h * h * (1 + 13 / (12 * h) + (VOCABULARY + SEQUENCE) / (12 * l * h))
        return whole / (self.tp * self.pp)


ROWS = {
    "1.7B": _Row(24, 2304, 24, 1, 1, 32, 512, 16),
    "7.5B": _Row(36, 4096, 32, 4, 1, 128, 512, 16),
    "39.1B": _Row(48, 8192, 64, 8, 2, 512, 1536, 4),
    "145.6B": _Row(80, 12288, 96, 8, 8, 1536, 2304, 1),
    "1008B": _Row(128, 25600, 160, 8, 64, 3072, 3072, 1),
}
_FITTED = {"1.7B": 137.0, "1008B": 163.0}


@dataclass(frozen=True)
class _Costs:
    """Seconds of a stage's passes; `head` lies on the last."""

    order: Order
    layers: int
    layer_s: float
    sums_s: float
    head_s: float

    def compute(self, action: Action) -> float:
        head = self.head_s if action.stage == self.order.stages - 1 else 0.0
        forward = self.layers * (self.layer_s + self.sums_s) + head
        if action.kind == "forward":
            return forward
        again = forward - head  # all but the head is computed once more
        return again + self.layers * (2 * self.layer_s + self.sums_s) + 2 * head

    def message(self, message: Message) -> float:
        return 0.0

    def held(self, action: Action) -> float:
        return 1.0


@lru_cache(maxsize=4)
def _a100() -> Device:
    from stretto.hardware import catalog

    return catalog.device("a100-sxm-80gb")


@cache
def _step_s(name: str, scores: float) -> float:
    """A step if attention scores cross memory `scores` times a layer and micro-batch, in forward and backward."""
    from stretto.hardware import cost
    from stretto.models.passes import PassShape
    from stretto.models.spec import ModelSpec

    row, device = ROWS[name], _a100()
    h, a, t, b = row.hidden, row.heads, row.tp, row.micro_batch
    spec = ModelSpec(
        family="llama", layers=1, hidden=h, heads=a, kv_heads=a, head_dim=h // a, ffn=8 * h // 3, vocab=VOCABULARY
    )
    shape = PassShape(new_tokens=(SEQUENCE,) * b, cached=(0,) * b, logits_rows=SEQUENCE * b)
    listed = spec.operations(shape, dtype="fp16", tp=t)
    ends = ("embed", "norm_final", "lm_head")
    layer_s = cost.total([op for op in listed if op.name not in ends], device, threads=None).seconds
    head_s = cost.total([op for op in listed if op.name in ends], device, threads=None).seconds
    sums_s = 2 * 2 * (t - 1) / t * b * SEQUENCE * h * 2 / _NVLINK
    scores_s = scores * b * a / t * SEQUENCE**2 * 2 / device.bandwidth
    order = order_of("1f1b", row.pp, row.micro_batches)
    costs = _Costs(order, row.layers // row.pp, layer_s + scores_s / 4, sums_s, head_s)
    schedule = Schedule()
    lay_out(order, costs, schedule=schedule, lanes=[schedule.lane(f"rank {rank}") for rank in range(row.pp)])
    passes_s = simulate(schedule.timed()).makespan
    cards = max(1, min(_NODE, _NODE // t))
    sum_s = 2 * (row.data_ranks - 1) / row.data_ranks * row.parameters * 2 / (_CARD * cards)
    return passes_s + sum_s + row.parameters * 28 / device.bandwidth


@lru_cache(maxsize=1)
def _fit() -> tuple[float, float]:
    """Slowness and passes over the scores with which both fitted rows come out."""

    def slowness(name: str, scores: float) -> float:
        return ROWS[name].flops / 1e12 / _FITTED[name] / _step_s(name, scores)

    def apart(scores: float) -> float:
        return slowness("1.7B", scores) / slowness("1008B", scores) - 1

    (a, at_a), (b, at_b) = ((scores, apart(scores)) for scores in (10.0, 30.0))
    for _ in range(4):  # the secant; the curve is all but straight
        c = b - at_b * (b - a) / (at_b - at_a)
        (a, at_a), (b, at_b) = (b, at_b), (c, apart(c))
        if abs(at_b) < 1e-6:
            break
    return slowness("1008B", b), b


def _teraflops(name: str) -> Figure:
    slow, scores = _fit()
    ours = ROWS[name].flops / 1e12 / (slow * _step_s(name, scores))
    null = sum(_FITTED.values()) / len(_FITTED)
    return Figure(ours=ours, null=null, note=f"null: the mean of the fitted rows; fitted {slow:.3f} and {scores:.1f}")


def _chunks_in_flight(order: Order, rank: int) -> int:
    now = most = 0
    for action in order.programs[rank]:
        now += 1 if action.kind == "forward" else -1
        most = max(most, now)
    return most


@dataclass(frozen=True)
class _Even:
    chunks: int

    def compute(self, action: Action) -> float:
        return (1.0 if action.kind == "forward" else 2.0) / self.chunks

    def message(self, message: Message) -> float:
        return 0.0

    def held(self, action: Action) -> float:
        return 1.0


def _bubble(name: str, ranks: int, count: int, chunks: int) -> float:
    """Idle time over ideal time of one step without communication."""
    order, schedule = order_of(name, ranks, count, chunks), Schedule()
    lay_out(order, _Even(chunks), schedule=schedule, lanes=[schedule.lane(f"rank {rank}") for rank in range(ranks)])
    return simulate(schedule.timed()).makespan / (3.0 * count) - 1


@claim(
    system="megatron",
    says="the bubble over the ideal time is (p - 1) / m, and (p - 1) / (m v) interleaved, in every setting tried",
    kind="exact",
    published=None,
    setting="p in 2, 4, 8; m in p, 2p, 4p; v in 1, 2, 4; no communication",
)
def bubble(quick: bool) -> Figure:
    worst = 0.0
    for p in (2, 4, 8):
        for m in (p, 2 * p, 4 * p):
            for v in (1, 2, 4):
                found = _bubble("1f1b" if v == 1 else "interleaved", p, m, v)
                worst = max(worst, abs(found - (p - 1) / (m * v)))
    return Figure(ours=worst < 1e-9, note=f"largest difference {worst:.1e}")


@claim(
    system="megatron",
    says="1F1B keeps at most p - r micro-batches on rank r, interleaved p v + p - 1 chunks on the first",
    kind="exact",
    published=None,
    setting="p in 2, 4, 8; v in 2, 4; m = 2 p",
)
def in_flight(quick: bool) -> Figure:
    plain = all(
        _chunks_in_flight(order_of("1f1b", p, m), rank) == min(p - rank, m)
        for p in (2, 4, 8)
        for m in (1, p, 2 * p)
        for rank in range(p)
    )
    interleaved = all(
        _chunks_in_flight(order_of("interleaved", p, 2 * p, v), 0) == p * v + p - 1 for p in (2, 4, 8) for v in (2, 4)
    )
    return Figure(ours=plain and interleaved)


@claim(
    system="megatron",
    says="the order of the five models by TFLOP/s a GPU, where they differ by over 5 %",
    kind="exact",
    published=None,
    setting="the weak-scaling table",
)
def order_of_models(quick: bool) -> Figure:
    published = {"1.7B": 137.0, "7.5B": 142.0, "39.1B": 138.0, "145.6B": 148.0, "1008B": 163.0}
    ours = {name: _teraflops(name).ours for name in ROWS}
    pairs = [(a, b) for a in ROWS for b in ROWS if published[a] > 1.05 * published[b]]
    note = ", ".join(f"{name} {value:.0f}" for name, value in ours.items())
    return Figure(ours=all(ours[a] > ours[b] for a, b in pairs), note=f"{len(pairs)} pairs; {note}")


@claim(
    system="megatron",
    says="7.5 billion parameters train at 142 TFLOP/s a GPU",
    kind="simulated",
    published=142.0,
    unit="TFLOP/s",
    setting=ROWS["7.5B"].setting,
    constants=CONSTANTS,
    tolerance=0.05,
)
def seven_billion(quick: bool) -> Figure:
    return _teraflops("7.5B")


@claim(
    system="megatron",
    says="39.1 billion parameters train at 138 TFLOP/s a GPU",
    kind="simulated",
    published=138.0,
    unit="TFLOP/s",
    setting=ROWS["39.1B"].setting,
    constants=CONSTANTS,
    tolerance=0.05,
)
def thirty_nine_billion(quick: bool) -> Figure:
    return _teraflops("39.1B")


@claim(
    system="megatron",
    says="145.6 billion parameters train at 148 TFLOP/s a GPU",
    kind="simulated",
    published=148.0,
    unit="TFLOP/s",
    setting=ROWS["145.6B"].setting,
    constants=CONSTANTS,
    tolerance=0.05,
)
def hundred_and_forty_five_billion(quick: bool) -> Figure:
    return _teraflops("145.6B")


@claim(
    system="megatron",
    says="a trillion parameters and 450 billion tokens take 84 days on 3072 GPUs",
    kind="simulated",
    published=84.0,
    unit="days",
    setting=ROWS["1008B"].setting,
    constants=CONSTANTS,
    fitted_on="the row of 1008 billion parameters",
    tolerance=0.05,
)
def a_trillion_in_days(quick: bool) -> Figure:
    slow, scores = _fit()
    row = ROWS["1008B"]
    steps = 450e9 / (row.batch * SEQUENCE)
    days = steps * slow * _step_s("1008B", scores) / 86400
    null = 8 * 450e9 * 1008e9 / (row.gpus * 312e12) / 86400
    return Figure(ours=days, null=null, note="null: the data sheet's peak")
