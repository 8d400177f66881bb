"""Simulation: laws that hold on every graph, agreement with a naive twin, and cases worked out by hand."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.core.fluid import CoRunTable
from stretto.core.schedule import Schedule
from stretto.core.simulate import OutOfMemory, simulate
from stretto.core.timed import Timed, Use
from stretto.core.trace import Key, Trace

from .oracles import EventSimulator


def insertion(rng: random.Random, held: list[list[int]], ordered: set[int]) -> list[int]:
    """An order of insertion that keeps that of each lane and no other: dependencies may point forward."""
    waiting, order = list(range(len(held))), []
    while waiting:
        free = [
            task
            for at, task in enumerate(waiting)
            if not any(ordered & set(held[task]) & set(held[before]) for before in waiting[:at])
        ]
        order.append(rng.choice(free))
        waiting.remove(order[-1])
    return order


def random_timed(seed: int, *, size: int, pools: bool, sharing: bool) -> Timed:
    """A random graph without cycles: all follows a hidden order, from which that of the ids differs."""
    rng = random.Random(seed)
    schedule = Schedule()
    lanes = [schedule.lane(f"lane {at}") for at in range(rng.randint(1, 4))]
    ordered = set(lanes)
    if pools:
        lanes += [schedule.pool(f"pool {at}", rng.randint(1, 3), rng.random() < 0.5) for at in range(rng.randint(1, 3))]
    lengths = [0.0, 1.0, 2.0] if not sharing and rng.random() < 0.5 else [0.0, rng.random(), 1 + rng.random()]
    counts = [1] if rng.random() < 0.4 else [0, 1, 1, 1, min(2, len(lanes)), len(lanes)]
    held = [rng.sample(lanes, rng.choice(counts)) for _ in range(size)]
    order = insertion(rng, held, ordered)
    number = {task: at for at, task in enumerate(order)}
    for at, task in enumerate(order):
        schedule.add(
            held[task],
            seconds=rng.choice([0.0, rng.uniform(0.2, 3), rng.uniform(1, 2)] if sharing else lengths),
            after=[number[before] for before in rng.sample(range(task), min(task, rng.choice([0, 0, 1, 2, 3])))],
            key=Key(rng.choice("pq"), step=at),
            priority=rng.randint(0, 2),
        )
    schedule.validate()
    if not sharing:
        return schedule.timed()
    draws = [(task, rng.randrange(3), rng.uniform(0.1, 2)) for task in range(size) for _ in range(rng.randint(0, 3))]
    columns = tuple(zip(*draws, strict=True)) or ((), (), ())
    use = Use(task=columns[0], resource=columns[1], amount=columns[2])
    capacity = {f"r{at}": rng.uniform(0.5, 2) for at in range(3)}
    return schedule.timed(use=use, capacity=capacity, weight=[rng.choice([1.0, 2.0]) for _ in range(size)])


def by_task(trace: Trace) -> dict[int, tuple[float, float]]:
    """Start and finish of each task (its key's step); all of its spans must agree."""
    spans = trace.spans
    found: dict[int, tuple[float, float]] = {}
    for task, start, finish in zip(spans.step.tolist(), spans.start.tolist(), spans.finish.tolist(), strict=True):
        assert found.setdefault(task, (start, finish)) == (start, finish)
    return found


def check_laws(timed: Timed, trace: Trace) -> None:
    times = by_task(trace)
    assert sorted(times) == list(range(len(timed)))
    assert trace.overlaps() == []
    for task, (start, _) in times.items():
        assert all(times[before][1] <= start for before in timed.after.row(task))
    for lane in np.flatnonzero(timed.widths == 0):
        program = timed.holds.owner[timed.holds.values == lane]
        assert all(times[a][1] <= times[b][0] for a, b in itertools.pairwise(program))
    chain = trace.critical_path
    assert all(a.finish == b.start for a, b in itertools.pairwise(chain))
    assert chain[0].start == 0
    assert chain[-1].finish == trace.makespan
    assert sum(span.finish - span.start for span in chain) == pytest.approx(trace.makespan, abs=1e-12)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 30), st.booleans())
def test_without_sharing_it_equals_the_naive_simulator(seed: int, size: int, pools: bool) -> None:
    timed = random_timed(seed, size=size, pools=pools, sharing=False)
    trace = simulate(timed)
    check_laws(timed, trace)
    twin = EventSimulator(timed).run()
    for task, (start, finish) in by_task(trace).items():
        assert (start, finish) == (twin.start[task], twin.finish[task])
        assert finish == start + timed.seconds[task]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 18), st.booleans())
def test_with_sharing_it_agrees_with_the_naive_simulator(seed: int, size: int, pools: bool) -> None:
    timed = random_timed(seed, size=size, pools=pools, sharing=True)
    trace = simulate(timed)
    check_laws(timed, trace)
    twin = EventSimulator(timed).run()
    for task, (start, finish) in by_task(trace).items():
        assert (start, finish) == pytest.approx((twin.start[task], twin.finish[task]), rel=1e-7, abs=1e-7)
        assert finish - start >= timed.seconds[task] - 1e-9


def test_lanes_alone_and_an_event_loop_without_need_agree() -> None:
    plain = random_timed(11, size=200, pools=False, sharing=False)
    schedule = Schedule()
    for name in plain.lanes:
        schedule.lane(name)
    schedule.pool("idle")
    for task in range(len(plain)):
        key = plain.key(task)
        schedule.add(plain.holds.row(task), seconds=float(plain.seconds[task]), after=plain.after.row(task), key=key)
    assert by_task(simulate(plain)) == by_task(simulate(schedule.timed()))


def test_two_runs_are_equal_and_do_not_disturb_each_other() -> None:
    one, other = (random_timed(seed, size=120, pools=True, sharing=True) for seed in (1, 2))
    first, _, again = simulate(one), simulate(other), simulate(one)
    for column in ("lane", "start", "finish", "task"):
        assert np.array_equal(getattr(first.spans, column), getattr(again.spans, column))
    assert np.array_equal(first.critical, again.critical)


def test_lanes_inserted_one_by_one_with_forward_dependencies() -> None:
    schedule = Schedule()
    lanes = [schedule.lane(name) for name in "ab"]
    # Lane a: 0 1 2, each waiting for one of lane b: 3 4 5, which wait for the one of a before.
    for at in range(3):
        schedule.add(lanes[:1], seconds=1.0, after=(3 + at,), key=Key("t", at))
    for at in range(3):
        schedule.add(lanes[1:], seconds=2.0, after=(at - 1,) if at else (), key=Key("t", 3 + at))
    trace = simulate(schedule.timed())
    assert by_task(trace) == {3: (0, 2), 0: (2, 3), 4: (3, 5), 1: (5, 6), 5: (6, 8), 2: (8, 9)}
    assert [span.key.step for span in trace.critical_path] == [3, 0, 4, 1, 5, 2]


def test_a_collective_holds_its_lanes_together() -> None:
    schedule = Schedule()
    lanes = [schedule.lane(name) for name in "abc"]
    for lane, seconds in zip(lanes, (1.0, 5.0, 2.0), strict=True):
        schedule.add((lane,), seconds=seconds, key=Key("compute"))
    schedule.add(lanes, seconds=1.0, key=Key("reduce"))
    trace = simulate(schedule.timed())
    rows = trace.spans.task >= 0
    assert set(trace.spans.start[rows]) == {5.0}
    assert rows.sum() == 3
    assert trace.phase_seconds == {"compute": 8.0, "reduce": 1.0}
    assert trace.busy == {"a": 2.0, "b": 6.0, "c": 3.0}
    assert [span.lane for span in trace.critical_path] == ["b", "a"]


def test_a_pool_picks_by_priority_then_readiness_then_id() -> None:
    schedule = Schedule()
    unit = schedule.pool("unit", width=1, by_priority=True)
    late = schedule.add(seconds=0.5)
    for at, (priority, after) in enumerate([(0, ()), (1, (late,)), (1, ()), (1, ()), (2, (late,))], start=1):
        schedule.add((unit,), seconds=1.0, priority=priority, after=after, key=Key("t", at))
    trace = simulate(schedule.timed())
    order = [span.key.step for span in sorted(trace, key=lambda span: span.start) if span.lane == "unit"]
    assert order == [3, 5, 4, 2, 1]


def test_slots_of_a_pool_and_delays_are_lanes_of_their_own() -> None:
    schedule = Schedule()
    unit = schedule.pool("unit", width=2)
    for _ in range(3):
        schedule.add((unit,), seconds=1.0)
        schedule.add(seconds=3.0)
    trace = simulate(schedule.timed())
    assert trace.lanes == ("unit[0]", "unit[1]", "-[0]", "-[1]", "-[2]")
    assert trace.busy == {"unit[0]": 2.0, "unit[1]": 1.0, "-[0]": 3.0, "-[1]": 3.0, "-[2]": 3.0}
    assert trace.makespan == 3.0


def test_a_task_of_no_seconds_takes_as_long_as_its_resource() -> None:
    schedule = Schedule()
    for _ in range(2):
        schedule.add(seconds=0.0)
    timed = schedule.timed(use=Use(task=[0, 1], resource=[0, 0], amount=[10.0, 30.0]), capacity={"link": 10.0})
    # Rates alone are 1 and 1/3 tasks a second; each is halved until the first ends.
    assert sorted(simulate(timed).spans.finish) == pytest.approx([2.0, 4.0])


def test_a_co_run_table_goes_by_phase() -> None:
    schedule = Schedule()
    for phase, seconds in (("decode", 1.0), ("prefill", 4.0)):
        schedule.add((schedule.lane(phase),), seconds=seconds, key=Key(phase))
    timed = schedule.timed(use=Use(task=[0, 1], resource=[0, 0], amount=[1.0, 1.0]), capacity={"gpu": 9.0})
    law = CoRunTable(shares={("decode", "prefill"): (0.5, 0.75)})
    assert simulate(timed, law=law).spans.finish.tolist() == pytest.approx([2.0, 2.0 + 4.0 - 1.5])
    with pytest.raises(ValueError, match=r"task 0 \(decode\)"):
        simulate(timed, law=CoRunTable(shares={("other",): (1.0,)}))


def memory_case(capacity: float) -> Timed:
    schedule = Schedule()
    lanes = [schedule.lane(name) for name in "ab"]
    space = schedule.space("hbm", capacity)
    schedule.add(lanes[:1], seconds=1.0, takes={space: 60}, key=Key("f", 0))
    schedule.add(lanes[:1], seconds=1.0, gives={space: 60}, key=Key("b", 0))
    schedule.add(lanes[1:], seconds=2.0, key=Key("wait"))
    schedule.add(lanes[1:], seconds=1.0, takes={space: 50}, gives={space: 50}, key=Key("f", 1))
    schedule.add(lanes[:1], seconds=1.0, takes={space: 45}, key=Key("f", 2))
    return schedule.timed()


def test_memory_is_given_back_before_it_is_taken() -> None:
    curve = simulate(memory_case(95)).memory["hbm"]
    assert curve.times.tolist() == [0.0, 2.0, 3.0]
    assert curve.values.tolist() == [60.0, 95.0, 45.0]


def test_running_out_of_memory_names_the_first_task_in_time() -> None:
    with pytest.raises(OutOfMemory, match=r"task 4 \(f, step 2\) does not fit in hbm: it takes 45 bytes, 44") as caught:
        simulate(memory_case(94))
    assert (caught.value.task, caught.value.space) == (4, "hbm")
    assert (caught.value.need, caught.value.room) == (45.0, 44.0)
    with pytest.raises(OutOfMemory) as caught:
        simulate(memory_case(59))
    assert caught.value.task == 0
    assert simulate(memory_case(59), memory="record").peak_memory == {"hbm": 95.0}


def test_a_task_of_no_length_shows_what_it_held() -> None:
    schedule = Schedule()
    space = schedule.space("m", 10.0)
    first = schedule.add(seconds=0.0, takes={space: 10.0})
    schedule.add(seconds=0.0, after=(first,), gives={space: 10.0})
    trace = simulate(schedule.timed())
    assert trace.peak_memory == {"m": 10.0}
    assert trace.memory["m"].values[-1] == 0.0


def test_cycles_and_unlawful_numbers_are_named() -> None:
    schedule = Schedule()
    lane = schedule.lane("a")
    schedule.add((lane,), seconds=1.0)
    schedule.add((lane,), seconds=1.0, after=(2,), key=Key("x", 3))
    schedule.add((lane,), seconds=1.0)
    with pytest.raises(ValueError, match=r"task 1 \(x, step 3\) waits on a cycle"):
        simulate(schedule.timed())
    schedule.pool("p")
    with pytest.raises(ValueError, match=r"task 1 \(x, step 3\) waits on a cycle"):
        simulate(schedule.timed())
    with pytest.raises(ValueError, match=r"task 1 \(x, step 3\) has an unlawful seconds"):
        simulate(schedule.timed([1.0, -1.0, 1.0]))
    schedule.add((7,), seconds=1.0)
    with pytest.raises(ValueError, match=r"task 3 .* has an unlawful lane"):
        simulate(schedule.timed())


def test_nothing_takes_no_time() -> None:
    trace = simulate(Schedule().timed())
    assert trace.makespan == 0.0
    assert trace.critical_path == []
