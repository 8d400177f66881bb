"""A recorded trace through the engine on the real clock and on virtual time: every step is decided alike.

On the real clock requests come as they did, so many times as fast and never more than 40 at a time, in front of a
simulated backend that takes no seconds: every step is handed out and heard of by itself, and arrivals fall where the
machine lets them. On virtual time each step takes a second and arrivals come during the step in which they came before;
decisions there reach to the next shortage of pages (`horizon: shortage`) and are cut short by arrivals. Both runs are
expanded to single steps, each with its prompt chunks, its rows, the pages that each row has in use and who was put
back, and compared. Beside that the log of the real run is replayed on a fresh scheduler, decision by decision.

Usage: python benchmarks/replay_trace.py [--data FILE] [--decisions 100000] [--speed 100] [--json] [--quick]
FILE is a trace in any format of `stretto.serve.deploy.traces`; without it, a chat's lengths are drawn.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import harness
from harness import Row
from stretto.core.clock import Clock, RealClock, VirtualClock, simulate_async
from stretto.core.eventlog import Entry, EventLog, replay
from stretto.core.record import Recorder
from stretto.serve.deploy.drawn import load_of
from stretto.serve.deploy.job import LoadSpec
from stretto.serve.deploy.load import Load
from stretto.serve.engine import Engine
from stretto.serve.request import Request
from stretto.serve.scheduler import Scheduler
from stretto.serve.scheduler_config import SchedulerConfig
from stretto.serve.simulated import SimulatedBackend

AT_ONCE = 40
PAGE_TOKENS = 16
CHAT = LoadSpec(requests=45_000, rate_per_s=5.0, prompt_tokens=120, output_tokens=40, spread=1.0, seed=5)
Step = tuple[Any, ...]


def config_of(load: Load) -> SchedulerConfig:
    """Sixteen slots over so few pages that requests are put back, where lengths are mixed."""
    return SchedulerConfig(
        joining="continuous",
        slots=16,
        pages=-(-load.longest // PAGE_TOKENS) + 4 * round(float((load.prompt + load.output).mean()) / PAGE_TOKENS),
        page_tokens=PAGE_TOKENS,
        prefill_tokens=512,
        prefix_cache=bool(load.prefixes),
    )


class Evenly:
    """Every pass takes so many seconds."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    def prefill_s(self, chunks: Sequence[tuple[int, int]], decode_contexts: Sequence[int]) -> float:
        return self._seconds

    def decode_s(self, contexts: Sequence[int], steps: int) -> list[float]:
        return [self._seconds] * steps

    def move_s(self, positions: int) -> float:
        return 0.0


async def at_once(seconds: float, chunks: Sequence[tuple[int, int]], contexts: Sequence[int]) -> None:
    """A pass on a device that takes no seconds, but lets others speak."""
    await asyncio.sleep(0)


def engine_of(load: Load, config: SchedulerConfig, clock: Clock, log: EventLog, step_s: float) -> Engine:
    lengths, prompts = dict(enumerate(load.output.tolist())), dict(enumerate(load.prompt.tolist()))
    shared = None if clock.is_virtual else at_once
    backend = SimulatedBackend(Evenly(step_s), clock, lengths, prompts, shared=shared)
    return Engine(Scheduler(config), backend, clock, Recorder("replay"), log=log)


def request_of(load: Load, number: int) -> Request:
    prompt = load.tokens(number, range(100, 1100)) if load.prefixes else (0,) * int(load.prompt[number])
    return Request(id=number, prompt=prompt, limit=int(load.output[number]))


def on_the_real_clock(load: Load, config: SchedulerConfig, decisions: int, speed: float) -> EventLog:
    """The log of a run that ends its arrivals after so many decisions."""

    async def main() -> EventLog:
        clock, log = RealClock(), EventLog()
        engine = engine_of(load, config, clock, log, 0.0)
        running = asyncio.ensure_future(engine.run())
        for number, arrival in enumerate((load.arrival_s / speed).tolist()):
            while arrival > clock.now or engine.live >= AT_ONCE:
                await asyncio.sleep(0)
            if len(log) >= decisions:
                break
            engine.submit(request_of(load, number))
        engine.close()
        await running
        return log

    return asyncio.run(main())


def arrivals_of(log: EventLog) -> list[tuple[float, int]]:
    """(second, request) of a run whose steps take a second each, in which requests come during the same steps."""
    found, now = [], 0.0
    for entry in log:
        ran = sum(event["steps"] for event in entry.events if event["type"] == "ran")
        came = [event["id"] for event in entry.events if event["type"] == "arrive"]
        now += ran
        if came and not ran:  # nothing ran: the engine was idle, and begins when they come
            now += 0.5
        found += [(now - 0.5 if ran else now, request) for request in came]
    return found


def on_virtual_time(load: Load, config: SchedulerConfig, arrivals: Sequence[tuple[float, int]]) -> EventLog:
    async def main(clock: VirtualClock) -> EventLog:
        log = EventLog()
        engine = engine_of(load, config, clock, log, 1.0)
        running = asyncio.ensure_future(engine.run())
        for second, request in arrivals:
            if second > clock.now:
                await clock.sleep(second - clock.now)
            engine.submit(request_of(load, request))
        engine.close()
        await clock.wait(running, "the engine")
        return log

    return simulate_async(main)


@dataclass
class Expansion:
    """A log as single steps: (prompt chunks, put back, rows that decode, the pages that each has in use)."""

    page_tokens: int
    lengths: dict[int, int] = field(default_factory=dict)
    tables: dict[int, list[int]] = field(default_factory=dict)

    def steps(self, log: EventLog) -> Iterator[Step]:
        entries = list(log)
        for entry, after in zip_longest(entries, entries[1:]):
            self._take(entry)
            if entry.decision["idle_until"] is not None:
                continue
            events = after.events if after is not None else log._waiting
            ran = next(event for event in events if event["type"] == "ran")
            yield from self._expand(entry.decision, ran["steps"])
            for request in ran["finished"]:
                del self.lengths[request], self.tables[request]

    def _take(self, entry: Entry) -> None:
        for event in entry.events:
            if event["type"] == "arrive":
                self.lengths[event["id"]] = event["prompt"]
        for request in entry.decision["preempted"]:
            self.tables.pop(request, None)  # it may not have held any yet
        for request, new in entry.decision["pages"]:
            self.tables.setdefault(request, []).extend(new)

    def _expand(self, decision: dict[str, Any], steps: int) -> Iterator[Step]:
        rows = decision["decode"]
        for step in range(steps):
            first = (decision["prefill"], decision["preempted"]) if not step else ([], [])
            pages = [self.tables[r][: -(-(self.lengths[r] + step) // self.page_tokens)] for r in rows]
            yield (*first, rows, pages)
        for chunk, _, _, last in decision["prefill"]:
            self.lengths[chunk] += last
        for request in rows:
            self.lengths[request] += steps
            if steps < decision["steps"]:  # what was lent for later steps goes back
                del self.tables[request][-(-(self.lengths[request] - 1) // self.page_tokens) :]


@dataclass(frozen=True, kw_only=True)
class Found:
    """What two runs of one trace had in common."""

    requests: int
    decisions: int
    virtual_decisions: int
    steps: int
    different: int
    replayed_differently: int
    put_back: int
    cached: int
    real_s: float
    virtual_s: float


def compare(load: Load, decisions: int, speed: float) -> Found:
    """Both runs of the first requests of `load`, enough for so many decisions, and what differs."""
    config = config_of(load)
    began = time.perf_counter()
    real = on_the_real_clock(load, config, decisions, speed)
    middle = time.perf_counter()
    arrivals = arrivals_of(real)
    virtual = on_virtual_time(load, replace(config, horizon="shortage"), arrivals)
    ended = time.perf_counter()
    steps = different = 0
    for mine, other in zip_longest(
        Expansion(PAGE_TOKENS).steps(real), Expansion(PAGE_TOKENS).steps(virtual), fillvalue=None
    ):
        steps += 1
        different += mine != other
    scheduler = Scheduler(config)
    again = replay(real, scheduler)
    cached = {c[0]: c[1] for entry in reversed(list(real)) for c in reversed(entry.decision["prefill"])}
    return Found(
        requests=len(arrivals),
        decisions=len(real),
        virtual_decisions=len(virtual),
        steps=steps,
        different=different,
        replayed_differently=len(again.different),
        put_back=scheduler.preemptions,
        cached=sum(cached.values()),
        real_s=middle - began,
        virtual_s=ended - middle,
    )


def measure(quick: bool) -> list[Row]:
    wanted = 2000 if quick else harness.options.decisions
    data = harness.options.data
    load = load_of(CHAT if data is None else LoadSpec(trace=str(data)))
    found = compare(load, wanted, harness.options.speed)
    note = f"{found.requests} requests of {data.name if data else 'a drawn chat'}, {found.put_back} times put back"
    note += f", {found.cached} prompt tokens cached" if load.prefixes else ""
    taken = f"in {found.real_s:.0f} s on the real clock"
    taken += f", {found.virtual_decisions} in {found.virtual_s:.0f} s on virtual time"
    return [
        Row(name="decisions on the real clock", ours=found.decisions, unit="", goal=wanted, note=f"{note}; {taken}"),
        Row(name="steps that were compared", ours=found.steps, unit="", goal=found.decisions),
        Row(name="steps that differ on virtual time", ours=found.different, unit="", goal=0, at_most=True),
        Row(name="decisions that differ in a replay", ours=found.replayed_differently, unit="", goal=0, at_most=True),
    ]


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, help="a trace; drawn if left out")
    parser.add_argument("--decisions", type=int, default=100_000, help="so many decisions are taken at least")
    parser.add_argument("--speed", type=float, default=100.0, help="how many times as fast as recorded requests come")


if __name__ == "__main__":
    sys.exit(harness.main(measure, __doc__ or "", add=add))
