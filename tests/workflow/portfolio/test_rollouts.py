"""Native rollouts equal their plain twin bit for bit, and the simulated world, whose samples settle one by one."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.core.errors import FieldError
from stretto.core.random import words
from stretto.workflow.portfolio import plain
from stretto.workflow.portfolio.baselines import Seq
from stretto.workflow.portfolio.draws import IN_FLIGHT, Draws, remainders, samples
from stretto.workflow.portfolio.problem import Action, Launch, Problem, Rules
from stretto.workflow.portfolio.rollouts import Pairs, Rollouts
from stretto.workflow.portfolio.simulate import simulate
from stretto.workflow.portfolio.state import Flight, State

from .kit import ALL_RULES, law, random_problem, start

LEVELS = (1, 2, 5, 16)
ROLLOUTS = 24


def all_pairs(rollouts: Rollouts, actions: list[Action]) -> tuple[Pairs, list[tuple[Action, str, int]]]:
    continuations = list(itertools.product(rollouts.problem.estimates.models, rollouts.levels))
    named = [(action, *each) for action in actions for each in continuations]
    return (
        Pairs(
            actions=np.array([rollouts.codes(action) for action in actions], dtype=np.int32),
            action=np.repeat(np.arange(len(actions), dtype=np.int32), len(continuations)),
            continuation=np.array([rollouts.code(model, count) for _, model, count in named], dtype=np.int32),
        ),
        named,
    )


def uniform_actions(problem: Problem, state: State) -> list[Action]:
    ready = problem.workflow.ready(state.done, [flight.node for flight in state.flights])
    return [
        tuple(Launch(node=node, model=model, count=count) for node in ready)
        for model in problem.estimates.models
        for count in LEVELS[:3]
    ]


def compare(problem: Problem, state: State, seed: int) -> int:
    rollouts = Rollouts(problem, LEVELS)
    pairs, named = all_pairs(rollouts, uniform_actions(problem, state))
    draws = Draws(seed, start=3, count=ROLLOUTS)
    expected = [
        sum(plain.wins(problem, state, *each, draws, rollout) for rollout in range(3, 3 + ROLLOUTS)) for each in named
    ]
    found = rollouts.wins(state, pairs, seed=seed, start=3, count=ROLLOUTS).tolist()
    assert found == expected
    return sum(expected)


@pytest.mark.parametrize("rules", ALL_RULES, ids=str)
def test_native_equals_plain_from_the_start(rules: Rules) -> None:
    won = [compare(random_problem(seed, rules), start(9.0, 30.0), seed) for seed in range(6)]
    assert sum(map(bool, won)) > 0


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rules=st.sampled_from(ALL_RULES),
    elapsed_s=st.sampled_from([0.0, 0.5, 0.75, 3.0, 100.0]),
    running=st.integers(1, 6),
    succeeded=st.booleans(),
    remaining_s=st.one_of(st.none(), st.floats(0.1, 5.0)),
)
def test_native_equals_plain_with_samples_in_flight(
    seed: int, rules: Rules, elapsed_s: float, running: int, succeeded: bool, remaining_s: float | None
) -> None:
    problem = random_problem(seed, rules, nodes=4)
    flight = Flight(
        node="n0",
        model=problem.estimates.models[-1],
        elapsed_s=elapsed_s,
        running=running,
        succeeded=succeeded,
        remaining_s=None if remaining_s is None else (remaining_s,) * running,
    )
    compare(problem, State(done=frozenset(), time_left_s=12.0, money_left=40.0, flights=(flight,)), seed)


@pytest.mark.parametrize("threads", [2, 3, 5])
def test_the_number_of_threads_changes_nothing(threads: int) -> None:
    problem, state = random_problem(5, nodes=6), start(12.0, 60.0)
    one, many = Rollouts(problem, LEVELS), Rollouts(problem, LEVELS, threads=threads)
    pairs, _ = all_pairs(one, uniform_actions(problem, state))
    found = one.wins(state, pairs, seed=1, count=101)
    assert found.any()
    assert (many.wins(state, pairs, seed=1, count=101) == found).all()


def test_rollouts_are_the_same_in_any_blocks_and_company() -> None:
    problem, state = random_problem(7, nodes=5), start(12.0, 60.0)
    rollouts = Rollouts(problem, LEVELS)
    pairs, _ = all_pairs(rollouts, uniform_actions(problem, state))
    whole = rollouts.wins(state, pairs, seed=1, count=40)
    first = rollouts.wins(state, pairs, seed=1, count=17)
    rest = rollouts.wins(state, pairs, seed=1, start=17, count=23)
    assert (whole == first + rest).all()
    some = np.arange(len(pairs))[::5]
    assert (rollouts.wins(state, pairs.take(some), seed=1, count=40) == whole[some]).all()


@pytest.mark.parametrize("ends", ["batch", "first"])
@pytest.mark.parametrize("seed", range(6))
def test_rollouts_of_a_fixed_policy_equal_the_simulated_world(seed: int, ends: str) -> None:
    problem = random_problem(seed, Rules(charge="realised", ends=ends))  # type: ignore[arg-type]
    for model, count in itertools.product(problem.estimates.models, (1, 5)):
        policy = Seq(problem=problem, model=model, count=count)
        world = simulate(problem, policy, 40.0, 9.0, trials=30, seed=11)
        won, seconds, spent = Rollouts(problem, LEVELS).outcomes(start(9.0, 40.0), model, count, seed=11, rollouts=30)
        assert (won == world.completed).all()
        assert seconds[won] == pytest.approx(world.seconds[won])
        assert spent[won] == pytest.approx(world.spent[won])


def test_the_words_are_those_of_the_core() -> None:
    draws = Draws(9, start=5, count=3)
    assert list(draws.words(6, 4, 2, 7)[4:]) == words(9, 1 << 32 | 4, 2 << 32 | 6)[:3].tolist()
    assert list(draws.words(7, 4, 0, 4, in_flight=True)) == words(9, IN_FLIGHT << 32 | 4, 7).tolist()


def test_rows_are_drawn_alike_often_and_whole() -> None:
    table = law([(1.0, 0.0, 5.0), (2.0, 0.25, 6.0), (3.0, 1.0, 7.0)])
    drawn = samples(table, Draws(1, count=1).words(0, 0, 0, 30_000))
    for at, latency_s in enumerate(table.latency_s):
        rows = [each for each in drawn if each.latency_s == latency_s]
        assert len(rows) / len(drawn) == pytest.approx(1 / 3, abs=0.01)
        assert {each.cost for each in rows} == {table.cost[at]}
        assert sum(each.success for each in rows) / len(rows) == pytest.approx(table.success[at], abs=0.02)


def test_a_remainder_is_of_the_rows_that_are_longer() -> None:
    table = law([(1.0, 0.0, 5.0), (2.0, 0.25, 6.0), (3.0, 1.0, 7.0), (3.0, 1.0, 8.0)])
    drawn = remainders(table, Draws(1, count=1).words(0, 0, 0, 30_000), 1.0)
    shares = {cost: sum(each.cost == cost for each in drawn) / len(drawn) for cost in table.cost}
    assert shares == pytest.approx({5.0: 0.0, 6.0: 1 / 3, 7.0: 1 / 3, 8.0: 1 / 3}, abs=0.01)
    late = remainders(table, [0, 2**32 - 1], 4.0)
    assert [(each.latency_s, each.cost) for each in late] == [(8.0, 8.0)] * 2


def test_sixty_four_nodes_fit() -> None:
    problem = random_problem(3, nodes=64, rows=1)
    state = State(done=frozenset(problem.workflow.nodes[:-1]), time_left_s=50.0, money_left=50.0)
    last = problem.workflow.nodes[-1]
    rollouts = Rollouts(problem, (1,))
    pairs, named = all_pairs(rollouts, [(Launch(node=last, model=problem.estimates.models[0], count=1),)])
    expected = [plain.wins(problem, state, *each, Draws(0, count=1), 0) for each in named]
    assert rollouts.wins(state, pairs, seed=0, count=1).tolist() == expected


@pytest.mark.parametrize("levels", [(), (0, 1), (2, 1), (1, 1), (1, 2000)])
def test_bad_levels_are_refused(levels: tuple[int, ...]) -> None:
    with pytest.raises(FieldError, match="levels"):
        Rollouts(random_problem(1), levels)
