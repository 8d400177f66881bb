"""Monte Carlo portfolio planning: the next action inside a budget and a deadline.

The publication ("On Time, Within Budget", 2026, arXiv 2605.06110) weighs every pair of an action for the ready nodes
and a continuation Seq-(model, count) by simulated runs and executes the first action of the best pair; the next event
is planned anew, so the result is at least as good as the best fixed Seq-(model, count), up to sampling error.

Ours differs in how it samples: all pairs meet the same luck (common random numbers), few rollouts weigh all pairs, the
best quarter gets four times as many, and so on (successive halving), and the probability that is reported comes from
fresh rollouts of the chosen pair, since the largest of many noisy means flatters itself.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from stretto.core.errors import require
from stretto.core.statistics import Interval
from stretto.workflow.portfolio.candidates import candidates
from stretto.workflow.portfolio.problem import Action, Launch, Problem
from stretto.workflow.portfolio.rollouts import Pairs, Rollouts
from stretto.workflow.portfolio.state import State

LEVELS = (1, 4, 16, 64)
"""Sample counts of the publication."""
_GROWTH = 4
"""A round leaves one pair in so many and gives it so many times the rollouts: all rounds cost about the same."""
MAX_ROLLOUTS = 2**20


class Policy(Protocol):
    """Decides what to launch; pure: the same state, the same action."""

    def plan(self, state: State) -> Action:
        """At most one launch a ready node; empty to launch nothing."""


@dataclass(frozen=True, kw_only=True)
class Weighed:
    """What a planner found in a state.

    Attributes:
        action: what to launch now.
        model, count: the continuation that the action was weighed with.
        probability: of completing by this pair: mean of fresh rollouts, with Hoeffding's bound on either side. The
            run itself is planned anew at each event, so it does at least as well.
        pairs: how many pairs were weighed.
        rollouts: how many runs were simulated.
    """

    action: Action
    model: str
    count: int
    probability: Interval
    pairs: int
    rollouts: int


class MCPP:
    """The planner of a problem.

    Args:
        levels: sample counts that a node may get at once, ascending.
        samples: rollouts of the pairs that stay to the end.
        first: rollouts of every pair in the first round; with `first = samples` all pairs get all rollouts, and with
            both 64 this is the publication's own sampling.
        fresh: rollouts of the chosen pair, from which its probability is reported.
        free_nodes, max_actions: see `candidates`.
        confidence: of the reported interval.
        seed: of all draws; with the state it decides the action.
        threads: of the native code; no answer depends on it.

    Raises:
        ValueError: naming the argument that is out of range.
    """

    def __init__(
        self,
        problem: Problem,
        *,
        levels: Sequence[int] = LEVELS,
        samples: int = 1024,
        first: int = 32,
        fresh: int = 256,
        free_nodes: int = 3,
        max_actions: int = 260,
        confidence: float = 0.95,
        seed: int = 0,
        threads: int = 1,
    ) -> None:
        require(1 <= first <= samples, "first", first, f"in 1 .. samples = {samples}")
        require(samples <= MAX_ROLLOUTS, "samples", samples, f"at most {MAX_ROLLOUTS}")
        require(1 <= fresh <= MAX_ROLLOUTS, "fresh", fresh, f"in 1 .. {MAX_ROLLOUTS}")
        require(1 <= free_nodes <= 8, "free_nodes", free_nodes, "in 1 .. 8")
        require(0 <= max_actions <= 100_000, "max_actions", max_actions, "in 0 .. 100000")
        require(0 < confidence < 1, "confidence", confidence, "between 0 and 1")
        require(1 <= threads <= 64, "threads", threads, "in 1 .. 64")
        self.problem = problem
        self.rollouts = Rollouts(problem, levels, threads=threads)
        self._samples, self._first, self._fresh = samples, first, fresh
        self._free_nodes, self._max_actions = free_nodes, max_actions
        self._confidence = confidence
        self._seed = seed

    def plan(self, state: State) -> Action:
        """What to launch now; empty if no node is ready."""
        ready = _ready(self.problem, state)
        return self._decode(*self._choose(state, ready)[:2]) if ready else ()

    def weigh(self, state: State) -> Weighed:
        """What to launch now, and the probability of completing.

        Raises:
            ValueError: if no node is ready, or the state names what the problem does not have.
        """
        ready = _ready(self.problem, state)
        require(bool(ready), "state", sorted(state.done), "one in which a node is ready")
        pairs, row, rollouts = self._choose(state, ready)
        chosen = pairs.take(np.array([row]))
        won = int(self.rollouts.wins(state, chosen, seed=self._mixed(state, fresh=True), count=self._fresh)[0])
        levels = len(self.rollouts.levels)
        code = int(chosen.continuation[0])
        return Weighed(
            action=self._decode(pairs, row),
            model=self.problem.estimates.models[code // levels],
            count=self.rollouts.levels[code % levels],
            probability=estimate(won, self._fresh, self._confidence),
            pairs=len(pairs),
            rollouts=rollouts + self._fresh,
        )

    def pairs(self, state: State) -> Pairs:
        """All pairs that are weighed in a state in which a node is ready."""
        return self._pairs(state, _ready(self.problem, state))

    def _pairs(self, state: State, ready: Sequence[str]) -> Pairs:
        levels = len(self.rollouts.levels)
        rows = candidates(
            self.problem,
            ready,
            levels,
            free_nodes=self._free_nodes,
            max_actions=self._max_actions,
            seed=self._mixed(state),
        )
        codes = len(self.problem.estimates.models) * levels
        return Pairs(
            actions=rows,
            action=np.repeat(np.arange(len(rows), dtype=np.int32), codes),
            continuation=np.tile(np.arange(codes, dtype=np.int32), len(rows)),
        )

    def _choose(self, state: State, ready: Sequence[str]) -> tuple[Pairs, int, int]:
        """All pairs, the best one's row, and the number of rollouts; of equals the earliest."""
        pairs = self._pairs(state, ready)
        seed = self._mixed(state)
        alive: NDArray[np.intp] = np.arange(len(pairs))
        wins = np.zeros(len(pairs), dtype=np.int64)
        played, block, total = 0, self._first, 0
        while True:
            wins += self.rollouts.wins(state, pairs.take(alive), seed=seed, start=played, count=block)
            played, total = played + block, total + block * len(alive)
            if played >= self._samples or len(alive) == 1:
                return pairs, int(alive[np.argmax(wins)]), total
            best = np.sort(np.argsort(-wins, kind="stable")[: max(2, math.ceil(len(alive) / _GROWTH))])
            alive, wins = alive[best], wins[best]
            block = min(self._samples, _GROWTH * played) - played

    def _decode(self, pairs: Pairs, row: int) -> Action:
        levels, models = self.rollouts.levels, self.problem.estimates.models
        codes = pairs.actions[pairs.action[row]].tolist()
        return tuple(
            Launch(node=node, model=models[code // len(levels)], count=levels[code % len(levels)])
            for node, code in zip(self.problem.workflow.nodes, codes, strict=True)
            if code >= 0
        )

    def _mixed(self, state: State, *, fresh: bool = False) -> int:
        """A seed of 64 bits that follows from the planner's and the state, whose numbers count to nine digits."""
        flights = [
            (f.node, f.model, f"{f.elapsed_s:.9g}", f.running, f.succeeded, f.remaining_s is None)
            for f in state.flights
        ]
        left = f"{state.time_left_s:.9g} {state.money_left:.9g}"
        text = repr((self._seed, fresh, left, sorted(state.done), flights))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def epsilon(samples: int, choices: int, confidence: float = 0.95) -> float:
    """Hoeffding's bound: all of `choices` means of `samples` values in 0 .. 1 are this near to what they estimate.

    >>> round(epsilon(64, 64 * 8), 2)
    0.28
    """
    return math.sqrt(math.log(2 * choices / (1 - confidence)) / (2 * samples))


def estimate(won: int, samples: int, confidence: float = 0.95) -> Interval:
    """The mean of one pair's rollouts with Hoeffding's bound on either side."""
    mean, slack = won / samples, epsilon(samples, 1, confidence)
    return Interval(value=mean, low=max(0.0, mean - slack), high=min(1.0, mean + slack))


def _ready(problem: Problem, state: State) -> tuple[str, ...]:
    workflow, models = problem.workflow, problem.model_index
    for node in state.done:
        require(node in workflow.index, "done", node, "a node of the workflow")
    for flight in state.flights:
        require(flight.node in workflow.index, "flights", flight.node, "a node of the workflow")
        require(flight.model in models, f"flights: {flight.node}", flight.model, f"one of {', '.join(models)}")
    return workflow.ready(state.done, [flight.node for flight in state.flights])
