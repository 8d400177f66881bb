"""Deployments on this machine: what is measured is what is played, and a load is served as it was asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import numpy as np
import pytest

from stretto.core.clock import RealClock
from stretto.core.record import Recorder
from stretto.serve.backend import Pass, PassResult
from stretto.serve.deploy.costs import Lane
from stretto.serve.deploy.here import CONTEXTS, PROMPTS, ROWS, Here, MeasuredCosts, started
from stretto.serve.deploy.layout import Layout
from stretto.serve.deploy.load import Load
from stretto.serve.deploy.simulate import serve
from stretto.serve.engine import Engine
from stretto.serve.scheduler import Scheduler

from .worlds import config, drawn, load

COSTS = MeasuredCosts(
    layout=Layout(),
    decode=((1, 0.010, 1e-6), (5, 0.014, 2e-6)),
    prompts=((10, 0.020), (110, 0.120)),
)
SETTINGS = config(pages=80, slots=12, prefill_tokens=512)


def test_tables_are_read_between_their_points_and_beyond() -> None:
    def seconds(**fields: int | float | bool) -> float:
        return COSTS.stage([Lane(**fields)]).total  # type: ignore[arg-type]

    assert seconds(rows=3, decoders=3, cached=1000) == pytest.approx(0.012 + 1000 * 1.5e-6)
    assert seconds(rows=60, eager=True) == pytest.approx(0.070)
    assert seconds(rows=210, eager=True) == pytest.approx(0.220)
    assert seconds(rows=60, eager=True, prompt_s=0.5) == pytest.approx(0.570)
    assert seconds() == 0.0
    assert COSTS.prompt_attention_s(10, 100) == pytest.approx(1e-3)
    assert COSTS.copy_s(0) == 0.0


def test_the_mean_of_two_measurements() -> None:
    twice = MeasuredCosts(
        layout=Layout(),
        decode=tuple((rows, 3 * base, 3 * each) for rows, base, each in COSTS.decode),
        prompts=tuple((tokens, 3 * seconds) for tokens, seconds in COSTS.prompts),
    )
    mean = COSTS.mean(twice)
    assert [base for _, base, _ in mean.decode] == pytest.approx([0.020, 0.028])
    assert [seconds for _, seconds in mean.prompts] == pytest.approx([0.040, 0.240])


def test_measured_costs_are_played_like_modelled_ones() -> None:
    requests = load([0.0], [60], [11])
    served = serve(requests, COSTS, SETTINGS)
    assert served.first_s[0] == pytest.approx(0.070)
    steps = sum(0.010 + (61 + k) * 1e-6 for k in range(10))
    assert served.finished_s[0] - served.first_s[0] == pytest.approx(steps)


class Sleeping:
    """A backend that takes 2 ms a pass and a tenth of one for each row."""

    steps_at_once = 1

    def __init__(self, clock: RealClock) -> None:
        self._clock = clock

    async def run(self, work: Pass, steps: int, news: asyncio.Event) -> PassResult:
        start = self._clock.now
        rows = len(work.decode) + sum(len(row.tokens) for row in work.prefill)
        await asyncio.sleep(0.002 + 1e-4 * rows)
        yields = [row for row in (*work.prefill, *work.decode) if row.sampling is not None]
        return PassResult(tokens={row.id: (7,) for row in yields}, spans_s=((start, self._clock.now),))

    def wipe(self) -> None:
        """Nothing is held."""

    def forget(self, ids: Iterable[int]) -> None:
        """Likewise."""


async def with_engines(copies: int, requests: Load) -> tuple[MeasuredCosts, np.ndarray, Here]:  # type: ignore[type-arg]
    clock = RealClock()
    engines = [Engine(Scheduler(SETTINGS), Sleeping(clock), clock, Recorder("measured")) for _ in range(copies)]
    running = [asyncio.ensure_future(engine.run()) for engine in engines]
    here = Here(Layout(replicas=copies), engines, clock)
    found = await here.measure(repeats=1)
    served = await here.serve(requests)
    for engine in engines:
        engine.close()
    await asyncio.gather(*running)
    return found, served.first_s - requests.arrival_s, here


@pytest.mark.parametrize("copies", [1, 2])
def test_a_load_is_served_on_all_copies_and_passes_are_timed(copies: int) -> None:
    requests = drawn(1, 12, gap_s=0.01, prompt=30, output=6)
    found, first, here = asyncio.run(with_engines(copies, requests))
    assert [rows for rows, _, _ in found.decode] == list(ROWS)
    assert [tokens for tokens, _ in found.prompts] == list(PROMPTS)
    assert all(seconds > 0.002 + 1e-4 * tokens for tokens, seconds in found.prompts)
    assert all(base + each * rows * CONTEXTS[0] > 0.002 for rows, base, each in found.decode)
    assert (first > 0).all()
    assert all(engine.finished == sum(ROWS) * 2 + len(PROMPTS) + 12 // copies for engine in here.engines)
    for engine in here.engines:
        engine.scheduler.audit()
        assert engine.scheduler.pool.held == 0


@pytest.mark.slow
def test_two_ranks_serve_a_load() -> None:
    async def main() -> int:
        async with started("smollm2-135m-instruct", Layout(devices=2), SETTINGS) as here:
            requests = drawn(2, 4, gap_s=0.1, prompt=20, output=5)
            served = await here.serve(requests)
            assert (served.finished_s >= served.first_s).all()
            return here.engines[0].finished

    assert asyncio.run(main()) == 4
