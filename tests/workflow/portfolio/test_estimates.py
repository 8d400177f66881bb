"""Workflows and estimates: what they hold, and what is refused, by node and model."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from stretto.core.errors import FieldError
from stretto.workflow.portfolio.estimates import MAX_NODES, Estimates, Rollout, Workflow
from stretto.workflow.portfolio.laws import LEAST_LATENCY_S, MAX_ROWS, Law, Moments
from stretto.workflow.portfolio.problem import Launch, Problem, Rules

from .kit import chain, law


def test_ready_nodes_have_all_parents_done() -> None:
    workflow = Workflow(nodes=("a", "b", "c"), edges=(("a", "c"), ("b", "c")))
    assert workflow.ready((), ()) == ("a", "b")
    assert workflow.ready(("a",), ("b",)) == ()
    assert workflow.ready(("a", "b"), ()) == ("c",)
    assert workflow.parents("c") == ("a", "b")


def test_the_order_has_parents_first() -> None:
    workflow = Workflow(nodes=("c", "b", "a"), edges=(("a", "b"), ("b", "c")))
    assert workflow.order == ("a", "b", "c")


@pytest.mark.parametrize(
    ("nodes", "edges", "words"),
    [
        ((), (), "nodes is '0 names'"),
        (tuple(f"n{at}" for at in range(MAX_NODES + 1)), (), "1 to 64"),
        (("a", "a"), (), "nodes.1 is 'a'; it must be named once"),
        (("a", ""), (), "nodes.1"),
        (("a", "b"), (("a", "x"),), "edges.0.*'x' is none"),
        (("a", "b"), (("a", "b"), ("x", "b")), "edges.1.*'x' is none"),
        (("a", "b", "c"), (("a", "b"), ("b", "c"), ("c", "b")), "b -> c -> b|c -> b -> c"),
        (("a",), (("a", "a"),), "a -> a"),
    ],
)
def test_a_bad_workflow_is_refused_by_name(nodes: Any, edges: Any, words: str) -> None:
    with pytest.raises(FieldError, match=words):
        Workflow(nodes=nodes, edges=edges)


def test_one_row_is_kept_whole() -> None:
    rows = [Rollout(node="a", model="m", latency_s=3.0, success=True, cost=7.0)]
    rows += [Rollout(node="a", model="m", latency_s=1.0, success=False, cost=9.0)]
    found = Estimates.from_rollouts(rows).law("a", "m")
    assert (found.latency_s, found.success, found.cost) == ((1.0, 3.0), (0.0, 1.0), (9.0, 7.0))
    assert (found.bound, found.success_rate, found.mean_latency_s, found.mean_cost) == (9.0, 0.5, 2.0, 8.0)


ROW = Rollout(node="a", model="m", latency_s=3.0, success=True, tokens=2000, cost=7.0)


@pytest.mark.parametrize(("mode", "cost"), [("cost", 7.0), ("tokens", 2000.0), ("latency", 3.0), ("money", 0.005)])
def test_cost_modes(mode: Any, cost: float) -> None:
    found = Estimates.from_rollouts([ROW], cost=mode, prices={"m": 2.5})
    assert found.law("a", "m").cost == (cost,)


def test_a_bound_is_reserved_and_covers_what_was_seen() -> None:
    assert Estimates.from_rollouts([ROW], bounds={"m": 10.0}).law("a", "m").bound == 10.0
    with pytest.raises(FieldError, match=r"a on m: bound is 6\.0.*at least 7"):
        Estimates.from_rollouts([ROW], bounds={"m": 6.0})


def test_a_missing_price_is_named() -> None:
    with pytest.raises(FieldError, match=r"prices.*given for m, which a was tried on"):
        Estimates.from_rollouts([ROW], cost="money", prices={"other": 1.0})
    with pytest.raises(FieldError, match="cost is 'gold'"):
        Estimates.from_rollouts([ROW], cost="gold")  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0])
@pytest.mark.parametrize("name", ["latency_s", "cost"])
def test_rows_are_finite_and_not_negative(name: str, value: float) -> None:
    with pytest.raises(FieldError, match=f"a on m: {name}"):
        Rollout(**{"node": "a", "model": "m", "latency_s": 1.0, "success": True, name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"latency_s": ()}, "rows is 0"),
        ({"latency_s": (0.0,) * (MAX_ROWS + 1)}, f"1 to {MAX_ROWS}"),
        ({"success": (0.5, 0.5)}, "one a row"),
        ({"cost": ()}, "one a row"),
        ({"latency_s": (math.nan,)}, "latency_s is nan"),
        ({"success": (1.5,)}, r"success is 1\.5.*in 0 \.\. 1"),
        ({"cost": (math.nan,)}, "cost is nan"),
        ({"cost": (-1.0,)}, r"cost is -1\.0"),
        ({"bound": math.inf}, "bound is inf"),
        ({"bound": 0.5}, r"bound is 0\.5"),
    ],
)
def test_a_bad_law_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(FieldError, match=words):
        Law(**{"latency_s": (1.0,), "success": (1.0,), "cost": (1.0,), "bound": 1.0, **fields})


def test_rows_of_a_law_are_sorted() -> None:
    with pytest.raises(FieldError, match="ascending"):
        Law(latency_s=(2.0, 1.0), success=(1.0, 1.0), cost=(1.0, 1.0), bound=1.0)


@pytest.mark.parametrize("shape", ["lognormal", "gamma", "gaussian"])
@pytest.mark.parametrize("variation", [0.1, 0.5, 1.0])
def test_moments_are_kept(shape: Any, variation: float) -> None:
    found = Moments(success=0.4, latency_s=5.0, latency_std_s=5.0 * variation, cost=2.0, shape=shape).law()
    assert (found.success_rate, found.mean_cost, found.bound) == (pytest.approx(0.4), 2.0, 2.0)
    assert min(found.latency_s) >= LEAST_LATENCY_S
    if shape != "gaussian" or variation < 0.3:
        assert found.mean_latency_s == pytest.approx(5.0, rel=1e-3)
        assert float(np.std(found.latency_s)) == pytest.approx(5.0 * variation, rel=0.03)


def test_shapes_differ_in_their_tails() -> None:
    tails = {
        shape: Moments(success=1.0, latency_s=1.0, latency_std_s=0.8, shape=shape).law().latency_s[-1]  # type: ignore[arg-type]
        for shape in ("gaussian", "gamma", "lognormal")
    }
    assert tails["gaussian"] < tails["gamma"] < tails["lognormal"]


@pytest.mark.parametrize(
    "fields",
    [{"success": -0.1}, {"success": math.nan}, {"latency_s": 0.0}, {"latency_std_s": math.inf}, {"cost": math.nan}]
    + [{"shape": "uniform"}],
)
def test_bad_moments_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(FieldError, match=next(iter(fields))):
        Moments(**{"success": 0.5, "latency_s": 1.0, **fields})


def test_a_problem_has_a_model_for_each_node_and_no_other() -> None:
    known = chain(2).estimates
    with pytest.raises(FieldError, match=r"estimates\.n2.*the node has no model"):
        Problem(workflow=Workflow(nodes=("n0", "n1", "n2")), estimates=known)
    with pytest.raises(FieldError, match=r"estimates\.n1 is 'n1'; it must be a node of the workflow"):
        Problem(workflow=Workflow(nodes=("n0",)), estimates=known)
    with pytest.raises(FieldError, match=r"laws\.a is \{\}"):
        Estimates(laws={"a": {}})
    with pytest.raises(FieldError, match="at most 16 models"):
        Estimates(laws={"a": {f"m{at}": law([(1.0, 1.0, 1.0)]) for at in range(17)}})


def test_a_node_without_a_model_is_tried_on_its_first() -> None:
    one, other = law([(1.0, 1.0, 1.0)]), law([(2.0, 1.0, 1.0)])
    known = Estimates(laws={"a": {"x": one, "y": other}, "b": {"y": other}})
    problem = Problem(workflow=Workflow(nodes=("a", "b")), estimates=known)
    assert known.law("b", "x") is other
    assert problem.laws[problem.law_index(1, 0)] is other


@pytest.mark.parametrize("fields", [{"charge": "later"}, {"ends": "never"}, {"refund": 1.5}, {"refund": math.nan}])
def test_bad_rules_are_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(FieldError, match=next(iter(fields))):
        Rules(**fields)


@pytest.mark.parametrize("count", [0, -1, 1025])
def test_a_launch_has_samples(count: int) -> None:
    with pytest.raises(FieldError, match="a: count"):
        Launch(node="a", model="m", count=count)
