"""A forecast is the plan's own table laid out with the costs of its pieces."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stretto.files import load_cluster
from stretto.hardware.cluster import Cluster
from stretto.train import costs
from stretto.train.job import TrainJob
from stretto.train.memory import peak_bytes
from stretto.train.plan import TrainPlan
from stretto.train.predict import play, predict
from stretto.train.prepare import _bench
from tests.train import kit

NODE = load_cluster(Path(__file__).parents[2] / "clusters" / "8xa100.yaml")
JOB = kit.job_of()
SPEC = kit.DENSE.spec(vocab=kit.VOCAB, positions=kit.LENGTH)
FORWARD, BACKWARD, HEAD, EMBED, MESSAGE, SUM, STEP = 1.0, 2.0, 0.5, 0.25, 0.125, 3.0, 4.0


def plan_of(**choices: Any) -> TrainPlan:
    plan = kit.plan_of(JOB, **choices)
    return replace(plan, devices=tuple(f"node0/gpu{rank}" for rank in range(plan.grid.world)))


def measured(plan: TrainPlan, message: float = MESSAGE) -> Cluster:
    """The node as if the plan's pieces had been timed on it, all the same for any size."""
    seconds = {
        "layer-forward": FORWARD,
        "layer-backward": BACKWARD,
        "head-forward": HEAD,
        "head-backward": HEAD,
        "embed-forward": EMBED,
        "embed-backward": EMBED,
        "message": message,
        "sum": SUM,
        "optimizer": STEP,
    }
    points = {piece: [(1.0, value), (1e9, value)] for piece, value in seconds.items()}
    tables = costs.tables(JOB, _bench(plan), SPEC, [points])
    return NODE.with_measured(plan.devices[0], tables)


def step_s(plan: TrainPlan, message: float = MESSAGE) -> float:
    return play(JOB, plan, SPEC, measured(plan, message), steps=1).makespan


def test_one_rank_is_the_sum_of_its_pieces() -> None:
    passes = 4 * (4 * (FORWARD + BACKWARD) + 2 * HEAD + 2 * EMBED)
    assert step_s(plan_of(micro_batch=2)) == pytest.approx(passes + STEP)
    again = 4 * 4 * FORWARD
    assert step_s(plan_of(micro_batch=2, recompute=True)) == pytest.approx(passes + again + STEP)


def test_data_ranks_add_their_sum() -> None:
    passes = 2 * (4 * (FORWARD + BACKWARD) + 2 * HEAD + 2 * EMBED)
    assert step_s(plan_of(dp=2, micro_batch=2)) == pytest.approx(passes + SUM + STEP)


@pytest.mark.parametrize("schedule", ["fill-drain", "1f1b"])
@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_a_pipeline_has_the_bubble_of_its_order(schedule: str, count: int) -> None:
    plan = plan_of(pp=2, micro_batch=8 // count, schedule=schedule)
    trace = play(JOB, plan, SPEC, measured(plan, 1e-9), steps=1)
    # stages of 2 layers; the last has the head, the first the embedding
    first, last = 2 * (FORWARD + BACKWARD) + 2 * EMBED, 2 * (FORWARD + BACKWARD) + 2 * HEAD
    ends = {span.key.rank: span.finish for span in trace if span.key.phase == "backward"}
    assert max(ends.values()) == pytest.approx(count * last + first, rel=0.02)


def test_messages_travel_beside_the_computing() -> None:
    plan = plan_of(pp=2, micro_batch=1)
    free, slow = step_s(plan, 1e-9), step_s(plan, MESSAGE)
    assert free < slow <= free + 4 * MESSAGE  # only those of the first and the last pass are waited for


def test_two_steps_take_twice_as_long() -> None:
    plan = plan_of(pp=2, micro_batch=2)
    one, two = (play(JOB, plan, SPEC, measured(plan), steps=steps).makespan for steps in (1, 2))
    assert two == pytest.approx(2 * one, rel=1e-6)


def test_what_a_prediction_says() -> None:
    plan = plan_of(pp=2, micro_batch=2)
    found = predict(JOB, plan, SPEC, measured(plan))
    step = found.metrics["step"].value
    assert step.value == pytest.approx(step_s(plan))
    assert step.low < step.value < step.high
    assert found.metrics["seconds"].value.value == pytest.approx(3 * step.value)
    assert found.metrics["throughput"].value.value == pytest.approx(8 * kit.LENGTH / step.value)
    assert found.metrics["memory"].value.value == max(peak_bytes(JOB, plan, SPEC))
    assert "measured pieces" in found.assumed
    assert "ranks idle" in found.bottleneck
    unknown = predict(JOB, plan, SPEC, NODE)
    assert "not measured on this machine" in unknown.assumed
    spread = unknown.metrics["step"].value
    assert spread.high / spread.value > step.high / step.value


def test_a_table_is_used_for_its_own_cut_alone() -> None:
    cluster = measured(plan_of(tp=2))
    assert "measured pieces" in predict(JOB, plan_of(tp=2), SPEC, cluster).assumed
    for other in (plan_of(dp=2), plan_of(cp=2), plan_of(tp=3), plan_of()):
        assert "not measured" in predict(JOB, other, SPEC, cluster).assumed
    longer: TrainJob = replace(JOB, sequence=16)
    assert "not measured" in predict(longer, plan_of(tp=2), SPEC, cluster).assumed


def test_the_slowest_rank_counts() -> None:
    plan = plan_of(dp=2)
    points = [{"layer-forward": [(1.0, seconds)]} for seconds in (1.0, 3.0)]
    (table,) = costs.tables(JOB, plan, SPEC, points).values()
    assert table.at(1.0).value == 3.0
