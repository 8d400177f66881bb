"""Finding the best plan: refuse what cannot run, prune what cannot win, simulate the rest, rank.

Candidates are taken in waves of a fixed size, best bound first, and pruned between waves only, so the answer
does not depend on how many workers simulate them.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from concurrent.futures import Executor
from dataclasses import dataclass, field, replace
from typing import Any

from stretto.core.errors import UserError
from stretto.core.plan import Domain, Metric, Plan, Prediction, Progress, Refusal, domain_of, no_progress

WAVE = 16
_TOLD_EVERY = 32
"""Progress is told after so many plans were checked."""


class NothingRuns(UserError):
    """No plan can run a job on a cluster."""


@dataclass(frozen=True, kw_only=True)
class Weighed:
    """A candidate that was simulated."""

    plan: Plan[Any, Any]
    prediction: Prediction


@dataclass(frozen=True, kw_only=True)
class Rejected:
    """A candidate that cannot run, with the reason and the nearest change that would fit."""

    choices: Any
    refusal: Refusal


@dataclass(frozen=True, kw_only=True)
class Pruned:
    """A candidate that was not simulated: even its optimistic bound was worse than the best."""

    choices: Any
    bound: float


SAME = 0.0005
"""Plans this near to each other, as a share, are told to be equally good."""


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """The answer of a search: plans that can run, best first, and what became of the others.

    `untried` plans could run and were not weighed, since the time that was given was over.
    """

    objective: str
    weighed: tuple[Weighed, ...]
    rejected: tuple[Rejected, ...] = ()
    pruned: tuple[Pruned, ...] = field(default=())
    untried: int = 0

    @property
    def best(self) -> Plan[Any, Any]:
        return self.weighed[0].plan

    @property
    def why(self) -> str:
        """Why the first one won: its lead over the second, and what bounds it."""
        first = self.weighed[0].prediction
        metric = first.metrics[self.objective]
        text = f"best {self.objective}: {metric.value.value:.4g} {metric.unit}"
        if len(self.weighed) > 1:
            second = self.weighed[1].prediction.metrics[self.objective]
            lead = abs(metric.value.value / second.value.value - 1) * 100 if second.value.value else 0.0
            text += ", as good as the next" if lead < 100 * SAME else f", {lead:.1f} % ahead of the next"
        return f"{text}; {first.bottleneck}"

    def behind(self, weighed: Weighed) -> str:
        """How far a plan is behind the first, and in which phases of its critical path it loses most."""
        first, other = self.weighed[0].prediction, weighed.prediction
        best, here = (p.metrics[self.objective].value.value for p in (first, other))
        share = abs(here / best - 1.0) if best else 0.0
        if share < SAME:
            return "" if weighed is self.weighed[0] else "as good"
        lost = {name: other.phases.get(name, 0.0) - first.phases.get(name, 0.0) for name in other.phases}
        worst = sorted((name for name in lost if lost[name] > 0), key=lambda name: -lost[name])[:2]
        reasons = ", ".join(f"{name} +{lost[name]:.3g} s" for name in worst)
        return f"{share:.1%} behind" + (f": {reasons}" if reasons else "")

    def pareto(self, names: Sequence[str]) -> tuple[Weighed, ...]:
        """The plans that no other plan beats on all of the metrics `names`."""

        def beats(a: Weighed, b: Weighed) -> bool:
            pairs = [(a.prediction.metrics[n], b.prediction.metrics[n]) for n in names]
            losses = [_loss(x) - _loss(y) for x, y in pairs]
            return all(x <= 0 for x in losses) and any(x < 0 for x in losses)

        return tuple(a for a in self.weighed if not any(beats(b, a) for b in self.weighed))


def _loss(metric: Metric) -> float:
    return -metric.value.value if metric.higher_is_better else metric.value.value


def _simulate(kind: str, job: Any, choices: Any, cluster: Any) -> Prediction:
    return replace(domain_of(kind).simulate(job, choices, cluster), trace=None)


def search(
    domain: Domain,
    job: Any,
    cluster: Any,
    *,
    executor: Executor | None = None,
    progress: Progress = no_progress,
    wave: int = WAVE,
    budget_s: float | None = None,
) -> Ranking:
    """Weigh every candidate of `domain` for `job` on `cluster`.

    Args:
        executor: where simulations run; None runs them here. With processes, `domain` must be installed.
        wave: candidates simulated between two prunings.
        budget_s: seconds after which no further wave begins; what was weighed by then is ranked.

    Raises:
        NothingRuns: if nothing can run, with the first reasons and the nearest changes.
    """
    able, rejected = _sift(domain, job, cluster, progress)
    if not able:
        reasons = "; ".join(dict.fromkeys(str(r.refusal) for r in rejected[:3])) or "there are no candidates"
        raise NothingRuns(f"no plan can run this job on {cluster.name}: {reasons}")
    objective = domain.objective(job)
    weighed: list[Weighed] = []
    pruned: list[Pruned] = []
    queue, sign = _by_bound(domain, job, able, cluster)
    began, untried = time.monotonic(), 0
    for first in range(0, len(queue), wave):
        if budget_s is not None and first and time.monotonic() - began > budget_s:
            untried = len(queue) - first
            break
        batch = queue[first : first + wave]
        best = min((_loss(w.prediction.metrics[objective]) for w in weighed), default=float("inf"))
        chosen = [choices for bound, choices in batch if bound <= best]
        pruned += [Pruned(choices=choices, bound=sign * bound) for bound, choices in batch if bound > best]
        if executor is None:
            predictions = [replace(domain.simulate(job, c, cluster), trace=None) for c in chosen]
        else:
            waiting = [executor.submit(_simulate, domain.name, job, c, cluster) for c in chosen]
            predictions = [future.result() for future in waiting]
        for choices, prediction in zip(chosen, predictions, strict=True):
            plan = Plan(kind=domain.name, job=job, choices=choices, cluster=cluster)
            weighed.append(Weighed(plan=plan, prediction=prediction))
        progress("weighing plans", min(first + wave, len(queue)), len(queue))
    weighed.sort(key=lambda w: _loss(w.prediction.metrics[objective]))
    return Ranking(
        objective=objective,
        weighed=tuple(weighed),
        rejected=tuple(rejected),
        pruned=tuple(pruned),
        untried=untried,
    )


def _sift(domain: Domain, job: Any, cluster: Any, progress: Progress) -> tuple[list[Any], list[Rejected]]:
    able, rejected = [], []
    listed = list(domain.candidates(job, cluster))
    for number, choices in enumerate(listed):
        if number and number % _TOLD_EVERY == 0:
            progress("checking plans", number, len(listed))
        refusal = domain.check(job, choices, cluster)
        if refusal is None:
            able.append(choices)
        else:
            rejected.append(Rejected(choices=choices, refusal=refusal))
    return able, rejected


def _by_bound(domain: Domain, job: Any, able: list[Any], cluster: Any) -> tuple[list[tuple[float, Any]], int]:
    """(loss bound, choices), most promising first, and the sign that turns a loss back into the metric."""
    sign = -1 if domain.higher_is_better(job) else 1
    bounds = [(sign * domain.bound(job, choices, cluster), choices) for choices in able]
    return sorted(bounds, key=lambda pair: pair[0]), sign
