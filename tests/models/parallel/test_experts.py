"""Expert parallelism is exact, with and without lending; the plan obeys its laws."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto.comm.grid import RankGrid
from stretto.comm.transport import alone
from stretto.core.errors import FieldError
from stretto.models.parallel.expert_plan import hot_experts, imbalance, lla_plan, native_plan, routes
from stretto.models.parallel.experts import MoE, reference
from tests.comm import pool

HERE = __name__
H, F = 6, 10
NAMES = ("router", "gate", "up", "down")


def whole(experts: int, dtype: torch.dtype = torch.float64, skew: float = 0.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) * 0.5

    found = {"router": drawn(experts, H), "gate": drawn(experts, F, H), "up": drawn(experts, F, H)}
    found["down"] = drawn(experts, H, F)
    found["router"][0] += skew  # tokens whose features are positive all like expert 0
    return found


def tokens(rank: int, rows: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.rand(rows, H, generator=generator, dtype=torch.float64).to(dtype)


def one_layer(rank: int, start: pool.Start, world: int, case: dict[str, Any]) -> dict[str, Any]:
    transport = start(RankGrid(axes=(("ep", world),)))
    axis = transport.axis("ep")
    dtype = case.get("dtype", torch.float64)
    moe = MoE(H, F, case["experts"], case["top_k"], axis, policy=case["policy"], min_tokens=case.get("min_tokens", 1))
    local = case["experts"] // world
    for name, value in whole(case["experts"], dtype, case["skew"]).items():
        part = value if name == "router" else value[rank * local : (rank + 1) * local]
        getattr(moe, name).data = part.clone()
    x = tokens(rank, case["rows"][rank], dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=case.get("autocast", False)):
        if case.get("recompute"):
            y = torch.utils.checkpoint.checkpoint(moe, x, use_reentrant=False)
        else:
            y = moe(x)
    (y * y).sum().backward()
    axis.all_reduce_(moe.router.grad)  # type: ignore[arg-type]
    assert moe.statistics is not None
    return {
        "y": y.detach().to(dtype),
        "x": x.grad,
        **{name: getattr(moe, name).grad for name in NAMES},
        "statistics": moe.statistics,
        "weights_sent": transport.meter.of("send", "ep (weights)").bytes,
    }


def check(case: dict[str, Any], world: int) -> list[dict[str, Any]]:
    found = pool.run(world, f"{HERE}:one_layer", world, case)
    dtype = case.get("dtype", torch.float64)
    parameters = {name: value.requires_grad_() for name, value in whole(case["experts"], dtype, case["skew"]).items()}
    x = torch.cat([tokens(rank, n, dtype) for rank, n in enumerate(case["rows"])]).requires_grad_()
    y = reference(x, parameters, case["top_k"])
    (y * y).sum().backward()
    tight = 0.05 if case.get("autocast") else 1e-10 if dtype == torch.float64 else 2e-5
    expected = {"y": y.detach(), "x": x.grad, **{name: parameters[name].grad for name in NAMES}}
    for name, value in expected.items():
        ours = found[0][name] if name == "router" else torch.cat([one[name] for one in found])
        torch.testing.assert_close(ours, value, rtol=tight, atol=tight, msg=lambda m, n=name: f"{n} of {case}\n{m}")
    return found


@pytest.mark.parametrize("policy", ["ep", "llep"])
@pytest.mark.parametrize("skew", [0.0, 3.0])
@pytest.mark.parametrize(("world", "rows"), [(2, [30, 30]), (2, [40, 0]), (4, [9, 1, 0, 30])])
def test_outputs_and_gradients_are_those_of_one_rank(policy: str, skew: float, world: int, rows: list[int]) -> None:
    case = {"policy": policy, "skew": skew, "rows": rows, "experts": 8, "top_k": 2}
    found = check(case, world)
    lent = found[0]["statistics"].loans
    assert (lent > 0) == (policy == "llep" and found[0]["statistics"].ratio >= 1.3)
    if skew and policy == "llep":
        assert lent
    sent = sum(one["weights_sent"] for one in found)
    assert sent == 2 * lent * 3 * H * F * 8  # there and, as gradients, back


def test_fp32_too_and_under_recomputation() -> None:
    case = {"policy": "llep", "skew": 3.0, "rows": [20, 20], "experts": 4, "top_k": 2}
    check({**case, "dtype": torch.float32}, 2)
    check({**case, "recompute": True}, 2)


@pytest.mark.parametrize("policy", ["ep", "llep"])
def test_bf16_too_where_some_ranks_have_no_row(policy: str) -> None:
    case = {"policy": policy, "skew": 9.0, "rows": [20, 20, 20, 20], "experts": 4, "top_k": 1, "min_tokens": 60}
    found = check({**case, "dtype": torch.float32, "autocast": True}, 4)
    assert min(found[0]["statistics"].loads) == 0


def test_without_a_loan_the_bits_are_those_of_plain_expert_parallelism() -> None:
    case = {"skew": 0.0, "rows": [30, 30], "experts": 4, "top_k": 2, "dtype": torch.float32}
    plain, spread = (pool.run(2, f"{HERE}:one_layer", 2, {**case, "policy": policy}) for policy in ("ep", "llep"))
    assert spread[0]["statistics"].path == "ep"
    for a, b in zip(plain, spread, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in ("y", "x", *NAMES))


def test_lending_evens_out_the_loads() -> None:
    case = {"policy": "llep", "skew": 9.0, "rows": [64, 64], "experts": 4, "top_k": 1}
    statistics = check(case, 2)[1]["statistics"]
    assert max(statistics.native_loads) == 128
    assert statistics.loads == (64, 64)
    assert statistics.path == "llep"


def test_one_rank_alone() -> None:
    moe = MoE(H, F, 4, 2, alone("ep"))
    parameters = whole(4)
    for name, value in parameters.items():
        getattr(moe, name).data = value.clone()
    x = tokens(0, 12)
    torch.testing.assert_close(moe(x), reference(x, parameters, 2), rtol=1e-12, atol=1e-12)


COUNTS = st.integers(1, 5).flatmap(
    lambda world: st.tuples(
        st.lists(st.integers(0, 400), min_size=world, max_size=4 * world).map(lambda c: c[: len(c) // world * world]),
        st.just(world),
    )
)


@given(COUNTS, st.sampled_from([1.0, 1.1, 1.5, 3.0]), st.sampled_from([0, 1, 16, 1024]))
@settings(max_examples=300, deadline=None)
def test_a_plan_tiles_every_expert_and_lends_once(case: tuple[list[int], int], alpha: float, least: int) -> None:
    counts, world = case
    plan = lla_plan(counts, world, alpha=alpha, min_tokens=least)
    each = len(counts) // world
    loads = [0] * world
    for expert, stretches in enumerate(plan.stretches):
        ends = [0, *(stretch.stop for stretch in stretches)]
        assert [stretch.start for stretch in stretches] == ends[:-1]
        assert ends[-1] == counts[expert]
        for stretch in stretches:
            assert stretch.stop > stretch.start
            loads[stretch.place] += stretch.stop - stretch.start
    assert tuple(loads) == plan.loads
    foreign = {(e, s.place) for e, each_ in enumerate(plan.stretches) for s in each_ if s.place != e // each}
    assert {(loan.expert, loan.helper) for loan in plan.loans} == foreign
    assert len(plan.loans) == len(foreign)
    assert all(loan.owner == loan.expert // each for loan in plan.loans)
    if least <= 1:
        assert max(loads) <= max(plan.native_loads)
        capacity = max(1, int(alpha * (sum(counts) // world)))
        assert max(loads) <= capacity + world
    json.dumps(plan.to_dict())


@given(COUNTS, st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None)
def test_routes_lead_every_copy_where_the_plan_says(case: tuple[list[int], int], random: Any) -> None:
    totals, world = case
    counts = np.zeros((world, len(totals)), np.int64)
    for expert, count in enumerate(totals):
        for _ in range(count):
            counts[random.randrange(world), expert] += 1
    plan = lla_plan(totals, world, min_tokens=1)
    seen = [routes(plan, counts, place) for place in range(world)]
    for place, one in enumerate(seen):
        assert (one.send.sum(1) == counts[place]).all()
        assert int(one.arrive.sum()) == plan.loads[place]
        for other in range(world):
            assert (one.send[:, other] == seen[other].arrive[place]).all()


def test_the_listed_examples() -> None:
    assert lla_plan([10, 10, 10, 10], 2).loans == ()
    plan = lla_plan([800, 0, 0, 0, 0, 0, 0, 0], 8, min_tokens=1)
    assert plan.loads == (100,) * 8
    assert len(plan.loans) == 7
    assert lla_plan([80, 20], 1).loads == (100,)
    assert lla_plan([80, 20], 2, alpha=1.7).loans == ()
    assert lla_plan([80, 20], 2, min_tokens=1024).loads == (50, 50), "all that is left may go, however little"
    assert imbalance([80, 20], 2) == pytest.approx(1.6)
    assert imbalance([0, 0], 2) == 1.0
    assert native_plan([3, 0], 2).stretches == (((0, 0, 3),), ())


@pytest.mark.parametrize("hot", [1, 4, 16])
def test_a_higher_capacity_never_lends_more_of_hot_experts(hot: int) -> None:
    ids = hot_experts(4096, 128, 4, share=0.8, hot=hot)
    counts = np.bincount(ids.flatten(), minlength=128)
    lent = [len(lla_plan(counts, 8, alpha=alpha, min_tokens=1).loans) for alpha in (1.0, 1.1, 1.5, 2.0, 4.0, 8.0)]
    assert lent == sorted(lent, reverse=True)
    assert lent[-1] == 0


def test_planning_is_quick() -> None:
    counts = np.bincount(hot_experts(65536, 384, 8, share=0.5, hot=8).flatten(), minlength=384)
    seconds = []
    for _ in range(20):
        begun = time.perf_counter()
        lla_plan(counts, 64)
        seconds.append(time.perf_counter() - begun)
    assert min(seconds) < 0.002


def test_bad_input_is_named() -> None:
    for call, said in (
        (lambda: lla_plan([1, 2, 3], 2), "experts is 3; it must be a multiple of the 2"),
        (lambda: lla_plan([1, -2], 2), "counts is -2"),
        (lambda: lla_plan([1, 2], 2, alpha=0.0), "alpha is 0.0"),
        (lambda: MoE(H, F, 4, 5, alone("ep")), "top_k is 5; it must be from 1 to 4"),
        (lambda: hot_experts(4, 4, 1, share=2.0, hot=1), "share is 2.0"),
    ):
        with pytest.raises(FieldError, match=said):
            call()


def test_a_helper_with_tokens_of_its_own_to_come_is_not_free() -> None:
    plan = lla_plan([300, 90, 10], 3, min_tokens=1)
    assert [stretch.place for stretch in plan.stretches[0]][:3] == [0, 2, 1]
    assert [stretch.stop - stretch.start for stretch in plan.stretches[0]][:2] == [133, 123]


def test_the_busiest_expert_is_placed_first() -> None:
    plan = lla_plan([60, 100, 0, 0], 2, min_tokens=1)
    assert [tuple(loan) for loan in plan.loans] == [(1, 0, 1)]
    assert plan.loads == (80, 80)


def test_a_helper_takes_no_less_than_the_least_part_or_all_that_is_left() -> None:
    plan = lla_plan([400, 90, 90, 20], 4, min_tokens=100)
    assert [(each.place, each.stop - each.start) for each in plan.stretches[0]] == [(0, 150), (3, 130), (1, 120)]
