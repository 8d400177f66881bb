"""The planner: candidates, what it may see, dominated models, monotone limits, ties and determinism."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from stretto.core.errors import FieldError
from stretto.workflow.portfolio.baselines import Seq
from stretto.workflow.portfolio.candidates import candidates
from stretto.workflow.portfolio.course import Course, begin, luck, observe
from stretto.workflow.portfolio.draws import Draws
from stretto.workflow.portfolio.estimates import Estimates, Workflow
from stretto.workflow.portfolio.grid import completion_surface, forecast, nominal_limits
from stretto.workflow.portfolio.laws import Moments
from stretto.workflow.portfolio.library import draw_problem
from stretto.workflow.portfolio.planner import MCPP, epsilon
from stretto.workflow.portfolio.problem import Launch, Problem, Rules
from stretto.workflow.portfolio.simulate import play, simulate
from stretto.workflow.portfolio.state import Flight, State

from .kit import chain, diamond, random_problem, start


def wide(nodes: int, models: int = 2) -> Problem:
    moments = {f"m{at}": Moments(success=0.5, latency_s=2.0, latency_std_s=1.0, cost=1.0 + at) for at in range(models)}
    names = tuple(f"n{at}" for at in range(nodes))
    return Problem(workflow=Workflow(nodes=names), estimates=Estimates.from_moments(dict.fromkeys(names, moments)))


def listed(problem: Problem, ready: tuple[str, ...], **how: int) -> list[tuple[int, ...]]:
    options = {"free_nodes": 3, "max_actions": 260, "seed": 0, **how}
    return [tuple(row) for row in candidates(problem, ready, 4, **options).tolist()]


@pytest.mark.parametrize("nodes", [1, 2])
def test_few_ready_nodes_get_the_full_product(nodes: int) -> None:
    problem = wide(nodes)
    found = listed(problem, problem.workflow.nodes)
    assert sorted(found) == sorted(itertools.product(range(8), repeat=nodes))
    assert found[:8] == [(code,) * nodes for code in range(8)]


@pytest.mark.parametrize("nodes", [3, 5, 20, 64])
def test_many_ready_nodes_get_the_uniform_actions_and_a_part_of_the_mixtures(nodes: int) -> None:
    problem = wide(nodes)
    found = listed(problem, problem.workflow.nodes)
    assert len(found) == len(set(found)) <= 260
    assert len(found) > 200
    assert found[:8] == [(code,) * nodes for code in range(8)]
    free = [at for at in range(nodes) if len({row[at] for row in found[8:]}) > 4]
    assert len(free) <= 3
    others = [{row[at] for at in range(nodes) if at not in free} for row in found[8:]]
    assert all(len(codes) <= 1 and codes <= {0, 1, 2, 3} for codes in others)
    assert found == listed(problem, problem.workflow.nodes)
    assert found != listed(problem, problem.workflow.nodes, seed=1)


def test_mixtures_of_a_large_product_are_drawn_from_all_of_it() -> None:
    problem = wide(8, models=3)
    found = np.array(listed(problem, problem.workflow.nodes, free_nodes=8, max_actions=2000))[16:]
    assert len(found) > 1900
    for at in range(8):
        assert set(found[:, at]) == set(range(12))


def test_every_ready_node_gets_something_and_no_other_does() -> None:
    for row in listed(diamond(), ("b", "c")):
        assert [code >= 0 for code in row] == [False, True, True, False]


def test_uniform_actions_are_kept_whatever_the_limit() -> None:
    assert len(listed(wide(2), ("n0", "n1"), max_actions=0)) == 8


def test_a_node_without_a_model_gets_its_first() -> None:
    fast, slow = Moments(success=0.5, latency_s=1.0), Moments(success=0.5, latency_s=2.0, cost=2.0)
    known = Estimates.from_moments({"a": {"x": fast, "y": slow}, "b": {"y": slow}})
    problem = Problem(workflow=Workflow(nodes=("a", "b")), estimates=known)
    found = listed(problem, ("a", "b"))
    assert {row[1] // 4 for row in found} == {1}
    assert {row[0] // 4 for row in found} == {0, 1}


def swapped(course: Course) -> Course:
    """The same course with other hidden outcomes: what fails succeeds, and all comes later and cheaper."""
    return replace(
        course,
        running=tuple(
            replace(
                batch,
                samples=tuple(
                    replace(each, success=not each.success, latency_s=each.latency_s + 7.0, cost=0.5)
                    for each in batch.samples
                ),
            )
            for batch in course.running
        ),
    )


def events_with_flights(seed: int) -> tuple[Problem, list[Course]]:
    """Events of a run at which one node is ready while another is in flight."""
    problem, seen = random_problem(seed, nodes=6), list[Course]()

    def watch(course: Course) -> None:
        busy = [batch.node for batch in course.running]
        if busy and problem.workflow.ready(course.done, busy):
            seen.append(course)

    models = problem.estimates.models
    policy = Seq(problem=problem, model=models[-1], count=2)
    play(problem, policy, begin(300.0, 60.0), luck(problem, Draws(seed), 0), watch=watch)
    return problem, seen[:8]


@pytest.mark.parametrize("seed", [1, 2, 8, 10])
def test_the_planner_never_sees_an_outcome(seed: int) -> None:
    """Hidden outcomes are swapped: the state and the action stay the same, and only the clairvoyant sees more."""
    problem, seen = events_with_flights(seed)
    assert seen
    planner = MCPP(problem, samples=64, first=16)
    for course in seen:
        other = swapped(course)
        assert observe(course) == observe(other)
        assert planner.plan(observe(course)) == planner.plan(observe(other))
        assert observe(course, clairvoyant=True) != observe(other, clairvoyant=True)


def test_the_clairvoyant_variant_knows_when_but_not_how() -> None:
    problem, seen = events_with_flights(1)
    for course in seen:
        for flight, batch in zip(observe(course, clairvoyant=True).flights, course.running, strict=True):
            assert flight.remaining_s == tuple(batch.start_s + each.latency_s - course.now_s for each in batch.samples)
        failed = replace(
            course,
            running=tuple(
                replace(batch, samples=tuple(replace(each, success=False) for each in batch.samples))
                for batch in course.running
            ),
        )
        assert observe(failed, clairvoyant=True) == observe(course, clairvoyant=True)
    found = simulate(problem, MCPP(problem, samples=32, first=8), 30.0, 12.0, trials=5, clairvoyant=True)
    assert len(found.completed) == 5


def test_elapsed_time_counts() -> None:
    """A sample that has outlived its quick rows is known to be a slow one, and all is planned accordingly."""
    problem = Problem(
        workflow=Workflow(nodes=("a", "b")),
        estimates=Estimates.from_moments(
            {
                "a": {"m": Moments(success=1.0, latency_s=10.0, latency_std_s=8.0)},
                "b": {"m": Moments(success=1.0, latency_s=1.0)},
            }
        ),
    )
    planner = MCPP(problem, levels=(1,), samples=512, first=512, fresh=4096)

    def chance(elapsed_s: float) -> float:
        flight = Flight(node="a", model="m", elapsed_s=elapsed_s, running=1)
        return planner.weigh(
            State(done=frozenset(), time_left_s=5.0, money_left=9.0, flights=(flight,))
        ).probability.value

    table = problem.estimates.law("a", "m").latency_s
    for elapsed_s in (0.0, 6.0, 20.0):
        longer = [value for value in table if value > elapsed_s]
        expected = sum(value <= elapsed_s + 5.0 for value in longer) / len(longer)
        assert chance(elapsed_s) == pytest.approx(expected, abs=0.03)


@pytest.mark.parametrize("worse_first", [False, True])
@pytest.mark.parametrize(("time_s", "money"), [(3.0, 3.0), (6.0, 9.0), (9.0, 30.0), (40.0, 400.0), (1.0, 400.0)])
def test_a_dominated_model_is_never_chosen(worse_first: bool, time_s: float, money: float) -> None:
    good = Moments(success=0.6, latency_s=2.0, latency_std_s=0.5, cost=1.0)
    worse = Moments(success=0.5, latency_s=3.0, latency_std_s=0.75, cost=1.5)
    models = {"worse": worse, "good": good} if worse_first else {"good": good, "worse": worse}
    names = ("a", "b", "c")
    problem = Problem(
        workflow=Workflow(nodes=names, edges=(("a", "c"), ("b", "c"))),
        estimates=Estimates.from_moments(dict.fromkeys(names, models)),
    )
    for seed in range(5):
        planner = MCPP(problem, samples=4096, first=512, seed=seed)
        assert {each.model for each in planner.plan(start(time_s, money))} == {"good"}


def test_another_model_never_hurts() -> None:
    both = random_problem(11, nodes=5)
    one = replace(
        both,
        estimates=Estimates(laws={node: dict(list(laws.items())[:1]) for node, laws in both.estimates.laws.items()}),
    )
    for time_s, money in ((8.0, 20.0), (12.0, 40.0), (20.0, 80.0)):
        values = [
            MCPP(problem, samples=1024, first=256, fresh=4096).weigh(start(time_s, money)).probability.value
            for problem in (one, both)
        ]
        assert values[1] >= values[0] - 2 * epsilon(4096, 1)


BUDGETS, DEADLINES = (2.0, 10.0, 25.0, 60.0, 200.0), (3.0, 6.0, 10.0, 20.0)


@pytest.mark.parametrize("seed", [9, 21])
def test_more_money_and_more_time_never_hurt_and_no_fixed_policy_is_better(seed: int) -> None:
    problem, trials = random_problem(seed, Rules(charge="realised"), nodes=4), 40
    planner = MCPP(problem, samples=64, first=16)
    cells = completion_surface(planner, BUDGETS, DEADLINES, trials=trials, seed=4).cells
    value = np.array([[cell.value for cell in row] for row in cells])
    slack = 2 * epsilon(trials, 1)
    assert (np.diff(value, axis=0) >= -slack).all()
    assert (np.diff(value, axis=1) >= -slack).all()
    assert value[-1, -1] > value[0, 0]
    for (row, budget), (column, deadline_s) in itertools.product(enumerate(BUDGETS), enumerate(DEADLINES)):
        fixed = max(
            planner.rollouts.outcomes(start(deadline_s, budget), model, count, seed=4, rollouts=trials)[0].mean()
            for model in problem.estimates.models
            for count in planner.rollouts.levels
        )
        assert value[row, column] >= fixed - slack


def test_a_forecast_is_about_a_lower_bound_of_whole_runs() -> None:
    problem = random_problem(2, nodes=4)
    planner = MCPP(problem, samples=64, first=16)
    whole = completion_surface(planner, (20.0, 60.0), (6.0, 12.0), trials=60)
    at_once = forecast(planner, (20.0, 60.0), (6.0, 12.0))
    for quick, played in zip(itertools.chain(*at_once.cells), itertools.chain(*whole.cells), strict=True):
        assert quick.value <= played.value + epsilon(60, 1)
        assert quick.low <= quick.value <= quick.high
    text = at_once.table("USD")
    assert [line.split()[0] for line in text.splitlines()] == ["budget", "20", "60"]
    assert "6 s" in text
    assert "%" in text


def test_nominal_limits() -> None:
    fast, sure = Moments(success=0.5, latency_s=1.0, cost=2.0), Moments(success=0.95, latency_s=3.0, cost=11.0)
    hopeless = Moments(success=0.0, latency_s=0.5, cost=0.1)
    problem = Problem(
        workflow=Workflow(nodes=("a", "b", "c"), edges=(("a", "c"), ("b", "c"))),
        estimates=Estimates.from_moments(
            {"a": {"f": fast, "s": sure}, "b": {"s": sure}, "c": {"h": hopeless, "f": fast}}
        ),
    )
    assert nominal_limits(problem) == (5 * 2.0 + 11.0 + 5 * 2.0, pytest.approx(3.0 / 0.95 + 2.0))
    assert nominal_limits(chain(2, success=0.0)) == (math.inf, math.inf)


@pytest.mark.parametrize(
    ("budgets", "deadlines_s", "words"),
    [
        ((), (1.0,), "budgets"),
        ((2.0, 1.0), (1.0,), "budgets"),
        ((1.0,), (-1.0,), "deadline"),
        ((math.nan,), (1.0,), "budget"),
    ],
)
def test_a_bad_grid_is_refused(budgets: Any, deadlines_s: Any, words: str) -> None:
    with pytest.raises(FieldError, match=words):
        forecast(MCPP(chain(1)), budgets, deadlines_s)


@pytest.mark.parametrize("threads", [2, 3])
def test_the_action_follows_from_seed_and_state_alone(threads: int) -> None:
    problem = draw_problem(3, nodes=8)
    one, many = MCPP(problem, seed=5), MCPP(problem, seed=5, threads=threads)
    for time_s, money in ((20.0, 0.02), (60.0, 0.05), (120.0, 0.2)):
        assert one.weigh(start(time_s, money)) == many.weigh(start(time_s, money)) == one.weigh(start(time_s, money))
    actions = {MCPP(problem, seed=seed, samples=16, first=16).plan(start(40.0, 0.04)) for seed in range(8)}
    assert len(actions) > 1


def test_of_equal_actions_the_earlier_is_chosen() -> None:
    planner = MCPP(chain(2, success=1.0), levels=(1, 2, 4))
    weighed = planner.weigh(start(10.0, 100.0))
    assert (weighed.action, weighed.count) == ((Launch(node="n0", model="m", count=1),), 1)
    assert weighed.probability.value == 1.0
    hopeless = planner.weigh(start(0.5, 100.0))
    assert (hopeless.action, hopeless.count) == ((Launch(node="n0", model="m", count=1),), 1)
    assert hopeless.probability.value == 0.0


def test_the_reported_probability_is_from_fresh_rollouts() -> None:
    """The winner of many alike pairs flatters itself; what is reported of it does not."""
    problem = wide(2)
    state = start(2.6, 100.0)
    flattered, reported = [], []
    for seed in range(200):
        planner = MCPP(problem, samples=8, first=8, fresh=8, seed=seed)
        reported.append(planner.weigh(state).probability.value)
        pairs = planner.pairs(state)
        flattered.append(planner.rollouts.wins(state, pairs, seed=seed, count=8).max() / 8)
    exact = MCPP(problem, samples=4096, first=1024, fresh=65536).weigh(state).probability.value
    assert np.mean(reported) <= exact + 0.025
    assert np.mean(flattered) > exact + 0.04


def test_halving_spends_a_fraction_and_chooses_as_well() -> None:
    problem = draw_problem(4, nodes=10)
    state = start(60.0, 0.08)
    full, halved = MCPP(problem, samples=512, first=512), MCPP(problem, samples=512, first=32)
    all_rollouts, few = full.weigh(state), halved.weigh(state)
    assert few.pairs == all_rollouts.pairs
    assert few.rollouts - 256 <= (all_rollouts.rollouts - 256) / 4
    pairs = full.pairs(state)
    reference = full.rollouts.wins(state, pairs, seed=77, count=4096) / 4096
    codes = [tuple(row) for row in pairs.actions.tolist()]
    best = max(reference)
    for weighed in (all_rollouts, few):
        action = codes.index(tuple(full.rollouts.codes(weighed.action)))
        assert max(reference[pairs.action == action]) >= best - 0.02


def test_nothing_is_planned_where_nothing_is_ready() -> None:
    planner = MCPP(chain(2))
    flying = State(
        done=frozenset(),
        time_left_s=5.0,
        money_left=5.0,
        flights=(Flight(node="n0", model="m", elapsed_s=0.5, running=1),),
    )
    assert planner.plan(flying) == ()
    with pytest.raises(FieldError, match="a node is ready"):
        planner.weigh(flying)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"done": frozenset({"x"})}, "done is 'x'"),
        ({"flights": (Flight(node="x", model="m", elapsed_s=0.0, running=1),)}, "flights is 'x'"),
        ({"flights": (Flight(node="n0", model="x", elapsed_s=0.0, running=1),)}, "n0 is 'x'"),
    ],
)
def test_a_state_of_another_problem_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(FieldError, match=words):
        MCPP(chain(2)).plan(State(**{"done": frozenset(), "time_left_s": 5.0, "money_left": 5.0, **fields}))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"time_left_s": math.nan}, "time_left_s"),
        ({"money_left": -1.0}, "money_left"),
        ({"flights": (Flight(node="n0", model="m", elapsed_s=0.0, running=1),) * 2}, "one a node"),
        ({"done": frozenset({"n0"}), "flights": (Flight(node="n0", model="m", elapsed_s=0.0, running=1),)}, "not done"),
    ],
)
def test_a_bad_state_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(FieldError, match=words):
        State(**{"done": frozenset(), "time_left_s": 5.0, "money_left": 5.0, **fields})
    with pytest.raises(FieldError, match="elapsed_s"):
        Flight(node="a", model="m", elapsed_s=-1.0, running=1)
    with pytest.raises(FieldError, match="remaining_s"):
        Flight(node="a", model="m", elapsed_s=1.0, running=2, remaining_s=(1.0,))


@pytest.mark.parametrize(
    "fields",
    [
        {"levels": ()},
        {"samples": 0},
        {"samples": 2**21, "first": 1},
        {"first": 0},
        {"first": 2048},
        {"fresh": 0},
        {"free_nodes": 0},
        {"max_actions": -1},
        {"confidence": 1.0},
        {"threads": 0},
    ],
)
def test_bad_settings_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(FieldError, match="|".join([*fields, "first"])):
        MCPP(chain(1), **fields)


def test_a_fixed_policy_follows_its_own_estimate() -> None:
    problem = diamond(Rules(charge="realised"))
    planner = MCPP(problem, levels=(1, 2), samples=16, first=16)
    won, *_ = planner.rollouts.outcomes(start(9.0, 14.0), "quick", 2, seed=4, rollouts=2000)
    found = simulate(problem, Seq(problem=problem, model="quick", count=2), 14.0, 9.0, trials=2000, seed=4)
    assert (won == found.completed).all()
