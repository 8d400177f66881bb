"""A request and its answer, as the engine sees them."""

from __future__ import annotations

from dataclasses import dataclass, field

from stretto.serve.constraint import Grammar
from stretto.serve.logprobs import MOST_ALTERNATIVES, Logprob
from stretto.serve.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked: token ids in, at most `limit` new tokens out.

    Attributes:
        id: number of the request, unique within an engine.
        prompt: token ids, at least one.
        limit: most new tokens, at least one.
        stop_tokens: token ids that end the answer (they are not part of its text).
        stop: strings that end the answer (likewise).
        logprobs: how many alternatives to tell the logprobs of beside each token's own, 0 to 20; None for no logprobs.
        grammar: what the answer's text must look like; None for anything.
        priority: the lower, the more urgent; among equals the first to come.
        deadline_s: seconds from its arrival after which it ends, waiting or running; None for no deadline.
    """

    id: int
    prompt: tuple[int, ...]
    limit: int
    sampling: Sampling = field(default_factory=Sampling)
    stop_tokens: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    grammar: Grammar | None = None
    priority: int = 0
    deadline_s: float | None = None

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError(f"request {self.id}: the prompt is empty; it must hold at least one token")
        if self.limit < 1:
            raise ValueError(f"request {self.id}: limit is {self.limit}; it must be >= 1")
        if self.deadline_s is not None and not self.deadline_s > 0:
            raise ValueError(f"request {self.id}: deadline_s is {self.deadline_s}; it must be > 0, or None")
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_ALTERNATIVES:
            raise ValueError(
                f"request {self.id}: logprobs is {self.logprobs}; it must be in 0 .. {MOST_ALTERNATIVES}, or None"
            )


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came of a request.

    Attributes:
        tokens: new token ids, the ending one included.
        text: the text of the answer.
        reason: why it ended: "stop", "length", "cancelled", "deadline" or "failed"; "grammar" if its grammar could not
            be followed further.
        arrived_s, first_token_s, finished_s: instants on the engine's clock; first_token_s is None if there was none.
        token_times_s: the instant of each token.
        cached_tokens: tokens of the prompt whose keys and values were there already.
        not_cached: why there were none.
        logprobs: of each token, the ending one included; None if they were not asked for.
        offsets: with logprobs, for each token the characters of text before it.
    """

    id: int
    tokens: tuple[int, ...]
    text: str
    reason: str
    arrived_s: float
    first_token_s: float | None
    finished_s: float
    token_times_s: tuple[float, ...] = ()
    cached_tokens: int = 0
    not_cached: str | None = None
    logprobs: tuple[Logprob, ...] | None = None
    offsets: tuple[int, ...] = ()

    @property
    def latency_s(self) -> float:
        return self.finished_s - self.arrived_s
