"""Language models behind OpenAI's chat protocol, stretto's own server among them; answers are streamed."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stretto.core.clock import Clock
from stretto.core.errors import UserError, require
from stretto.workflow.model import Model, Prompt, Usage, tokens_in
from stretto.workflow.parse import END_OF_PLAN

if TYPE_CHECKING:
    import httpx

MOST_LINE_CHARACTERS = 2**18
_MOST_SAID = 500  # bytes of what an endpoint says when it refuses
_STOPS = {"plan": [END_OF_PLAN], "step": ["\nObservation:"]}


class EndpointError(RuntimeError):
    """The endpoint refused, or answered something that is not of the protocol."""


@dataclass(frozen=True, kw_only=True)
class Endpoint(Model):
    """A model at an OpenAI-compatible address.

    Attributes:
        base_url: with the version, as `http://localhost:8000/v1`.
        model: its name there.
        api_key: sent as a bearer token; None: none.
        max_tokens: of an answer.
        temperature: of the draws.
        input_price, output_price: money a million tokens, in units of the budget.
        timeout_s: seconds without any news from the endpoint after which a call fails.
        extra: further fields of the request by part, as `{"plan": {"guided_grammar": ...}}`.
    """

    base_url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    max_tokens: int = 1024
    temperature: float = 0.0
    input_price: float = 0.0
    output_price: float = 0.0
    timeout_s: float = 60.0
    extra: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        right = "an address as http://localhost:8000/v1"
        require(self.base_url.startswith(("http://", "https://")), "base_url", self.base_url, right)
        require(1 <= self.max_tokens <= 10**6, "max_tokens", self.max_tokens, "in 1 .. 1000000")
        require(self.timeout_s > 0, "timeout_s", self.timeout_s, "> 0 seconds")
        for name in ("input_price", "output_price"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "not negative")

    def bound(self, prompt: Prompt) -> float:
        """No token has less than one byte, and an answer no more than its limit; a message takes some for its frame."""
        most = sum(len(message.text.encode()) + 16 for message in prompt.messages) + 16
        return (most * self.input_price + self.max_tokens * self.output_price) / 1e6

    async def stream(self, prompt: Prompt, clock: Clock, usage: Usage) -> AsyncGenerator[str, None]:
        httpx = _httpx()
        headers = {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}
        secure = self.base_url.startswith("https")
        counted = Usage(calls=1, prompt_tokens=tokens_in(prompt.messages))
        try:
            async with (
                httpx.AsyncClient(timeout=self.timeout_s, verify=secure, trust_env=False) as client,
                client.stream("POST", self._url, json=self._body(prompt), headers=headers) as response,
            ):
                if response.status_code != 200:
                    said = b""
                    async for piece in response.aiter_bytes():
                        said += piece
                        if len(said) >= _MOST_SAID:
                            break
                    text = said[:_MOST_SAID].decode("utf-8", "replace")
                    raise EndpointError(f"{self._url} answered {response.status_code}: {text}")
                async for event in _events(response):
                    told = event.get("usage")
                    if isinstance(told, dict):
                        counted.prompt_tokens = int(told.get("prompt_tokens", counted.prompt_tokens))
                        counted.completion_tokens = int(told.get("completion_tokens", counted.completion_tokens))
                    if piece := _piece(event):
                        counted.completion_tokens += not isinstance(told, dict)
                        yield piece
        except httpx.HTTPError as problem:
            raise EndpointError(f"{self._url}: {type(problem).__name__} {problem}".strip()) from None
        finally:
            tokens = counted.prompt_tokens * self.input_price + counted.completion_tokens * self.output_price
            counted.cost = tokens / 1e6
            usage.add(counted)

    @property
    def _url(self) -> str:
        return f"{self.base_url.rstrip('/')}/chat/completions"

    def _body(self, prompt: Prompt) -> dict[str, Any]:
        stops = _STOPS.get(prompt.part)
        return {
            "model": self.model,
            "messages": [{"role": message.role, "content": message.text} for message in prompt.messages],
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"stop": stops} if stops else {}),
            **self.extra.get(prompt.part, {}),
        }


def llm(base_url: str, model: str, **options: Any) -> Endpoint:
    """A model at an OpenAI-compatible address: `llm("http://localhost:8000/v1", model="...")`; see `Endpoint`."""
    return Endpoint(base_url=base_url, model=model, **options)


def _httpx() -> Any:
    try:
        import httpx
    except ImportError:
        raise UserError("httpx is not installed", right="pip install 'stretto[workflow]'") from None
    return httpx


async def _events(response: httpx.Response) -> AsyncGenerator[dict[str, Any], None]:
    """The JSON objects of a stream of server-sent events."""
    async for line in _lines(response):
        if not line.startswith("data:"):
            continue
        data = line[5:].strip()
        if data == "[DONE]":
            return
        try:
            event = json.loads(data)
        except ValueError:
            raise EndpointError(f"an event is not JSON: {data[:200]}") from None
        if not isinstance(event, dict):
            raise EndpointError(f"an event is not an object: {data[:200]}")
        if "error" in event:
            raise EndpointError(f"the endpoint failed: {str(event['error'])[:500]}")
        yield event


async def _lines(response: httpx.Response) -> AsyncGenerator[str, None]:
    """The lines of an answer, each of bounded length."""
    held = ""
    async for text in response.aiter_text():
        *whole, held = (held + text).split("\n")
        for line in whole:
            yield line
        if len(held) > MOST_LINE_CHARACTERS:
            raise EndpointError(f"a line has more than {MOST_LINE_CHARACTERS} characters")
    yield held


def _piece(event: dict[str, Any]) -> str:
    choices = event.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return ""
    delta = choices[0].get("delta")
    content = delta.get("content") if isinstance(delta, dict) else None
    return content if isinstance(content, str) else ""
