"""Random graphs of calls that succeed, fail, dawdle, hang and are cancelled, and what must hold of every run."""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field
from typing import Any

from stretto.core.clock import Clock
from stretto.core.eventlog import EventLog, replay
from stretto.core.graph import Failure, Graph, Paid, PaidError, Terms
from stretto.core.graph_policy import GraphPolicy
from stretto.core.record import Recorder

KINDS = ("search", "compute", "write")


@dataclass(frozen=True, kw_only=True)
class Planned:
    """One node as it was drawn: what it comes after and how each of its attempts goes."""

    after: tuple[int, ...]
    terms: Terms
    seconds: tuple[float, ...]
    ways: tuple[str, ...]
    cost: float


@dataclass
class World:
    """A random graph, and what was seen while it ran."""

    seed: int
    scale: float = 1.0
    nodes: list[Planned] = field(default_factory=list)
    starts: dict[int, list[float]] = field(default_factory=dict)
    ends: dict[int, list[float]] = field(default_factory=dict)
    running: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    most: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    charged: float = 0.0
    cut: dict[int, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        draw = random.Random(self.seed)
        size = draw.choice([1, 2, 5, 12, 30, 60])
        hangs = draw.random() < 0.5
        for node in range(size):
            parents = draw.sample(range(node), min(node, draw.choice([0, 1, 1, 2, 3])))
            attempts = draw.choice([1, 1, 2, 3])
            timeout = draw.choice([None, 0.5, 2.0])
            ways = ["ok", "ok", "ok", "raise", "paid raise"] + (["hang"] if hangs and timeout is not None else [])
            bound = draw.choice([0.0, 0.0, 0.3, 1.0, 2.5])
            self.nodes.append(
                Planned(
                    after=tuple(parents),
                    terms=Terms(
                        kind=draw.choice(KINDS),
                        timeout_s=None if timeout is None else timeout * self.scale,
                        attempts=attempts,
                        backoff_s=draw.choice([0.0, 0.2]) * self.scale,
                        on_error=draw.choice(["skip", "feed"]),
                        bound=bound,
                        keyed=draw.random() < 0.3,
                    ),
                    seconds=tuple(draw.choice([0.0, 0.1, 0.7, 3.0]) * self.scale for _ in range(attempts)),
                    ways=tuple(draw.choice(ways) for _ in range(attempts)),
                    cost=round(bound * draw.choice([0.0, 0.5, 1.0]), 6),
                )
            )
        self.limits = {kind: draw.choice([1, 2, 4]) for kind in KINDS if draw.random() < 0.5}
        self.budget = draw.choice([None, 0.0, 1.0, 5.0, 20.0])
        self.streamed = draw.random() < 0.5
        self.cancels = [
            (draw.random() * 4 * self.scale, draw.randrange(size)) for _ in range(draw.choice([0, 0, 1, 3]))
        ]
        self.cancel_run_at = draw.random() * 5 * self.scale if draw.random() < 0.15 else None

    def call(self, node: int, clock: Clock) -> Any:
        planned = self.nodes[node]

        async def attempt(*values: Any) -> Any:
            number = len(self.starts.setdefault(node, []))
            assert number < planned.terms.attempts, f"node {node} runs too often"
            assert len(self.ends.get(node, [])) == number, f"node {node} runs twice at once"
            if planned.terms.keyed:
                assert str(values[0]).endswith(f"/{node}")
                values = values[1:]
            assert len(values) == len(planned.after)
            if planned.terms.on_error == "skip":
                assert not any(isinstance(value, Failure) for value in values)
            self.starts[node].append(clock.now)
            kind = planned.terms.kind
            self.running[kind] += 1
            self.most[kind] = max(self.most[kind], self.running[kind])
            charge = planned.terms.bound
            try:
                if planned.ways[number] == "hang":
                    await clock.sleep(1e6)
                await clock.sleep(planned.seconds[number])
                if planned.ways[number] == "raise":
                    raise ValueError(f"node {node} fails")
                if planned.ways[number] == "paid raise":
                    charge = planned.cost
                    raise PaidError("no luck", planned.cost)
                charge = planned.cost
                return Paid((node, *(value for value in values if not isinstance(value, Failure))), planned.cost)
            finally:
                self.running[kind] -= 1
                self.ends.setdefault(node, []).append(clock.now)
                if not planned.terms.keyed:
                    self.charged += charge

        return attempt

    async def run(self, clock: Clock) -> tuple[list[Any], Graph, Recorder, EventLog]:
        """Run it, with nodes added before or meanwhile and cancellations on the way."""
        recorder, events = Recorder("simulated"), EventLog()
        closed: dict[int, float] = {}
        graph = Graph(
            clock,
            recorder,
            limits=self.limits,
            budget=self.budget,
            seed=self.seed,
            events=events,
            watch=lambda node, outcome: closed.setdefault(node, clock.now),
        )
        self.cut = closed

        async def feed() -> None:
            for node, planned in enumerate(self.nodes):
                if self.streamed:
                    await clock.sleep(0.05 * self.scale)
                try:
                    graph.add(self.call(node, clock), after=planned.after, terms=planned.terms)
                except ValueError:
                    assert self.cancel_run_at is not None
                    return
            graph.close()

        async def disturb(after: float, node: int | None) -> None:
            await clock.sleep(after)
            if node is None:
                graph.cancel()
            elif node < len(graph.outcomes):
                graph.cancel(node)

        others = [asyncio.create_task(disturb(*cancel)) for cancel in self.cancels]
        if self.cancel_run_at is not None:
            others.append(asyncio.create_task(disturb(self.cancel_run_at, None)))
        others.append(asyncio.create_task(feed()))
        outcomes = await graph.run()
        await asyncio.sleep(0)
        for other in others:
            other.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        return outcomes, graph, recorder, events

    def check(self, outcomes: list[Any], graph: Graph, recorder: Recorder, events: EventLog) -> None:
        """No node early, none twice, none lost; limits and the budget kept; the trace lawful; the log replayed."""
        slack = 1e-12
        if self.cancel_run_at is None:
            assert len(outcomes) == len(self.nodes)
        assert graph.live == 0
        assert sorted(self.cut) == list(range(len(outcomes))), "every node ends once"
        assert all(count == 0 for count in self.running.values())
        for node, outcome in enumerate(outcomes):
            planned, starts = self.nodes[node], self.starts.get(node, [])
            assert len(starts) == len(self.ends.get(node, [])) <= planned.terms.attempts
            for parent in planned.after:
                if starts:
                    assert self.cut[parent] <= starts[0] + slack, f"node {node} starts before {parent} ends"
            if isinstance(outcome, Failure):
                self._check_failure(node, outcome, outcomes)
            else:
                fed = tuple(outcomes[p] for p in planned.after if not isinstance(outcomes[p], Failure))
                assert outcome == (node, *fed)
        for kind, limit in self.limits.items():
            assert self.most[kind] <= limit
        assert graph.overrun == 0
        if self.budget is not None:
            assert graph.spent <= self.budget
        if not any(planned.terms.keyed for planned in self.nodes):
            assert abs(graph.spent - self.charged) < 1e-6
        assert recorder.trace().overlaps() == []
        assert len(recorder.trace()) == sum(len(starts) for starts in self.starts.values())
        fresh = GraphPolicy(events.header["limits"], events.header["budget"], events.header["seed"])
        again = replay(events, fresh)
        assert again.equal, again.different[:1]
        assert fresh.live == 0

    def _check_failure(self, node: int, failure: Failure, outcomes: list[Any]) -> None:
        planned = self.nodes[node]
        if failure.why == "skipped":
            assert planned.terms.on_error == "skip"
            assert failure.cause in planned.after
            assert isinstance(outcomes[failure.cause], Failure)
            assert node not in self.starts
        elif failure.why in ("raised", "timeout"):
            assert len(self.starts[node]) == planned.terms.attempts
        elif failure.why == "no budget":
            assert self.budget is not None
            assert planned.terms.bound > 0
        else:
            assert failure.why == "cancelled"
            assert self.cancels or self.cancel_run_at is not None
