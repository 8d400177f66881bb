"""Faults by seed, and each kind doing what it says on virtual time."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.core.clock import VirtualClock, simulate_async
from stretto.core.faults import KINDS, BackendCrash, Fault, FaultInjector, draw_faults


@dataclass
class Seen:
    """What came of the calls: (call, outcome, when it came), the works done, the wipes."""

    outcomes: list[tuple[int, str, float]] = field(default_factory=list)
    works: list[float] = field(default_factory=list)
    wipes: list[float] = field(default_factory=list)
    injected: list[Fault] = field(default_factory=list)


def calls(*faults: Fault, count: int = 3, patience: float = 50.0) -> Seen:
    """Call a backend whose work takes 1 s, `count` times, giving up on a call after `patience` seconds."""
    seen = Seen()

    async def main(clock: VirtualClock) -> None:
        injector = FaultInjector(faults, clock)

        async def work() -> str:
            await clock.sleep(1.0)
            seen.works.append(clock.now)
            return "done"

        for number in range(count):
            try:
                async with clock.timeout(patience):
                    outcome = await injector.call(work, lambda: seen.wipes.append(clock.now))
            except BackendCrash:
                outcome = "crash"
            except TimeoutError:
                outcome = "no answer"
            seen.outcomes.append((number, outcome, clock.now))
        seen.injected = injector.injected

    simulate_async(main)
    return seen


def test_without_faults_calls_pass_through() -> None:
    seen = calls()
    assert seen.outcomes == [(0, "done", 1.0), (1, "done", 2.0), (2, "done", 3.0)]
    assert seen.injected == []


def test_crash_wipes_and_raises_and_never_works() -> None:
    fault = Fault(kind="crash", call=1, seconds=0.5)
    seen = calls(fault)
    assert seen.outcomes == [(0, "done", 1.0), (1, "crash", 1.5), (2, "done", 2.5)]
    assert seen.works == [1.0, 2.5]
    assert seen.wipes == [1.5]
    assert seen.injected == [fault]


def test_loss_never_works_and_never_answers() -> None:
    seen = calls(Fault(kind="loss", call=1))
    assert seen.outcomes == [(0, "done", 1.0), (1, "no answer", 51.0), (2, "done", 52.0)]
    assert seen.works == [1.0, 52.0]
    assert seen.wipes == []


def test_stall_works_once_and_never_answers() -> None:
    seen = calls(Fault(kind="stall", call=1))
    assert seen.outcomes == [(0, "done", 1.0), (1, "no answer", 51.0), (2, "done", 52.0)]
    assert seen.works == [1.0, 2.0, 52.0]


def test_duplicate_works_twice() -> None:
    seen = calls(Fault(kind="duplicate", call=1))
    assert seen.outcomes == [(0, "done", 1.0), (1, "done", 3.0), (2, "done", 4.0)]
    assert seen.works == [1.0, 2.0, 3.0, 4.0]


def test_delay_takes_longer_once() -> None:
    seen = calls(Fault(kind="delay", call=1, seconds=0.25))
    assert seen.outcomes == [(0, "done", 1.0), (1, "done", 2.25), (2, "done", 3.25)]


def test_slow_takes_longer_for_its_span() -> None:
    slow = Fault(kind="slow", call=1, seconds=0.25, span=2)
    seen = calls(slow, count=4)
    assert [at for _, _, at in seen.outcomes] == [1.0, 2.25, 3.5, 4.5]
    assert seen.injected == [slow, slow]


def test_calls_are_numbered_as_they_begin() -> None:
    async def main(clock: VirtualClock) -> list[object]:
        injector = FaultInjector((Fault(kind="crash", call=1),), clock)

        async def work() -> float:
            await clock.sleep(1.0)
            return clock.now

        both = asyncio.gather(*(injector.call(work, lambda: None) for _ in range(3)), return_exceptions=True)
        return list(await both)

    first, second, third = simulate_async(main)
    assert (first, third) == (1.0, 1.0)
    assert isinstance(second, BackendCrash)


@given(st.integers(0, 2**63 - 1), st.integers(0, 12))
def test_a_seed_draws_one_plan_on_distinct_calls(seed: int, count: int) -> None:
    faults = draw_faults(seed, count=count, calls=12, seconds=3.0)
    assert faults == draw_faults(seed, count=count, calls=12, seconds=3.0)
    numbers = [fault.call for fault in faults]
    assert len(numbers) == count
    assert numbers == sorted(set(numbers))
    assert all(0 <= fault.call < 12 and 0 <= fault.seconds < 3.0 for fault in faults)


def test_seeds_draw_different_plans_of_all_kinds() -> None:
    plans = {draw_faults(seed, count=5, calls=100, seconds=1.0) for seed in range(50)}
    assert len(plans) == 50
    assert {fault.kind for plan in plans for fault in plan} == set(KINDS)
    assert {f.kind for f in draw_faults(1, count=9, calls=9, seconds=1.0, kinds=("loss",))} == {"loss"}


def test_more_faults_than_calls_are_refused() -> None:
    with pytest.raises(ValueError, match="count is 4"):
        draw_faults(0, count=4, calls=3, seconds=1.0)


@pytest.mark.parametrize(
    ("kind", "call", "seconds", "span"), [("melt", 0, 0, 1), ("loss", -1, 0, 1), ("delay", 0, -1, 1), ("slow", 0, 0, 0)]
)
def test_impossible_faults_are_refused(kind: str, call: int, seconds: float, span: int) -> None:
    with pytest.raises(ValueError, match="fault: "):
        Fault(kind=kind, call=call, seconds=seconds, span=span)
