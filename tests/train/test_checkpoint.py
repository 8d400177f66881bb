"""A checkpoint is whole or not there, and any layout goes on from any other's."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from stretto.comm.grid import RankGrid
from stretto.core.errors import UserError
from stretto.train import checkpoint
from stretto.train.job import Optimizer, TrainJob
from stretto.train.plan import TrainPlan
from stretto.train.session import _require_one_step
from stretto.train.trainer import Trainer
from tests.comm import pool
from tests.train import kit

HERE = __name__


def steps(
    rank: int, start: pool.Start, job: TrainJob, plan: TrainPlan, folder: str, save_after: int, more: int
) -> dict[str, Any]:
    """Go on from the newest checkpoint if there is one; some steps, a checkpoint, and some more."""
    transport = start(plan.grid)
    assert job.shape is not None
    spec = job.shape.spec(vocab=kit.VOCAB, positions=kit.LENGTH)
    trainer = Trainer(job, plan, spec, None, *kit.samples(), transport)
    found = checkpoint.newest(Path(folder))
    if found is not None:
        checkpoint.load(trainer, found)
    state = {
        name: (place, trainer.optimizer.state[p]["exp_avg_sq"].clone())
        for name, p, place in zip(
            trainer.trained.names, trainer.trained.parameters, trainer.trained.places, strict=True
        )
        if found is not None
    }
    weights = {
        name: (place, p.detach().clone())
        for name, p, place in zip(
            trainer.trained.names, trainer.trained.parameters, trainer.trained.places, strict=True
        )
    }
    losses = [trainer.train_step().loss for _ in range(save_after)]
    if save_after:
        checkpoint.save(trainer, Path(folder), keep=2)
    losses += [trainer.train_step().loss for _ in range(more)]
    return {"losses": losses, "step": trainer.step, "weights": weights, "moments": state}


def go(job: TrainJob, plan: TrainPlan, folder: Path, save_after: int, more: int) -> list[dict[str, Any]]:
    return pool.run(plan.grid.world, f"{HERE}:steps", job, plan, str(folder), save_after, more)


LAYOUTS: list[dict[str, Any]] = [
    {"micro_batch": 2},
    {"dp": 2, "micro_batch": 2},
    {"tp": 3, "micro_batch": 2},
    {"pp": 2, "micro_batch": 2, "schedule": "interleaved", "chunks": 2},
    {"pp": 2, "tp": 2, "micro_batch": 2},
    {"cp": 2, "dp": 2, "micro_batch": 1},
]


@pytest.mark.parametrize("choices", LAYOUTS[:5])
def test_the_same_layout_goes_on_with_the_same_bits(choices: dict[str, Any], tmp_path: Path) -> None:
    job = kit.job_of(kit.DROPPED)
    plan = kit.plan_of(job, **choices)
    whole = go(job, plan, tmp_path, 2, 3)
    again = go(job, plan, tmp_path, 0, 3)
    assert again[0]["losses"] == whole[0]["losses"][2:]
    assert again[0]["step"] == 5


@pytest.mark.parametrize(("first", "second"), [(0, 4), (4, 2), (3, 1), (2, 3), (5, 4)])
def test_another_layout_goes_on_with_the_same_state(first: int, second: int, tmp_path: Path) -> None:
    job = kit.job_of(kit.UNET)
    whole = go(job, kit.plan_of(job, **LAYOUTS[first]), tmp_path, 2, 2)
    other = go(job, kit.plan_of(job, **LAYOUTS[second]), tmp_path, 0, 2)
    np.testing.assert_allclose(other[0]["losses"], whole[0]["losses"][2:], rtol=1e-10)
    reader = checkpoint.Reader(tmp_path / "step-2")
    for what, suffix in (("weights", ""), ("moments", "/exp_avg_sq")):
        for name, value in kit.assembled(other, what).items():
            assert torch.equal(value, reader.whole(reader.stored_name(name) + suffix)), name


def test_experts_are_dealt_out_anew(tmp_path: Path) -> None:
    job = kit.job_of(kit.MIXED)
    whole = go(job, kit.plan_of(job, ep=4, micro_batch=1), tmp_path, 2, 2)
    other = go(job, kit.plan_of(job, ep=2, tp=2, micro_batch=2), tmp_path, 0, 2)
    np.testing.assert_allclose(other[0]["losses"], whole[0]["losses"][2:], rtol=1e-10)


def test_old_ones_are_dropped_and_half_written_ones_are_not_seen(tmp_path: Path) -> None:
    job = kit.job_of()
    plan = kit.plan_of(job, micro_batch=4)
    for _ in range(3):
        go(job, plan, tmp_path, 1, 0)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["step-2", "step-3"]
    (tmp_path / "step-9.writing").mkdir()
    (tmp_path / "step-8").mkdir()
    assert checkpoint.newest(tmp_path) == tmp_path / "step-3"
    assert checkpoint.newest(tmp_path / "nowhere") is None
    go(job, plan, tmp_path, 1, 0)  # what was left half written goes with the next one
    assert sorted(each.name for each in tmp_path.iterdir()) == ["step-4", "step-8"]


def test_damage_is_named(tmp_path: Path) -> None:
    job = kit.job_of()
    go(job, kit.plan_of(job, micro_batch=4), tmp_path, 1, 0)
    file = tmp_path / "step-1" / "rank-0.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(UserError, match=r"rank-0.safetensors: is damaged: its checksum"):
        checkpoint.Reader(tmp_path / "step-1")
    file.unlink()
    with pytest.raises(UserError, match=r"rank-0.safetensors: is damaged"):
        checkpoint.Reader(tmp_path / "step-1")
    file.write_bytes(good)
    with pytest.raises(pool.RankFailed, match=r"shape\.\w+: is .*, and .*step-1 goes on from another"):
        go(
            job=kit.job_of(kit.MIXED),
            plan=kit.plan_of(kit.job_of(kit.MIXED), micro_batch=4),
            folder=tmp_path,
            save_after=0,
            more=1,
        )
    index = tmp_path / "step-1" / "index.json"
    changed = json.loads(index.read_text())
    index.write_text(json.dumps(changed | {"format": 99}))
    with pytest.raises(UserError, match=r"index.json: is damaged: it is of another format"):
        checkpoint.Reader(tmp_path / "step-1")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"seed": 5}, "seed: is 5, and .*step-1 goes on from another; 0, with which it was trained"),
        ({"global_batch": 4}, "global_batch: is 4, and .*; 8, with which"),
        ({"optimizer": Optimizer(name="sgd")}, r"optimizer\.name: is sgd, and .*; adamw, with which"),
        ({"shape": replace(kit.DENSE, layers=2)}, r"shape\.layers: is 2, and .*; 4, with which"),
        ({"shape": kit.untied(kit.DENSE)}, r"shape\.tied_embeddings: is False, and .*; True, with which"),
        ({"dtype": "fp32"}, "dtype: .* in torch.float64, the job's weights are torch.float32; the one with which"),
    ],
)
def test_what_changes_the_next_steps_is_refused(changes: dict[str, Any], says: str, tmp_path: Path) -> None:
    job = kit.job_of()
    go(job, kit.plan_of(job, micro_batch=4), tmp_path, 1, 0)
    other = replace(job, **changes)
    with pytest.raises(pool.RankFailed, match=says):
        go(other, kit.plan_of(other, micro_batch=4), tmp_path, 0, 1)


def test_files_that_no_checksum_vouches_for_are_not_read(tmp_path: Path) -> None:
    job = kit.job_of()
    go(job, kit.plan_of(job, micro_batch=4), tmp_path, 1, 0)
    index = tmp_path / "step-1" / "index.json"
    changed = json.loads(index.read_text())
    for file in ("../rank-0.safetensors", None):
        changed["parts"][0].pop("file")
        changed["parts"][0] |= {} if file is None else {"file": file}
        index.write_text(json.dumps(changed))
        with pytest.raises(UserError, match=r"index\.json: is damaged"):
            checkpoint.Reader(tmp_path / "step-1")
        changed["parts"][0]["file"] = ""


def slowly(rank: int, start: pool.Start, seconds: float, timeout_s: float) -> float:
    """Rank 0 takes longer for its own work than ranks wait for each other."""
    transport = start(RankGrid(axes=(("dp", 2),)), timeout_s=timeout_s)
    begun = time.monotonic()
    checkpoint._together(transport.axis("dp"), lambda: time.sleep(seconds if rank == 0 else 0.0))
    return time.monotonic() - begun


def test_a_rank_may_write_for_longer_than_ranks_wait() -> None:
    assert min(pool.run(2, f"{HERE}:slowly", 6.0, 3.0)) > 5.9


def from_elsewhere(rank: int, start: pool.Start) -> None:
    transport = start(RankGrid(axes=(("dp", 2),)))
    _require_one_step(50 * rank, transport.axis("dp"), Path("checkpoints"))


def test_ranks_that_found_different_checkpoints_are_told() -> None:
    says = "checkpoints: checkpoint: one rank would go on from step 0, another from step 50; a folder that all machines"
    with pytest.raises(pool.RankFailed, match=says):
        pool.run(2, f"{HERE}:from_elsewhere")


def test_a_folder_that_cannot_be_written_is_told_before(tmp_path: Path) -> None:
    checkpoint.check_place(tmp_path / "new" / "one")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file: checkpoint: cannot be written: .*; another folder"):
        checkpoint.check_place(tmp_path / "file")
