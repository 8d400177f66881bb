"""The sharing engine against progressive filling from scratch, and against fairness itself."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.core.fluid import CoRunTable, Fluid

from .oracles import Flow, fair_rates


def names(use: dict[int, float]) -> dict[str, float]:
    return {f"r{r}": amount for r, amount in use.items()}


class Pair:
    """The engine beside a list of flows that is advanced by the oracle's rates."""

    def __init__(self, capacity: list[float]) -> None:
        self.capacity = capacity
        self.fluid = Fluid(names(dict(enumerate(capacity))))
        self.flows: dict[int, Flow] = {}

    def start(self, flow: Flow) -> None:
        task = self.fluid.start(flow.left, names(flow.use), flow.peak, flow.weight)
        self.flows[task] = flow

    def rates(self) -> dict[int, float]:
        return dict(zip(self.flows, fair_rates(list(self.flows.values()), self.capacity), strict=True))

    def step(self) -> None:
        rates = self.rates()
        completion = self.fluid.next_completion()
        assert completion is not None
        at, first = completion
        seconds = at - self.fluid.now
        expected = min(flow.left / rates[i] for i, flow in self.flows.items())
        assert seconds == pytest.approx(expected, rel=1e-6, abs=1e-9)
        done = self.fluid.advance(at)
        assert first in done
        for i, flow in self.flows.items():
            flow.left -= rates[i] * seconds
        for i in done:
            assert self.flows.pop(i).left == pytest.approx(0, abs=1e-6)

    def check(self) -> None:
        for i, rate in self.rates().items():
            assert self.fluid.rate(i) == pytest.approx(rate, rel=1e-9)


def random_flow(rng: random.Random, num_resources: int) -> Flow:
    chosen = rng.sample(range(num_resources), rng.randint(0, min(3, num_resources)))
    use = {r: rng.choice([0.25, 0.5, 1.0, rng.uniform(0.1, 3)]) for r in chosen}
    peak = rng.choice([1.0, rng.uniform(0.2, 4), math.inf]) if use else rng.uniform(0.5, 2)
    return Flow(use, peak, rng.choice([1.0, 1.0, 2.0, rng.uniform(0.3, 3)]), rng.uniform(0.1, 5))


@settings(max_examples=120, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 12), st.integers(1, 25))
def test_rates_and_completions_equal_progressive_filling(seed: int, num_resources: int, busy: int) -> None:
    rng = random.Random(seed)
    pair = Pair([rng.choice([1.0, 2.0, rng.uniform(0.5, 5)]) for _ in range(num_resources)])
    for _ in range(40):
        action = rng.random()
        if len(pair.flows) < busy and action < 0.65:
            pair.start(random_flow(rng, num_resources))
        elif pair.flows and action < 0.75:
            task = rng.choice(list(pair.flows))
            assert pair.fluid.cancel(task) == pytest.approx(pair.flows.pop(task).left, rel=1e-6, abs=1e-9)
        elif pair.flows:
            pair.step()
        if rng.random() < 0.5:
            pair.check()
    pair.check()


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 6), st.integers(1, 12))
def test_no_task_can_gain_but_from_one_that_is_better_off(seed: int, num_resources: int, size: int) -> None:
    rng = random.Random(seed)
    capacity = [rng.uniform(0.5, 5) for _ in range(num_resources)]
    flows = [random_flow(rng, num_resources) for _ in range(size)]
    fluid = Fluid(names(dict(enumerate(capacity))))
    rates = [fluid.rate(fluid.start(1.0, names(flow.use), flow.peak, flow.weight)) for flow in flows]
    # The rates above were asked for one by one, as tasks came; ask again now that all run.
    rates = [fluid.rate(i) for i in range(size)]
    level = [x / (flow.weight * flow.alone(capacity)) for x, flow in zip(rates, flows, strict=True)]
    used = [sum(flow.use.get(r, 0) * x for x, flow in zip(rates, flows, strict=True)) for r in range(num_resources)]
    assert all(u <= c * (1 + 1e-9) for u, c in zip(used, capacity, strict=True))
    for r in range(num_resources):
        assert fluid.in_use(f"r{r}") == pytest.approx(used[r])
    for i, flow in enumerate(flows):
        if rates[i] >= flow.alone(capacity) * (1 - 1e-9):
            continue
        bottlenecks = [
            r
            for r in flow.use
            if used[r] >= capacity[r] * (1 - 1e-9)
            and all(level[j] <= level[i] * (1 + 1e-9) for j in range(size) if r in flows[j].use)
        ]
        assert bottlenecks, f"task {i} could gain from one that is better off"


def test_two_alike_share_equally_and_end_together_by_id() -> None:
    fluid = Fluid({"m": 100.0})
    tasks = [fluid.start(10.0, {"m": 10.0}, peak=10.0) for _ in range(3)]
    assert fluid.next_completion() == (3.0, 0)
    assert fluid.in_use("m") == pytest.approx(100.0)
    assert fluid.advance(3.0) == tasks
    assert fluid.next_completion() is None
    assert len(fluid) == 0


def test_slowdown_is_equal_not_the_rate() -> None:
    fluid = Fluid({"m": 100.0})
    big = fluid.start(1.0, {"m": 1.0}, peak=100.0)
    small = fluid.start(1.0, {"m": 1.0}, peak=50.0)
    assert fluid.rate(big) / 100.0 == pytest.approx(fluid.rate(small) / 50.0)
    assert fluid.rate(big) + fluid.rate(small) == pytest.approx(100.0)


def test_weights_divide_a_bottleneck() -> None:
    fluid = Fluid({"m": 9.0})
    light, heavy = (fluid.start(1.0, {"m": 1.0}, weight=weight) for weight in (1.0, 2.0))
    assert (fluid.rate(light), fluid.rate(heavy)) == (pytest.approx(3.0), pytest.approx(6.0))


def test_cancel_returns_what_is_left_and_frees_the_resource() -> None:
    fluid = Fluid({"m": 10.0})
    first, second = (fluid.start(20.0, {"m": 1.0}, peak=10.0) for _ in range(2))
    assert fluid.advance(1.0) == []
    assert fluid.cancel(first) == pytest.approx(15.0)
    assert fluid.rate(second) == pytest.approx(10.0)
    assert fluid.next_completion() == (pytest.approx(2.5), second)


def test_two_engines_do_not_disturb_each_other() -> None:
    def lived(other: Fluid | None) -> list[tuple[float, int]]:
        rng = random.Random(3)
        fluid = Fluid({"r0": 1.0, "r1": 2.0})
        seen = []
        for _ in range(50):
            flow = random_flow(rng, 2)
            fluid.start(flow.left, names(flow.use), flow.peak, flow.weight)
            if other is not None:
                other.start(1.0, {"x": 1.0})
                other.advance(other.now + 0.1)
            completion = fluid.next_completion()
            assert completion is not None
            seen += [(completion[0], task) for task in fluid.advance(completion[0])]
        return seen

    assert lived(None) == lived(Fluid({"x": 1.0}))


def test_co_run_table_sets_each_kinds_share() -> None:
    table = CoRunTable(shares={("decode", "prefill"): (0.5, 0.8), ("decode", "decode", "prefill"): (0.4, 0.4, 0.7)})
    fluid = Fluid({"gpu": 1.0}, table)
    prefill = fluid.start(8.0, {"gpu": 1.0}, peak=1.0, kind="prefill")
    assert fluid.rate(prefill) == 1.0
    decode = fluid.start(1.0, {"gpu": 1.0}, peak=1.0, kind="decode")
    assert (fluid.rate(prefill), fluid.rate(decode)) == (0.8, 0.5)
    third = fluid.start(1.0, {"gpu": 1.0}, peak=1.0, kind="decode")
    assert (fluid.rate(prefill), fluid.rate(third)) == (0.7, 0.4)
    assert fluid.advance(2.5) == [decode, third]
    assert fluid.rate(prefill) == 1.0
    assert fluid.next_completion() == (pytest.approx(2.5 + 8.0 - 2.5 * 0.7), prefill)
    fluid.start(1.0, {"gpu": 1.0}, peak=1.0, kind="prefill")
    with pytest.raises(ValueError, match=r"no row for \(prefill, prefill\)"):
        fluid.next_completion()


@pytest.mark.parametrize(
    ("shares", "problem"),
    [
        ({("b", "a"): (1.0, 1.0)}, "sorted"),
        ({("a", "b"): (1.0,)}, "one share a kind"),
        ({("a", "a"): (0.5, 0.6)}, "two shares"),
        ({("a", "b"): (0.0, 1.0)}, "must lie in"),
    ],
)
def test_unlawful_tables(shares: dict[tuple[str, ...], tuple[float, ...]], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        CoRunTable(shares=shares)


def test_unlawful_starts_and_steps() -> None:
    fluid = Fluid({"m": 1.0})
    for arguments, problem in [
        ({"work": 1.0, "use": {"x": 1.0}}, "unknown resource x"),
        ({"work": 1.0, "use": {"m": -1.0}}, "must not be negative"),
        ({"work": -1.0, "use": {"m": 1.0}}, "work"),
        ({"work": 1.0, "use": {}}, "rate alone"),
        ({"work": 1.0, "use": {"m": 1.0}, "weight": 0.0}, "weight"),
    ]:
        with pytest.raises(ValueError, match=problem):
            fluid.start(**arguments)
    fluid.advance(1.0)
    with pytest.raises(ValueError, match="cannot advance"):
        fluid.advance(0.5)
    with pytest.raises(IndexError, match="not running"):
        fluid.rate(7)
    with pytest.raises(ValueError, match="law"):
        Fluid({"m": 1.0}, "fifo")  # type: ignore[arg-type]
