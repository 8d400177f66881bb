"""What can be asked of the workflow domain: declared steps, each a call of a tool, with limits on money and time.

A job file names tools; it never brings code. The tools that are built in are `wait`, `text` and `ask`; others are
passed from Python (`run(job, tools=[...])`), and a file that names one it does not get is refused.
"""

from __future__ import annotations

import re
from collections.abc import Container, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from stretto.core.errors import FieldError, require
from stretto.workflow.literals import MOST_RESULT_CHARACTERS

Plain = str | int | float | bool | list[str | int | float | bool] | None
_NAME = re.compile(r"[A-Za-z_]\w{0,63}")
_REFERENCE = re.compile(r"\{([A-Za-z_]\w{0,63})\}")
_QUANTITY = re.compile(r"\s*([0-9]+(?:\.[0-9]*)?(?:[eE][-+]?[0-9]+)?)\s*([A-Za-z]*)\s*")
_SECONDS = {"": 1.0, "s": 1.0, "ms": 1e-3, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the answers of `ask` come from: an endpoint, or a script.

    Attributes:
        base_url, model: an OpenAI-compatible endpoint; or
        script: the answer that every step gets.
        max_tokens: of an answer.
        input_price, output_price: money a million tokens.
        first_token_s, token_s: how long a script, and the forecast of an endpoint, take for the first token and each.
        expected_tokens: of an answer, for the forecast.
    """

    base_url: str | None = None
    model: str = "default"
    script: str | None = None
    max_tokens: int = 256
    input_price: float = 0.0
    output_price: float = 0.0
    first_token_s: float = 0.3
    token_s: float = 0.02
    expected_tokens: int = 64

    def __post_init__(self) -> None:
        if (self.base_url is None) == (self.script is None):
            raise FieldError("base_url", self.base_url, "given where `script` is not: one of the two")
        right = "an address as http://localhost:8000/v1"
        require(
            self.base_url is None or self.base_url.startswith(("http://", "https://")), "base_url", self.base_url, right
        )
        require(1 <= self.max_tokens <= 10**6, "max_tokens", self.max_tokens, "in 1 .. 1000000")
        require(1 <= self.expected_tokens <= 10**6, "expected_tokens", self.expected_tokens, "in 1 .. 1000000")
        for name in ("input_price", "output_price", "first_token_s", "token_s"):
            require(0 <= getattr(self, name) <= 1e6, name, getattr(self, name), "in 0 .. 1e6")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One call.

    Attributes:
        name: of the step; `{name}` in later arguments is its result: itself where it stands alone, else its text.
        tool: `wait` (seconds, result), `text` (text), `ask` (source, prompt), or one passed from Python.
        args: by the names of the tool's parameters.
        after: steps above that must have ended; those whose results are used need not be named.
        timeout_s, attempts, backoff_s, on_error: see `core.graph.Terms`.
        cost: the most that a call can cost; left out: the tool's price, or for `ask` what its tokens can cost.
        expected_s: seconds that the forecast takes for a tool that is not built in.
    """

    name: str
    tool: str
    args: Mapping[str, Plain] = field(default_factory=dict)
    after: tuple[str, ...] = ()
    timeout_s: float | None = None
    attempts: int = 1
    backoff_s: float = 0.1
    on_error: Literal["skip", "feed"] = "skip"
    cost: float | None = None
    expected_s: float = 0.0

    def __post_init__(self) -> None:
        require(_NAME.fullmatch(self.name) is not None, "name", self.name, "a name of letters, digits and _")
        require(self.timeout_s is None or self.timeout_s > 0, "timeout_s", self.timeout_s, "> 0 seconds, or left out")
        require(1 <= self.attempts <= 1000, "attempts", self.attempts, "in 1 .. 1000")
        require(0 <= self.backoff_s <= 3600, "backoff_s", self.backoff_s, "in 0 .. 3600 seconds")
        require(self.cost is None or 0 <= self.cost <= 1e9, "cost", self.cost, "in 0 .. 1e9, or left out")
        require(0 <= self.expected_s <= 1e6, "expected_s", self.expected_s, "in 0 .. 1e6 seconds")

    @cached_property
    def used(self) -> tuple[str, ...]:
        """Names in braces in the arguments, in order."""
        return tuple(dict.fromkeys(name for text in _texts(self.args) for name in _REFERENCE.findall(text)))

    def before(self, above: Container[str]) -> tuple[str, ...]:
        """The steps it comes after, of those `above` it: those it names and those whose results it uses."""
        return tuple(dict.fromkeys([*self.after, *(name for name in self.used if name in above)]))


@dataclass(frozen=True, kw_only=True)
class WorkflowJob:
    """A graph of declared steps.

    Attributes:
        steps: in an order in which each stands below those it comes after.
        sources: what `ask` may ask, by name.
        budget: the most that may be spent; None: no limit.
        deadline_s: seconds after which the run is cancelled; None: never.
        max_parallel: most steps at once; None: weighed.
        log: a file that keeps what came out, so that a run that was killed goes on; None: nothing is kept.
        seed: of the pauses between attempts.
    """

    kind: Literal["workflow"] = "workflow"
    steps: tuple[Step, ...]
    sources: Mapping[str, Source] = field(default_factory=dict)
    budget: float | None = None
    deadline_s: float | None = None
    max_parallel: int | None = None
    log: str | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require(0 < len(self.steps) <= 10_000, "steps", len(self.steps), "1 to 10000 steps")
        require(self.budget is None or 0 <= self.budget <= 1e9, "budget", self.budget, "in 0 .. 1e9, or left out")
        require(self.deadline_s is None or self.deadline_s > 0, "deadline_s", self.deadline_s, "> 0 seconds")
        require(self.max_parallel is None or self.max_parallel >= 1, "max_parallel", self.max_parallel, "at least 1")
        above, names = set[str](), {step.name for step in self.steps}
        for place, step in enumerate(self.steps):
            require(step.name not in above, f"steps.{place}.name", step.name, "a name that no other step has")
            for before in step.after:
                require(before in above, f"steps.{place}.after", before, "the name of a step above")
            for used in step.used:
                right = "of a step above, whose result is there by then"
                require(used in above or used not in names, f"steps.{place}.args", f"{{{used}}}", right)
            above.add(step.name)


def filled(value: Plain, results: Mapping[str, Any], text_of: Any) -> Any:
    """An argument with results in place of names in braces; what is no step's name stays as it is.

    Raises:
        ValueError: if a text would grow beyond `MOST_RESULT_CHARACTERS`.
    """
    if isinstance(value, list):
        return [filled(item, results, text_of) for item in value]
    if not isinstance(value, str):
        return value
    whole = _REFERENCE.fullmatch(value)
    if whole is not None and whole.group(1) in results:
        return results[whole.group(1)]
    parts: list[str] = []
    at = size = 0
    for match in _REFERENCE.finditer(value):
        if match.group(1) in results:
            parts += [value[at : match.start()], text_of(results[match.group(1)])]
            at = match.end()
            size += len(parts[-2]) + len(parts[-1])
            if size > MOST_RESULT_CHARACTERS:
                raise ValueError(
                    f"an argument has more than {MOST_RESULT_CHARACTERS} characters; pass a shorter result"
                )
    return "".join([*parts, value[at:]])


def amount(text: str | float) -> float:
    """Money as people write it: `0.30`, `0.30 USD`.

    >>> amount("0.30 USD")
    0.3
    """
    match = _QUANTITY.fullmatch(str(text))
    if match is None:
        raise FieldError("budget", text, "a number, with a currency or without: 0.30 USD")
    if match.group(2) and len(match.group(2)) != 3:
        raise FieldError("budget", text, "a number with the code of its currency, or without: 0.30 USD")
    return float(match.group(1))


def duration_s(text: str | float) -> float:
    """Seconds as people write them: `60`, `60 s`, `2 min`.

    >>> duration_s("2 min")
    120.0
    """
    match = _QUANTITY.fullmatch(str(text))
    if match is None or match.group(2) not in _SECONDS or float(match.group(1)) <= 0:
        raise FieldError(
            "deadline", text, f"a positive number, with a unit or without: {', '.join(list(_SECONDS)[1:])}"
        )
    return float(match.group(1)) * _SECONDS[match.group(2)]


def _texts(args: Mapping[str, Plain]) -> list[str]:
    found: list[str] = []
    for value in args.values():
        items = value if isinstance(value, list) else [value]
        found += [item for item in items if isinstance(item, str)]
    return found
