"""Search over a toy domain: rank, refuse with reasons, prune only what the bound allows, whoever simulates."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.core import search as module
from stretto.core.errors import UserError
from stretto.core.plan import Context, Metric, Plan, Prediction, Progress, Refusal, Result
from stretto.core.search import Ranking, Weighed, search
from stretto.core.statistics import Interval


@dataclass(frozen=True)
class Machine:
    name: str = "toy machine"


@dataclass
class Toy:
    """Choices are numbers; choice i has score `scores[i]` and bound `bounds[i]`; `banned` ones cannot run."""

    scores: list[float]
    bounds: list[float] = field(default_factory=list)
    banned: frozenset[int] = frozenset()
    higher: bool = False
    name: str = "toy"
    job_type: type = str
    plan_type: type = int
    simulated: list[int] = field(default_factory=list)

    def candidates(self, job: Any, cluster: Any) -> Iterable[int]:
        return range(len(self.scores))

    def check(self, job: Any, choices: Any, cluster: Any) -> Refusal | None:
        return Refusal(reason=f"{choices} is banned", nearest=f"try {choices + 1}") if choices in self.banned else None

    def objective(self, job: Any) -> str:
        return "score"

    def higher_is_better(self, job: Any) -> bool:
        return self.higher

    def bound(self, job: Any, choices: Any, cluster: Any) -> float:
        return self.bounds[choices] if self.bounds else self.scores[choices]

    def simulate(self, job: Any, choices: Any, cluster: Any) -> Prediction:
        self.simulated.append(choices)
        value = Interval.exact(self.scores[choices])
        metric = Metric(value=value, unit="points", higher_is_better=self.higher)
        return Prediction(metrics={"score": metric}, bottleneck="it is a toy")

    def prepare(self, job: Any, cluster: Any, progress: Progress) -> Any:
        return cluster

    def run(self, plan: Plan[Any, Any], ctx: Context) -> Result:
        raise AssertionError("a search runs nothing")


def order(ranking: Ranking) -> list[int]:
    return [w.plan.choices for w in ranking.weighed]


@pytest.mark.parametrize(("higher", "expected"), [(False, [2, 0, 3, 1]), (True, [1, 3, 0, 2])])
def test_best_comes_first(higher: bool, expected: list[int]) -> None:
    ranking = search(Toy([2.0, 9.0, 1.0, 5.0], higher=higher), "job", Machine())
    assert order(ranking) == expected
    assert ranking.best == Plan(kind="toy", job="job", choices=expected[0], cluster=Machine())


def test_why_tells_the_lead_and_the_bottleneck() -> None:
    why = search(Toy([2.0, 8.0], higher=True), "job", Machine()).why
    assert why == "best score: 8 points, 300.0 % ahead of the next; it is a toy"


def test_prunes_only_what_cannot_win() -> None:
    # By bound: 0 and 1 first; the best of them is 5, so that 3 (bound 6) cannot win, and 2 (bound 5) might tie.
    toy = Toy(scores=[5.0, 9.0, 8.0, 6.5], bounds=[1.0, 2.0, 5.0, 6.0])
    ranking = search(toy, "job", Machine(), wave=2)
    assert order(ranking) == [0, 2, 1]
    assert [(p.choices, p.bound) for p in ranking.pruned] == [(3, 6.0)]
    assert toy.simulated == [0, 1, 2]


def test_pruned_bounds_keep_their_sign_when_more_is_better() -> None:
    toy = Toy(scores=[90.0, 10.0], bounds=[100.0, 20.0], higher=True)
    ranking = search(toy, "job", Machine(), wave=1)
    assert [(p.choices, p.bound) for p in ranking.pruned] == [(1, 20.0)]


def test_refused_ones_keep_their_reasons() -> None:
    toy = Toy([1.0, 2.0, 3.0], banned=frozenset({0, 2}))
    ranking = search(toy, "job", Machine())
    assert order(ranking) == [1]
    assert [(r.choices, str(r.refusal)) for r in ranking.rejected] == [
        (0, "0 is banned; try 1"),
        (2, "2 is banned; try 3"),
    ]
    assert toy.simulated == [1]


def test_nothing_that_can_run_is_an_error_with_reasons() -> None:
    with pytest.raises(UserError, match="no plan can run this job on toy machine: 0 is banned; try 1"):
        search(Toy([1.0], banned=frozenset({0})), "job", Machine())
    with pytest.raises(UserError, match="no candidates"):
        search(Toy([]), "job", Machine())


def test_progress_ends_at_all_that_can_run() -> None:
    seen: list[tuple[float, float]] = []
    toy = Toy([1.0] * 7, banned=frozenset({0, 1}))
    search(toy, "job", Machine(), wave=2, progress=lambda what, done, total: seen.append((done, total)))
    assert seen == [(2, 5), (4, 5), (5, 5)]


COSTS = st.lists(st.tuples(st.integers(1, 50), st.integers(0, 40), st.booleans()), min_size=1, max_size=40)


def toy_of(rows: list[tuple[int, int, bool]], *, higher: bool) -> Toy:
    """A toy whose bounds are never worse than its scores, and whose first choice can run."""
    sign = 1 if higher else -1
    return Toy(
        scores=[float(score) for score, _, _ in rows],
        bounds=[float(score + sign * slack) for score, slack, _ in rows],
        banned=frozenset(i for i, (_, _, banned) in enumerate(rows) if banned and i > 0),
        higher=higher,
    )


@given(COSTS, st.booleans(), st.integers(1, 8))
def test_pruning_never_loses_the_best(rows: list[tuple[int, int, bool]], higher: bool, wave: int) -> None:
    toy = toy_of(rows, higher=higher)
    ranking = search(toy, "job", Machine(), wave=wave)
    able = set(range(len(rows))) - toy.banned
    pick = max if higher else min
    assert toy.scores[ranking.best.choices] == pick(toy.scores[i] for i in able)
    fates = [*order(ranking), *(p.choices for p in ranking.pruned), *(r.choices for r in ranking.rejected)]
    assert sorted(fates) == list(range(len(rows)))


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_do_not_change_the_answer(workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    toy = toy_of([((i * 37) % 11 + 1, (i * 13) % 7, i % 6 == 5) for i in range(50)], higher=False)
    monkeypatch.setattr(module, "domain_of", lambda kind: {"toy": toy}[kind])
    alone = search(toy, "job", Machine(), wave=4)
    with ThreadPoolExecutor(workers) as executor:
        together = search(toy, "job", Machine(), wave=4, executor=executor)
    assert alone.pruned
    assert together == alone


POINTS = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.integers(0, 5)), min_size=1, max_size=20)


@given(POINTS)
def test_pareto_equals_brute_force(points: list[tuple[int, int, int]]) -> None:
    # Speed is to be large, the two others small; "noise" is not asked for.
    def weighed(number: int, point: tuple[int, int, int]) -> Weighed:
        metrics = {
            name: Metric(value=Interval.exact(float(x)), unit="", higher_is_better=name == "speed")
            for name, x in zip(("speed", "memory", "noise"), point, strict=True)
        }
        plan = Plan(kind="toy", job="job", choices=number, cluster=Machine())
        return Weighed(plan=plan, prediction=Prediction(metrics=metrics, bottleneck=""))

    ranking = Ranking(objective="speed", weighed=tuple(weighed(i, p) for i, p in enumerate(points)))
    found = {w.plan.choices for w in ranking.pareto(["speed", "memory"])}
    seen = [(-speed, memory) for speed, memory, _ in points]
    expected = {i for i, a in enumerate(seen) if not any(b[0] <= a[0] and b[1] <= a[1] and b != a for b in seen)}
    assert found == expected
