"""What a rank measures of its pieces: which points, and that everything is read before a piece is timed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from stretto.comm.transport import Transport
from stretto.models.spec import ModelSpec
from stretto.train import measure
from stretto.train.job import TrainJob
from stretto.train.plan import TrainPlan
from tests.train import kit

PIECES = {f"{name}-{way}" for name in ("embed", "layer", "again", "head") for way in ("forward", "backward")}


def spec_of(job: TrainJob) -> ModelSpec:
    assert job.shape is not None
    return job.shape.spec(vocab=kit.VOCAB, positions=kit.LENGTH)


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> tuple[measure._Bench, list[str]]:
    """A bench of one rank, and what it does: "leave", "forward"."""
    job = kit.job_of()
    plan: TrainPlan = replace(kit.plan_of(job), layers=(1,))
    monkeypatch.setattr(measure, "model_of", lambda _: type("Model", (), {"spec": spec_of(job)}))
    found = measure._Bench(job, plan, Transport.start(plan.grid, rank=0, timeout_s=5.0))
    done: list[str] = []
    leave, computed = found._leave, found._computed
    monkeypatch.setattr(found, "_leave", lambda: (done.append("leave"), leave()))
    monkeypatch.setattr(found, "_computed", lambda call: (done.append("forward"), computed(call))[1])
    return found, done


def test_every_piece_has_a_point_for_every_size(bench: tuple[measure._Bench, list[str]]) -> None:
    points = bench[0].points([1, 2])
    assert PIECES | {"message", "sum", "optimizer"} == set(points)
    assert all([at for at, _ in points[piece]] == [1, 2] for piece in PIECES)
    assert all(seconds > 0 for rows in points.values() for _, seconds in rows)


def test_as_much_as_a_run_reads_is_read_before_each_way(bench: tuple[measure._Bench, list[str]]) -> None:
    found, done = bench
    weights = spec_of(found.job).parameters() * torch.float64.itemsize
    assert found.between.nbytes == pytest.approx(2 * weights, abs=4)
    found._passes(1)
    passes, messages = 4 * (measure.ROUNDS + 1), measure.ROUNDS + 1
    assert done == ["leave", "forward", "leave"] * passes + ["leave"] * messages


def test_the_optimizer_is_also_timed_over_as_much_as_a_rank_of_the_whole_model_trains(
    bench: tuple[measure._Bench, list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = bench[0]
    own = sum(parameter.numel() for parameter in found.stage.parameters())
    found.numel = 3.2 * own
    found._steps()
    assert [at for at, _ in found.found["optimizer"]] == [own, 3 * own]
    monkeypatch.setattr(measure, "_MOST_MEMORY", 0.0)
    assert found._copies() == 0
