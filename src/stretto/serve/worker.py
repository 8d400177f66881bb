"""One rank of a model as a process: `python -m stretto.serve.worker`, which speaks `serve.wire` on its pipes.

The process ends as soon as its input does, whatever it is doing, so none outlives its parent. Failures that a user can
mend are answered while it is set up; any other goes to stderr and ends the process.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
import traceback
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from stretto.core.clock import RealClock
from stretto.core.errors import UserError
from stretto.models.calibrate import warm_up
from stretto.models.load import load_model
from stretto.models.shard import Shard
from stretto.models.thread import submit
from stretto.serve.backend import Pass, Row
from stretto.serve.local import LocalBackend
from stretto.serve.wire import Frame, Ran, SetUp, pack, pass_from_json, read


class SlotMap:
    """What a rank believes to be in each KV page, and behind them in each spare one: whose positions, and how many.

    Ranks that have carried out the same passes in the same order have the same digest.
    """

    def __init__(self, *, pages: int, page_tokens: int, spare_pages: int = 0) -> None:
        self._page_tokens = page_tokens
        self._spare = pages
        self._pages = np.full((pages + spare_pages, 2), -1, dtype=np.int64)

    def note(self, work: Pass) -> None:
        """Follow what a pass moves and writes."""
        away = [(page, self._spare + spare, positions) for page, spare, positions in work.swap_out]
        back = [(self._spare + spare, page, positions) for spare, page, positions in work.swap_in]
        for source, target, positions in (*away, *back, *work.moves):
            owner, written = self._pages[source]
            self._pages[target] = owner, min(written, positions)
        for row in (*work.prefill, *work.decode):
            self._write(row)

    def _write(self, row: Row) -> None:
        end = row.start + len(row.tokens)
        for index in range(row.start // self._page_tokens, -(-end // self._page_tokens)):
            written = min(end - index * self._page_tokens, self._page_tokens)
            self._pages[row.table[index]] = row.id, written

    @property
    def digest(self) -> str:
        """16 hexadecimal digits."""
        return hashlib.sha256(self._pages.tobytes()).hexdigest()[:16]


class Worker:
    """A rank, loaded and warm. Made and used in the model thread.

    Raises:
        UserError, ValueError: the set-up asks for what is not possible.
        RuntimeError: another rank did not come.
    """

    def __init__(self, set_up: SetUp) -> None:
        shard = None
        if set_up.rendezvous is not None:
            shard = Shard.join(
                rank=set_up.rank,
                world=set_up.world,
                rendezvous=Path(set_up.rendezvous),
                timeout_s=set_up.timeout_s,
            )
        model = load_model(set_up.model, dtype=set_up.dtype, threads=set_up.threads, shard=shard, path=set_up.path)
        warm_up(model)
        size = {"pages": set_up.pages, "page_tokens": set_up.page_tokens, "spare_pages": set_up.spare_pages}
        self._backend = LocalBackend(model, clock=RealClock(), **size)
        self._slots = SlotMap(**size)
        self._draws = set_up.rank == 0

    def run(self, work: Pass) -> Ran:
        """Carry out one pass on this rank's part."""
        start = time.monotonic()
        result = self._backend.compute(work)
        span = (start, time.monotonic())
        self._slots.note(work)
        if not self._draws:
            return Ran(tokens={}, span=span, slots=self._slots.digest)
        return Ran(tokens=result.tokens, span=span, slots=self._slots.digest, logprobs=result.logprobs)


class Desk:
    """Answers frames, one after another, in the model thread."""

    def __init__(self, answers: BinaryIO) -> None:
        self._answers = answers
        self._worker: Worker | None = None

    def set_up(self, fields: dict[str, Any]) -> None:
        try:
            self._worker = Worker(SetUp.from_json(fields))
        except (UserError, ValueError, RuntimeError, OSError, MemoryError) as error:
            self._answer({"error": " ".join(str(error).split()) or type(error).__name__})
        else:
            self._answer({"ready": True})

    def run(self, fields: dict[str, Any]) -> None:
        assert self._worker is not None
        self._answer(self._worker.run(pass_from_json(fields)).to_json())

    def _answer(self, frame: Frame) -> None:
        self._answers.write(pack(frame))
        self._answers.flush()


def main() -> None:
    """Answer frames until the input ends."""
    desk = Desk(_take_stdout())
    questions: dict[str, Callable[[dict[str, Any]], None]] = {"set_up": desk.set_up, "run": desk.run}
    while (frame := read(sys.stdin.buffer)) is not None and "quit" not in frame:
        ((name, fields),) = frame.items()
        if name == "set_up" and fields["cpus"] is not None:
            # Before the model thread and its helpers are there: threads inherit it.
            os.sched_setaffinity(0, fields["cpus"])
        submit(questions[name], fields).add_done_callback(_end_if_failed)


def _take_stdout() -> BinaryIO:
    """The pipe behind stdout for the answers alone; whatever else is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    return answers


def _end_if_failed(done: Future[None]) -> None:
    error = done.exception()
    if error is not None:
        traceback.print_exception(error)
        _end(1)


def _end(status: int) -> None:
    """End at once, even if the model thread waits for another rank."""
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    try:
        main()
    except Exception:  # noqa: BLE001 - the process must not wait for its model thread
        traceback.print_exc()
        _end(1)
    _end(0)
