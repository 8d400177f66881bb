"""The simulator beside SimPy, on one schedule: a 1F1B pipeline over 64 lanes, inserted lane by lane (so
dependencies point forward), with unequal seconds.

SimPy plays a smaller instance of the same pipeline (fewer micro-batches; it is written with one process a
lane, an event for each dependency that crosses lanes, and no wait for events that have come), in the same
rounds as ours; both must find the same makespan there. The fluid plays 100,000 tasks on 1,024 lanes, each
drawing on 1 to 3 of 256 resources, with as much asked of a resource, on average, as it has: most tasks are
throttled by a neighbour.

Usage: python benchmarks/simulate_vs_simpy.py [--json] [--quick]
"""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import simpy

import harness
from stretto.core import _native
from stretto.core.schedule import Columns, Schedule
from stretto.core.simulate import simulate
from stretto.core.timed import Ragged, Timed, Use, offsets

STAGES = 64
TASKS = 1_000_000
SIMPY_TASKS = 256_000  # large enough that it leaves the caches, as the whole would
FLUID_TASKS, FLUID_LANES, FLUID_RESOURCES = 100_000, 1_024, 256
FLUID_SHARE = (
    0.05,
    0.20,
)  # of a resource, that a task draws at full speed: 8 tasks a resource ask for 1.0 of it

GOAL_PASS_S = 0.2
GOAL_TIMES_SIMPY = 100.0
GOAL_TO_METRICS_S = 3.0
GOAL_FLUID_S = 2.0


def pipeline(num_tasks: int) -> tuple[Schedule, Columns]:
    """An empty schedule with its lanes, and the columns of a 1F1B pipeline of about `num_tasks` tasks."""
    micro_batches = num_tasks // (2 * STAGES)
    size = 2 * micro_batches
    stage, batch = np.arange(STAGES)[:, None], np.arange(micro_batches)[None, :]
    warm = np.minimum(STAGES - stage, micro_batches)
    forward = np.where(batch < warm, batch, 2 * batch - warm + 1) + stage * size
    backward = np.where(batch < micro_batches - warm, warm + 2 * batch, micro_batches + batch) + stage * size

    rng = np.random.default_rng(0)
    is_backward = np.zeros(STAGES * size, bool)
    is_backward[backward.ravel()] = True
    micro_batch = np.zeros(STAGES * size, np.int32)
    micro_batch[forward] = micro_batch[backward] = np.broadcast_to(batch, forward.shape)
    after = np.full(STAGES * size, -1)
    after[forward[1:]] = forward[:-1]
    after[backward[:-1]] = backward[1:]
    after[backward[-1]] = forward[-1]
    lane = np.repeat(np.arange(STAGES, dtype=np.int32), size)

    schedule = Schedule()
    for at in range(STAGES):
        schedule.lane(f"rank {at}")
    return schedule, Columns(
        lanes=lane,
        seconds=np.where(is_backward, 2.0, 1.0) * rng.uniform(0.9, 1.1, len(lane)),
        after=Ragged(offsets(after >= 0), after[after >= 0].astype(np.int32)),
        phases=("forward", "backward"),
        phase=is_backward,
        micro_batch=micro_batch,
        stage=lane,
        rank=lane,
    )


def native_pass(timed: Timed) -> None:
    _, _, _, played = _native.play_static(timed.seconds, *timed.holds, *timed.after, timed.widths)
    assert len(played) == len(timed)


def to_metrics(num_tasks: int) -> Callable[[], object]:
    def run() -> object:
        schedule, columns = pipeline(num_tasks)
        begin = time.perf_counter()
        schedule.extend(columns)
        trace = simulate(schedule.timed())
        metrics = (trace.makespan, trace.busy, trace.bubble, trace.critical_seconds, trace.phase_seconds)
        run.seconds = time.perf_counter() - begin  # type: ignore[attr-defined]
        return metrics

    return run


def simpy_pass(timed: Timed) -> float:
    """SimPy's makespan of a schedule in which each task holds one lane and waits for at most one other."""
    seconds = timed.seconds.tolist()
    lane = timed.holds.values.tolist()
    after = [row[0] if (row := timed.after.row(task)) else -1 for task in range(len(timed))]
    needed = {before for task, before in enumerate(after) if before >= 0 and lane[before] != lane[task]}

    gc.collect()
    begin = time.perf_counter()
    environment = simpy.Environment()
    done = {task: environment.event() for task in needed}
    programs: list[list[tuple[float, Any, Any]]] = [[] for _ in timed.lanes]
    for task, before in enumerate(after):
        programs[lane[task]].append((seconds[task], done.get(before), done.get(task)))

    def rank(program: list[tuple[float, Any, Any]]) -> Any:
        for length, waited, finished in program:
            if waited is not None and not waited.processed:
                yield waited
            yield environment.timeout(length)
            if finished is not None:
                finished.succeed()

    for program in programs:
        environment.process(rank(program))
    environment.run()
    simpy_pass.seconds = time.perf_counter() - begin  # type: ignore[attr-defined]
    return float(environment.now)


def fluid_case() -> Timed:
    rng = np.random.default_rng(0)
    schedule = Schedule()
    for at in range(FLUID_LANES):
        schedule.lane(f"lane {at}")
    seconds = rng.uniform(0.5, 1.5, FLUID_TASKS)
    schedule.extend(Columns(lanes=np.arange(FLUID_TASKS) % FLUID_LANES, seconds=seconds))
    owner = np.repeat(np.arange(FLUID_TASKS), rng.integers(1, 4, FLUID_TASKS))
    share = rng.uniform(*FLUID_SHARE, len(owner))
    resource = rng.integers(0, FLUID_RESOURCES, len(owner))
    return schedule.timed(
        use=Use(task=owner, resource=resource, amount=share * seconds[owner]),
        capacity={f"resource {at}": 1.0 for at in range(FLUID_RESOURCES)},
    )


def seconds_of(call: Callable[[], object], inner: Callable[[], object] | None = None) -> float:
    """Seconds of a call, or those that it measured of its own core."""
    gc.collect()
    begin = time.perf_counter()
    call()
    whole = time.perf_counter() - begin
    return whole if inner is None else float(inner.seconds)  # type: ignore[attr-defined]


def spread(values: list[float]) -> float:
    low, middle, high = np.quantile(values, [0.25, 0.5, 0.75])
    return float((high - low) / middle)


def measure(quick: bool) -> Sequence[harness.Row]:
    timed, small = (schedule_of(size).timed() for size in (TASKS, SIMPY_TASKS))
    fluid, metrics = fluid_case(), to_metrics(TASKS)
    ours_makespan, simpy_makespan = simulate(small).makespan, simpy_pass(small)

    took: dict[str, list[float]] = {"pass": [], "simpy": [], "metrics": [], "fluid": []}
    for _ in range(3 if quick else 9):
        took["pass"].append(seconds_of(lambda: native_pass(timed)))
        took["simpy"].append(seconds_of(lambda: simpy_pass(small), simpy_pass))
        took["metrics"].append(seconds_of(metrics, metrics))
        took["fluid"].append(seconds_of(lambda: simulate(fluid)))

    def limit(name: str, key: str, goal: float) -> harness.Row:
        middle = statistics.median(took[key])
        return harness.Row(name=name, ours=middle, unit="s", goal=goal, at_most=True, spread=spread(took[key]))

    rate, simpy_rate = len(timed) / statistics.median(took["pass"]), len(small) / statistics.median(took["simpy"])
    return [
        limit("native pass with cycle check, 1,000,000 tasks", "pass", GOAL_PASS_S),
        harness.Row(
            name="tasks a second against SimPy",
            ours=rate,
            peer=simpy_rate,
            unit="tasks/s",
            ratio=rate / simpy_rate,
            goal=GOAL_TIMES_SIMPY,
            spread=spread(took["simpy"]),
            note=f"SimPy {simpy.__version__} played {SIMPY_TASKS} tasks of the same shape",
        ),
        limit("extend to metrics, 1,000,000 tasks", "metrics", GOAL_TO_METRICS_S),
        limit("fluid, 100,000 tasks, 1,024 at a time on 256 resources", "fluid", GOAL_FLUID_S),
        harness.Row(
            name="makespan beside SimPy's",
            ours=abs(ours_makespan / simpy_makespan - 1.0),
            unit="relative difference",
            goal=1e-9,
            at_most=True,
            note=f"{ours_makespan} and {simpy_makespan} s",
        ),
    ]


def schedule_of(num_tasks: int) -> Schedule:
    schedule, columns = pipeline(num_tasks)
    schedule.extend(columns)
    schedule.validate()
    return schedule


if __name__ == "__main__":
    sys.exit(harness.main(measure, __doc__))
