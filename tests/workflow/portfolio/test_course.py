"""The simulated world keeps its books: money, time, order of nodes, other batches."""

from __future__ import annotations

import itertools
import math

import pytest

from stretto.core.errors import FieldError
from stretto.workflow.portfolio.baselines import SPLITS, Seq, Split
from stretto.workflow.portfolio.course import Course, advance, begin, launch, luck, next_event, observe
from stretto.workflow.portfolio.draws import Draws
from stretto.workflow.portfolio.estimates import Estimates, Workflow
from stretto.workflow.portfolio.laws import Moments
from stretto.workflow.portfolio.library import PRICES, draw_problem
from stretto.workflow.portfolio.planner import MCPP, Policy
from stretto.workflow.portfolio.problem import Action, Launch, Problem, Rules
from stretto.workflow.portfolio.simulate import play, simulate
from stretto.workflow.portfolio.state import State

from .kit import ALL_RULES, chain, diamond, law, random_problem


class Cycling:
    """Launches other counts on other models at every event, as the state's money says."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem

    def plan(self, state: State) -> Action:
        ready = self.problem.workflow.ready(state.done, [flight.node for flight in state.flights])
        models, turn = self.problem.estimates.models, int(state.money_left)
        return tuple(
            Launch(node=node, model=models[(turn + at) % len(models)], count=1 + (turn + at) % 4)
            for at, node in enumerate(ready)
        )


@pytest.mark.parametrize("rules", ALL_RULES, ids=str)
def test_the_books_are_kept(rules: Rules) -> None:
    ends = set[str | None]()
    for seed in range(40):
        problem = random_problem(seed, rules)
        budget, deadline_s = 8.0 + 3 * (seed % 17), 3.0 + seed % 11
        started = dict[str, float]()
        seen = list[Course]()

        def watch(
            course: Course,
            budget: float = budget,
            deadline_s: float = deadline_s,
            seen: list[Course] = seen,
        ) -> None:
            assert course.money + course.reserved + course.spent == pytest.approx(budget)
            assert 0 <= course.money <= budget
            assert course.now_s <= deadline_s
            seen.append(course)

        end = play(problem, Cycling(problem), begin(budget, deadline_s), luck(problem, Draws(seed), 0), watch=watch)
        assert end.spent <= budget + 1e-9
        assert end.money + end.reserved + end.spent == pytest.approx(budget)
        assert end.now_s <= deadline_s
        for course in seen:
            for batch in course.running:
                started.setdefault(batch.node, batch.start_s)
                assert set(problem.workflow.parents(batch.node)) <= course.done
                assert batch.node not in course.done
        for before, after in itertools.pairwise([*seen, end]):
            assert before.done <= after.done
            assert before.now_s <= after.now_s
        assert (end.end == "completed") == (len(end.done) == len(problem.workflow.nodes))
        ends.add(end.end)
    assert ends >= {"completed", "budget_exhausted", "deadline_exhausted"}


def test_a_course_is_a_value() -> None:
    """Launching and advancing leave the course before as it was, and do the same again."""
    problem, draws = diamond(), Draws(3)
    course = begin(30.0, 20.0)
    action = (Launch(node="a", model="quick", count=3),)
    once, twice = (launch(problem, course, action, luck(problem, draws, 0)) for _ in range(2))
    assert once == twice
    assert course == begin(30.0, 20.0)
    assert advance(problem, once) == advance(problem, once)
    assert once.running[0].start_s == 0.0


def test_the_end_of_one_batch_does_not_disturb_the_others() -> None:
    for seed in range(30):
        problem = random_problem(seed, nodes=6)
        flying = dict[str, tuple[float, ...]]()

        def watch(course: Course, flying: dict[str, tuple[float, ...]] = flying) -> None:
            now = {
                batch.node: tuple(batch.start_s + each.latency_s for each in batch.samples) for batch in course.running
            }
            for node in set(now) & set(flying):
                assert set(now[node]) <= set(flying[node])
                assert all(end in now[node] for end in flying[node] if end > course.now_s)
            for flight, batch in zip(observe(course).flights, course.running, strict=True):
                assert flight.elapsed_s == course.now_s - batch.start_s
            flying.clear()
            flying.update(now)

        policy = Seq(problem=problem, model=problem.estimates.models[0], count=2)
        play(problem, policy, begin(400.0, 50.0), luck(problem, Draws(seed), 0), watch=watch)


def test_a_node_that_does_not_fit_waits_for_what_comes_back() -> None:
    """Both nodes may cost 10 and do cost 1: with 12, the second starts when the first has given back."""
    table = law([(2.0, 1.0, 1.0)], bound=10.0)
    problem = Problem(
        workflow=Workflow(nodes=("a", "b")), estimates=Estimates(laws={"a": {"m": table}, "b": {"m": table}})
    )
    found = simulate(problem, Seq(problem=problem, model="m", count=1), 12.0, 10.0, trials=1)
    assert (found.completed[0], found.seconds[0], found.spent[0]) == (True, 4.0, 2.0)
    assert simulate(problem, Seq(problem=problem, model="m", count=1), 10.5, 10.0, trials=1).ends == {
        "budget_exhausted": 1
    }
    assert simulate(problem, Seq(problem=problem, model="m", count=1), 30.0, 10.0, trials=1).seconds[0] == 2.0


def test_the_first_success_ends_a_batch_and_refunds_the_rest() -> None:
    table = law([(1.0, 1.0, 8.0), (4.0, 1.0, 8.0)])
    moments = Estimates(laws={"a": {"m": table}})
    spent = dict[float, float]()
    for refund in (0.0, 0.5, 1.0):
        problem = Problem(workflow=Workflow(nodes=("a",)), estimates=moments, rules=Rules(ends="first", refund=refund))
        found = simulate(problem, Seq(problem=problem, model="m", count=8), 100.0, 10.0, trials=1)
        assert (found.completed[0], found.seconds[0]) == (True, 1.0)
        spent[refund] = float(found.spent[0])
    slow = (64.0 - spent[1.0]) / (8.0 * 0.75)
    assert slow == round(slow)
    assert 0 < slow < 8
    assert spent == pytest.approx({0.0: 64.0, 0.5: 64.0 - slow * 3.0, 1.0: 64.0 - slow * 6.0})


@pytest.mark.parametrize(
    ("success", "budget", "deadline_s", "end"),
    [
        (0.0, 30.0, 8.0, "deadline_exhausted"),
        (0.0, 5.0, 100.0, "budget_exhausted"),
        (1.0, 30.0, 8.0, "completed"),
        (1.0, 3.0, 3.0, "completed"),
        (1.0, 2.5, 9.0, "budget_exhausted"),
        (1.0, 9.0, 2.5, "deadline_exhausted"),
        (1.0, 0.0, 9.0, "budget_exhausted"),
        (1.0, 9.0, 0.0, "deadline_exhausted"),
        (0.0, math.inf, 50.0, "deadline_exhausted"),
        (0.0, 50.0, math.inf, "budget_exhausted"),
    ],
)
def test_limits_and_certainties(success: float, budget: float, deadline_s: float, end: str) -> None:
    problem = chain(3, success)
    for policy in (Seq(problem=problem, model="m", count=1), MCPP(problem, levels=(1, 2), samples=16, first=16)):
        found = simulate(problem, policy, budget, deadline_s, trials=2)
        assert found.ends == {end: 2}
        assert (found.seconds <= deadline_s).all()


def test_a_run_that_costs_nothing_and_never_succeeds_ends() -> None:
    problem = Problem(
        workflow=Workflow(nodes=("a",)),
        estimates=Estimates(laws={"a": {"m": law([(0.0, 0.0, 0.0)])}}),
    )
    found = simulate(problem, Seq(problem=problem, model="m", count=1), 1.0, 1.0, trials=1)
    assert found.ends == {"stalled": 1}
    planner = MCPP(problem, levels=(1,), samples=2, first=2, fresh=1)
    assert planner.weigh(State(done=frozenset(), time_left_s=1.0, money_left=1.0)).probability.value == 0.0


class Silent:
    def plan(self, state: State) -> Action:
        return ()


class Wrong:
    def plan(self, state: State) -> Action:
        return (Launch(node="n1", model="m", count=1),)


def test_a_policy_that_launches_nothing_stalls_and_a_wrong_one_is_told() -> None:
    problem = chain(2)
    silent: Policy = Silent()
    assert simulate(problem, silent, 5.0, 5.0, trials=1).ends == {"stalled": 1}
    with pytest.raises(ValueError, match="n1 is not ready"):
        simulate(problem, Wrong(), 5.0, 5.0, trials=1)


@pytest.mark.parametrize(("budget", "deadline_s"), [(-1.0, 1.0), (math.nan, 1.0), (1.0, math.nan), (1.0, -1.0)])
def test_bad_limits_are_refused(budget: float, deadline_s: float) -> None:
    with pytest.raises(FieldError, match=r"budget|deadline_s"):
        simulate(chain(1), Silent(), budget, deadline_s, trials=1)
    with pytest.raises(FieldError, match="trials"):
        simulate(chain(1), Silent(), 1.0, 1.0, trials=0)


def test_splits_share_a_budget() -> None:
    def node(seconds: float, success: float) -> dict[str, Moments]:
        return {"m": Moments(success=success, latency_s=seconds)}

    moments = {"a": node(1.0, 0.5), "b": node(3.0, 0.75), "c": node(1.0, 0.75)}
    problem = Problem(
        workflow=Workflow(nodes=("a", "b", "c"), edges=(("a", "b"),)), estimates=Estimates.from_moments(moments)
    )
    expected = {
        "uniform": {"a": 20, "b": 20, "c": 20},
        "latency": {"a": 12, "b": 36, "c": 12},
        "failure": {"a": 30, "b": 15, "c": 15},
        "critical-path": {"a": 30, "b": 22, "c": 7},
    }
    for by, counts in expected.items():
        assert dict(Split(problem=problem, model="m", budget=60.0, by=by).counts) == counts
    drawn = [Split(problem=problem, model="m", budget=60.0, by="dirichlet", seed=seed).counts for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    for by in SPLITS:
        found = simulate(problem, Split(problem=problem, model="m", budget=60.0, by=by), 60.0, 9.0, trials=20)
        assert (found.spent <= 60.0).all()
        assert found.completed.any()
    with pytest.raises(FieldError, match="by is 'luck'"):
        Split(problem=problem, model="m", budget=60.0, by="luck")


def test_the_library_has_the_published_quartiles() -> None:
    laws = [
        table
        for seed in range(60)
        for models in draw_problem(seed, models=tuple(PRICES)[:2], rows=60).estimates.laws.values()
        for table in models.values()
    ]
    latency = sorted(table.mean_latency_s for table in laws)
    success = sorted(table.success_rate for table in laws)
    for values, quartiles, slack in ((latency, (3.1, 5.7, 10.6), 0.12), (success, (0.38, 0.53, 0.67), 0.12)):
        for at, expected in zip((0.25, 0.5, 0.75), quartiles, strict=True):
            assert values[int(at * len(values))] == pytest.approx(expected, rel=slack)
    assert draw_problem(7) == draw_problem(7)
    assert draw_problem(7) != draw_problem(8)
    assert {len(draw_problem(seed, rows=1).workflow.nodes) for seed in range(60)} == set(range(6, 13))
    with pytest.raises(FieldError, match="models is 'gpt'"):
        draw_problem(1, models=("gpt",))
    with pytest.raises(FieldError, match="rows"):
        draw_problem(1, rows=0)


def test_advancing_past_the_deadline_cancels_and_ends() -> None:
    problem = Problem(
        workflow=Workflow(nodes=("a",)),
        estimates=Estimates(laws={"a": {"m": law([(8.0, 1.0, 4.0)])}}),
        rules=Rules(refund=1.0),
    )
    course = launch(problem, begin(10.0, 2.0), (Launch(node="a", model="m", count=2),), luck(problem, Draws(0), 0))
    end = next_event(problem, course)
    assert (end.end, end.now_s, end.running) == ("deadline_exhausted", 2.0, ())
    assert (end.spent, end.money) == (2.0, 8.0)
