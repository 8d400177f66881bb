"""Decisions that reach to the next shortage of pages: the same steps as decisions that reach to the next page."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.serve.decision import Decision
from stretto.serve.horizon import page_needs, within
from stretto.serve.joining import JOININGS
from stretto.serve.scheduler import Scheduler
from stretto.serve.scheduler_config import SchedulerConfig

from .worlds import config

Ask = tuple[int, int, int]
"""(arrival in steps, prompt, length of the answer)."""
Step = tuple[object, ...]


def expanded(asks: Sequence[Ask], settings_: SchedulerConfig) -> tuple[list[Step], Scheduler, int]:
    """Every step that the scheduler decides on when each takes a second: who, with which pages."""
    scheduler = Scheduler(settings_)
    waiting = sorted(range(len(asks)), key=lambda i: asks[i][0])
    steps: list[Step] = []
    now = decisions = 0
    while waiting or scheduler.running or scheduler.waiting:
        while waiting and asks[waiting[0]][0] <= now:
            at, prompt, length = asks[waiting[0]]
            event = {"type": "arrive", "id": waiting.pop(0), "at": float(at), "prompt": prompt, "limit": length}
            scheduler.apply(event)
        if not waiting and not scheduler.closed:
            scheduler.apply({"type": "close"})
        decision = scheduler.next_decision()
        decisions += 1
        if decision.idle_until is not None:
            now += 1
            scheduler.apply({"type": "tick", "at": float(now)})
            continue
        arrives = asks[waiting[0]][0] - now if waiting else decision.steps
        done = min(decision.steps, max(1, arrives))
        steps += [(decision.decode, tables(scheduler, decision, k)) for k in range(1, done + 1)]
        steps[-done] = (*steps[-done], decision.prefill, decision.preempted)
        now += done
        scheduler.apply({"type": "ran", "at": float(now), "steps": done, "finished": ()})
        scheduler.audit()
    return steps, scheduler, decisions


def tables(scheduler: Scheduler, decision: Decision, step: int) -> dict[int, tuple[int, ...]]:
    """The pages that the decoding rows have used after so many steps of a decision."""
    page = scheduler.config.page_tokens
    rows = {r.id: r.length + step - 1 for r in scheduler.running if r.id in decision.decode}
    return {i: scheduler.pool.table(i)[: -(-positions // page)] for i, positions in rows.items()}


def flat(steps: Sequence[Step]) -> list[Step]:
    """Steps in which nobody is put back or prefilled say so alike, whoever first decided on them."""
    return [step if len(step) == 4 else (*step, (), ()) for step in steps]


@settings(max_examples=200, deadline=None)
@given(
    asks=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 40), st.integers(1, 60)), min_size=1, max_size=10),
    joining=st.sampled_from(sorted(JOININGS)),
    prefill=st.sampled_from(["mixed", "whole"]),
    slots=st.integers(1, 6),
    page_tokens=st.sampled_from([1, 3, 16]),
    spare=st.integers(0, 60),
    prefill_tokens=st.integers(1, 64),
)
def test_far_decisions_are_the_near_ones_run_together(
    asks: list[Ask], joining: str, prefill: str, slots: int, page_tokens: int, spare: int, prefill_tokens: int
) -> None:
    near = config(
        joining=joining,
        prefill=prefill,
        slots=slots,
        page_tokens=page_tokens,
        pages=-(-100 // page_tokens) + spare // page_tokens,
        prefill_tokens=prefill_tokens,
        max_wait_s=3.0,
    )
    by_page, scheduler, _ = expanded(asks, near)
    by_shortage, other, _ = expanded(asks, replace(near, horizon="shortage"))
    assert flat(by_page) == flat(by_shortage)
    assert scheduler.preemptions == other.preemptions
    assert scheduler.pool._free == other.pool._free  # the next to come will get the same pages


def test_far_decisions_are_few() -> None:
    asks = [(0, 10, 1000), (0, 20, 500), (0, 30, 250)]
    roomy = config(page_tokens=16, pages=1000, prefill_tokens=1000)
    steps, _, near = expanded(asks, roomy)
    same, _, far = expanded(asks, replace(roomy, horizon="shortage"))
    assert len(steps) == len(same) == 1000
    assert near > 60
    assert far == 4  # the prompts, and one decision for each that ends


def test_whole_prompts_come_first_and_alone() -> None:
    asks = [(0, 10, 30), (5, 40, 3), (5, 40, 3), (5, 100, 3)]
    steps, _, _ = expanded(asks, config(prefill="whole", prefill_tokens=80, page_tokens=16, pages=100))
    prompts = [step for step in flat(steps) if step[2]]
    assert all(step[0] == () for step in prompts)
    counts = [[chunk.count for chunk in step[2]] for step in prompts]  # type: ignore[attr-defined]
    assert counts == [[10], [40, 40], [100]]  # a prompt beyond the budget has a step to itself
    assert [index for index, step in enumerate(flat(steps)) if step[2]] == [0, 5, 6]


@given(
    rooms=st.lists(st.integers(1, 20), min_size=1, max_size=6),
    page=st.integers(1, 9),
    steps=st.integers(1, 60),
    free=st.integers(0, 30),
)
def test_needs_equal_counting_step_by_step(rooms: list[int], page: int, steps: int, free: int) -> None:
    found, needs = within(page_needs(rooms, page, steps), free, steps)
    left, taken, held = free, [], list(rooms)
    for step in range(1, steps + 1):
        wanting = [i for i, room in enumerate(held) if room < step]
        if len(wanting) > left:
            break
        left -= len(wanting)
        taken += [(step, i) for i in wanting]
        held = [room + page * (i in wanting) for i, room in enumerate(held)]
    else:
        step = steps + 1
    assert (found, list(needs)) == (step - 1, taken)


def decided(seed: int) -> list[str]:
    """Decisions of a scheduler of before there were horizons and policies for prompts, on a load of this seed."""
    draw = random.Random(seed)
    page = draw.choice([1, 7, 16])
    scheduler = Scheduler(
        SchedulerConfig(
            joining=draw.choice(["continuous", "dynamic", "shortest", "static"]),
            slots=draw.randint(1, 6),
            pages=-(-100 // page) + draw.randint(0, 20),
            page_tokens=page,
            prefill_tokens=draw.randint(1, 64),
            prefix_cache=True,
            preemption=draw.choice(["recompute", "swap"]),
            spare_pages=draw.randint(0, 20),
        )
    )
    now, came, texts = 0.0, 0, []
    while came < 20 or scheduler.running or scheduler.waiting:
        while came < 20 and (draw.random() < 0.4 or not (scheduler.running or scheduler.waiting)):
            prompt = draw.randint(1, 60)
            prefix = [f"{draw.randint(0, 1)}/{i}" for i in range(prompt // page)]
            event = {"type": "arrive", "id": came, "at": now, "prompt": prompt, "limit": draw.randint(1, 40)}
            scheduler.apply(event | {"prefix": prefix, "priority": draw.randint(-1, 1)})
            came += 1
        if came == 20 and not scheduler.closed:
            scheduler.apply({"type": "close"})
        decision = scheduler.decide()
        texts.append(json.dumps(decision))
        now += 1.0
        if decision["idle_until"] is None:
            done = draw.randint(1, decision["steps"])
            finished = [i for i in decision["decode"] if draw.random() < 0.02]
            scheduler.apply({"type": "ran", "at": now, "steps": done, "finished": finished})
        else:
            scheduler.apply({"type": "tick", "at": now})
        if draw.random() < 0.02 and scheduler.running:
            scheduler.apply({"type": "cancel", "id": scheduler.running[0].id})
        if draw.random() < 0.01:
            scheduler.apply({"type": "lost", "at": now})
    return texts


def test_what_was_decided_before_is_decided_still() -> None:
    """The digest was taken at commit cbd78e0, so logs of that day replay."""
    texts = [text for seed in range(60) for text in decided(seed)]
    assert len(texts) == 8219
    digest = hashlib.sha256()
    for seed in range(60):
        digest.update("\n".join(decided(seed)).encode())
    assert digest.hexdigest()[:24] == "fc80deb3bc1db59abc095592"
