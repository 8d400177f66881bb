"""The serving engine: asks the scheduler, awaits the backend, hands out tokens. It holds no policy and no tensors.

The same lines run on the real clock with the model and on virtual time with its simulated twin; every event
that the scheduler saw is logged, so a run can be replayed decision by decision. A backend that crashes or does
not answer in time is wiped and the live requests are recomputed from their tokens: none is lost, doubled or
given a token twice.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stretto.core.clock import Clock
from stretto.core.eventlog import EventLog
from stretto.core.faults import BackendCrash
from stretto.core.record import Recorder
from stretto.core.trace import Key
from stretto.serve.backend import Backend, Pass, PassResult, Row
from stretto.serve.decision import Decision
from stretto.serve.handle import Handle, NoText, TextStream
from stretto.serve.request import Request
from stretto.serve.scheduler import Scheduler

__all__ = ["Engine", "Handle", "TextStream"]

MAX_FAILURES_IN_A_ROW = 5
_ENDS = {"cancel": "cancelled", "expire": "deadline"}
"""Events that end a request, and the reasons that its answer gives."""


def page_hashes(tokens: Sequence[int], page_tokens: int) -> list[str]:
    """For each full page of a text, a hash of all tokens up to the page's end: 32 hexadecimal digits."""
    found, digest = [], hashlib.blake2b(digest_size=16)
    for end in range(page_tokens, len(tokens) + 1, page_tokens):
        digest.update(np.asarray(tokens[end - page_tokens : end], dtype=np.int64).tobytes())
        found.append(digest.copy().hexdigest())
    return found


HostSeconds = Callable[[int], float]
"""Modelled seconds of host work (scheduling, hand-out) in a step of so many rows; only virtual time asks."""


@dataclass(slots=True)
class Course:
    """A decision on its way: how many steps it is to have, fewer than it said if it is cut short, and has had."""

    decision: Decision
    steps: int
    done: int = 0


class Engine:
    """One engine on one backend.

    Args:
        scheduler: the policy; owned by this engine.
        backend: who computes.
        clock: real or virtual.
        recorder: where spans go.
        host_seconds: the model of host work, for virtual time.
        step_timeout_s: a backend that takes longer for a step is taken for dead; None waits for ever.
        log: where events and decisions go; None keeps no log.
        lane: the name of the backend's lane in the trace.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        backend: Backend,
        clock: Clock,
        recorder: Recorder,
        *,
        host_seconds: HostSeconds = lambda rows: 0.0,
        step_timeout_s: float | None = None,
        log: EventLog | None = None,
        lane: str = "device",
    ) -> None:
        self.scheduler = scheduler
        self.backend = backend
        self.clock = clock
        self.recorder = recorder
        self.steps = 0
        self.failures = 0
        self.finished = 0
        self._host_seconds = host_seconds
        self._timeout_s = step_timeout_s
        self._log = log
        self._lane = lane
        self._live: dict[int, Handle] = {}
        self._tables: dict[int, tuple[int, ...]] = {}
        self._inbox: list[dict[str, Any]] = []
        self._closed = False
        self._news = asyncio.Event()
        self._failures_in_a_row = 0

    # What callers do.

    def submit(self, request: Request, stream: TextStream | None = None) -> Handle:
        """Queue a request; it joins at a step boundary as the joining policy says.

        Raises:
            ValueError: if the number is taken, or the request can never fit into the KV pool.
        """
        if request.id in self._live:
            raise ValueError(f"request {request.id} is already live; give each request its own number")
        if not self.scheduler.can_ever_fit(len(request.prompt), request.limit):
            raise ValueError(
                f"request {request.id}: prompt of {len(request.prompt)} + {request.limit} new tokens "
                f"do not fit into {self.scheduler.config.room}"
            )
        handle = Handle(request, self.clock.now, stream or NoText())
        self._live[request.id] = handle
        self._post(
            {
                "type": "arrive",
                "id": request.id,
                "at": handle.arrived_s,
                "prompt": len(request.prompt),
                "limit": request.limit,
                **self._prefix(request),
                **({"priority": request.priority} if request.priority else {}),
            }
        )
        if request.deadline_s is not None:
            event = {"type": "expire", "id": request.id}
            handle.timer = asyncio.get_running_loop().call_later(request.deadline_s, self._post, event)
        return handle

    def _prefix(self, request: Request) -> dict[str, list[str]]:
        settings = self.scheduler.config
        if not settings.prefix_cache:
            return {}
        return {"prefix": page_hashes(request.prompt, settings.page_tokens)}

    @property
    def live(self) -> int:
        """Requests that wait or run."""
        return len(self._live)

    def cancel(self, request: int) -> None:
        """End a request at the next step boundary; its pages are free then. Unknown numbers are ignored."""
        if request in self._live:
            self._post({"type": "cancel", "id": request})

    def cancel_all(self) -> None:
        for request in list(self._live):
            self.cancel(request)

    def close(self) -> None:
        """No more requests will come: `run` returns when the live ones are done."""
        self._closed = True
        self._post({"type": "close"})

    async def run(self) -> None:
        """Serve until closed and empty."""
        while True:
            self._take_inbox()
            if not self._live:
                if self._closed:
                    return
                await self._sleep_until(float("inf"))
                continue
            with self.clock.spend("host", self._host_seconds(len(self._live))):
                decision = self.scheduler.next_decision()
                if self._log is not None:
                    self._log.decided(self.clock.now, decision.to_json())
                work = self._pass(decision) if decision.idle_until is None else None
            if work is None:
                await self._sleep_until(decision.idle_until or 0.0)
                self._tell({"type": "tick", "at": self.clock.now})
            elif await self._carry_out(work, Course(decision, decision.steps)):
                self._lost()

    # Events.

    def _post(self, event: dict[str, Any]) -> None:
        self._inbox.append(event)
        self._news.set()

    def _take_inbox(self) -> None:
        events, self._inbox = self._inbox, []
        self._news.clear()
        for event in events:
            reason = _ENDS.get(event["type"])
            if reason is not None:
                handle = self._live.get(event["id"])
                if handle is None:
                    continue
                self._tell(event)
                self._retire(handle, reason)
            else:
                self._tell(event)

    def _tell(self, event: dict[str, Any]) -> None:
        if self._log is not None:
            self._log.saw(event)
        self.scheduler.apply(event)

    async def _sleep_until(self, when: float) -> None:
        waiting = asyncio.ensure_future(self._news.wait())
        try:
            if when == float("inf"):
                await self.clock.wait(waiting, "engine waits for a request")
            else:
                async with self.clock.timeout(max(0.0, when - self.clock.now)):
                    await self.clock.wait(waiting, "engine waits for company or a request")
        except TimeoutError:
            pass
        finally:
            waiting.cancel()

    # Steps.

    def _pass(self, decision: Decision) -> Pass:
        for request in decision.preempted:
            self._tables.pop(request, None)
        if decision.preempted:
            self.backend.forget(decision.preempted)
        for request, new in decision.pages:
            self._tables[request] = self._tables.get(request, ()) + new
        for request, _, target, _ in decision.moves:
            self._tables[request] = (target,)
        now = self.clock.now
        for chunk in decision.prefill:
            handle = self._live[chunk.id]
            if handle.started_s is None:
                handle.started_s = now
                handle.cached_tokens = chunk.start
                handle.not_cached = None if chunk.start else self._why_not_cached(handle.request)
                key = Key("queue", micro_batch=chunk.id)
                self.recorder.request("requests", handle.arrived_s, now, key)
        return Pass(
            step=self.steps,
            prefill=tuple(self._prompt_row(c.id, c.start, c.count, c.last) for c in decision.prefill),
            decode=tuple(self._decode_row(i) for i in decision.decode),
            moves=tuple(move[1:] for move in decision.moves),
            slots=decision.slots,
            swap_out=decision.swap_out,
            swap_in=decision.swap_in,
        )

    def _why_not_cached(self, request: Request) -> str:
        page = self.scheduler.config.page_tokens
        if not self.scheduler.config.prefix_cache:
            return "the prefix cache is off"
        if len(request.prompt) <= page:
            return f"pages of {page} tokens are shared, and the prompt goes beyond none"
        if self.scheduler.pool.gave_up(page_hashes(request.prompt[:page], page)[0]):
            return "the pages of its beginning were given to other requests meanwhile"
        return f"no prompt kept here begins with the same {page} tokens"

    def _prompt_row(self, request: int, start: int, count: int, last: bool) -> Row:
        handle = self._live[request]
        prompt = handle.request.prompt
        text = prompt if start + count <= len(prompt) else prompt + tuple(handle.tokens)
        return Row(
            id=request,
            tokens=text[start : start + count],
            start=start,
            table=self._tables[request],
            sampling=handle.request.sampling if last else None,
            position=start + count,
            ends=handle.request.stop_tokens,
            logprobs=handle.request.logprobs if last else None,
            mask=handle.mask if last else None,
        )

    def _decode_row(self, request: int) -> Row:
        handle = self._live[request]
        position = len(handle.request.prompt) + len(handle.tokens)
        return Row(
            id=request,
            tokens=(handle.tokens[-1],),
            start=position - 1,
            table=self._tables[request],
            sampling=handle.request.sampling,
            position=position,
            ends=handle.request.stop_tokens,
            logprobs=handle.request.logprobs,
            mask=handle.mask,
        )

    async def _carry_out(self, work: Pass, course: Course) -> bool:
        """Take its steps, ending early when a request finishes or something arrives; tell the scheduler. Whether the
        backend failed.
        """
        failed = False
        finished: list[int] = []
        while course.done < course.steps and not finished and (course.done == 0 or not self._inbox):
            if course.done:
                rows = tuple(self._decode_row(row.id) for row in work.decode)
                work = Pass(step=self.steps, prefill=(), decode=rows, slots=work.slots)
            result = await self._ask(work, course.steps - course.done)
            if result is None:
                failed = True
                break
            course.done += result.steps
            with self.clock.spend("host", 0.0):
                finished = self._hand_out(work, result)
        if course.done < course.decision.steps:
            self._cut_tables(work)
        if course.done:
            lane = {"lane": course.decision.lane} if course.decision.lane else {}
            self._tell({"type": "ran", "at": self.clock.now, "steps": course.done, "finished": finished, **lane})
        return failed

    def _cut_tables(self, work: Pass) -> None:
        """Forget pages that were given out for steps which were not carried out; the scheduler takes them back."""
        page = self.scheduler.config.page_tokens
        for row in work.decode:
            handle = self._live.get(row.id)
            if handle is not None:
                positions = len(handle.request.prompt) + len(handle.tokens) - 1
                self._tables[row.id] = self._tables[row.id][: -(-positions // page)]

    async def _ask(self, work: Pass, steps: int) -> PassResult | None:
        if any(row.mask is not None for row in work.decode):
            steps = 1  # the next mask follows from this step's token
        try:
            if self._timeout_s is None:
                return await self.backend.run(work, steps, self._news)
            async with self.clock.timeout(self._timeout_s * min(steps, self.backend.steps_at_once)):
                return await self.backend.run(work, steps, self._news)
        except (TimeoutError, BackendCrash):
            return None

    def _hand_out(self, work: Pass, result: PassResult) -> list[int]:
        lane = self._lane_of(work)
        for start, finish in result.spans_s:
            self.recorder.span(lane, start, finish, Key(work.phase, step=self.steps))
            self.steps += 1
        self.recorder.counter(f"running on {lane}", result.spans_s[0][0], len(work.prefill) + len(work.decode))
        finished = []
        if result.tokens:
            self._failures_in_a_row = 0
        for request, tokens in result.tokens.items():
            handle = self._live.get(request)
            if handle is None:
                continue  # it was ended while another lane's pass went on
            logprobs = result.logprobs.get(request, (None,) * len(tokens))
            for k, (token, logprob) in enumerate(zip(tokens, logprobs, strict=True)):
                if handle.take(token, result.spans_s[k][1], logprob):
                    finished.append(request)
                    break
        for request in finished:
            self._retire(self._live[request], None)
        return finished

    def _lane_of(self, work: Pass) -> str:
        """The lane in the trace that a pass belongs to."""
        return self._lane

    def _retire(self, handle: Handle, reason: str | None) -> None:
        request = handle.request.id
        if handle.timer is not None:
            handle.timer.cancel()
        if reason is not None:
            handle.end(reason, self.clock.now)
        began = handle.started_s if handle.started_s is not None else handle.arrived_s
        key = Key("answer", micro_batch=request)
        self.recorder.request("requests", began, max(handle.finished_s, began), key)
        del self._live[request]
        self.finished += 1
        self._tables.pop(request, None)
        self.backend.forget([request])

    def _lost(self) -> None:
        """The backend failed: wipe it, and start the live requests over from their tokens, or give up."""
        self.failures += 1
        self._failures_in_a_row += 1
        self.backend.wipe()
        self._tables.clear()
        self._tell({"type": "lost", "at": self.clock.now})
        if self._failures_in_a_row >= MAX_FAILURES_IN_A_ROW:
            for request, handle in list(self._live.items()):
                self._tell({"type": "cancel", "id": request})
                self._retire(handle, "failed")
