"""A scheduler with two lanes, driven through passes of made-up lengths."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from stretto.serve.decision import Decision, Lane
from stretto.serve.lanes import LaneScheduler
from stretto.serve.scheduler import Scheduler
from stretto.serve.scheduler_config import SchedulerConfig

from .worlds import config


def lanes(**changes: object) -> SchedulerConfig:
    return config(**{"prefill": "lanes", **changes})


def ran(scheduler: Scheduler, lane: Lane, steps: int = 1, finished: Sequence[int] = ()) -> None:
    scheduler.apply({"type": "ran", "lane": lane, "at": 0.0, "steps": steps, "finished": list(finished)})


def decide(scheduler: Scheduler) -> dict[Lane | None, Decision]:
    """All decisions of an instant, by lane; None: the last one, that there is nothing more to do."""
    found: dict[Lane | None, Decision] = {}
    while None not in found:
        decision = scheduler.next_decision()
        assert decision.lane not in found
        found[decision.lane] = decision
        scheduler.audit()
    return found


@dataclass
class Drive:
    """A scheduler driven through passes of made-up lengths: what it decided, step by step.

    Attributes:
        steps: (second, lane, who with which pages, who was put back) of each step.
        given: tokens given to each request.
    """

    scheduler: Scheduler
    steps: list[tuple[int, str, object, object]] = field(default_factory=list)
    given: dict[int, int] = field(default_factory=dict)
    now: int = 0
    prompts: tuple[Decision, int] | None = None  # and the second in which it ends
    tokens: tuple[Decision, int] | None = None  # and the second in which it began
    left: int = 0

    def tell(self, kind: str, **fields: object) -> None:
        self.scheduler.apply({"type": kind, "at": float(self.now), **fields})
        self.scheduler.audit()

    def end(self, heard: bool) -> None:
        """Passes that end in this second; the decoding rows' ends early if something has happened."""
        if self.prompts is not None and self.prompts[1] == self.now:
            decision, self.prompts = self.prompts[0], None
            self.tell("ran", lane="prompts", steps=1, finished=())
            for chunk in decision.prefill:
                self.given[chunk.id] = self.given.get(chunk.id, 0) + chunk.last
            heard = True
        if self.tokens is None:
            return
        decision, began = self.tokens
        if heard and max(1, self.now - began) < self.left:
            self.left = max(1, self.now - began)
            self.tell("cut", steps=self.left)
        if self.now - began == self.left:
            self.tokens = None
            page = self.scheduler.config.page_tokens
            lengths = {r.id: r.length for r in self.scheduler.running}
            for k in range(self.left):
                rows = [(i, self.scheduler.pool.table(i)[: -(-(lengths[i] + k) // page)]) for i in decision.decode]
                self.steps.append((began + k, "tokens", rows, () if k else decision.preempted))
            for i in decision.decode:
                self.given[i] += self.left
            self.tell("ran", lane="tokens", steps=self.left, finished=())

    def begin(self, seconds: random.Random) -> None:
        """Whatever may begin in this second."""
        for lane, decision in decide(self.scheduler).items():
            if lane == "prompts":
                self.prompts = decision, self.now + seconds.randint(1, 9)
                tables = [self.scheduler.pool.table(chunk.id) for chunk in decision.prefill]
                self.steps.append((self.now, "prompts", (decision.prefill, tables), decision.preempted))
            elif lane == "tokens":
                self.tokens, self.left = (decision, self.now), decision.steps


Sent = tuple[int, int, int, int]
"""(arrival in seconds, prompt, limit, priority)."""


def drive(
    sent: Sequence[Sent], settings_: SchedulerConfig, ends: Sequence[tuple[int, int]], lost: Sequence[int]
) -> Drive:
    """`ends`: (second, whose caller goes then); `lost`: seconds in which all is lost. Steps take a second each."""
    it, seconds = Drive(LaneScheduler(settings_)), random.Random(len(sent))
    gone: set[int] = set()
    coming = sorted(range(len(sent)), key=lambda i: sent[i][0])
    while it.now < 5000:
        heard = [i for i in coming if sent[i][0] <= it.now]
        leaving = [i for second, i in ends if second == it.now and i < len(sent)]
        it.end(bool(heard or leaving) or it.now in lost)
        if it.now in lost:
            it.prompts = it.tokens = None
            it.tell("lost")
        for i in heard:
            coming.remove(i)
            _, prompt, limit, priority = sent[i]
            it.tell("arrive", id=i, prompt=prompt, limit=limit, priority=priority)
        if not coming and not it.scheduler.closed:
            it.tell("close")
        for i in leaving:
            if i not in coming:
                gone.add(i)
                it.tell("cancel", id=i)
        it.begin(seconds)
        if not coming and not it.scheduler.running and not it.scheduler.waiting:
            break
        it.now += 1
        it.tell("tick")
    assert it.scheduler.pool.held == 0
    assert all(it.given[i] == sent[i][2] for i in range(len(sent)) if i not in gone)
    return it
