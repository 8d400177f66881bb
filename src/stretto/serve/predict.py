"""The cost of a serving plan: the product's own engine and scheduler on virtual time, in front of a backend of seconds.

Seconds of a pass are the sum over the operations that `ModelSpec` lists, each from `hardware.cost`: from
tables measured by `calibrate` where there are any, from the roofline model elsewhere. Exact: which requests
share which pass, and every length, once answers' lengths are given. Approximate: the seconds; their interval
is carried along with them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np

from stretto.core.clock import VirtualClock, simulate_async
from stretto.core.fluid import Fluid
from stretto.core.plan import Metric, Prediction
from stretto.core.record import Recorder
from stretto.core.shared import SharedDevice
from stretto.core.statistics import Interval
from stretto.core.trace import Key, Trace
from stretto.hardware import cost
from stretto.hardware.device import Device
from stretto.hardware.operation import Operation
from stretto.models.calibrate import pass_signature
from stretto.models.passes import PassShape, arithmetic, pass_operations
from stretto.models.spec import ModelSpec
from stretto.serve.engine import Engine
from stretto.serve.instances import Instances
from stretto.serve.job import ServeJob
from stretto.serve.lane_engine import engine_of
from stretto.serve.plan import ServePlan, memory_bytes
from stretto.serve.request import Answer, Request
from stretto.serve.scheduler_config import SchedulerConfig
from stretto.serve.simulated import END, SharedPass, SimulatedBackend
from stretto.serve.workload import Workload

SHORT_ANSWER = 0.25
"""The forecast's interval runs from answers of this share of the assumed length to answers that all reach the limit."""


def host_signature(what: str, spec: ModelSpec, path: str = "torch") -> str:
    """The signature of host work: "step" (scheduling and handing out) or "sample" (choosing tokens from logits)."""
    fused = "" if what == "step" or path == "torch" else "/fused"
    return f"host-{what}/vocab{spec.vocab}{fused}"


@dataclass
class PassCosts:
    """Seconds of passes of one model on one device; remembers what it has seen.

    `low` and `high` add up, over all passes asked for, how far below and above the estimate each might lie.
    """

    spec: ModelSpec
    device: Device
    dtype: str
    threads: int | None
    path: str = "torch"
    basis: set[str] = field(default_factory=set)
    low: float = 0.0
    high: float = 0.0
    total: float = 0.0

    def __post_init__(self) -> None:
        self._seconds = lru_cache(maxsize=4096)(self._estimate)
        self._demand = lru_cache(maxsize=4096)(self._count)

    def prefill_s(self, chunks: Sequence[tuple[int, int]], decode_contexts: Sequence[int]) -> float:
        new = tuple(n for n, _ in chunks) + (1,) * len(decode_contexts)
        cached = tuple(c for _, c in chunks) + tuple(decode_contexts)
        return self._charge(self._seconds(new, cached), 1)

    def decode_s(self, contexts: Sequence[int], steps: int) -> list[float]:
        rows, mean = len(contexts), sum(contexts) / len(contexts)
        first = self._decode(rows, mean)
        if steps == 1:
            return [self._charge(first, 1)]
        last = self._decode(rows, mean + steps - 1)
        middle = tuple((a + b) / 2 for a, b in zip(first, last, strict=True))
        self._charge(middle, steps)
        seconds: list[float] = np.linspace(first[0], last[0], steps).tolist()
        return seconds

    def move_s(self, positions: int) -> float:
        if not positions:
            return 0.0
        copied = 2.0 * positions * self.spec.kv_bytes_per_token(self.dtype)
        move = Operation(
            name="kv_move", kind="elementwise", dtype=arithmetic(self.dtype, self.path), flops=0.0, bytes=copied
        )
        found = cost.total([move], self.device, threads=self.threads)
        return self._charge((found.seconds, found.low, found.high), 1)

    def _decode(self, rows: int, mean_context: float) -> tuple[float, float, float]:
        # Contexts differ from row to row, but cost depends on their number and mean alone.
        low = int(mean_context)
        a = self._seconds((1,) * rows, (low,) * rows)
        if low == mean_context:
            return a
        b = self._seconds((1,) * rows, (low + 1,) * rows)
        share = mean_context - low
        return tuple(x + (y - x) * share for x, y in zip(a, b, strict=True))  # type: ignore[return-value]

    def _charge(self, estimate: Sequence[float], times: int) -> float:
        seconds, low, high = estimate
        self.total += seconds * times
        self.low += low * times
        self.high += high * times
        return seconds

    def demand(self, chunks: Sequence[tuple[int, int]], contexts: Sequence[int]) -> tuple[float, float]:
        """FLOPs and bytes of one pass."""
        new = tuple(n for n, _ in chunks) + (1,) * len(contexts)
        cached = tuple(c for _, c in chunks) + tuple(contexts)
        return self._demand(new, cached)

    def _count(self, new: tuple[int, ...], cached: tuple[int, ...]) -> tuple[float, float]:
        shape = PassShape(new_tokens=new, cached=cached)
        operations = pass_operations(self.spec, shape, dtype=self.dtype, path=self.path)
        return sum(op.flops * op.count for op in operations), sum(op.bytes * op.count for op in operations)

    def _estimate(self, new: tuple[int, ...], cached: tuple[int, ...]) -> tuple[float, float, float]:
        shape = PassShape(new_tokens=new, cached=cached)
        found = cost.total(self._operations(shape), self.device, threads=self.threads)
        self.basis.add(found.basis)
        return found.seconds, found.low, found.high

    def host_s(self, rows: int) -> float:
        """Seconds of scheduling and handing out in a step of so many rows; 0 where it was not measured."""
        table = self.device.measured.get(f"{host_signature('step', self.spec)}@{self.threads}")
        return table.at(float(max(1, rows))).value if table else 0.0

    def _operations(self, shape: PassShape) -> list[Operation]:
        """What the spec lists, and the host's part of a pass where it was measured: laying out, drawing tokens."""
        hosts = {
            pass_signature(self.spec, self.dtype, self.path): shape.rows,
            host_signature("sample", self.spec, self.path): shape.head_rows,
        }
        own = [
            Operation(
                name="host",
                kind="host",
                dtype=arithmetic(self.dtype, self.path),
                flops=0.0,
                bytes=0.0,
                signature=name,
                at=(float(rows),),
            )
            for name, rows in hosts.items()
            if f"{name}@{self.threads}" in self.device.measured
        ]
        return [*pass_operations(self.spec, shape, dtype=self.dtype, path=self.path), *own]


@dataclass(frozen=True, kw_only=True)
class Played:
    """What a simulated run gave."""

    trace: Trace
    answers: tuple[Answer, ...]
    spread: tuple[float, float]


def scheduler_config(plan: ServePlan, work: Workload) -> SchedulerConfig:
    """The scheduler of a plan."""
    return SchedulerConfig(
        joining=plan.joining,
        slots=plan.slots,
        pages=plan.pages(work.longest),
        page_tokens=plan.page_tokens,
        prefill_tokens=plan.prefill_tokens,
        layout=plan.layout,
        reorder=plan.reorder,
        prefix_cache=plan.prefix_cache,
        prefill=plan.prefill,
    )


def play(plan: ServePlan, work: Workload, device: Device, lengths: Sequence[int]) -> Played:
    """Play `plan` on virtual time with answers of these lengths (tokens, the ending one included)."""
    threads = plan.threads if device.kind == "cpu" else None
    costs = PassCosts(work.spec, device, plan.dtype, threads, plan.path)

    async def main(clock: VirtualClock) -> Played:
        recorder = Recorder("simulated")
        clock.on_spend = lambda what, start, finish: recorder.span("host", start, finish, Key(what))
        numbers = range(len(lengths))
        alone = plan.instances == 1 and plan.prefill == "mixed"
        shared = None if alone else _shared_device(plan, device, costs, clock)

        def engine(lane: str) -> Engine:
            backend = SimulatedBackend(
                costs,
                clock,
                dict(zip(numbers, lengths, strict=True)),
                {i: len(work.prompts[i]) for i in numbers},
                host_s=lambda rows: costs.host_s(rows) * between_steps(plan, device),
                on_host=lambda start, finish: recorder.span("host", start, finish, Key("host")),
                shared=shared,
            )
            settings = scheduler_config(plan, work)
            return engine_of(settings, backend, clock, recorder, host_seconds=costs.host_s, lane=lane)

        engines = Instances([engine(lane) for lane in lanes(plan)])
        running = asyncio.ensure_future(engines.run())
        handles = []
        for i in numbers:
            if work.arrivals_s[i] > clock.now:
                await clock.sleep(work.arrivals_s[i] - clock.now)
            request = Request(id=i, prompt=work.prompts[i], limit=work.limit, stop_tokens=frozenset({END}))
            handles.append(engines.submit(request))
        engines.close()
        await clock.wait(running, "the simulation waits for its engine")
        recorder.memory(plan.device, 0.0, memory_bytes(plan, work))
        answers = tuple([await handle.answer() for handle in handles])
        total = max(costs.total, 1e-12)
        return Played(trace=recorder.trace(), answers=answers, spread=(costs.low / total, costs.high / total))

    return simulate_async(main)


def between_steps(plan: ServePlan, device: Device) -> float:
    """The share of host work that shows between two steps of a batch, of which the next begins before it is done.

    It costs nothing where a core is left over. Else it takes a core from a pass: threads that help each other out lose
    their share of it, torch's wait for the slowest.
    """
    if plan.instances > 1 or plan.prefill == "lanes" or device.kind != "cpu":
        return 1.0  # their workers do not go ahead
    if plan.threads < device.units:
        return 0.0
    return 1.0 if plan.path == "torch" else 1.0 / plan.threads


def lanes(plan: ServePlan) -> list[str]:
    """The lane of each instance in a trace."""
    return ["device"] if plan.instances == 1 else [f"instance {i}" for i in range(plan.instances)]


def _shared_device(plan: ServePlan, device: Device, costs: PassCosts, clock: VirtualClock) -> SharedPass:
    """How passes of instances or lanes slow each other down: by the cores or FLOPs and by the bandwidth they share.

    A pass that runs alone takes the seconds of `costs`; the device's bandwidth and cores are shared in equal parts.
    """
    if device.kind == "cpu":
        capacity = {"bandwidth": device.bandwidth, "cores": float(device.units)}
    else:
        capacity = {"bandwidth": device.bandwidth, "flops": device.peak(arithmetic(plan.dtype, plan.path))}
    machine = SharedDevice(clock, Fluid(capacity))

    async def execute(seconds: float, chunks: Sequence[tuple[int, int]], contexts: Sequence[int]) -> None:
        flops, moved = costs.demand(chunks, contexts)
        use = {"bandwidth": min(moved, seconds * device.bandwidth)}
        use |= {"cores": seconds * plan.threads} if device.kind == "cpu" else {"flops": flops}
        await machine.execute(1.0, use, 1.0 / seconds, label="a pass")

    return execute


def predict(job: ServeJob, plan: ServePlan, work: Workload, device: Device) -> Prediction:
    """The forecast: the assumed lengths for the values, shorter and longest answers for the intervals."""
    count, assumed = len(work.prompts), job.assumed_new_tokens
    middle = play(plan, work, device, [assumed] * count)
    if job.ignore_eos or assumed == job.max_new_tokens:
        short = long = middle
    else:
        short = play(plan, work, device, [max(1, round(assumed * SHORT_ANSWER))] * count)
        long = play(plan, work, device, [job.max_new_tokens] * count)
    low, high = short.spread[0], long.spread[1]

    def metric(measure: str, unit: str, *, higher: bool = False) -> Metric:
        a, b, c = (_measure(p, measure) for p in (short, middle, long))
        bounds = (
            (a / high, b / high, c / high, a / low, b / low, c / low)
            if higher
            else (a * low, b * low, c * low, a * high, b * high, c * high)
        )
        return Metric(
            value=Interval(value=b, low=min(*bounds, b), high=max(*bounds, b)),
            unit=unit,
            higher_is_better=higher,
        )

    metrics = {
        "throughput": metric("throughput", "tokens/s", higher=True),
        "seconds": metric("seconds", "s"),
        "first_token": metric("first_token", "s"),
        "latency": metric("latency", "s"),
        "memory": Metric(value=Interval.exact(memory_bytes(plan, work)), unit="bytes"),
    }
    return Prediction(
        metrics=metrics,
        bottleneck=_bottleneck(middle.trace),
        assumed=_assumed(job, count),
        phases=middle.trace.critical_seconds,
        trace=middle.trace,
    )


def _measure(played: Played, what: str) -> float:
    answers = played.answers
    tokens = sum(len(a.tokens) for a in answers)
    if what == "throughput":
        return tokens / played.trace.makespan
    if what == "seconds":
        return played.trace.makespan
    if what == "latency":
        return float(np.mean([a.latency_s for a in answers]))
    return float(np.mean([(a.first_token_s or 0.0) - a.arrived_s for a in answers]))


def _assumed(job: ServeJob, count: int) -> str:
    length = job.assumed_new_tokens
    if job.ignore_eos:
        return f"{count} answers of exactly {length} tokens"
    shortest = max(1, round(length * SHORT_ANSWER))
    return f"{count} answers of {length} tokens each; the intervals span {shortest} to {job.max_new_tokens} tokens"


def _bottleneck(trace: Trace) -> str:
    seconds = trace.critical_seconds
    total = sum(seconds.values()) or 1.0
    parts = sorted(seconds.items(), key=lambda pair: -pair[1])[:3]
    return "the critical path is " + ", ".join(f"{share / total:.0%} {phase}" for phase, share in parts)
