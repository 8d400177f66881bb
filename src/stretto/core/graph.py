"""A graph of coroutines that run as soon as they can, while the graph still grows: the driver around `GraphPolicy`.

A node is a coroutine function, called with the values of the nodes that it comes after. The same lines run on the real
loop and on virtual time. Nodes may be added before `run` and while it runs, by nodes too; `close` says that no more
will come. A failure is a value (`Failure`): it never breaks the run, and dependents are skipped or fed it. Each attempt
is a span in the recorder. A durable log keeps what came out, so that a run that was killed goes on where it stood.

What does not await (a busy loop) holds its slot and its reservation until it ends. A job on a thread or a process that
is cancelled, or late, frees both at once and keeps only its worker until it ends.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from heapq import heappop, heappush
from typing import Any, NamedTuple
from uuid import uuid4

from stretto.core import threads
from stretto.core.budget import UNITS, units
from stretto.core.clock import Clock
from stretto.core.durable import DurableLog, Finished
from stretto.core.errors import UserError
from stretto.core.eventlog import EventLog
from stretto.core.graph_policy import PLAIN, Decision, GraphPolicy, Terms, Why, terms_json
from stretto.core.record import Recorder
from stretto.core.trace import Key

__all__ = ["PLAIN", "Failure", "Graph", "Paid", "PaidError", "Terms", "on_executor"]

Call = Callable[..., Awaitable[Any]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """What a node gives instead of a value.

    Attributes:
        why: it raised, timed out, was cancelled, was skipped after `cause` failed, or could not be paid.
        message: of the exception, on one line.
        cause: the node that failed; the node itself where it did.
    """

    why: Why
    message: str
    cause: int

    def __str__(self) -> str:
        return f"{self.why}: {self.message}" if self.message else self.why


@dataclass(frozen=True, slots=True)
class Paid:
    """A value together with what it cost; a value alone costs its bound."""

    value: Any
    cost: float

    def __post_init__(self) -> None:
        units(self.cost)


class PaidError(Exception):
    """A failure that tells what it cost, and whether to try again; any other exception costs the bound."""

    def __init__(self, message: str, cost: float = 0.0, *, again: bool = True) -> None:
        super().__init__(message)
        units(cost)
        self.cost = cost
        self.again = again


def on_executor(executor: Executor, function: Callable[..., Any]) -> Call:
    """A plain function as a call that runs on any `concurrent.futures` executor: threads, processes, MPI, Ray, Dask."""

    async def call(*values: Any) -> Any:
        return await threads.on_executor(executor, function, *values)

    return call


class Graph:
    """One graph and its run.

    Args:
        clock: real or virtual.
        recorder: where spans go, a lane for each node of a kind that runs at once; None records nothing.
        limits, budget, seed: see `GraphPolicy`.
        log: keeps what came out of each node; None keeps nothing.
        events: where the policy's events and decisions go; None logs nothing.
        watch: called with (node, outcome) when a node ends.
    """

    def __init__(
        self,
        clock: Clock,
        recorder: Recorder | None = None,
        *,
        limits: Mapping[str, int] | None = None,
        budget: float | None = None,
        seed: int = 0,
        log: DurableLog | None = None,
        events: EventLog | None = None,
        watch: Callable[[int, Any], None] | None = None,
    ) -> None:
        self.clock = clock
        self.outcomes: list[Any] = []
        self._policy = GraphPolicy(limits, budget, seed)
        self._recorder = recorder
        self._log = log
        self._events = events
        self._watch = watch
        self._calls: list[Call | None] = []
        self._after: list[Sequence[int]] = []
        self._names: dict[int, str] = {}
        self._keys: list[str] = []
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._lanes: dict[str, _Lanes] = {}
        self._end: asyncio.Future[None] | None = None
        self._run = log.run if log is not None else uuid4().hex
        if events is not None:
            events.header.update(limits=dict(limits or {}), budget=budget, seed=seed)
        if log is not None and log.spent:
            self._tell("charge", cost=log.spent)

    # What callers do.

    def add(
        self,
        call: Call,
        *,
        after: Sequence[int] = (),
        terms: Terms = PLAIN,
        key: str | None = None,
        name: str | None = None,
    ) -> int:
        """Add a node; returns its number.

        Args:
            call: called with the values of `after`, in that order (and before them, for `keyed` terms, a key).
            key: the node's name in the durable log, which is to be the same in the next run; its number if left out.
            name: what the failures of nodes that are skipped for it call it; "node" and its number if left out.

        Raises:
            ValueError: if the graph is closed, or a node of `after` does not exist.
        """
        log = self._log
        if log is not None:
            key = key if key is not None else str(len(self._keys))
            if key in log.finished:
                terms = _REPLAYED[terms.on_error]
        node = self._policy.add(after, terms)
        if self._events is not None:
            self._events.saw({"type": "add", "after": list(after), "terms": terms_json(terms)})
        self.outcomes.append(None)
        self._calls.append(call)
        self._after.append(after)
        if name is not None:
            self._names[node] = name
        if log is not None:
            self._keys.append(key or "")
        if self._end is not None:
            self._carry_out(self._end)
        return node

    def close(self) -> None:
        """No more nodes will come: `run` returns when all have ended."""
        self._tell("close")

    def cancel(self, node: int | None = None) -> None:
        """Cancel one node, or all of them and the run."""
        if node is None:
            self._tell("cancel_all")
        else:
            self._tell("cancel", node=node)

    async def run(self) -> list[Any]:
        """Run until the graph is closed and every node has ended; returns a value or a `Failure` for each.

        Cancelled, it cancels all nodes, waits for them, and passes the cancellation on.

        Raises:
            UserError: if the durable log cannot be written any more.
        """
        loop = asyncio.get_running_loop()
        self._end = loop.create_future()
        self._carry_out(self._end)
        try:
            await self.clock.wait(self._end, "a graph waits for its nodes, or to be closed")
        except BaseException:
            self._end = loop.create_future()
            self.cancel()
            await self.clock.wait(self._end, "a cancelled graph waits for its nodes to stop")
            raise
        return self.outcomes

    @property
    def live(self) -> int:
        """Nodes that have not ended."""
        return self._policy.live

    @property
    def spent(self) -> float:
        """What all nodes have cost so far, in units of the budget."""
        return self._policy.budget.spent / UNITS

    @property
    def overrun(self) -> float:
        """What nodes said they cost beyond their bounds, which no budget can stop; 0 where bounds hold."""
        return self._policy.budget.overrun / UNITS

    # Between the policy and the loop.

    def _tell(self, event: str, **arguments: Any) -> None:
        if self._events is not None:
            self._events.saw({"type": event, **arguments})
        getattr(self._policy, event)(**arguments)
        if self._end is not None:
            self._carry_out(self._end)

    def _carry_out(self, end: asyncio.Future[None]) -> None:
        """Do what the policy decided."""
        decision = self._policy.take()
        if self._events is not None:
            self._events.decided(self.clock.now, decision._asdict())
        log = self._log
        for node in decision.start:
            if log is not None and self._keys[node] in log.finished:
                asyncio.get_running_loop().call_soon(self._replay, node, log.finished[self._keys[node]])
            else:
                self._tasks[node] = asyncio.create_task(self._attempt(node, self._policy.terms[node]))
        if decision.pause or decision.stop or decision.ended:
            self._carry_out_rest(decision)
        if decision.finished and not end.done():
            end.set_result(None)

    def _carry_out_rest(self, decision: Decision) -> None:
        for node, seconds in decision.pause:
            asyncio.get_running_loop().call_later(seconds, self._due, node)
        for node in decision.stop:
            task = self._tasks.get(node)
            if task is not None:
                task.add_done_callback(partial(self._never_began, node))
                task.cancel()
        for node, why, cause in decision.ended:
            message = f"{self._names.get(cause, f'node {cause}')} failed" if cause >= 0 else ""
            self._close(node, Failure(why=why, message=message, cause=cause if cause >= 0 else node))

    def _due(self, node: int) -> None:
        self._tell("due", node=node)

    def _replay(self, node: int, finished: Finished) -> None:
        """End a node with what an earlier run wrote of it; its cost was counted at the start."""
        if finished.why is None:
            self._close(node, finished.value)
            self._tell("succeeded", node=node)
        else:
            self._close(node, Failure(why=finished.why, message=str(finished.value), cause=node))
            self._tell("failed", node=node, again=False)

    def _never_began(self, node: int, task: asyncio.Task[None]) -> None:
        """A task that is cancelled before its first step runs none of its own lines: end its node here."""
        if self._tasks.get(node) is task:
            self._over(node, Failure(why="cancelled", message="", cause=node), 0.0, again=False)

    async def _attempt(self, node: int, terms: Terms) -> None:
        """One attempt of one node, from its span's start to its finish."""
        clock, outcomes = self.clock, self.outcomes
        recorder = self._recorder if terms.kind else None
        lane = self._take_lane(terms.kind) if recorder is not None else 0
        start = clock.now
        cost: float | None = None
        again = True
        value: Any
        try:
            call: Any = self._calls[node]
            values = [outcomes[before] for before in self._after[node]]
            if self._log is not None and terms.bound and not terms.keyed:
                self._log.begin(self._keys[node], terms.bound)
            if terms.keyed:
                values.insert(0, self._idempotency_key(node))
            if terms.timeout_s is None:
                value = await call(*values)
            else:
                value = await self._timed(call, values, terms.timeout_s)
            if type(value) is Paid:
                value, cost = value.value, value.cost
        except asyncio.CancelledError:
            value, again = Failure(why="cancelled", message="", cause=node), False
        except _TimedOut:
            value = Failure(why="timeout", message=f"took more than {terms.timeout_s:g} s", cause=node)
        except Exception as problem:  # noqa: BLE001 - whatever a call raises is its error value
            value = Failure(why="raised", message=_told(problem), cause=node)
            if isinstance(problem, PaidError):
                cost, again = problem.cost, problem.again
        if recorder is not None:
            self._record(recorder, node, terms.kind, lane, start)
        try:
            self._over(node, value, cost, again=again)
        except UserError as problem:
            self._break(problem)

    async def _timed(self, call: Call, values: list[Any], seconds: float) -> Any:
        try:
            async with self.clock.timeout(seconds) as scope:
                value = await call(*values)
        except TimeoutError:
            if scope.expired():
                raise _TimedOut from None
            raise
        if scope.expired():
            raise _TimedOut
        return value

    def _over(self, node: int, value: Any, cost: float | None, *, again: bool = True) -> None:
        """The attempt of `node` gave a value or a failure: tell the policy, the log, and whoever watches."""
        self._tasks.pop(node, None)
        policy, log = self._policy, self._log
        terms, failed, text = policy.terms[node], type(value) is Failure, ""
        if log is not None and terms.durable and not failed:
            try:
                value, text = log.encode(value)
            except (TypeError, ValueError, RecursionError) as problem:
                value, failed, again = Failure(why="raised", message=_told(problem), cause=node), True, False
        if self._events is not None:
            told = {"again": again} if failed else {}
            self._events.saw({"type": "failed" if failed else "succeeded", "node": node, "cost": cost, **told})
        for_good = True
        if failed:
            for_good = policy.failed(node, cost, again=again)
        else:
            policy.succeeded(node, cost)
        if log is not None:
            self._write(log, node, value, text, terms, cost, for_good)
        if for_good:
            self._close(node, value)
        if self._end is not None:
            self._carry_out(self._end)

    def _write(
        self, log: DurableLog, node: int, value: Any, text: str, terms: Terms, cost: float | None, for_good: bool
    ) -> None:
        key, paid = self._keys[node], terms.bound if cost is None else cost
        failure = value if type(value) is Failure else None
        if failure is not None and failure.why == "cancelled":
            return
        if not (terms.durable and for_good):
            if paid and not (terms.keyed and not for_good):
                log.paid(key, paid)
        elif failure is not None:
            log.finish(key, json.dumps(failure.message), paid, failure.why)
        else:
            log.finish(key, text, paid)

    def _close(self, node: int, outcome: Any) -> None:
        self.outcomes[node] = outcome
        self._calls[node] = None
        self._after[node] = ()
        if self._watch is not None:
            try:
                self._watch(node, outcome)
            except Exception as problem:  # noqa: BLE001 - the run ends with it
                self._break(problem)

    def _break(self, problem: Exception) -> None:
        """What the run stands on failed: `run` cancels all nodes and raises `problem`."""
        self._log = self._watch = None
        if self._end is not None and not self._end.done():
            self._end.set_exception(problem)

    def _idempotency_key(self, node: int) -> str:
        key = self._keys[node] if self._log is not None else str(node)
        return f"{self._run}/{key}"

    # Spans.

    def _take_lane(self, kind: str) -> int:
        """The lowest free lane of a kind."""
        lanes = self._lanes.get(kind)
        if lanes is None:
            lanes = self._lanes[kind] = _Lanes([], [])
        if lanes.free:
            return heappop(lanes.free)
        lanes.names.append(f"{kind} {len(lanes.names)}")
        return len(lanes.names) - 1

    def _record(self, recorder: Recorder, node: int, kind: str, lane: int, start: float) -> None:
        lanes = self._lanes[kind]
        heappush(lanes.free, lane)
        recorder.span(lanes.names[lane], start, self.clock.now, Key(kind, node, self._policy.attempt[node]))


class _Lanes(NamedTuple):
    names: list[str]
    free: list[int]


class _TimedOut(Exception):
    pass


_REPLAYED = {"skip": Terms(kind="from the log"), "feed": Terms(kind="from the log", on_error="feed")}


def _told(problem: BaseException) -> str:
    """An exception on one line, at most 500 characters."""
    name = "" if isinstance(problem, PaidError) else f"{type(problem).__name__}: "
    text = " ".join(f"{name}{problem}".split())
    return text if len(text) <= _MOST_CHARACTERS else text[: _MOST_CHARACTERS - 3] + "..."


_MOST_CHARACTERS = 500
