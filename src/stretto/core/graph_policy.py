"""Which nodes of a growing graph may start now: pure decisions, with neither clock nor tasks.

A node waits for the nodes before it, then for a slot of its kind, then for its reservation from the budget. It starts
the moment it has all three: there are no levels. A failure may be tried again after a pause; what fails for good
lets its dependents be skipped, or be fed the failure, as they ask. Edges lead to nodes that exist, so that a graph can
have no cycle. Nodes are numbers and their state is kept in columns, for a node costs microseconds.
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, NamedTuple

from stretto.core.budget import Budget, units
from stretto.core.errors import require
from stretto.core.random import uniform

Why = Literal["raised", "timeout", "cancelled", "skipped", "no budget"]
"""What an error value stands for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Terms:
    """Under which terms a node runs; one value serves any number of nodes.

    Attributes:
        kind: what kind of work it is: the name of its spans, and of a limit that it counts against; "" for bookkeeping,
            which leaves no span.
        pools: other limits that it counts against, shared by kinds.
        timeout_s: an attempt that takes longer is cancelled; None: no limit.
        attempts: how often it is tried at most.
        backoff_s: the pause before the second attempt, doubled before each further one.
        jitter: the share of a pause that is drawn at random, in 0 .. 1.
        on_error: a node after one that failed is skipped, or is fed the failure in place of a value.
        bound: the most that an attempt can cost, in units of the budget; reserved before it starts.
        keyed: the call takes an idempotency key before its values, and its backend charges a key once. All attempts
            share the key and one reservation.
        durable: whether a durable log keeps what came out. False for a node that adds nodes: it is run again.
    """

    kind: str = "node"
    pools: tuple[str, ...] = ()
    timeout_s: float | None = None
    attempts: int = 1
    backoff_s: float = 0.1
    jitter: float = 0.5
    on_error: Literal["skip", "feed"] = "skip"
    bound: float = 0.0
    keyed: bool = False
    durable: bool = True

    def __post_init__(self) -> None:
        require(self.timeout_s is None or self.timeout_s > 0, "timeout_s", self.timeout_s, "> 0 seconds, or left out")
        require(1 <= self.attempts <= 1000, "attempts", self.attempts, "in 1 .. 1000")
        require(0 <= self.backoff_s <= 3600, "backoff_s", self.backoff_s, "in 0 .. 3600 seconds")
        require(0 <= self.jitter <= 1, "jitter", self.jitter, "in 0 .. 1")
        require(self.on_error in ("skip", "feed"), "on_error", self.on_error, "skip or feed")
        units(self.bound, "bound")


PLAIN = Terms()


class Decision(NamedTuple):
    """What follows from the events so far.

    Attributes:
        start: nodes whose next attempt begins now.
        pause: (node, seconds) to wait before `due` is told.
        stop: nodes whose attempt in flight is to be cancelled.
        ended: (node, why, cause): nodes that end without (another) attempt; `cause` is the node that failed, or -1.
        finished: the graph is closed and every node has ended.
    """

    start: list[int]
    pause: list[tuple[int, float]]
    stop: list[int]
    ended: list[tuple[int, Why, int]]
    finished: bool


_WAITING, _QUEUED, _POOR, _RUNNING, _PAUSED, _DONE, _FAILED = range(7)


class GraphPolicy:
    """The state of one graph. Each method is an event; `take` gives what follows.

    Args:
        limits: most nodes of a kind or a pool that run at once; what is not named has no limit.
        budget: the most that may be spent; None: no limit.
        seed: of the pauses between attempts.
    """

    def __init__(self, limits: Mapping[str, int] | None = None, budget: float | None = None, seed: int = 0) -> None:
        for kind, limit in (limits or {}).items():
            require(limit >= 1, f"limits.{kind}", limit, "at least 1")
        self.budget = Budget(budget)
        self.live = 0
        self.seed = seed
        self.attempt: list[int] = []
        self.terms: list[Terms] = []
        self._state: list[int] = []
        self._missing: list[int] = []
        self._dependents: list[list[int] | None] = []
        self._held: dict[int, int] = {}
        self._free = dict(limits or {})
        self._queues: dict[str, deque[int]] = {kind: deque() for kind in self._free}
        self._poor: list[tuple[int, int]] = []
        self._spread: list[int] = []
        self._doomed: set[int] = set()
        self._closed = False
        self._next = Decision([], [], [], [], False)

    # Events.

    def add(self, after: Sequence[int] = (), terms: Terms = PLAIN) -> int:
        """A new node after existing ones; returns its number.

        Raises:
            ValueError: after `close`, or if `after` names a node that does not exist.
        """
        node = len(self._state)
        if self._closed:
            raise ValueError(f"node {node}: the graph is closed; add nodes before close()")
        missing, cause = 0, -1
        for before in after:
            if not 0 <= before < node:
                raise ValueError(f"node {node} comes after node {before}, which does not exist")
            state = self._state[before]
            if state < _DONE:
                missing += 1
                row = self._dependents[before]
                if row is None:
                    self._dependents[before] = [node]
                else:
                    row.append(node)
            elif state == _FAILED and terms.on_error == "skip" and cause < 0:
                cause = before
        self._state.append(_WAITING)
        self._missing.append(missing)
        self._dependents.append(None)
        self.terms.append(terms)
        self.attempt.append(0)
        self.live += 1
        if cause >= 0:
            self._fail(node, "skipped", cause)
        elif not missing:
            self._ready(node)
        return node

    def charge(self, cost: float) -> None:
        """Count what an earlier run spent."""
        self.budget.charge(units(cost))

    def succeeded(self, node: int, cost: float | None = None) -> None:
        """The attempt of `node` gave a value and cost so much (None: its bound)."""
        if node in self._held or cost:
            self._settle(node, cost)
        self._state[node] = _DONE
        self.live -= 1
        self._leave(node)
        if self._dependents[node] is not None:
            self._spread.append(node)
        self._propagate()

    def failed(self, node: int, cost: float | None = None, *, again: bool = True) -> bool:
        """The attempt of `node` failed and cost so much (None: its bound); whether that is for good."""
        terms = self.terms[node]
        again = again and self.attempt[node] < terms.attempts and node not in self._doomed
        if not (again and terms.keyed):
            self._settle(node, cost)
        if again:
            self._state[node] = _PAUSED
            self._next.pause.append((node, self._pause_s(node)))
        else:
            self._state[node] = _FAILED
            self.live -= 1
            if self._dependents[node] is not None:
                self._spread.append(node)
        self._leave(node)
        self._propagate()
        return not again

    def due(self, node: int) -> None:
        """The pause of `node` is over."""
        if self._state[node] == _PAUSED:
            self._ready(node)
            self._propagate()

    def cancel(self, node: int) -> None:
        """End `node`, whatever it waits for; one that has ended stays as it is."""
        state = self._state[node]
        if state == _RUNNING:
            self._doomed.add(node)
            self._next.stop.append(node)
        elif state < _DONE:
            self._settle(node, None)
            self._fail(node, "cancelled", -1)
            self._propagate()

    def cancel_all(self) -> None:
        """End every node, those that wait for others first, so that none starts; no more can be added."""
        self._closed = True
        for node in reversed(range(len(self._state))):
            self.cancel(node)

    def close(self) -> None:
        """No more nodes will come."""
        self._closed = True

    def apply(self, event: dict[str, Any]) -> None:
        """One event as plain values: `type` names the method, the rest are its arguments."""
        arguments = {name: value for name, value in event.items() if name != "type"}
        if event["type"] == "add":
            self.add(arguments["after"], Terms(**arguments["terms"]))
        else:
            getattr(self, event["type"])(**arguments)

    # Decisions.

    @property
    def finished(self) -> bool:
        return self._closed and self.live == 0

    def take(self) -> Decision:
        """What is to be done after the events since the last call."""
        taken = self._next
        self._next = Decision([], [], [], [], False)
        return taken._replace(finished=True) if self._closed and self.live == 0 else taken

    def decide(self) -> dict[str, Any]:
        """`take` as plain values."""
        return self.take()._asdict()

    # What events lead to.

    def _ready(self, node: int) -> None:
        """All before `node` has ended: start it if it gets a slot and money."""
        terms = self.terms[node]
        free = self._free
        limits = self._limits(terms)
        for name in limits:
            if free[name] == 0:
                self._state[node] = _QUEUED
                self._queues[name].append(node)
                return
        if terms.bound and not self._reserve(node, terms):
            return
        for name in limits:
            free[name] -= 1
        self._state[node] = _RUNNING
        self.attempt[node] += 1
        self._next.start.append(node)

    def _reserve(self, node: int, terms: Terms) -> bool:
        if node in self._held:
            return True
        bound, budget = units(terms.bound), self.budget
        if budget.can_reserve(bound):
            budget.reserve(bound)
            self._held[node] = bound
            return True
        if budget.may_ever_reserve(bound):
            self._state[node] = _POOR
            insort(self._poor, (bound, node))
        else:
            self._fail(node, "no budget", -1)
        return False

    def _settle(self, node: int, cost: float | None) -> None:
        bound = self._held.pop(node, 0)
        if bound or cost:
            self.budget.settle(bound, bound if cost is None else units(cost))

    def _leave(self, node: int) -> None:
        """The attempt of `node` is over: its slots go to the next who wait for them."""
        free = self._free
        limits = self._limits(self.terms[node])
        for name in limits:
            free[name] += 1
        for name in limits:
            queue = self._queues[name]
            while queue and free[name]:
                candidate = queue.popleft()
                if self._state[candidate] == _QUEUED:
                    self._ready(candidate)

    def _limits(self, terms: Terms) -> Sequence[str]:
        """The names of the limits that a node counts against, each once."""
        free = self._free
        return [name for name in dict.fromkeys((terms.kind, *terms.pools)) if name in free] if free else ()

    def _fail(self, node: int, why: Why, cause: int) -> None:
        self._state[node] = _FAILED
        self.live -= 1
        self._next.ended.append((node, why, cause))
        if self._dependents[node] is not None:
            self._spread.append(node)

    def _propagate(self) -> None:
        """Let what ended reach its dependents, and money that came back those that wait for it."""
        while self._spread or self._poor:
            while self._spread:
                self._tell_dependents(self._spread.pop())
            if not self._poor or not self._spend_again():
                return

    def _tell_dependents(self, node: int) -> None:
        failed = self._state[node] == _FAILED
        for child in self._dependents[node] or ():
            if self._state[child] != _WAITING:
                continue
            self._missing[child] -= 1
            if failed and self.terms[child].on_error == "skip":
                self._fail(child, "skipped", node)
            elif self._missing[child] == 0:
                self._ready(child)
        self._dependents[node] = None

    def _spend_again(self) -> bool:
        """Start the cheapest of those that wait for money, end the dearest that can never have it; whether any did."""
        poor, budget = self._poor, self.budget
        if self._state[poor[0][1]] != _POOR:
            poor.pop(0)
            return True
        if not budget.may_ever_reserve(poor[-1][0]):
            _, node = poor.pop()
            if self._state[node] == _POOR:
                self._fail(node, "no budget", -1)
            return True
        if budget.can_reserve(poor[0][0]):
            self._ready(poor.pop(0)[1])
            return True
        return False

    def _pause_s(self, node: int) -> float:
        terms, attempt = self.terms[node], self.attempt[node]
        draw = float(uniform(self.seed, node, attempt))
        return float(terms.backoff_s * 2.0 ** (attempt - 1) * (1.0 - terms.jitter * draw))


def terms_json(terms: Terms) -> dict[str, Any]:
    """Terms as plain values, without what is as usual."""
    usual = asdict(PLAIN)
    return {name: value for name, value in asdict(terms).items() if value != usual[name]}
