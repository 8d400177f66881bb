"""Models and tools that only take their time: seeded twins for virtual time, benchmarks and bad days.

A simulated model writes a script line by line, each after the time of its tokens. A simulated tool draws one whole row
(seconds, success, cost, result) for a call, so that what belongs together stays together; which row the n-th call with
the same arguments draws depends on the seed alone, not on who else calls when.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from stretto.core.clock import Clock
from stretto.core.errors import require
from stretto.core.graph import Paid, PaidError
from stretto.core.random import integers, uniform
from stretto.workflow.model import Model, Part, Prompt, Usage, tokens_in, turn_of
from stretto.workflow.tool import Parameter, Tool


@dataclass(frozen=True, slots=True)
class Line:
    """Text and how many tokens it is."""

    text: str
    tokens: int


Script = Sequence[Sequence[Line]]


@dataclass(frozen=True, kw_only=True)
class SimulatedModel(Model):
    """Writes scripts at a pace.

    Attributes:
        plans, joins, steps: the lines of each turn.
        first_token_s: seconds until the first token.
        prompt_token_s: seconds more for each token of the prompt.
        token_s: seconds for each token written.
        input_price, output_price: money a million tokens.
        prompt_tokens: of a prompt by part, where they are not to be estimated from its text.
    """

    plans: Script = ()
    joins: Script = ()
    steps: Script = ()
    first_token_s: float = 0.3
    prompt_token_s: float = 0.0
    token_s: float = 0.02
    input_price: float = 0.0
    output_price: float = 0.0

    def bound(self, prompt: Prompt) -> float:
        tokens = sum(line.tokens for line in self._lines(prompt))
        return (tokens_in(prompt.messages) * self.input_price + tokens * self.output_price) / 1e6

    async def stream(self, prompt: Prompt, clock: Clock, usage: Usage) -> AsyncGenerator[str, None]:
        asked = tokens_in(prompt.messages)
        usage.add(Usage(calls=1, prompt_tokens=asked, cost=asked * self.input_price / 1e6))
        await clock.sleep(self.first_token_s + asked * self.prompt_token_s)
        for line in self._lines(prompt):
            await clock.sleep(line.tokens * self.token_s)
            usage.add(Usage(completion_tokens=line.tokens, cost=line.tokens * self.output_price / 1e6))
            yield f"{line.text}\n"

    def _lines(self, prompt: Prompt) -> Sequence[Line]:
        scripts: dict[Part, Script] = {"plan": self.plans, "join": self.joins, "step": self.steps}
        return scripts[prompt.part][turn_of(prompt)]


@dataclass(frozen=True, kw_only=True, slots=True)
class CallRow:
    """One call as it was once: seconds it took, whether it gave a result, what it cost, and the result."""

    seconds: float
    success: bool = True
    cost: float = 0.0
    result: Any = None

    def __post_init__(self) -> None:
        require(0 <= self.seconds < 1e6, "seconds", self.seconds, "in 0 .. 1e6")
        require(self.cost >= 0, "cost", self.cost, "not negative")


def simulated_tool(name: str, rows: Sequence[CallRow], *, seed: int = 0, stretch: float = 0.0, **options: Any) -> Tool:
    """A tool that takes anything and behaves as one of `rows`.

    Args:
        stretch: a call takes up to so much longer, as a share of its row's seconds.
        options: further fields of `Tool`.
    """
    require(len(rows) > 0, "rows", rows, "at least one row")
    stream = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest())
    attempts: dict[int, int] = {}

    async def call(*values: Any) -> Any:
        place = int.from_bytes(hashlib.blake2b(repr(values).encode("utf-8", "replace"), digest_size=6).digest())
        index = attempts[place] = attempts.get(place, place << 8) + 1
        row = rows[int(integers(seed, stream, index, len(rows)))]
        await asyncio.sleep(row.seconds * (1.0 + stretch * float(uniform(seed, stream + 1, index))))
        if not row.success:
            raise PaidError(f"{name} failed", row.cost)
        return Paid(row.result if row.result is not None else f"{name}{values!r}", row.cost)

    most = max(row.cost for row in rows)
    usual = {"description": "a simulated tool", "price": most, **options}
    parameters = (Parameter(name="values", many=True),)
    return Tool(name=name, function=call, parameters=parameters, **usual)
