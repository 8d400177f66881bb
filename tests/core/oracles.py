"""Plain twins of the native code: slow, from scratch, and written from the definitions alone."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

from stretto.core.timed import Timed


@dataclass
class Flow:
    """A running task of `fluid`: `use` per unit of work, `left` in units of work."""

    use: dict[int, float]
    peak: float = math.inf
    weight: float = 1.0
    left: float = 1.0

    def alone(self, capacity: list[float]) -> float:
        return min([self.peak, *(capacity[r] / amount for r, amount in self.use.items())])


def fair_rates(flows: list[Flow], capacity: list[float]) -> list[float]:
    """Progressive filling: a common level rises; a flow stops at its rate alone or at a full resource."""
    alone = [flow.alone(capacity) for flow in flows]
    level: dict[int, float] = {}
    while len(level) < len(flows):
        rising = [i for i in range(len(flows)) if i not in level]
        stops = [(1.0 / flows[i].weight, {i}) for i in rising]
        for r, size in enumerate(capacity):
            users = {i for i in rising if r in flows[i].use}
            if users:
                taken = sum(flows[i].use.get(r, 0.0) * flows[i].weight * alone[i] * at for i, at in level.items())
                slope = sum(flows[i].use[r] * flows[i].weight * alone[i] for i in users)
                stops.append((max(0.0, size - taken) / slope, users))
        lowest = min(at for at, _ in stops)
        for at, stopped in stops:
            if at <= lowest * (1 + 1e-12):
                level |= dict.fromkeys(stopped - level.keys(), at)
    return [level[i] * flow.weight * alone[i] for i, flow in enumerate(flows)]


@dataclass
class EventSimulator:
    """The rules of `simulate`, played an instant at a time with plain lists."""

    timed: Timed
    start: dict[int, float] = field(default_factory=dict)
    finish: dict[int, float] = field(default_factory=dict)

    def run(self) -> EventSimulator:
        t = self.timed
        size = len(t)
        lanes = [t.holds.row(i) for i in range(size)]
        before = [set(t.after.row(i)) for i in range(size)]
        for lane in range(len(t.lanes)):
            if t.widths[lane] == 0:
                program = [i for i in range(size) if lane in lanes[i]]
                for earlier, later in itertools.pairwise(program):
                    before[later].add(earlier)
        pools = [[lane for lane in row if t.widths[lane] > 0] for row in lanes]
        ready: dict[int, float] = {}
        due: dict[int, float] = {}
        flows: dict[int, Flow] = {}
        now = 0.0

        def begin(i: int) -> None:
            del ready[i]
            self.start[i] = now
            draws = {int(t.use.values[at]): float(t.use_amount[at]) for at in range(t.use.ptr[i], t.use.ptr[i + 1])}
            seconds = float(t.seconds[i])
            if draws:
                work = seconds or 1.0
                use = {r: amount / work for r, amount in draws.items()}
                flows[i] = Flow(use, 1.0 if seconds else math.inf, float(t.weight[i]), work)
            else:
                due[i] = now + seconds

        while len(self.finish) < size:
            for i in range(size):
                if i not in self.start and i not in ready and before[i] <= self.finish.keys():
                    ready[i] = now
            for i in sorted(i for i in ready if not pools[i]):
                begin(i)
            for pool in range(len(t.lanes)):
                by_priority = t.by_priority[pool]
                queue = [i for i in ready if pool in pools[i]]
                for i in sorted(queue, key=lambda i: (-t.priority[i] if by_priority else 0, ready[i], i)):
                    if all(self._free(p, pools) for p in pools[i]):
                        begin(i)
            rates = dict(zip(flows, fair_rates(list(flows.values()), t.capacity.tolist()), strict=True))
            ends = due | {i: now + flows[i].left / rates[i] for i in flows}
            if not ends:
                raise ValueError("stuck")
            instant = min(ends.values())
            for i, flow in flows.items():
                flow.left -= rates[i] * (instant - now)
            now = instant
            for i in [i for i, at in ends.items() if at == instant]:
                self.finish[i] = now
                due.pop(i, None)
                flows.pop(i, None)
        return self

    def _free(self, pool: int, pools: list[list[int]]) -> bool:
        running = sum(1 for i in self.start if i not in self.finish and pool in pools[i])
        return running < int(self.timed.widths[pool])
