"""What writes plans and answers: anything that streams text. Scripts and Python functions need no language model."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal

from stretto.core.clock import Clock
from stretto.core.errors import UserError
from stretto.core.graph import Failure
from stretto.workflow.parse import Note, PlannedTask

MOST_CHARACTERS = 1_000_000
Part = Literal["plan", "join", "step"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    text: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Executed:
    """A task and what came of it: a value, or a `Failure`."""

    task: PlannedTask
    outcome: Any

    @property
    def failed(self) -> bool:
        return isinstance(self.outcome, Failure)


@dataclass(frozen=True, kw_only=True, slots=True)
class Round:
    """One plan, what came of its tasks, and what the joiner thought of it."""

    tasks: tuple[Executed, ...]
    notes: tuple[Note, ...] = ()
    thought: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """What a model is asked.

    Attributes:
        part: a plan, the joiner's verdict, or the next step of a ReAct loop.
        messages: the same for a language model.
        rounds: what was done so far; for a verdict the last one is the one to be judged.
        last: no further round may be asked for.
    """

    part: Part
    question: str
    messages: tuple[Message, ...] = ()
    rounds: tuple[Round, ...] = ()
    last: bool = False


@dataclass(kw_only=True, slots=True)
class Usage:
    """Calls, tokens and money of one part of a run."""

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0

    def add(self, other: Usage) -> None:
        self.calls += other.calls
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens
        self.cost += other.cost


class Model(ABC):
    """Writes text for a prompt, piece by piece."""

    @abstractmethod
    def stream(self, prompt: Prompt, clock: Clock, usage: Usage) -> AsyncGenerator[str, None]:
        """The text in pieces of any size; `usage` is filled in on the way."""

    def bound(self, prompt: Prompt) -> float:
        """The most that the answer can cost."""
        return 0.0


async def written(model: Model, prompt: Prompt, clock: Clock, usage: Usage) -> str:
    """All that a model writes, up to a million characters."""
    pieces, length = list[str](), 0
    async with aclosing(model.stream(prompt, clock, usage)) as stream:
        async for piece in stream:
            pieces.append(piece)
            length += len(piece)
            if length > MOST_CHARACTERS:
                break
    return "".join(pieces)


def tokens_in(messages: Sequence[Message]) -> int:
    """An estimate where nobody counts: a token for four characters."""
    return sum(len(message.text) // 4 + 4 for message in messages)


@dataclass(frozen=True, kw_only=True)
class Scripted(Model):
    """Answers from a script: the plan, verdict or step of each turn, given beforehand.

    >>> model = Scripted(plans=['1. search("a")', ...])
    """

    plans: Sequence[str] = ()
    joins: Sequence[str] = ()
    steps: Sequence[str] = field(default=())

    async def stream(self, prompt: Prompt, clock: Clock, usage: Usage) -> AsyncGenerator[str, None]:
        texts = {"plan": self.plans, "join": self.joins, "step": self.steps}[prompt.part]
        turn = turn_of(prompt)
        if turn >= len(texts):
            raise UserError(
                f"the script has {len(texts)} of part {prompt.part!r}, and number {turn + 1} is asked for",
                field=f"{prompt.part}s",
                right="write one for each round, or give a joiner",
            )
        usage.add(Usage(calls=1, prompt_tokens=tokens_in(prompt.messages), completion_tokens=len(texts[turn]) // 4))
        yield texts[turn]


def turn_of(prompt: Prompt) -> int:
    """How many answers of its part came before this one."""
    return len(prompt.rounds) - (1 if prompt.part == "join" else 0)


Answering = Callable[[Prompt], str | Awaitable[str] | AsyncIterator[str]]


@dataclass(frozen=True)
class Called(Model):
    """Answers from a Python function of the prompt: text, an awaitable of text, or an async iterator of pieces."""

    function: Answering

    async def stream(self, prompt: Prompt, clock: Clock, usage: Usage) -> AsyncGenerator[str, None]:
        usage.add(Usage(calls=1))
        answer = self.function(prompt)
        if isinstance(answer, AsyncIterator):
            async for piece in answer:
                yield piece
        else:
            yield await answer if inspect.isawaitable(answer) else answer
