"""The meter: rates from whole seconds, predictions from the tables, progress, and passes that raise."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import pytest

from stretto.core.clock import VirtualClock, simulate_async
from stretto.core.faults import BackendCrash
from stretto.hardware import catalog
from stretto.models.load import Model
from stretto.serve.backend import Pass, PassResult, Row
from stretto.serve.http.meter import HISTORY_S, Meter
from stretto.serve.predict import PassCosts
from stretto.serve.sampling import Sampling

from .conftest import running


class Timed:
    """A backend whose passes take 0.25 s; a pass without rows breaks."""

    steps_at_once = 4

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock

    async def run(self, work: Pass, steps: int, news: asyncio.Event) -> PassResult:
        start = self._clock.now
        await self._clock.sleep(0.25 * steps)
        rows = (*work.prefill, *work.decode)
        if not rows:
            raise ZeroDivisionError
        spans = tuple((start + 0.25 * i, start + 0.25 * (i + 1)) for i in range(steps))
        return PassResult(tokens={row.id: (7,) * steps for row in rows if row.sampling}, spans_s=spans)

    def wipe(self) -> None: ...

    def forget(self, ids: Iterable[int]) -> None: ...


def row(number: int, tokens: int, start: int) -> Row:
    return Row(id=number, tokens=(1,) * tokens, start=start, table=(0,), sampling=Sampling(), position=start + tokens)


def on_virtual_time(story: Any) -> Any:
    async def main(clock: VirtualClock) -> Any:
        seen: list[tuple[int, int]] = []
        meter = Meter(Timed(clock), clock, on_step=lambda prompt, new: seen.append((prompt, new)))
        return await story(clock, meter, seen)

    return simulate_async(main)


def test_rates_and_history_count_whole_seconds() -> None:
    async def story(clock: VirtualClock, meter: Meter, seen: list[tuple[int, int]]) -> None:
        news = asyncio.Event()
        await meter.run(Pass(step=0, prefill=(row(0, 12, 0),), decode=(row(1, 1, 5),)), 1, news)
        for step in range(1, 9):
            await meter.run(Pass(step=step, prefill=(), decode=(row(0, 1, 12), row(1, 1, 6))), 1, news)
        assert clock.now == pytest.approx(2.25)
        assert seen == [(12, 2)] + [(0, 2)] * 8
        assert meter.history()[-2:] == [(12, 6), (0, 8)]
        assert meter.rates(2) == (6.0, 7.0)
        await clock.sleep(10)
        assert meter.rates(10) == (0.0, 0.4)
        await clock.sleep(HISTORY_S + 1)
        assert meter.history() == [(0, 0)] * HISTORY_S

    on_virtual_time(story)


def test_progress_is_the_end_of_a_pass_or_the_end_of_idleness() -> None:
    async def story(clock: VirtualClock, meter: Meter, seen: list[tuple[int, int]]) -> None:
        await clock.sleep(5)
        meter.begin()
        assert meter.progressed_s == 5
        await meter.run(Pass(step=0, prefill=(), decode=(row(0, 1, 3),)), 4, asyncio.Event())
        assert meter.progressed_s == 6
        assert meter.steps_done == 4
        assert [step.contexts for step, _ in meter.recent()] == [(3,), (4,), (5,), (6,)]
        assert all(predicted is None for _, predicted in meter.recent())

    on_virtual_time(story)


def test_a_pass_that_raises_is_a_crash_of_the_backend() -> None:
    async def story(clock: VirtualClock, meter: Meter, seen: list[tuple[int, int]]) -> None:
        with pytest.raises(BackendCrash):
            await meter.run(Pass(step=0, prefill=(), decode=()), 1, asyncio.Event())
        assert meter.progressed_s == 0
        assert seen == []

    on_virtual_time(story)


def test_passes_are_predicted_from_the_tables(tiny: Model) -> None:
    costs = PassCosts(tiny.spec, catalog.device("a40"), "fp32", None)

    async def main(clock: VirtualClock) -> None:
        meter = Meter(Timed(clock), clock, costs=costs)
        await meter.run(Pass(step=0, prefill=(row(0, 12, 4),), decode=(row(1, 1, 5),)), 1, asyncio.Event())
        await meter.run(Pass(step=1, prefill=(), decode=(row(1, 1, 6),)), 1, asyncio.Event())
        found = [predicted for _, predicted in meter.recent()]
        assert found == [costs.prefill_s([(12, 4)], [5]), costs.decode_s([6], 1)[0]]
        assert all(step.seconds == pytest.approx(0.25) for step, _ in meter.recent())

    simulate_async(main)


def test_the_live_view_lays_predictions_beside_measurements(chat_model: Model) -> None:
    costs = PassCosts(chat_model.spec, catalog.device("a40"), "fp32", None)
    with running(chat_model, costs=costs) as server, server.client() as client:
        client.post("/v1/completions", json={"prompt": "abc", "max_tokens": 5, "ignore_eos": True})
        passes = client.get("/v1/stretto/live").json()["passes"]
        assert len(passes) == 5
        assert all(one["ms"] > 0 and one["predicted_ms"] > 0 for one in passes)
        assert [one["prefill"] for one in passes] == [True] + [False] * 4
