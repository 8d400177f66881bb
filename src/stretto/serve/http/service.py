"""The engine of a server, and who is admitted to it.

Exact: every handle that was given out ends, with "stop", "length", "cancelled" or "failed". Approximate: the
seconds of a Retry-After, from how many answers ended lately.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from stretto.core.clock import RealClock
from stretto.core.errors import UserError
from stretto.models.load import Model
from stretto.models.tokenizer import Tokenizer
from stretto.serve.backend import Backend
from stretto.serve.constraint import Grammar
from stretto.serve.engine import Engine
from stretto.serve.grammar import Grammars
from stretto.serve.handle import Handle
from stretto.serve.http.compiling import Compiler
from stretto.serve.http.errors import ApiError
from stretto.serve.http.logprobs import Speller
from stretto.serve.http.meter import Meter
from stretto.serve.http.metrics import Metrics
from stretto.serve.http.schemas import MOST_CHOICES, Message
from stretto.serve.http.settings import ServerSettings
from stretto.serve.predict import PassCosts
from stretto.serve.request import Request
from stretto.serve.sampling import Sampling
from stretto.serve.settings import new_backend, new_engine
from stretto.serve.text import AnswerText

log = logging.getLogger("stretto.serve")
T = TypeVar("T")

REPORT_S = 10.0
_AT_ONCE_CHARACTERS = 4000
"""Texts up to this long are tokenised on the event loop: about 2 ms."""
_TURN_CHARACTERS = 40
"""What a turn costs a chat template beside its text, in characters of it."""
_FINISHES_KEPT = 256
_LONGEST_RETRY_S = 60


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What a request asks of the engine.

    Attributes:
        prompts: token ids of each prompt.
        prompt_field, limit_field: what the request calls its prompt and its most new tokens.
        choices: answers to each prompt; answer i of a prompt uses seed + i.
        limit: most new tokens; None: as many as fit.
        logprobs: how many alternatives to tell the logprobs of; None for no logprobs.
        grammar: what the answers must look like; None for anything.
        priority: the lower, the more urgent.
        deadline_s: seconds after which the answers end; None for no deadline.
    """

    prompts: tuple[tuple[int, ...], ...]
    prompt_field: str
    limit_field: str
    choices: int
    limit: int | None
    sampling: Sampling
    stop: tuple[str, ...]
    ignore_eos: bool
    logprobs: int | None = None
    grammar: Grammar | None = None
    priority: int = 0
    deadline_s: float | None = None


class Service:
    """One engine and its doors.

    Args:
        model: loaded.
        settings: of the server.
        costs: tables of this machine for the model, to show predicted beside measured; None shows measured alone.
        wrap: puts something between the engine and the backend; tests stall and slow it down so.
    """

    def __init__(
        self,
        model: Model,
        settings: ServerSettings,
        *,
        costs: PassCosts | None = None,
        wrap: Callable[[Backend], Backend] = lambda backend: backend,
    ) -> None:
        self.settings = settings
        self.longest = settings.engine.longest(model.spec)
        self.clock = RealClock()
        # No text of more characters can fit; encoding one could hold up the event loop for seconds.
        self._most_characters = self.longest * _longest_token(model.tokenizer)
        self.draining = False
        self._model = model
        self._costs = costs
        self._wrap = wrap
        self._handles: dict[Handle, asyncio.Task[None]] = {}
        self._next_number = 0
        self._finishes_s: deque[float] = deque(maxlen=_FINISHES_KEPT)
        self._failure: str | None = "the engine has not started"
        self._tasks: list[asyncio.Task[None]] = []
        self.metrics = Metrics(settings.model_name)
        self.speller = Speller(model.tokenizer)
        self.compiler = Compiler(Grammars(model.tokenizer, model.spec.vocab))

    # Life.

    def start(self) -> None:
        """Start the engine on the running event loop."""
        backend = self._wrap(new_backend(self._model, self.settings.engine, self.clock))
        self.meter = Meter(backend, self.clock, costs=self._costs, on_step=self._count)
        self.engine: Engine = new_engine(self._model, self.settings.engine, self.meter, self.clock)
        pool = self.engine.scheduler.pool
        self.metrics.gauge("num_requests_running", "Requests that run.", lambda: float(self.running))
        self.metrics.gauge("num_requests_waiting", "Requests that wait for a slot.", lambda: float(self.waiting))
        self.metrics.gauge(
            "kv_cache_usage_perc", "Share of the KV pages in use, 0 to 1.", lambda: pool.held / pool.pages
        )
        self._failure = None
        self._tasks = [asyncio.create_task(self._run()), asyncio.create_task(self._report())]

    async def stop(self) -> None:
        """End what is live and wait for the engine."""
        self.draining = True
        engine, report = self._tasks
        self.engine.cancel_all()
        self.engine.close()
        await asyncio.wait([engine], timeout=self.settings.stall_seconds)
        report.cancel()
        engine.cancel()
        self.compiler.close()

    async def drain(self) -> None:
        """Take no more requests; return when the live ones are done, or are cancelled after `drain_seconds`."""
        self.draining = True
        log.info("draining: %d requests are live", self.live)
        until = self.clock.now + self.settings.drain_seconds
        while self.live and self._failure is None and self.clock.now < until:
            await asyncio.sleep(0.02)
        if self.live:
            log.warning("cancelled %d requests that were not done in time", self.live)
            self.engine.cancel_all()

    async def _run(self) -> None:
        try:
            await self.engine.run()
            self._failure = "the server is shutting down"
        except Exception as error:
            log.exception("the engine has stopped")
            self._failure = f"the engine has stopped: {type(error).__name__}"
        finally:
            for handle in list(self._handles):
                if handle.reason is None:
                    handle.end("failed", self.clock.now)

    async def _report(self) -> None:
        """One line of throughput every 10 s in which anything was done."""
        done = self.meter.steps_done
        while True:
            await asyncio.sleep(REPORT_S)
            if self.meter.steps_done == done:
                continue
            done = self.meter.steps_done
            prompt, new = self.meter.rates(int(REPORT_S))
            log.info(
                "throughput: %.1f prompt and %.1f new tokens/s, %d running, %d waiting, KV %.1f%%",
                *(prompt, new, self.running, self.waiting, 100 * self.kv_use),
            )

    def _count(self, prompt_tokens: int, new_tokens: int) -> None:
        self.metrics.prompt_tokens.inc(prompt_tokens)
        self.metrics.generation_tokens.inc(new_tokens)

    # State.

    @property
    def tokenizer(self) -> Tokenizer:
        return self._model.tokenizer

    @property
    def live(self) -> int:
        """Requests that wait or run."""
        return self.engine.live

    @property
    def running(self) -> int:
        return len(self.engine.scheduler.running)

    @property
    def waiting(self) -> int:
        return max(0, self.live - self.running)

    @property
    def kv_use(self) -> float:
        """Share of the KV pages in use."""
        pool = self.engine.scheduler.pool
        return pool.held / pool.pages

    def problem(self) -> str | None:
        """Why this server is not healthy; None if it is: idle, or making progress."""
        if self._failure is not None:
            return self._failure
        since = self.clock.now - self.meter.progressed_s
        if self.live and since >= self.settings.stall_seconds:
            return f"{self.live} requests are live and no step has finished for {since:.1f} s"
        return None

    def view(self) -> dict[str, Any]:
        """What the engine does now, for the live page: no prompt and no answer is in it."""
        scheduler, pool = self.engine.scheduler, self.engine.scheduler.pool
        prompt, new = self.meter.rates()
        return {
            "model": self.settings.model_name,
            "healthy": self.problem() is None,
            "uptime_s": self.clock.now,
            "slots": scheduler.config.slots,
            "running": self.running,
            "waiting": self.waiting,
            "finished": self.engine.finished,
            "steps": self.engine.steps,
            "kv": {"used_pages": pool.held, "pages": pool.pages, "page_tokens": pool.page_tokens},
            "prompt_tokens_per_s": prompt,
            "new_tokens_per_s": new,
            "history": self.meter.history(),
            "rows": [
                {
                    "id": row.id,
                    "state": "decode" if row.decoding else "prefill",
                    "prompt": row.prompt,
                    "new": row.produced,
                    "limit": row.limit,
                    "seconds": self.clock.now - row.arrived_s,
                }
                for row in scheduler.running
            ],
            "passes": [
                {
                    "ms": 1e3 * step.seconds,
                    "predicted_ms": None if predicted is None else 1e3 * predicted,
                    "rows": len(step.chunks) + len(step.contexts),
                    "prefill": bool(step.chunks),
                }
                for step, predicted in self.meter.recent()
            ],
        }

    # Requests.

    async def encode(self, text: str, *, special: bool = True, field: str = "prompt") -> tuple[int, ...]:
        """Token ids of a text, which stands in `field`; long ones are tokenised in a thread: the loop stays free."""
        if len(text) > self._most_characters:
            raise ApiError(
                400,
                f"a text of {len(text)} characters is more than {self.longest} tokens, this model's maximum context "
                f"length; at most {self._most_characters} are read",
                param=field,
                code="context_length_exceeded",
            )
        return await _aside(lambda: tuple(self.tokenizer.encode(text, special=special)), len(text))

    async def encode_chat(self, messages: Sequence[Message], *, field: str = "messages") -> tuple[int, ...]:
        """Token ids of a conversation, which stands in `field`, as the model's chat template makes it."""
        plain = [message.plain() for message in messages]
        tokenizer = self.tokenizer
        size = sum(len(message["content"]) + _TURN_CHARACTERS for message in plain)
        try:
            text = await _aside(lambda: tokenizer.chat(plain), size)
        except UserError as problem:
            raise ApiError(400, f"{problem.problem}; {problem.right}", param=field) from None
        return await self.encode(text, special=False, field=field)

    async def decode(self, tokens: Sequence[int]) -> str:
        """The text of token ids, special ones included; ids without a text are left out."""
        return await _aside(lambda: self.tokenizer.decode(tokens, skip_special=False), len(tokens))

    def check_open(self, count: int = 1, field: str = "n") -> None:
        """Raise the 503 or 429 of a server that takes no `count` further sequences, asked for by `field`, now."""
        if self.draining:
            raise ApiError(503, "this server is shutting down; ask another one", code="draining", retry_after_s=1)
        if self._failure is not None:
            raise ApiError(503, self._failure, code="engine_failed", retry_after_s=5)
        room = self.settings.engine.slots + self.settings.max_queue
        if count > min(room, MOST_CHOICES):
            raise ApiError(
                400, f"{count} answers in one request; this server takes {min(room, MOST_CHOICES)}", param=field
            )
        if self.live + count > room:
            raise ApiError(
                429,
                f"{self.running} requests run and {self.waiting} wait; the queue holds {self.settings.max_queue}",
                code="queue_full",
                retry_after_s=self._retry_after_s(self.live + count - room),
            )

    def _retry_after_s(self, places: int) -> int:
        """Seconds until so many requests will have ended, at the pace of the last ones."""
        finishes = [at for at in self._finishes_s if at > self.clock.now - _LONGEST_RETRY_S]
        if not finishes:
            return 1
        pace = len(finishes) / max(self.clock.now - finishes[0], 1e-3)
        return min(_LONGEST_RETRY_S, max(1, math.ceil(places / pace)))

    def submit(self, ask: Ask) -> list[Handle]:
        """Queue a request: all of its sequences or none.

        Raises:
            ApiError: 400 if it can never fit, 429 if the queue is full, 503 if the server is closing or broken.
        """
        self.check_open(len(ask.prompts) * ask.choices)
        limits = [self._limit(prompt, ask) for prompt in ask.prompts]
        if not self.live:
            self.meter.begin()
        return [
            self._submit(prompt, limit, replace(ask.sampling, seed=ask.sampling.seed + choice), ask)
            for prompt, limit in zip(ask.prompts, limits, strict=True)
            for choice in range(ask.choices)
        ]

    def _limit(self, prompt: tuple[int, ...], ask: Ask) -> int:
        if not prompt:
            raise ApiError(400, "the prompt has no tokens", param=ask.prompt_field, code="invalid_value")
        vocabulary = self._model.spec.vocab
        if max(prompt) >= vocabulary:
            message = f"token {max(prompt)} is outside of the vocabulary of {vocabulary}"
            raise ApiError(400, message, param=ask.prompt_field, code="invalid_value")
        limit = max(1, self.longest - len(prompt)) if ask.limit is None else ask.limit
        if len(prompt) + limit > self.longest:
            raise ApiError(
                400,
                f"this model's maximum context length is {self.longest} tokens; {len(prompt)} in the prompt and "
                f"{limit} for the answer are {len(prompt) + limit}",
                param=ask.limit_field if len(prompt) < self.longest else ask.prompt_field,
                code="context_length_exceeded",
            )
        return limit

    def _submit(self, prompt: tuple[int, ...], limit: int, sampling: Sampling, ask: Ask) -> Handle:
        number = self._next_number
        self._next_number += 1
        ends = frozenset[int]() if ask.ignore_eos else self.tokenizer.eos_ids
        request = Request(
            id=number,
            prompt=prompt,
            limit=limit,
            sampling=sampling,
            stop_tokens=ends,
            stop=ask.stop,
            logprobs=ask.logprobs,
            grammar=ask.grammar,
            priority=ask.priority,
            deadline_s=ask.deadline_s,
        )
        handle = self.engine.submit(request, AnswerText(self.tokenizer, ask.stop))
        self._handles[handle] = asyncio.create_task(self._watch(handle))
        return handle

    async def _watch(self, handle: Handle) -> None:
        await handle.answer()
        del self._handles[handle]
        self._finishes_s.append(self.clock.now)
        self.metrics.ended(handle)

    def cancel(self, handles: Sequence[Handle]) -> None:
        """End these at the next step boundary; those that have ended are left alone."""
        for handle in handles:
            if handle.reason is None:
                self.engine.cancel(handle.request.id)


def _longest_token(tokenizer: Tokenizer) -> int:
    """Characters of the longest token."""
    return max(len(tokenizer.decode([token], skip_special=False)) for token in range(tokenizer.size))


async def _aside(work: Callable[[], T], characters: int) -> T:
    return work() if characters <= _AT_ONCE_CHARACTERS else await asyncio.to_thread(work)
