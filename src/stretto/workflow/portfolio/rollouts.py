"""Many rollouts of many (action, continuation) pairs in native code; `plain.py` is the same in plain Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stretto.workflow.portfolio import _native
from stretto.workflow.portfolio.problem import Action, Problem, check_levels
from stretto.workflow.portfolio.state import State

Ints = NDArray[np.int32]
Floats = NDArray[np.float64]
_MASK = 2**64 - 1


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """What is weighed: each pair is an action, by its row in `actions`, and the code of a continuation.

    A code is model * number of levels + level; `actions` has one a node, -1 where the action says nothing.
    """

    actions: Ints
    action: Ints
    continuation: Ints

    def __len__(self) -> int:
        return len(self.action)

    def take(self, rows: NDArray[np.intp]) -> Pairs:
        """Some of the pairs."""
        return Pairs(actions=self.actions, action=self.action[rows], continuation=self.continuation[rows])


class Rollouts:
    """A problem and its sample counts, ready to be played.

    Args:
        levels: sample counts that an action may give a node, ascending.
        threads: of the native code; the answers do not depend on it.
    """

    def __init__(self, problem: Problem, levels: Sequence[int], *, threads: int = 1) -> None:
        check_levels(levels)
        self.problem = problem
        self.levels = tuple(levels)
        self.threads = threads
        laws = problem.laws
        sizes = [len(law.latency_s) if law else 0 for law in laws]
        known = [law for law in laws if law]
        self._native = _native.Rollouts(
            np.array(problem.workflow.parent_masks, dtype=np.uint64),
            np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64),
            np.concatenate([law.latency_s for law in known]),
            (np.concatenate([law.success for law in known]) * 2.0**32).astype(np.uint64),
            np.concatenate([law.cost for law in known]),
            np.array([law.bound if law else 0.0 for law in laws]),
            np.array(levels, dtype=np.int32),
            problem.rules.charge == "realised",
            problem.rules.ends == "first",
            problem.rules.refund,
        )

    def code(self, model: str, count: int) -> int:
        """The code of so many samples on a model."""
        return self.problem.model_index[model] * len(self.levels) + self.levels.index(count)

    def codes(self, action: Action) -> list[int]:
        """The row of an action."""
        row = [-1] * len(self.problem.workflow.nodes)
        for each in action:
            row[self.problem.workflow.index[each.node]] = self.code(each.model, each.count)
        return row

    def wins(self, state: State, pairs: Pairs, *, seed: int, start: int = 0, count: int) -> Ints:
        """How many of the rollouts `start .. start + count - 1` each pair wins."""
        return self._native.wins(
            *self._start(state),
            pairs.actions,
            pairs.action,
            pairs.continuation,
            seed & _MASK,
            start,
            count,
            self.threads,
        )

    def outcomes(
        self, state: State, model: str, count: int, *, seed: int, start: int = 0, rollouts: int
    ) -> tuple[NDArray[np.bool_], Floats, Floats]:
        """Each rollout of Seq-(model, count): whether it won, when it ended, and what had been taken by then."""
        code = self.code(model, count)
        action = np.full((1, len(self.problem.workflow.nodes)), code, dtype=np.int32)
        won, seconds, spent = self._native.outcomes(*self._start(state), action, code, seed & _MASK, start, rollouts)
        return won.astype(bool), seconds, spent

    def _start(self, state: State) -> tuple[int, float, float, list[_native.Flight]]:
        index, models = self.problem.workflow.index, self.problem.model_index
        done = sum(1 << index[node] for node in state.done)
        flights = [
            (
                index[flight.node],
                models[flight.model],
                flight.running,
                flight.succeeded,
                flight.elapsed_s,
                list(flight.remaining_s or ()),
            )
            for flight in state.flights
        ]
        return done, state.time_left_s, state.money_left, flights
