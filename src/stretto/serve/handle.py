"""One submitted request on its way through the engine: what came of it so far, and whoever waits for it."""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from stretto.serve.constraint import Constraint
from stretto.serve.logprobs import Logprob
from stretto.serve.request import Answer, Request


class TextStream(Protocol):
    """Turns an answer's tokens into text as they come, and finds stop strings.

    Attributes:
        text: what has been given out.
        length: characters given out or held back; where the text of the next token begins.
    """

    text: str

    @property
    def length(self) -> int: ...

    def push(self, token: int) -> bool:
        """Take one token; true if the answer ends here because of a stop string."""

    def finish(self) -> None:
        """No more tokens: give out what was held back."""


class NoText:
    """For runs in which nobody reads the text."""

    text = ""
    length = 0

    def push(self, token: int) -> bool:
        return False

    def finish(self) -> None:
        return None


@dataclass(eq=False)
class Handle:
    """A submitted request: await `answer()`, or iterate over it for pieces of text as they come.

    Attributes:
        logprobs: of each token, where the request asks for them.
        offsets: for each of these, the characters of text before it.
        constraint: where it stands in its grammar, if it has one.
        timer: what ends it at its deadline, if it has one.
        not_cached: why no token of its prompt was found in the prefix cache; None if some were, or nobody looked yet.
    """

    request: Request
    arrived_s: float
    stream: TextStream
    tokens: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    logprobs: list[Logprob] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    started_s: float | None = None
    cached_tokens: int = 0
    not_cached: str | None = None
    reason: str | None = None
    finished_s: float = 0.0
    constraint: Constraint | None = None
    timer: asyncio.TimerHandle | None = None
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        if self.request.grammar is not None:
            self.constraint = self.request.grammar.start()

    async def answer(self) -> Answer:
        """Wait for the end and return what came of it."""
        while self.reason is None:
            self._changed.clear()
            await self._changed.wait()
        return self.result()

    async def __aiter__(self) -> AsyncIterator[str]:
        given = 0
        while True:
            text = self.stream.text
            if len(text) > given:
                yield text[given:]
                given = len(text)
            elif self.reason is not None:
                return
            else:
                self._changed.clear()
                await self._changed.wait()

    def result(self) -> Answer:
        """The answer as far as it is known; `reason` is "" while it runs."""
        return Answer(
            id=self.request.id,
            tokens=tuple(self.tokens),
            text=self.stream.text,
            reason=self.reason or "",
            arrived_s=self.arrived_s,
            first_token_s=self.times_s[0] if self.times_s else None,
            finished_s=self.finished_s,
            token_times_s=tuple(self.times_s),
            cached_tokens=self.cached_tokens,
            not_cached=self.not_cached,
            logprobs=None if self.request.logprobs is None else tuple(self.logprobs),
            offsets=tuple(self.offsets),
        )

    def logprobs_between(self, start: int, end: int) -> Sequence[tuple[int, Logprob]]:
        """The tokens whose text begins at characters start .. end-1, each with where it begins."""
        first, last = bisect_left(self.offsets, start), bisect_left(self.offsets, end)
        return list(zip(self.offsets[first:last], self.logprobs[first:last], strict=True))

    @property
    def mask(self) -> bytes | None:
        """The tokens that may come next; None for all."""
        return None if self.constraint is None else self.constraint.mask

    def take(self, token: int, at: float, logprob: Logprob | None = None) -> bool:
        """Add a token that came at `at`; true if the answer is complete."""
        self.tokens.append(token)
        self.times_s.append(at)
        last = token in self.request.stop_tokens
        if last:
            self.end("stop", at)  # what was held back comes before it
        if logprob is not None:
            self.logprobs.append(logprob)
            self.offsets.append(self.stream.length)
        if last:
            return True
        if self.stream.push(token):
            self.end("stop", at)
        elif self.constraint is not None and (reason := self.constraint.accept(token)) is not None:
            self.end(reason, at)
        elif len(self.tokens) >= self.request.limit:
            self.end("length", at)
        self._changed.set()
        return self.reason is not None

    def end(self, reason: str, at: float) -> None:
        """Nothing more will come."""
        self.reason = reason
        self.finished_s = at
        self.stream.finish()
        self._changed.set()
