"""What may be asked: OpenAI's request bodies, validated strictly, unknown fields tolerated.

A known field that would change the answer and is not supported is refused unless it has its neutral value: nothing
that matters is ignored in silence.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from stretto.serve.http.errors import ApiError
from stretto.serve.http.structured import (
    Choices,
    ResponseFormat,
    Schema,
    StructuredOutputs,
    TextOptions,
    Wanted,
    sources,
    the_only,
)
from stretto.serve.logprobs import MOST_ALTERNATIVES
from stretto.serve.sampling import Sampling

MOST_CHOICES = 128
MOST_STOPS = 16
MOST_TIMEOUT_S = 86_400.0
_NEARLY_ZERO = 1e-4
"""Temperatures below it are greedy: dividing logits by them would overflow."""

Neutral = dict[str, tuple[Any, ...]]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
SOME = Field(max_length=MOST_CHOICES, fail_fast=True)
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
"""Lists stop at their first mistake: a body of a million wrong items must not cost a million messages."""
Alternatives = Annotated[int, Field(ge=0, le=MOST_ALTERNATIVES)]
StopString = Annotated[str, Field(min_length=1, max_length=1000)]

_OFF: tuple[Any, ...] = (None, False, 0)
_NONE: tuple[Any, ...] = (None, [], {}, "")


class TextPart(BaseModel):
    """A piece of a message."""

    model_config = ConfigDict(strict=True)

    type: Literal["text", "input_text", "output_text"]
    text: str


class Message(BaseModel):
    """One turn of a conversation."""

    model_config = ConfigDict(strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]

    def plain(self) -> dict[str, str]:
        """As chat templates want it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


Conversation = Annotated[list[Message], Field(min_length=1, fail_fast=True)]


class StreamOptions(BaseModel):
    """What a stream carries besides text."""

    model_config = ConfigDict(strict=True)

    include_usage: bool | None = None


class Generation(BaseModel):
    """What all requests for text share."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    neutral: ClassVar[Neutral] = {
        "presence_penalty": _OFF,
        "frequency_penalty": _OFF,
        "repetition_penalty": (None, 1),
        "length_penalty": (None, 1),
        "logit_bias": _NONE,
        "min_tokens": _OFF,
        "prompt_logprobs": (None,),
        "use_beam_search": _OFF,
        "bad_words": _NONE,
        "allowed_token_ids": _NONE,
        "logits_processors": _NONE,
        "continue_final_message": _OFF,
        "chat_template": (None,),
        "chat_template_kwargs": _NONE,
        "add_generation_prompt": (None, True),
    }
    """Fields that are not supported, with the values that change nothing."""
    prompt_field: ClassVar[str] = "prompt"
    """What this kind of request calls its prompt."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    min_p: Annotated[float, Field(ge=0, lt=1)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopString | Annotated[list[StopString], Field(max_length=MOST_STOPS, fail_fast=True)] | None = None
    stream: bool | None = None
    ignore_eos: bool | None = None
    priority: Annotated[int, Field(ge=-(2**31), lt=2**31)] | None = None
    timeout: Annotated[float, Field(gt=0, le=MOST_TIMEOUT_S)] | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: Schema | str | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None

    @model_validator(mode="after")
    def _refuse_unsupported(self) -> Generation:
        given = self.model_extra or {}
        for name, values in self.neutral.items():
            if name in given and given[name] not in values:
                raise ApiError(
                    400,
                    f"{name}: not supported yet by this server; leave it out",
                    param=name,
                    code="unsupported_parameter",
                )
        return self

    def sampling(self) -> Sampling:
        """How tokens are drawn: OpenAI's defaults, and a seed at random where none is given."""
        temperature = 1.0 if self.temperature is None else self.temperature
        return Sampling(
            temperature=temperature if temperature >= _NEARLY_ZERO else 0.0,
            top_k=max(0, self.top_k or 0),
            top_p=1.0 if self.top_p is None else self.top_p,
            min_p=self.min_p or 0.0,
            seed=secrets.randbits(63) if self.seed is None else self.seed,
        )

    @property
    def limit(self) -> int | None:
        """Most new tokens; None: as many as fit."""
        return None

    @property
    def limit_field(self) -> str:
        """The field that says so."""
        return "max_tokens"

    @property
    def alternatives(self) -> int | None:
        """How many alternatives to tell the logprobs of; None for no logprobs."""
        return None

    def format(self) -> Wanted | None:
        """What OpenAI's own field says of the answer's form."""
        return None

    def wanted(self) -> Wanted | None:
        """What the answer must look like, and which field says so.

        Raises:
            ApiError: two fields do.
        """
        formatted = self.format()
        found = [] if formatted is None else [formatted]
        if self.structured_outputs is not None:
            found += self.structured_outputs.wanted()
        guided = (self.guided_json, self.guided_regex, self.guided_choice, self.guided_grammar)
        return the_only(found + sources("guided_", *guided))

    def stops(self) -> tuple[str, ...]:
        """Strings before which an answer ends."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatRequest(Generation):
    """POST /v1/chat/completions."""

    neutral: ClassVar[Neutral] = {
        **Generation.neutral,
        "tools": _NONE,
        "tool_choice": (None, "none", "auto"),
        "functions": _NONE,
        "function_call": (None, "none", "auto"),
        "modalities": (None, ["text"]),
        "audio": (None,),
        "reasoning_effort": (None, "none"),
        "web_search_options": (None,),
    }
    prompt_field = "messages"

    messages: Conversation
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None
    response_format: ResponseFormat | None = None

    @model_validator(mode="after")
    def _check_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs: send logprobs: true with it", param="top_logprobs", code="invalid_value")
        return self

    @property
    def limit(self) -> int | None:
        """Most new tokens; None: as many as fit."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def limit_field(self) -> str:
        """The field that says so."""
        return "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"

    @property
    def alternatives(self) -> int | None:
        """How many alternatives to tell the logprobs of; None for no logprobs."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def format(self) -> Wanted | None:
        return None if self.response_format is None else self.response_format.wanted()


class CompletionRequest(Generation):
    """POST /v1/completions."""

    neutral: ClassVar[Neutral] = {
        **Generation.neutral,
        "echo": _OFF,
        "suffix": (None, ""),
        "best_of": (None, 1),
    }

    prompt: str | TokenIds | Annotated[list[str], SOME] | Annotated[list[TokenIds], SOME]
    max_tokens: Annotated[int, Field(ge=1)] | None = 16
    n: Annotated[int, Field(ge=1, le=MOST_CHOICES)] | None = None
    stream_options: StreamOptions | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None
    response_format: ResponseFormat | None = None

    @property
    def limit(self) -> int | None:
        """Most new tokens; None: as many as fit."""
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """How many alternatives to tell the logprobs of; None for no logprobs."""
        return self.logprobs

    def format(self) -> Wanted | None:
        return None if self.response_format is None else self.response_format.wanted()

    def prompts(self) -> list[str] | list[list[int]]:
        """Each prompt, as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[token for token in self.prompt if isinstance(token, int)]]
        return self.prompt  # type: ignore[return-value]


class ResponsesRequest(Generation):
    """POST /v1/responses, for text; nothing is stored."""

    neutral: ClassVar[Neutral] = {
        **Generation.neutral,
        "previous_response_id": (None,),
        "conversation": (None,),
        "background": _OFF,
        "tools": _NONE,
        "tool_choice": (None, "none", "auto"),
        "reasoning": _NONE,
        "prompt": (None,),
        "truncation": (None, "disabled"),
    }
    prompt_field = "input"

    input: str | Conversation
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1)] | None = None
    include: Annotated[list[Literal["message.output_text.logprobs"]], Field(max_length=1)] | None = None
    top_logprobs: Alternatives | None = None
    text: TextOptions | None = None

    @property
    def limit(self) -> int | None:
        """Most new tokens; None: as many as fit."""
        return self.max_output_tokens

    @property
    def limit_field(self) -> str:
        """The field that says so."""
        return "max_output_tokens"

    @property
    def alternatives(self) -> int | None:
        """How many alternatives to tell the logprobs of; None for no logprobs."""
        return (self.top_logprobs or 0) if self.include or self.top_logprobs else None

    def format(self) -> Wanted | None:
        return None if self.text is None else self.text.wanted()

    def messages(self) -> list[Message]:
        """The conversation, its instructions first."""
        said = [Message(role="user", content=self.input)] if isinstance(self.input, str) else self.input
        return [Message(role="system", content=self.instructions), *said] if self.instructions else said


class TokenizeRequest(BaseModel):
    """POST /tokenize: a text, or a conversation as the chat template makes it."""

    model_config = ConfigDict(strict=True)

    model: str | None = None
    prompt: str | None = None
    messages: Conversation | None = None
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _one_of_two(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("send either prompt or messages")
        return self


class DetokenizeRequest(BaseModel):
    """POST /detokenize."""

    model_config = ConfigDict(strict=True)

    model: str | None = None
    tokens: TokenIds


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer that is not 200."""

    error: ErrorDetail
