"""One trace through the engine on the real clock and on the virtual one: every decision is the same.

The real run's events, with the instants that the real clock gave them, are its log; the scheduler that replays them
on no clock at all must decide alike, and so must an engine that meets them on virtual time.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stretto.core.clock import RealClock
from stretto.core.eventlog import EventLog, replay
from stretto.core.record import Recorder
from stretto.serve.backend import Pass, PassResult
from stretto.serve.deploy.drawn import load_of
from stretto.serve.deploy.job import LoadSpec
from stretto.serve.lane_engine import engine_of
from stretto.serve.lanes import scheduler_of
from stretto.serve.request import Request
from stretto.serve.scheduler_config import SchedulerConfig

from .worlds import config

ROOT = Path(__file__).parents[3]
CHAT = LoadSpec(requests=1, rate_per_s=1.0, prompt_tokens=120, output_tokens=40, spread=1.0, seed=5)
"""Lengths as a chat's: most are short, a few are long."""


class Instant:
    """A backend that answers at once, a step at a time."""

    steps_at_once = 1

    def __init__(self, clock: RealClock) -> None:
        self._clock = clock

    async def run(self, work: Pass, steps: int, news: asyncio.Event) -> PassResult:
        await asyncio.sleep(0)
        now = self._clock.now
        yields = [row for row in (*work.prefill, *work.decode) if row.sampling is not None]
        return PassResult(tokens={row.id: (7,) for row in yields}, spans_s=((now, now),))

    def wipe(self) -> None:
        """Nothing is held."""

    def forget(self, ids: Iterable[int]) -> None:
        """Likewise."""


def on_the_real_clock(requests: int, settings: SchedulerConfig) -> EventLog:
    """Requests come as fast as earlier ones leave, never more than 40 at a time."""
    load = load_of(LoadSpec(**{**{n: getattr(CHAT, n) for n in CHAT.__dataclass_fields__}, "requests": requests}))

    async def main() -> EventLog:
        clock, log = RealClock(), EventLog()
        engine = engine_of(settings, Instant(clock), clock, Recorder("measured"), log=log)
        task = asyncio.ensure_future(engine.run())
        for i in range(requests):
            while engine.live >= 40:
                await asyncio.sleep(0)
            prompt, limit = (0,) * min(1000, int(load.prompt[i])), min(500, int(load.output[i]))
            engine.submit(Request(id=i, prompt=prompt, limit=limit))
        engine.close()
        await task
        return log

    return asyncio.run(main())


def compare(requests: int, **changes: Any) -> int:
    settings = config(slots=16, pages=400, page_tokens=4, prefill_tokens=256, **changes)
    log = on_the_real_clock(requests, settings)
    again = replay(log, scheduler_of(settings))
    assert again.equal, again.different[:1]
    assert any(entry.decision["preempted"] for entry in log)
    return len(log)


@pytest.mark.parametrize("prefill", ["whole", "mixed", "lanes"])
@pytest.mark.parametrize("horizon", ["page", "shortage"])
def test_two_thousand_decisions_are_equal_on_both_clocks(prefill: str, horizon: str) -> None:
    assert compare(1200, prefill=prefill, horizon=horizon) >= 2000


@pytest.mark.slow
@pytest.mark.parametrize("prefill", ["mixed", "lanes"])
def test_a_hundred_thousand_decisions_are_equal_on_both_clocks(prefill: str) -> None:
    assert compare(45_000, prefill=prefill, horizon="page") >= 100_000


@pytest.mark.parametrize("shared", [False, True], ids=["alone", "shared prefixes"])
def test_a_recorded_trace_is_decided_alike_on_both_clocks(
    shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps of both runs, one by one, as the benchmark compares them; the file is drawn, in Mooncake's form."""
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import replay_trace

    drawn = load_of(replace(CHAT, requests=300))
    lines = []
    for i in range(len(drawn)):
        fields = {"timestamp": 1e3 * drawn.arrival_s[i], "input_length": int(drawn.prompt[i])}
        hashes = [i % 3 + 10 * k for k in range(-(-int(drawn.prompt[i]) // 512))] if shared else []
        lines.append(json.dumps({**fields, "output_length": int(drawn.output[i]), "hash_ids": hashes}) + "\n")
    (tmp_path / "recorded.jsonl").write_text("".join(lines))
    load = load_of(LoadSpec(trace=str(tmp_path / "recorded.jsonl")))
    found = replay_trace.compare(load, 500, speed=1e9)
    assert found.decisions >= 500
    assert found.steps >= found.decisions > found.virtual_decisions
    assert (found.different, found.replayed_differently) == (0, 0)
    assert found.put_back > 0 or shared
    assert (found.cached > 0) == shared
    other = replay_trace.Expansion(16)
    log = replay_trace.on_the_real_clock(load, replay_trace.config_of(load), 50, 1e9)
    steps = list(other.steps(log))
    assert all(len(set(map(tuple, pages))) == len(rows) for _, _, rows, pages in steps)
