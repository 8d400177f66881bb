"""One rank of a plan in a process that torchrun, or another launcher that sets the same variables, has started."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from stretto.comm.transport import Transport
from stretto.core.errors import UserError
from stretto.core.plan import Plan
from stretto.train import checkpoint
from stretto.train.check import check_layout
from stretto.train.export import check_model, check_place, export
from stretto.train.job import TrainJob
from stretto.train.launch import RankFailed
from stretto.train.plan import TrainPlan
from stretto.train.session import model_of, run_rank
from stretto.train.worker import failure

_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def join(
    plan: Plan[TrainJob, TrainPlan],
    tell: Callable[[Mapping[str, Any]], None],
    stopping: Callable[[], bool] = lambda: False,
) -> None:
    """Be the rank that the environment names; returns when the run is done.

    Args:
        tell: is given what happened as in `session.run_rank`; on rank 0 alone it is more than this rank's end.
        stopping: as there.

    Raises:
        UserError: no launcher has set the variables, it started another number of ranks than the plan has, or the plan
            does not go with the job.
        RankFailed: this rank failed; names its stages and the cause.
    """
    rank = _rank(plan.choices)
    job = plan.job
    refusal = check_layout(job, plan.choices, model_of(job).spec)
    if refusal is not None:
        raise UserError(f"the plan cannot run: {refusal.reason}", field="choices", right=refusal.nearest)
    if job.export is not None and rank == 0:
        check_place(Path(job.export))
        check_model(job)
    if job.checkpoint is not None and rank == 0:
        checkpoint.check_place(Path(job.checkpoint))
    try:
        transport = Transport.start(plan.choices.grid, rank=rank, timeout_s=job.timeout_s)
        try:
            done = run_rank(job, plan.choices, transport, origin=time.perf_counter(), emit=tell, stopping=stopping)
        finally:
            transport.close()
    except Exception as problem:
        stages = ", ".join(map(str, plan.choices.stages_of(plan.choices.grid.coordinate(rank, "pp"))))
        told = f"rank {rank} (stage {stages}) {failure(rank, problem)['failed']}"
        raise RankFailed(told, right="the launcher ends the others") from problem
    newest = checkpoint.newest(Path(job.checkpoint)) if job.checkpoint is not None else None
    if job.export is not None and rank == 0 and newest is not None and done >= job.steps:
        export(job, newest, Path(job.export))


def _rank(choices: TrainPlan) -> int:
    missing = [name for name in _VARIABLES if name not in os.environ]
    if missing:
        raise UserError(
            f"the environment has no {', '.join(missing)}",
            right="start the ranks with `torchrun --nproc-per-node N -m stretto rank PLAN`",
        )
    world = int(os.environ["WORLD_SIZE"])
    if world != choices.grid.world:
        raise UserError(
            f"the launcher started {world} ranks, the plan has {choices.grid.world}",
            field="choices",
            right=f"start {choices.grid.world}, or plan for {world} (`processes: {world}` in the job)",
        )
    return int(os.environ["RANK"])
