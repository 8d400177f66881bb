"""Ranks as processes of this machine: started together, watched together, ended together.

Each has its CPUs, an end of a pipe that keeps it alive, and nobody else's signals. As soon as one fails, the others are
ended and one error says which rank, which stage and why: of several, the first that did not merely lose another.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stretto.core.errors import UserError
from stretto.train import wire
from stretto.train.job import TrainJob
from stretto.train.plan import TrainPlan

_GRACE_S = 3.0
"""How long the others may take to say why, after one rank has failed."""

_ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**62)}
"""Of glibc, unless the user's environment says otherwise: memory that a pass gives back stays with the process, for the
next pass to find, however much it is. Mapped anew and zeroed page by page each time, a step takes a tenth longer."""


@dataclass(frozen=True)
class Said:
    """A message of a rank; None: it ended."""

    rank: int
    message: dict[str, Any] | None


class RankFailed(UserError):
    """A rank failed, and so the run."""


def run_ranks(
    job: TrainJob,
    plan: TrainPlan,
    *,
    task: str = "train",
    origin: float = 0.0,
    hear: Callable[[int, dict[str, Any]], None],
    stopping: Callable[[], bool] = lambda: False,
    micro_batches: Sequence[int] = (),
) -> None:
    """Start every rank of the plan here, and return when all have ended well.

    Args:
        task: "train", or "measure" to time the plan's pieces.
        hear: is called with each message of a rank.
        stopping: asked many times a second; when true, the ranks end after their step.

    Raises:
        RankFailed: names the rank, its stages and the cause; all other ranks have been ended.
    """
    with tempfile.TemporaryDirectory(prefix="stretto-") as folder:
        ranks: list[_Rank] = []
        said: queue.Queue[Said] = queue.Queue()
        try:
            for rank in range(plan.grid.world):
                order = {
                    "task": task,
                    "rank": rank,
                    "job": wire.to_plain(job),
                    "plan": wire.to_plain(plan),
                    "store": str(Path(folder) / "store"),
                    "origin": origin,
                    "cpus": cpus_of(plan, rank),
                    "micro_batches": list(micro_batches),
                }
                ranks.append(_Rank(rank, order, said))
            _watch(ranks, said, hear, stopping, job, plan)
        finally:
            for each in ranks:
                each.end()


def cpus_of(plan: TrainPlan, rank: int) -> list[int]:
    """The CPUs of a rank: neighbours, if there are enough for all; else none in particular."""
    usable = sorted(os.sched_getaffinity(0))
    each = plan.threads or 1
    if each * plan.grid.world > len(usable):
        return []
    return usable[rank * each : (rank + 1) * each]


class _Rank:
    """A process and the thread that hears it."""

    def __init__(self, number: int, order: dict[str, Any], said: queue.Queue[Said]):
        self.number = number
        environment = {**_ALLOCATOR, **os.environ, "OMP_NUM_THREADS": str(order["plan"]["threads"] or 1)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "stretto.train.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the parent, which ends its ranks itself
        )
        self._said = said
        self._errors = b""
        for target in (self._hear, self._keep):
            threading.Thread(target=target, daemon=True).start()
        self.tell(wire.line(order))

    def tell(self, line: bytes) -> None:
        """A line on its input; nothing if it is gone."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line)
            self.process.stdin.flush()
        except OSError:
            return

    def _hear(self) -> None:
        assert self.process.stdout is not None
        try:
            for line in self.process.stdout:
                self._said.put(Said(self.number, json.loads(line)))
        except ValueError:  # a line that was cut off, as the rank was
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(_GRACE_S)
            if self.process.poll() is None:
                cause = "failed: it said what is no message"
                self._said.put(Said(self.number, {"rank": self.number, "failed": cause, "lost": False}))
        self.process.wait()
        self._said.put(Said(self.number, None))

    def _keep(self) -> None:
        """The end of what it writes to its error output."""
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._errors = (self._errors + line)[-4000:]

    def death(self) -> str:
        """How it ended without a word."""
        status = self.process.poll()
        if status is not None and status < 0:
            return f"was killed (signal {-status}{', perhaps for want of memory' if status == -9 else ''})"
        last = self._errors.decode(errors="replace").strip().splitlines()[-1:]
        return f"ended with status {status}{': ' + last[0] if last else ''}"

    def end(self) -> None:
        """Make sure that it is gone."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                try:
                    pipe.close()
                except OSError:
                    continue


def _watch(
    ranks: Sequence[_Rank],
    said: queue.Queue[Said],
    hear: Callable[[int, dict[str, Any]], None],
    stopping: Callable[[], bool],
    job: TrainJob,
    plan: TrainPlan,
) -> None:
    going = {rank.number for rank in ranks}
    failures: list[dict[str, Any]] = []
    told, deadline = False, float("inf")
    while going and time.monotonic() < deadline:
        if not told and stopping():
            told = True
            ranks[0].tell(b"stop\n")
        try:
            found = said.get(timeout=0.1)
        except queue.Empty:
            continue
        if found.message is None:
            going.discard(found.rank)
            heard = any(failure["rank"] == found.rank for failure in failures)
            if ranks[found.rank].process.returncode and not heard:
                failures.append({"rank": found.rank, "failed": ranks[found.rank].death(), "lost": False})
        elif "failed" in found.message:
            failures.append(found.message)
        else:
            hear(found.rank, found.message)
        if failures and deadline == float("inf"):
            deadline = time.monotonic() + _GRACE_S
    if failures:
        raise _failed(failures, going - {failure["rank"] for failure in failures}, job, plan)


def _failed(failures: Sequence[dict[str, Any]], silent: set[int], job: TrainJob, plan: TrainPlan) -> RankFailed:
    """One error for all: the first that did not merely lose another; else the one that was lost without a word."""
    first = min(failures, key=lambda failure: failure["lost"])
    rank, cause = first["rank"], first["failed"]
    if first["lost"] and silent:
        rank, cause = min(silent), f"fell silent: {cause}"
    stages = plan.stages_of(plan.grid.coordinate(rank, "pp"))
    where = f"stage{'s' if len(stages) > 1 else ''} {', '.join(map(str, stages))}"
    right = "the run has ended"
    if job.checkpoint is not None:
        right += f"; run the job again to go on from the newest checkpoint in {job.checkpoint}"
    return RankFailed(f"rank {rank} ({where}) {cause}", right=right)
