"""Temporal fusion beside what it replaces: requests one after another, dynamic batches of 8, concurrent instances.

32 requests of 128 new tokens arrive 20 to 100 ms apart (SmolLM2-135M, fp32, all cores); each way answers them
in turn, in several rounds. Goals: over sequential, 5 times as fast and 80 % of the ratio that the roofline
allows (the same engine on virtual time, where a pass takes the larger of its bytes over the measured bandwidth
and its FLOPs over the measured peak); 1.5 times dynamic batches of 8 with a time-out of 50 ms; 4 times 8
concurrent instances, each in a process of its own. Batching at every step over paged memory should be about
equal and is reported. Then 32 requests of random lengths (32 to 256 tokens, all at once): closing holes against
leaving them, 1.15 times. Worst gaps between tokens and the latency with 8 alive are reported.

Usage: python benchmarks/temporal_fusion.py [--json] [--quick]
"""

from __future__ import annotations

import asyncio
import statistics
import sys
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

import harness
import stretto
from stretto.core.clock import RealClock, VirtualClock, simulate_async
from stretto.core.record import Recorder
from stretto.hardware.device import Device
from stretto.models.calibrate import warm_up
from stretto.models.load import Model, load_model
from stretto.models.passes import PassShape
from stretto.models.spec import ModelSpec
from stretto.serve.backend import Backend
from stretto.serve.engine import Engine, Handle
from stretto.serve.instances import Instances
from stretto.serve.local import LocalBackend
from stretto.serve.remote import RemoteBackend
from stretto.serve.request import Answer, Request
from stretto.serve.scheduler import Scheduler
from stretto.serve.scheduler_config import SchedulerConfig
from stretto.serve.simulated import SimulatedBackend

DTYPE = "fp32"
REQUESTS, NEW_TOKENS, SLOT_TOKENS = 32, 128, 320
GAPS_S = (0.020, 0.100)
LENGTHS = (32, 256)
INSTANCES = 8
GOAL_SEQUENTIAL, GOAL_OF_ROOFLINE, GOAL_DYNAMIC, GOAL_INSTANCES, GOAL_REORDER = 5.0, 0.8, 1.5, 4.0, 1.15


@dataclass(frozen=True)
class Asked:
    at: float
    prompt: tuple[int, ...]
    length: int


@dataclass(frozen=True)
class Way:
    """One way to serve: the scheduler's settings, and how many instances of it."""

    settings: SchedulerConfig
    instances: int = 1


def way(joining: str, slots: int, *, instances: int = 1, layout: str = "pages", reorder: str = "eager") -> Way:
    settings = SchedulerConfig(
        joining=joining,
        slots=slots,
        pages=slots,
        page_tokens=SLOT_TOKENS,
        prefill_tokens=512,
        layout=layout,  # type: ignore[arg-type]
        reorder=reorder,  # type: ignore[arg-type]
    )
    return Way(settings, instances)


FUSED = way("continuous", REQUESTS, layout="slots")
WAYS: Mapping[str, Way] = {
    "fused": FUSED,
    "paged": way("continuous", REQUESTS),
    "sequential": way("continuous", 1),
    "dynamic batches of 8": way("dynamic", 8),
    "8 concurrent instances": way("continuous", 1, instances=INSTANCES),
}
REORDERED = {"closing holes": FUSED, "leaving holes": way("continuous", REQUESTS, layout="slots", reorder="never")}


def load_of(lengths: Sequence[int], gaps_s: tuple[float, float]) -> list[Asked]:
    """Prompts of 8 to 40 made-up tokens, arrivals with gaps drawn uniformly."""
    rng = np.random.default_rng(0)
    at, asked = 0.0, []
    for length in lengths:
        prompt = tuple(rng.integers(100, 20_000, int(rng.integers(8, 41))).tolist())
        asked.append(Asked(at, prompt, int(length)))
        at += float(rng.uniform(*gaps_s))
    return asked


async def answer_all(engine: Instances, clock: RealClock | VirtualClock, asked: Sequence[Asked]) -> list[Answer]:
    running = asyncio.ensure_future(engine.run())
    handles: list[Handle] = []
    for number, each in enumerate(asked):
        if each.at > clock.now:
            await clock.sleep(each.at - clock.now)
        handles.append(engine.submit(Request(id=number, prompt=each.prompt, limit=each.length)))
    engine.close()
    await clock.wait(running, "the benchmark waits for its engine")
    return [handle.result() for handle in handles]


async def backends(model: Model, how: Way, clock: RealClock, stack: AsyncExitStack) -> list[Backend]:
    pages, tokens = how.settings.pages, how.settings.page_tokens
    if how.instances == 1:
        return [LocalBackend(model, pages=pages, page_tokens=tokens, clock=clock)]
    started: list[Backend] = []
    for _ in range(how.instances):
        remote = await RemoteBackend.start(
            "default", dtype=DTYPE, threads=1, pages=pages, page_tokens=tokens, clock=clock
        )
        stack.push_async_callback(remote.close)
        started.append(remote)
    return started


def serve(model: Model, how: Way, asked: Sequence[Asked]) -> list[Answer]:
    """The answers of one real run; instances are started and warm before its time begins."""

    async def main() -> list[Answer]:
        async with AsyncExitStack() as stack:
            clock = RealClock()
            found = await backends(model, how, clock, stack)
            clock.restart()
            engines = [Engine(Scheduler(how.settings), each, clock, Recorder("measured")) for each in found]
            return await answer_all(Instances(engines), clock, asked)

    warm_up(model)
    return asyncio.run(main())


class RooflineCost:
    """A pass takes the larger of bytes over bandwidth and FLOPs over peak, and nothing else."""

    def __init__(self, spec: ModelSpec, device: Device) -> None:
        self.spec = spec
        self.device = device

    def _pass_s(self, new: Sequence[int], cached: Sequence[int]) -> float:
        operations = self.spec.operations(PassShape(new_tokens=tuple(new), cached=tuple(cached)), dtype=DTYPE)
        matmuls = [op for op in operations if op.kind in ("matmul", "attention")]
        moved, flops = (sum(getattr(op, what) * op.count for op in matmuls) for what in ("bytes", "flops"))
        return max(moved / self.device.bandwidth, flops / self.device.peak(DTYPE))

    def prefill_s(self, chunks: Sequence[tuple[int, int]], decode_contexts: Sequence[int]) -> float:
        new = [n for n, _ in chunks] + [1] * len(decode_contexts)
        return self._pass_s(new, [c for _, c in chunks] + list(decode_contexts))

    def decode_s(self, contexts: Sequence[int], steps: int) -> list[float]:
        return [self._pass_s([1] * len(contexts), [c + k for c in contexts]) for k in range(steps)]

    def move_s(self, positions: int) -> float:
        return 2.0 * positions * self.spec.kv_bytes_per_token(DTYPE) / self.device.bandwidth


def roofline_s(spec: ModelSpec, device: Device, how: Way, asked: Sequence[Asked]) -> float:
    """Seconds of the same requests, the same way, on virtual time at the roofline."""

    async def main(clock: VirtualClock) -> float:
        lengths = {i: each.length for i, each in enumerate(asked)}
        prompts = {i: len(each.prompt) for i, each in enumerate(asked)}
        backend = SimulatedBackend(RooflineCost(spec, device), clock, lengths, prompts)
        engine = Engine(Scheduler(how.settings), backend, clock, Recorder("simulated"))
        return total_s(await answer_all(Instances([engine]), clock, asked))

    return simulate_async(main)


def total_s(answers: Sequence[Answer]) -> float:
    return max(answer.finished_s for answer in answers)


def worst_gap_s(answers: Sequence[Answer]) -> float:
    return max(b - a for answer in answers for a, b in pairwise(answer.token_times_s))


def first_token_s(answers: Sequence[Answer]) -> float:
    return statistics.mean((answer.first_token_s or 0.0) - answer.arrived_s for answer in answers)


def rounds_of(
    model: Model, ways: Mapping[str, Way], asked: Sequence[Asked], count: int
) -> dict[str, list[list[Answer]]]:
    """Answers by way, round after round in turn."""
    found: dict[str, list[list[Answer]]] = {name: [] for name in ways}
    for _ in range(count):
        for name, how in ways.items():
            found[name].append(serve(model, how, asked))
    return found


def ratio_row(
    name: str, ours: Sequence[list[Answer]], peers: Sequence[list[Answer]], goal: float | None
) -> harness.Row:
    ratios = [total_s(peer) / total_s(own) for own, peer in zip(ours, peers, strict=True)]
    own, peer = (statistics.median(map(total_s, runs)) for runs in (ours, peers))
    gaps = [statistics.median(map(worst_gap_s, runs)) * 1e3 for runs in (ours, peers)]
    firsts = [statistics.median(map(first_token_s, runs)) for runs in (ours, peers)]
    return harness.Row(
        name=name,
        ours=own,
        peer=peer,
        unit="s",
        ratio=statistics.median(ratios),
        goal=goal,
        note=f"ratios {min(ratios):.2f} to {max(ratios):.2f}; mean first token after {firsts[0]:.2f} s, "
        f"peer {firsts[1]:.2f} s; worst gap between tokens {gaps[0]:.0f} ms, peer {gaps[1]:.0f} ms",
    )


def measure(quick: bool) -> Sequence[harness.Row]:
    device = next(iter(stretto.probe().devices().values()))
    model = load_model("default", dtype=DTYPE, threads=device.units)
    count = 1 if quick else 3
    asked = load_of([NEW_TOKENS] * REQUESTS, GAPS_S)
    serve(
        model, FUSED, load_of([4] * REQUESTS, (0.0, 0.0))
    )  # else the first round pays for memory never touched before
    runs = rounds_of(model, WAYS, asked, count)
    allowed = roofline_s(model.spec, device, WAYS["sequential"], asked) / roofline_s(model.spec, device, FUSED, asked)

    rows = [ratio_row("fused over sequential", runs["fused"], runs["sequential"], GOAL_SEQUENTIAL)]
    reached = rows[0].ratio or 0.0
    rows.append(
        harness.Row(
            name="of the ratio the roofline allows",
            ours=reached / allowed,
            unit="",
            goal=GOAL_OF_ROOFLINE,
            note=f"{reached:.2f} of {allowed:.2f}",
        )
    )
    for name, goal in (
        ("dynamic batches of 8", GOAL_DYNAMIC),
        ("8 concurrent instances", GOAL_INSTANCES),
        ("paged", None),
    ):
        rows.append(ratio_row(f"fused over {name}", runs["fused"], runs[name], goal))
    rows.append(latency_row(model))

    lengths = np.random.default_rng(1).integers(LENGTHS[0], LENGTHS[1] + 1, REQUESTS).tolist()
    random = rounds_of(model, REORDERED, load_of(lengths, (0.0, 0.0)), 2 * count + 1)
    rows.append(
        ratio_row("closing holes over leaving them", random["closing holes"], random["leaving holes"], GOAL_REORDER)
    )
    return rows


def latency_row(model: Model) -> harness.Row:
    """Mean latency of 8 requests that are alive together over one alone."""
    together, alone = (
        statistics.mean(answer.latency_s for answer in serve(model, FUSED, load_of([NEW_TOKENS] * n, (0.0, 0.0))))
        for n in (8, 1)
    )
    return harness.Row(
        name="latency with 8 alive over a lone one's", ours=together / alone, unit="x", goal=None, at_most=True
    )


if __name__ == "__main__":
    sys.exit(harness.main(measure, __doc__))
