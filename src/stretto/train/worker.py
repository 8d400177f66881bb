"""A rank as a process of its own: `python -m stretto.train.worker`.

The first line on its input says what to do; a line "stop" after that ends the run between two steps. What happens goes
to its output, a line of JSON each; whatever else is printed goes to its error output. The process ends as soon as its
input does, so none outlives its parent.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

from stretto.core.errors import UserError
from stretto.train import wire
from stretto.train.job import TrainJob
from stretto.train.plan import TrainPlan


def main() -> int:
    """Returns the exit status."""
    order: dict[str, Any] = json.loads(sys.stdin.buffer.readline())
    stopping = threading.Event()
    threading.Thread(target=_listen, args=(stopping,), daemon=True).start()
    lock, messages = threading.Lock(), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)

    def emit(message: Any) -> None:
        with lock:
            messages.write(wire.line(message))
            messages.flush()

    job = wire.from_plain(TrainJob, order["job"])
    plan = wire.from_plain(TrainPlan, order["plan"])
    try:
        _work(order, job, plan, emit, stopping)
    except Exception as problem:  # noqa: BLE001 (whatever it is, the parent tells the user)
        emit(failure(order["rank"], problem))
        return 1
    return 0


def _work(order: dict[str, Any], job: TrainJob, plan: TrainPlan, emit: Any, stopping: threading.Event) -> None:
    from stretto.comm.transport import Transport

    transport = Transport.start(plan.grid, rank=order["rank"], timeout_s=job.timeout_s, store=Path(order["store"]))
    if order["cpus"]:
        # Only now: the threads that carry messages are there already and stay free to run where there is room. Bound
        # to the CPU on which their rank computes, they wait for a tick of the scheduler: a sum takes 4 ms, not 0.4.
        os.sched_setaffinity(0, order["cpus"])
    try:
        if order["task"] == "measure":
            from stretto.train.measure import measure_rank

            emit({"measured": measure_rank(job, plan, transport, order["micro_batches"])})
        else:
            from stretto.train.session import run_rank

            run_rank(job, plan, transport, origin=order["origin"], emit=emit, stopping=stopping.is_set)
    finally:
        transport.close()


def failure(rank: int, problem: Exception) -> dict[str, Any]:
    """What a rank says of itself when it fails: the cause, and whether it merely lost another."""
    from stretto.comm.transport import RankLost

    frames = traceback.extract_tb(problem.__traceback__)
    where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
    told = " ".join(str(problem).split()) or type(problem).__name__
    of_type = f"{type(problem).__name__} at {where}: {told}"
    users = isinstance(problem, UserError | ValueError)
    return {
        "failed": told if isinstance(problem, RankLost) else f"failed: {told if users else of_type}",
        "rank": rank,
        "lost": isinstance(problem, RankLost),
    }


def _listen(stopping: threading.Event) -> None:
    for said in sys.stdin.buffer:
        if said.strip() == b"stop":
            stopping.set()
    os._exit(3)


if __name__ == "__main__":
    from stretto.models.load import prepare_environment

    prepare_environment()
    status = main()
    sys.stdout.flush()
    os._exit(status)  # the thread that listens cannot be joined
