"""Building schedules, reading them back, and the mistakes that are named."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.core.schedule import Columns, Schedule
from stretto.core.timed import Ragged, Use
from stretto.core.trace import Key


def unpacked(schedule: Schedule) -> list[Any]:
    return [schedule.task(task) for task in range(len(schedule))]


def test_a_task_reads_back_as_it_was_added() -> None:
    schedule = Schedule()
    lanes = schedule.lane("rank 0"), schedule.pool("unit", width=2)
    space = schedule.space("memory", 100.0)
    first = schedule.add(lanes, work=("matmul", 3), key=Key("forward", 1, 2, 3, 4), op="run", takes={space: 8.0})
    second = schedule.add(lanes[:1], seconds=2.0, after=(first,), gives={space: 8.0}, priority=5)
    task = schedule.task(first)
    assert (task.lanes, task.work, task.seconds, task.op) == (lanes, ("matmul", 3), None, "run")
    assert (task.key, task.takes, task.gives) == (Key("forward", 1, 2, 3, 4), {space: 8.0}, {})
    task = schedule.task(second)
    assert (task.seconds, task.after, task.gives, task.priority) == (2.0, (first,), {space: 8.0}, 5.0)
    assert schedule.program(lanes[0]) == [first, second]
    assert schedule.program(lanes[1]) == [first]


def test_equal_works_share_a_number_and_others_do_not() -> None:
    schedule = Schedule()
    for work in (("a", 1), ("a", 1), 1, 1.0, True, {"unhashable": 1}, {"unhashable": 1}):
        schedule.add(work=work)
    assert schedule.work_column.tolist() == [0, 0, 1, 2, 3, 4, 5]
    assert schedule.works[0] == ("a", 1)


def test_timed_takes_lowered_seconds_and_names_what_was_not_lowered() -> None:
    schedule = Schedule()
    schedule.add(seconds=1.0)
    schedule.add(work="copy", key=Key("send", step=4))
    with pytest.raises(ValueError, match=r"task 1 \(send, step 4\) has no seconds; its work 'copy' was not lowered"):
        schedule.timed()
    assert schedule.timed([np.nan, 2.0]).seconds.tolist() == [1.0, 2.0]
    with pytest.raises(ValueError, match="shape"):
        schedule.timed([1.0])


def test_use_is_summed_by_task_and_resource() -> None:
    schedule = Schedule()
    for _ in range(3):
        schedule.add(seconds=1.0)
    use = Use(task=[2, 0, 2, 2, 1], resource=[1, 0, 1, 0, 0], amount=[1.0, 2.0, 3.0, 4.0, 0.0])
    timed = schedule.timed(use=use, capacity={"m": 5.0, "n": 6.0})
    assert [timed.use.row(task) for task in range(3)] == [[0], [], [0, 1]]
    assert timed.use_amount.tolist() == [2.0, 4.0, 4.0]
    with pytest.raises(ValueError, match="resource must lie in 0 to 1"):
        schedule.timed(use=Use(task=[0], resource=[2], amount=[1.0]), capacity={"m": 5.0, "n": 6.0})
    with pytest.raises(ValueError, match="task 1"):
        schedule.timed(use=Use(task=[1], resource=[0], amount=[-1.0]), capacity={"m": 5.0})


def random_tasks(rng: random.Random, size: int, first: int) -> list[dict[str, Any]]:
    """Arguments of `add`; dependencies may point back, into the block, or forward beyond it."""
    return [
        {
            "lanes": tuple(rng.sample(range(3), rng.randint(0, 3))),
            **rng.choice([{"seconds": rng.random()}, {"work": rng.choice(["x", "y", ("z", 1)])}]),
            "after": tuple(rng.sample(range(first + size + 2), rng.randint(0, 3))),
            "key": Key(rng.choice("pqr"), *(rng.randint(-1, 5) for _ in range(4))),
            "op": rng.choice([None, "op", len]),
            "takes": {rng.randint(0, 1): rng.random()} if rng.random() < 0.5 else None,
            "gives": {rng.randint(0, 1): rng.random()} if rng.random() < 0.5 else None,
            "priority": rng.randint(0, 3),
        }
        for _ in range(size)
    ]


def fresh() -> Schedule:
    schedule = Schedule()
    for name in "abc":
        schedule.lane(name)
    for name in ("m", "n"):
        schedule.space(name)
    return schedule


def as_columns(tasks: list[dict[str, Any]]) -> Columns:
    works = list(dict.fromkeys(task["work"] for task in tasks if "work" in task))
    ops = [op for op in ("op", len) if any(task["op"] is op for task in tasks)]
    phases = sorted({task["key"].phase for task in tasks})
    changes = [
        (row, space, size, gives)
        for row, task in enumerate(tasks)
        for gives, held in ((False, task["takes"]), (True, task["gives"]))
        for space, size in (held or {}).items()
    ]
    return Columns(
        lanes=Ragged.of([task["lanes"] for task in tasks]),
        seconds=[task.get("seconds", np.nan) for task in tasks],
        after=Ragged.of([task["after"] for task in tasks]),
        works=works,
        work=[works.index(task["work"]) if "work" in task else -1 for task in tasks],
        ops=ops,
        op=[-1 if task["op"] is None else ops.index(task["op"]) for task in tasks],
        phases=phases,
        phase=[phases.index(task["key"].phase) for task in tasks],
        step=[task["key"].step for task in tasks],
        micro_batch=[task["key"].micro_batch for task in tasks],
        stage=[task["key"].stage for task in tasks],
        rank=[task["key"].rank for task in tasks],
        priority=[task["priority"] for task in tasks],
        memory_row=[row for row, *_ in changes],
        memory_space=[space for _, space, *_ in changes],
        memory_bytes=[size for *_, size, _ in changes],
        memory_gives=[gives for *_, gives in changes],
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 6), st.integers(1, 8))
def test_extend_equals_adds(seed: int, before: int, size: int) -> None:
    rng = random.Random(seed)
    ahead, tasks = random_tasks(rng, before, 0), random_tasks(rng, size, before)
    one, other = fresh(), fresh()
    for task in ahead:
        one.add(**task)
        other.add(**task)
    for task in tasks:
        one.add(**task)
    assert other.extend(as_columns(tasks)) == range(before, before + size)
    assert unpacked(one) == unpacked(other)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 4), st.integers(1, 6), st.integers(0, 4), st.booleans())
def test_repeat_equals_adds(seed: int, before: int, size: int, times: int, far: bool) -> None:
    rng = random.Random(seed)
    ahead, tasks = random_tasks(rng, before, 0), random_tasks(rng, size, before)
    carried = [(before + rng.randrange(size), before + rng.randrange(size)) for _ in range(rng.randint(0, 3))]
    advance = rng.choice([None, "step", "micro_batch"])
    one, other = fresh(), fresh()
    for task in [*ahead, *tasks, *(tasks[:1] if far else [])]:
        one.add(**task)
        other.add(**task)
    begin = len(one)
    for copy in range(times):
        shift = begin + copy * size - before
        last = shift - size if copy else 0
        for at, task in enumerate(tasks):
            inside = range(before, before + size)
            after = [dep + shift if dep in inside else dep for dep in task["after"]]
            after += [source + last for source, target in carried if target == before + at]
            key = task["key"]
            if advance and getattr(key, advance) >= 0:
                key = key._replace(**{advance: getattr(key, advance) + copy + 1})
            one.add(**{**task, "after": after, "key": key})
    template = range(before, before + size)
    assert other.repeat(template, times, carried=carried, advance=advance) == range(begin, len(one))
    assert unpacked(one) == unpacked(other)


def test_repeat_refuses_what_is_not_a_template() -> None:
    schedule = fresh()
    schedule.add(seconds=1.0)
    for arguments in ((range(2), 1), (range(0, 1, 2), 1), (range(1), -1)):
        with pytest.raises(ValueError, match=r"template|times"):
            schedule.repeat(*arguments)
    with pytest.raises(ValueError, match="carried"):
        schedule.repeat(range(1), 1, carried=[(0, 1)])


def test_extend_refuses_columns_of_other_lengths() -> None:
    schedule = fresh()
    with pytest.raises(ValueError, match="seconds has 1 rows, lanes has 2"):
        schedule.extend(Columns(lanes=[0, 1], seconds=[1.0]))
    with pytest.raises(ValueError, match="after has 1 rows"):
        schedule.extend(Columns(lanes=[0, 1], seconds=[1.0, 1.0], after=Ragged.empty(1)))
    with pytest.raises(ValueError, match="memory_row"):
        schedule.extend(Columns(lanes=[0], seconds=[1.0], memory_row=[1], memory_space=[0], memory_bytes=[1.0]))
    assert len(schedule) == 0


@pytest.mark.parametrize(
    ("task", "problem"),
    [
        ({"lanes": (3,), "seconds": 1.0}, "holds unknown lane 3"),
        ({"lanes": (-1,), "seconds": 1.0}, "holds unknown lane -1"),
        ({"lanes": (1, 0, 1), "seconds": 1.0}, "holds lane 1 more than once"),
        ({"seconds": 1.0, "after": (9,)}, "waits for unknown task 9"),
        ({"seconds": 1.0, "takes": {2: 1.0}}, "uses unknown space 2"),
        ({"seconds": 1.0, "gives": {0: -1.0}}, "takes or gives -1.0 bytes"),
        ({"seconds": 1.0, "takes": {0: float("nan")}}, "takes or gives nan bytes"),
        ({"seconds": -2.0}, "takes -2.0 seconds"),
        ({"seconds": float("nan")}, "has neither seconds nor work"),
        ({}, "has neither seconds nor work"),
    ],
)
def test_mistakes_name_the_task(task: dict[str, Any], problem: str) -> None:
    schedule = fresh()
    schedule.add((0, 1), seconds=1.0, key=Key("fine"))
    schedule.validate()
    schedule.add(**task, key=Key("bad", stage=7))
    schedule.add((0,), seconds=1.0, key=Key("fine"))
    with pytest.raises(ValueError) as caught:
        schedule.validate()
    assert str(caught.value).startswith("task 1 (bad, stage 7) ")
    assert problem in str(caught.value)


def test_seconds_and_work_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="both"):
        Schedule().add(seconds=1.0, work="x")


def test_unlawful_pools_and_spaces() -> None:
    with pytest.raises(ValueError, match="width 0"):
        Schedule().pool("p", 0)
    with pytest.raises(ValueError, match="capacity -1"):
        Schedule().space("m", -1)


def test_forward_dependencies_are_lawful() -> None:
    schedule = fresh()
    schedule.add((0,), seconds=1.0, after=(1,))
    schedule.add((1,), seconds=1.0)
    schedule.validate()


def test_a_cycle_over_dependencies_and_lane_order_is_named_and_short() -> None:
    schedule = fresh()
    for _ in range(5):
        schedule.add((2,), seconds=1.0)
    first = schedule.add((0,), seconds=1.0, key=Key("early", step=1), after=(7, 4))
    schedule.add((0,), seconds=1.0, key=Key("late", step=2))
    schedule.add((1,), seconds=1.0, key=Key("send", step=3), after=(first + 1, 0))
    for _ in range(5):
        schedule.add((0,), seconds=1.0)
    with pytest.raises(ValueError) as caught:
        schedule.validate()
    text = str(caught.value)
    assert text.startswith("cycle: task")
    for name in ("task 5 (early, step 1)", "task 6 (late, step 2)", "task 7 (send, step 3)"):
        assert name in text
    assert text.count("waits for") == 3


def test_pools_have_no_order_and_so_no_cycle() -> None:
    schedule = Schedule()
    pool = schedule.pool("p")
    schedule.add((pool,), seconds=1.0, after=(1,))
    schedule.add((pool,), seconds=1.0)
    schedule.validate()


def test_a_task_that_waits_for_itself() -> None:
    schedule = Schedule()
    schedule.add(seconds=1.0, after=(0,))
    with pytest.raises(ValueError, match=r"cycle: task 0 \(task\) waits for task 0"):
        schedule.validate()
