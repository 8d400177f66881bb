"""Streams that decode while long prompts arrive: prompts in the streams' passes, in small chunks of them, or in a lane.

Four streams of SmolLM2-135M decode; when they are under way, prompts of 1,024 tokens arrive one after another, each of
which wants one token. Three ways of the same engine on the same cores: up to 512 tokens of prompts in a pass (the
default), chunks of 64, and two lanes (Nexus, Shi et al., 2025) on half of the cores each. Told are the gaps between two
tokens of a stream while prompts are computed, and the time to a prompt's token. Ways are run in turn, round by round.

Usage: python benchmarks/two_lanes.py [--json] [--quick]
"""

from __future__ import annotations

import asyncio
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

import harness
from stretto.core.clock import RealClock
from stretto.models.load import Model
from stretto.serve.request import Answer, Request
from stretto.serve.settings import EngineSettings, load, new_backend, new_engine

STREAMS, STREAM_TOKENS = 4, 400
PROMPTS, PROMPT_TOKENS, GAP_S = 6, 1024, 1.0
GOAL = 2.0
"""By how much lanes shorten the 95th percentile of the gaps, at least, beside the default."""
BASE = EngineSettings(path="bf16", dtype="bf16", slots=STREAMS + 2, max_model_len=2048, prefix_cache=False)
WAYS = {
    "512 tokens in the streams' passes": replace(BASE, prefill_tokens=512),
    "chunks of 64": replace(BASE, prefill_tokens=64),
    "two lanes": replace(BASE, prefill_tokens=512, prefill="lanes"),
}


@dataclass(frozen=True)
class Seen:
    """Seconds between two tokens of a stream while prompts were there, and to the tokens of the prompts."""

    gaps: Sequence[float]
    firsts: Sequence[float]

    @property
    def late_gap(self) -> float:
        return float(np.quantile(self.gaps, 0.95))

    @property
    def first(self) -> float:
        return statistics.median(self.firsts)


def ids(count: int, seed: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng(seed).integers(100, 1100, count).tolist())


def run(model: Model, how: EngineSettings) -> Seen:
    async def main() -> tuple[list[Answer], list[Answer]]:
        clock = RealClock()
        engine = new_engine(model, how, new_backend(model, how, clock), clock)
        running = asyncio.ensure_future(engine.run())
        streams = [engine.submit(Request(id=i, prompt=ids(32, i), limit=STREAM_TOKENS)) for i in range(STREAMS)]
        while not all(handle.times_s for handle in streams):
            await asyncio.sleep(0.005)
        prompts = []
        for number in range(STREAMS, STREAMS + PROMPTS):
            prompts.append(engine.submit(Request(id=number, prompt=ids(PROMPT_TOKENS, number), limit=1)))
            await asyncio.wait([asyncio.ensure_future(prompts[-1].answer())], timeout=GAP_S)
        for handle in prompts:
            await handle.answer()
        engine.cancel_all()
        engine.close()
        await running
        return [handle.result() for handle in streams], [handle.result() for handle in prompts]

    streams, prompts = asyncio.run(main())
    spans = [(answer.arrived_s, answer.finished_s) for answer in prompts]
    gaps = [
        b - a
        for answer in streams
        for a, b in pairwise(answer.token_times_s)
        if any(a < finish and start < b for start, finish in spans)
    ]
    firsts = [answer.first_token_s - answer.arrived_s for answer in prompts if answer.first_token_s is not None]
    return Seen(gaps, firsts)


def measure(quick: bool) -> Sequence[harness.Row]:
    model = load(BASE)
    found: dict[str, list[Seen]] = {}
    for _ in range(1 if quick else 5):
        for name, how in WAYS.items():
            found.setdefault(name, []).append(run(model, how))
    default = next(iter(WAYS))
    return list(rows(default, found))


def rows(default: str, found: dict[str, list[Seen]]) -> Sequence[harness.Row]:
    middle = {
        name: {what: statistics.median(getattr(each, what) for each in seen) for what in ("late_gap", "first")}
        for name, seen in found.items()
    }
    table = []
    for name in WAYS:
        if name == default:
            continue
        for what, said in (("late_gap", "gap of a stream, 95th percentile"), ("first", "a prompt's token, median")):
            ours, theirs = middle[name][what], middle[default][what]
            times = [getattr(each, what) for each in found[name]]
            table.append(
                harness.Row(
                    name=f"{name}: {said}",
                    ours=ours * 1e3,
                    peer=theirs * 1e3,
                    ratio=theirs / ours,
                    unit="ms",
                    goal=GOAL if name == "two lanes" and what == "late_gap" else None,
                    spread=(max(times) - min(times)) / ours,
                    note=f"beside {default}; ratio is how many times shorter",
                )
            )
    return table


if __name__ == "__main__":
    sys.exit(harness.main(measure, __doc__))
