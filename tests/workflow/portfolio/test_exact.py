"""Exact answers: backward induction on chains, the published example, and estimates within their bounds."""

from __future__ import annotations

import itertools
from functools import cache

import numpy as np
import pytest

from stretto.core.errors import FieldError
from stretto.workflow.portfolio.baselines import Seq
from stretto.workflow.portfolio.exact import completion, first_then, optimum
from stretto.workflow.portfolio.planner import MCPP, epsilon
from stretto.workflow.portfolio.problem import Action, Launch, Problem, Rules
from stretto.workflow.portfolio.simulate import simulate
from stretto.workflow.portfolio.state import State

from .kit import ALL_RULES, chain, diamond, start


def by_induction(nodes: int, hours: int, money: int, success: float, levels: tuple[int, ...]) -> float:
    """The closed recursion for unit times and costs."""

    @cache
    def value(n: int, h: int, b: int) -> float:
        if n == 0:
            return 1.0
        if h == 0:
            return 0.0
        best = 0.0
        for k in levels:
            if k <= b:
                q = 1 - (1 - success) ** k
                best = max(best, q * value(n - 1, h - 1, b - k) + (1 - q) * value(n, h - 1, b - k))
        return best

    return value(nodes, hours, money)


@pytest.mark.parametrize("success", [0.5, 0.3, 0.9, 1.0, 0.0])
@pytest.mark.parametrize(("nodes", "hours", "money"), [(1, 2, 3), (2, 3, 4), (3, 4, 7), (2, 2, 8)])
def test_the_optimum_of_a_chain_is_backward_induction(success: float, nodes: int, hours: int, money: int) -> None:
    levels = (1, 2, 4)
    found = optimum(chain(nodes, success), levels, float(money), float(hours))
    assert found == pytest.approx(by_induction(nodes, hours, money, success, levels))


def test_the_published_example() -> None:
    problem = chain(2)
    fixed = [completion(problem, Seq(problem=problem, model="m", count=count), 4.0, 3.0) for count in (1, 2, 4)]
    assert fixed == pytest.approx([0.5, 0.5625, 0.0])
    assert optimum(problem, (1, 2, 4), 4.0, 3.0) == pytest.approx(0.625)


class ExactQ:
    """The planner's rule with exact values instead of rollouts, on a chain."""

    def __init__(self, problem: Problem, levels: tuple[int, ...]) -> None:
        self.problem, self.levels = problem, levels

    def plan(self, state: State) -> Action:
        (node,) = self.problem.workflow.ready(state.done, ())
        rest = chain(len(self.problem.workflow.nodes) - len(state.done))
        pairs = itertools.product(self.levels, self.levels)

        def value(pair: tuple[int, int]) -> float:
            first = (Launch(node="n0", model="m", count=pair[0]),)
            then = Seq(problem=rest, model="m", count=pair[1])
            return first_then(rest, first, then, state.money_left, state.time_left_s)

        return (Launch(node=node, model="m", count=max(pairs, key=value)[0]),)


@pytest.mark.parametrize(("nodes", "hours", "money"), [(2, 3, 4), (3, 4, 6), (3, 5, 8), (2, 4, 5)])
def test_planning_with_exact_values_lies_between_the_best_fixed_count_and_the_optimum(
    nodes: int, hours: int, money: int
) -> None:
    problem, levels = chain(nodes), (1, 2, 4)
    planned = completion(problem, ExactQ(problem, levels), money, hours)
    fixed = max(completion(problem, Seq(problem=problem, model="m", count=count), money, hours) for count in levels)
    best = optimum(problem, levels, money, hours)
    assert fixed - 1e-12 <= planned <= best + 1e-12
    if (nodes, hours, money) == (2, 3, 4):
        assert planned == pytest.approx(0.625)


def test_the_planner_reaches_the_optimum_of_the_example() -> None:
    problem = chain(2)
    planner = MCPP(problem, levels=(1, 2, 4), samples=4096, first=512)
    assert planner.plan(start(3.0, 4.0)) == (Launch(node="n0", model="m", count=2),)
    assert completion(problem, planner, 4.0, 3.0) == pytest.approx(0.625)


@pytest.mark.parametrize("rules", ALL_RULES, ids=str)
def test_simulated_runs_agree_with_the_exact_answer(rules: Rules) -> None:
    problem = diamond(rules)
    for model, count in (("quick", 2), ("slow", 1)):
        policy = Seq(problem=problem, model=model, count=count)
        exact = completion(problem, policy, 16.0, 9.0)
        found = simulate(problem, policy, 16.0, 9.0, trials=600, seed=3)
        assert 0.05 < exact < 0.95
        assert abs(found.completed.mean() - exact) < epsilon(600, 1, 0.999)


def errors_of(samples: int, seeds: range) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """For each seed, how far each pair's mean over so many rollouts is from its exact value; realised costs."""
    problem, state = diamond(Rules(charge="realised")), start(9.0, 14.0)
    planner = MCPP(problem, levels=(1, 2), samples=16, first=16)
    pairs = planner.pairs(state)
    exact = exact_values()
    rows = [planner.rollouts.wins(state, pairs, seed=seed, count=samples) / samples - exact for seed in seeds]
    return np.array(rows)


@cache
def exact_values() -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    problem, state = diamond(Rules(charge="realised")), start(9.0, 14.0)
    planner = MCPP(problem, levels=(1, 2), samples=16, first=16)
    pairs = planner.pairs(state)
    models = problem.estimates.models
    values = []
    for action, code in zip(pairs.action, pairs.continuation, strict=True):
        first = int(pairs.actions[action][0])
        launch = Launch(node="a", model=models[first // 2], count=(1, 2)[first % 2])
        policy = Seq(problem=problem, model=models[code // 2], count=(1, 2)[code % 2])
        values.append(first_then(problem, (launch,), policy, state.money_left, state.time_left_s))
    return np.array(values)


def test_estimates_are_within_their_bound_as_often_as_stated() -> None:
    samples, confidence = 64, 0.95
    wrong = np.abs(errors_of(samples, range(200)))
    bound = epsilon(samples, wrong.shape[1], confidence)
    assert (wrong.max(axis=1) > bound).mean() <= 1 - confidence
    assert wrong.max() > bound / 4


def test_errors_fall_with_the_square_root_of_the_rollouts() -> None:
    few, more = (float(np.sqrt((errors_of(samples, range(60)) ** 2).mean())) for samples in (32, 512))
    assert 3.0 < few / more < 5.3


def test_what_cannot_be_enumerated_is_refused() -> None:
    problem = diamond()
    with pytest.raises(FieldError, match="count"):
        completion(problem, Seq(problem=problem, model="quick", count=200), 1000.0, 9.0)
    with pytest.raises(FieldError, match="chain"):
        optimum(problem, (1,), 4.0, 4.0)
