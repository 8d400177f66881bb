"""A backend in worker processes of its own: one copy of the model, whole or split over ranks.

All ranks get the same passes. After each, their digests of what is in the KV pages must be equal; a rank that differs,
dies or stays silent ends all of them, the pass ends in `BackendCrash`, and the next pass starts fresh ones.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import TypeVar

from stretto.core.clock import RealClock
from stretto.core.errors import UserError, require
from stretto.core.faults import BackendCrash
from stretto.models.load import ENVIRONMENT
from stretto.serve.backend import Pass, PassResult
from stretto.serve.wire import Frame, Ran, SetUp, pack, pass_to_json, receive

PASS_TIMEOUT_S = 600.0
"""A rank that has not answered by then is taken for dead."""
CLOSE_TIMEOUT_S = 5.0
MOST_CRASHES = 4
"""After so many crashes in a row no fresh workers are started."""
_STDERR_BYTES = 8192

T = TypeVar("T")


class RemoteBackend:
    """A `Backend` on worker processes; made by `start`, ended by `close`."""

    steps_at_once = 1

    def __init__(self, set_ups: Sequence[SetUp], *, clock: RealClock, start_timeout_s: float) -> None:
        self._set_ups = set_ups
        self._clock = clock
        self._start_timeout_s = start_timeout_s
        self._ranks: list[_Rank] = []
        self._killed: list[_Rank] = []
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._crashes = 0

    @classmethod
    async def start(
        cls,
        model: str,
        *,
        dtype: str = "fp32",
        path: str = "torch",
        threads: int,
        pages: int,
        page_tokens: int,
        clock: RealClock,
        ranks: int = 1,
        cpus: Sequence[Sequence[int]] | None = None,
        start_timeout_s: float = 120.0,
        spare_pages: int = 0,
    ) -> RemoteBackend:
        """Start the workers; returns when each has loaded its part and is warm.

        Args:
            model, dtype, path: as `load_model` takes them.
            threads: of each rank.
            pages, page_tokens: size of the KV cache.
            clock: the engine's.
            ranks: how many processes share the model, at most one a KV head.
            cpus: for each rank the CPUs to stay on; None leaves the choice to the system.
            start_timeout_s: for loading, here and after a crash.
            spare_pages: size of the spare memory for requests that are put back.

        Raises:
            UserError: the workers did not get ready; it says why.
            ValueError: a number is out of range, or a CPU is not there.
        """
        require(ranks >= 1, "ranks", ranks, "at least 1")
        require(threads >= 1, "threads", threads, "at least 1")
        allowed = os.sched_getaffinity(0)
        require(cpus is None or len(cpus) == ranks, "cpus", cpus, f"{ranks} lists, one a rank, or none")
        require(cpus is None or all(allowed.issuperset(own) for own in cpus), "cpus", cpus, f"among {sorted(allowed)}")
        set_ups = [
            SetUp(
                model=model,
                dtype=dtype,
                path=path,
                threads=threads,
                pages=pages,
                page_tokens=page_tokens,
                rank=rank,
                world=ranks,
                timeout_s=PASS_TIMEOUT_S,
                cpus=None if cpus is None else tuple(cpus[rank]),
                spare_pages=spare_pages,
            )
            for rank in range(ranks)
        ]
        backend = cls(set_ups, clock=clock, start_timeout_s=start_timeout_s)
        ready = False
        try:
            await backend._launch()
            ready = True
        except BackendCrash as crash:
            raise UserError(str(crash)) from None
        finally:
            if not ready:
                backend._kill()
                await backend._bury()
        return backend

    @property
    def pids(self) -> tuple[int, ...]:
        """The processes at work, by rank; none between a crash and the next pass."""
        return tuple(rank.pid for rank in self._ranks)

    async def run(self, work: Pass, steps: int, news: asyncio.Event) -> PassResult:
        """Carry out `work` on all ranks; a pass that is cancelled ends its workers too.

        Raises:
            BackendCrash: a rank died, stayed silent, did not start or disagrees about what is in the KV pages.
        """
        failed = True
        try:
            if not self._ranks:
                await self._launch()
            question = pack({"run": pass_to_json(work)})
            answers = await asyncio.gather(*(rank.ask(question, PASS_TIMEOUT_S) for rank in self._ranks))
            result = self._result(answers)
            failed = False
        finally:
            self._crashes = self._crashes + 1 if failed else 0
            if failed:
                self._kill()
        return result

    def wipe(self) -> None:
        """Nothing to do: a pass that failed or was given up has ended its workers."""

    def forget(self, ids: Iterable[int]) -> None:
        """Nothing to do: the next pass over a position writes its keys and values anew."""

    async def close(self) -> None:
        """End the workers: politely, and by force after 5 s. Returns when they are gone."""
        await asyncio.gather(*(rank.quit() for rank in self._ranks))
        self._kill()
        await self._bury()

    async def _launch(self) -> None:
        if self._crashes >= MOST_CRASHES:
            raise BackendCrash(f"the workers crashed {MOST_CRASHES} times in a row; they are not started again")
        await self._bury()
        self._folder = tempfile.TemporaryDirectory(prefix="stretto-", ignore_cleanup_errors=True)
        rendezvous = os.path.join(self._folder.name, "rendezvous") if len(self._set_ups) > 1 else None
        for set_up in self._set_ups:
            self._ranks.append(await _Rank.start(set_up))
        questions = [pack({"set_up": replace(set_up, rendezvous=rendezvous).to_json()}) for set_up in self._set_ups]
        await asyncio.gather(
            *(rank.ask(q, self._start_timeout_s) for rank, q in zip(self._ranks, questions, strict=True))
        )

    def _result(self, answers: Sequence[Frame]) -> PassResult:
        try:
            ran = [Ran.from_json(answer) for answer in answers]
        except ValueError as error:
            raise BackendCrash(str(error)) from None
        if len({one.slots for one in ran}) > 1:
            raise BackendCrash(f"the ranks disagree about the KV pages: {', '.join(one.slots for one in ran)}")
        zero = time.monotonic() - self._clock.now
        start, finish = min(one.span[0] for one in ran), max(one.span[1] for one in ran)
        return PassResult(tokens=ran[0].tokens, spans_s=((start - zero, finish - zero),), logprobs=ran[0].logprobs)

    def _kill(self) -> None:
        """End the workers now; `_bury` waits until they are gone."""
        for rank in self._ranks:
            rank.kill()
        self._killed += self._ranks
        self._ranks = []

    async def _bury(self) -> None:
        await asyncio.gather(*(rank.gone() for rank in self._killed))
        self._killed = []
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None


class _Rank:
    """One worker process."""

    def __init__(self, number: int, process: asyncio.subprocess.Process) -> None:
        self._number = number
        self._process = process
        self._stderr = b""
        self._listening = asyncio.create_task(self._listen())

    @classmethod
    async def start(cls, set_up: SetUp) -> _Rank:
        environment = {**ENVIRONMENT, **os.environ, "OMP_NUM_THREADS": str(set_up.threads)}
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-m",
                "stretto.serve.worker",
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.PIPE,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the parent, which ends its workers itself
            )
        except OSError as error:
            raise BackendCrash(f"rank {set_up.rank} cannot be started: {error}") from None
        return cls(set_up.rank, process)

    @property
    def pid(self) -> int:
        return self._process.pid

    async def ask(self, question: bytes, timeout_s: float) -> Frame:
        """Send a frame and wait for its answer.

        Raises:
            BackendCrash: it did not come in time, is none, or says what is wrong.
        """
        try:
            async with asyncio.timeout(timeout_s):
                await self._send(question)
                answer = await receive(_open(self._process.stdout))
        except TimeoutError:
            raise BackendCrash(f"rank {self._number} did not answer in {timeout_s:g} s") from None
        except (OSError, EOFError):
            raise BackendCrash(f"rank {self._number} died: {await self._last_words()}") from None
        except ValueError as error:
            raise BackendCrash(f"rank {self._number} did not answer in frames: {error}") from None
        if "error" in answer:
            raise BackendCrash(str(answer["error"]))
        return answer

    async def quit(self) -> None:
        """Ask it to end, and wait a little."""
        with suppress(TimeoutError, OSError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._send(pack({"quit": True}))
                await self._process.wait()

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            self._process.kill()

    async def gone(self) -> None:
        """Wait until a killed process has left nothing behind."""
        with suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._process.wait()
                await self._listening

    async def _send(self, frame: bytes) -> None:
        pipe = _open(self._process.stdin)
        pipe.write(frame)
        await pipe.drain()

    async def _listen(self) -> None:
        """Keep the end of what it writes to stderr."""
        pipe = _open(self._process.stderr)
        while chunk := await pipe.read(_STDERR_BYTES):
            self._stderr = (self._stderr + chunk)[-_STDERR_BYTES:]

    async def _last_words(self) -> str:
        await self.gone()
        lines = self._stderr.decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), f"status {self._process.returncode}")


def _open(pipe: T | None) -> T:
    """A pipe that was asked for when the process was started."""
    assert pipe is not None
    return pipe
