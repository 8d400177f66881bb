"""What a planner may see of a run: what is done, what is left, what is in flight and for how long. Never an outcome."""

from __future__ import annotations

import math
from dataclasses import dataclass

from stretto.core.errors import require


@dataclass(frozen=True, kw_only=True)
class Flight:
    """The samples of one launch that have not returned.

    Attributes:
        elapsed_s: since the launch.
        running: samples that have not returned, at least 1.
        succeeded: whether one that returned has passed its check (the batch still runs).
        remaining_s: the true seconds until each running sample returns. Only a simulator knows them: the
            publication hands them to its planner, and this is here to compare with it.
    """

    node: str
    model: str
    elapsed_s: float
    running: int
    succeeded: bool = False
    remaining_s: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        sound = 0 <= self.elapsed_s < math.inf
        require(sound, f"{self.node}: elapsed_s", self.elapsed_s, "a finite number >= 0")
        require(self.running >= 1, f"{self.node}: running", self.running, ">= 1")
        known = self.remaining_s is None or len(self.remaining_s) == self.running
        require(known, f"{self.node}: remaining_s", self.remaining_s, f"None or {self.running} numbers")


@dataclass(frozen=True, kw_only=True)
class State:
    """The planner's state.

    Attributes:
        done: nodes that have succeeded and whose batch has ended.
        time_left_s: until the deadline, >= 0.
        money_left: what is neither spent nor reserved, >= 0.
        flights: one for each node in flight.
    """

    done: frozenset[str]
    time_left_s: float
    money_left: float
    flights: tuple[Flight, ...] = ()

    def __post_init__(self) -> None:
        require(self.time_left_s >= 0, "time_left_s", self.time_left_s, ">= 0")
        require(self.money_left >= 0, "money_left", self.money_left, ">= 0")
        nodes = [flight.node for flight in self.flights]
        require(len(set(nodes)) == len(nodes), "flights", nodes, "one a node")
        require(self.done.isdisjoint(nodes), "flights", nodes, "of nodes that are not done")
