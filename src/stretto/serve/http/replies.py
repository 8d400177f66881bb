"""Answers in the forms of the protocol: whole bodies, and the events of streams, whose deltas together are the text
of the whole body.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from stretto.serve.http.errors import ApiError
from stretto.serve.http.logprobs import Entries, Speller, entries_of
from stretto.serve.request import Answer

DONE = "data: [DONE]\n\n"
_FINGERPRINT = "stretto"


def event(value: Any, name: str | None = None) -> str:
    """One server-sent event."""
    head = f"event: {name}\n" if name else ""
    return f"{head}data: {json.dumps(value, separators=(',', ':'), allow_nan=False)}\n\n"


def cached_details(cached: int, first: Answer) -> dict[str, Any]:
    """How much of the prompts was found in the prefix cache and, if nothing was, why; clients pass over the second."""
    why = {"not_cached_because": first.not_cached} if not cached and first.not_cached else {}
    return {"cached_tokens": cached, **why}


class Reply(Protocol):
    """One form of answer. A stream is `first`, then for each choice its `piece`s and `ended`, then `last`; or, instead
    of what is left of it, `failed`. A piece comes with the tokens that begin in it, where logprobs are asked for.
    """

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]: ...

    def first(self) -> Iterable[str]: ...

    def piece(self, index: int, text: str, entries: Entries) -> Iterable[str]: ...

    def ended(self, index: int, answer: Answer) -> Iterable[str]: ...

    def last(self, answers: Sequence[Answer]) -> Iterable[str]: ...

    def failed(self, error: ApiError) -> Iterable[str]: ...


class _Choices(ABC):
    """What chat and plain completions share.

    Args:
        name: the answer's id.
        model: its name, as clients know it.
        created: seconds since 1970.
        prompt_tokens: of all prompts together.
        prompts: how many there are.
        choices: answers in all.
        include_usage: whether a stream ends with an event of usage.
        speller: how logprobs are written; None where they are not asked for.
    """

    kind = ""
    chunk_kind = ""

    def __init__(
        self,
        *,
        name: str,
        model: str,
        created: int,
        prompt_tokens: int,
        prompts: int,
        choices: int,
        include_usage: bool,
        speller: Speller | None = None,
    ) -> None:
        self._name = name
        self._model = model
        self._created = created
        self._prompt_tokens = prompt_tokens
        self._prompts = prompts
        self._choices = choices
        self._include_usage = include_usage
        self._speller = speller

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        choices = [self._choice(index, answer) for index, answer in enumerate(answers)]
        return {**self._head(self.kind), "choices": choices, "usage": self._usage(answers)}

    def last(self, answers: Sequence[Answer]) -> Iterable[str]:
        if self._include_usage:
            yield event({**self._head(self.chunk_kind), "choices": [], "usage": self._usage(answers)})
        yield DONE

    def failed(self, error: ApiError) -> Iterable[str]:
        yield event(error.body)
        yield DONE

    @abstractmethod
    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """One answer as an element of `choices`."""

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self._name,
            "object": kind,
            "created": self._created,
            "model": self._model,
            "system_fingerprint": _FINGERPRINT,
        }

    def _chunk(self, choice: dict[str, Any]) -> str:
        usage = {"usage": None} if self._include_usage else {}
        return event({**self._head(self.chunk_kind), "choices": [choice], **usage})

    def _usage(self, answers: Sequence[Answer]) -> dict[str, Any]:
        new = sum(len(answer.tokens) for answer in answers)
        prompt = self._prompt_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": cached_details(self._cached(answers), answers[0]),
        }

    def _cached(self, answers: Sequence[Answer]) -> int:
        """Prompt tokens that were not computed; like `prompt_tokens`, each prompt counts once."""
        each = len(answers) // self._prompts
        return sum(answers[first].cached_tokens for first in range(0, len(answers), each))


class ChatReply(_Choices):
    """Of /v1/chat/completions."""

    kind = "chat.completion"
    chunk_kind = "chat.completion.chunk"

    def first(self) -> Iterable[str]:
        for index in range(self._choices):
            yield self._delta(index, {"role": "assistant", "content": ""})

    def piece(self, index: int, text: str, entries: Entries) -> Iterable[str]:
        yield self._delta(index, {"content": text}, logprobs=self._logprobs(entries))

    def ended(self, index: int, answer: Answer) -> Iterable[str]:
        yield self._delta(index, {}, answer.reason)

    def _delta(
        self, index: int, delta: dict[str, Any], reason: str | None = None, logprobs: dict[str, Any] | None = None
    ) -> str:
        return self._chunk({"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason})

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        logprobs = self._logprobs(entries_of(answer))
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": answer.reason}

    def _logprobs(self, entries: Entries) -> dict[str, Any] | None:
        return None if self._speller is None else self._speller.chat(entries)


class CompletionReply(_Choices):
    """Of /v1/completions."""

    kind = chunk_kind = "text_completion"

    def first(self) -> Iterable[str]:
        return ()

    def piece(self, index: int, text: str, entries: Entries) -> Iterable[str]:
        yield self._chunk(self._text(index, text, None, entries))

    def ended(self, index: int, answer: Answer) -> Iterable[str]:
        yield self._chunk(self._text(index, "", answer.reason, ()))

    def _choice(self, index: int, answer: Answer) -> dict[str, Any]:
        return self._text(index, answer.text, answer.reason, entries_of(answer))

    def _text(self, index: int, text: str, reason: str | None, entries: Entries) -> dict[str, Any]:
        logprobs = None if self._speller is None else self._speller.completion(entries)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}


class ResponsesReply:
    """Of /v1/responses: one message of one text.

    Args:
        name: the answer's id, without a prefix.
        model: its name, as clients know it.
        created: seconds since 1970.
        prompt_tokens: length of the prompt.
        echoed: what the protocol repeats of the request.
        speller: how logprobs are written; None where they are not asked for.
    """

    def __init__(
        self,
        *,
        name: str,
        model: str,
        created: int,
        prompt_tokens: int,
        echoed: dict[str, Any],
        speller: Speller | None = None,
    ) -> None:
        self._name = name
        self._prompt_tokens = prompt_tokens
        self._speller = speller
        self._fixed = {
            "id": f"resp_{name}",
            "object": "response",
            "created_at": created,
            "model": model,
            "error": None,
            "metadata": {},
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "tool_choice": "none",
            "tools": [],
            "truncation": "disabled",
            **echoed,
        }
        self._sequence = 0
        self._text = ""

    def whole(self, answers: Sequence[Answer]) -> dict[str, Any]:
        answer = answers[0]
        cut = answer.reason == "length"
        new = len(answer.tokens)
        usage = {
            "input_tokens": self._prompt_tokens,
            "input_tokens_details": cached_details(answer.cached_tokens, answer),
            "output_tokens": new,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": self._prompt_tokens + new,
        }
        status = "incomplete" if cut else "completed"
        details = {"reason": "max_output_tokens"} if cut else None
        item = self._item(status, answer.text, self._items(entries_of(answer)))
        return self._response(status, [item], usage, details)

    def first(self) -> Iterable[str]:
        begun = self._response("in_progress", [], None, None)
        yield self._event("response.created", response=begun)
        yield self._event("response.in_progress", response=begun)
        yield self._event("response.output_item.added", output_index=0, item=self._item("in_progress", None))
        yield self._event("response.content_part.added", **self._place(), part=self._part(""))

    def piece(self, index: int, text: str, entries: Entries) -> Iterable[str]:
        self._text += text
        yield self._event("response.output_text.delta", **self._place(), delta=text, logprobs=self._items(entries))

    def ended(self, index: int, answer: Answer) -> Iterable[str]:
        items = self._items(entries_of(answer))
        yield self._event("response.output_text.done", **self._place(), text=answer.text, logprobs=items)
        yield self._event("response.content_part.done", **self._place(), part=self._part(answer.text, items))
        status = "incomplete" if answer.reason == "length" else "completed"
        yield self._event("response.output_item.done", output_index=0, item=self._item(status, answer.text, items))

    def last(self, answers: Sequence[Answer]) -> Iterable[str]:
        body = self.whole(answers)
        yield self._event(f"response.{body['status']}", response=body)

    def failed(self, error: ApiError) -> Iterable[str]:
        body = self._response("failed", [self._item("incomplete", self._text)], None, None)
        body["error"] = {"code": "server_error", "message": error.detail}
        yield self._event("response.failed", response=body)

    def _event(self, kind: str, **fields: Any) -> str:
        number = self._sequence
        self._sequence += 1
        return event({"type": kind, "sequence_number": number, **fields}, kind)

    def _response(
        self, status: str, output: list[Any], usage: dict[str, Any] | None, details: dict[str, Any] | None
    ) -> dict[str, Any]:
        return {**self._fixed, "status": status, "output": output, "usage": usage, "incomplete_details": details}

    def _place(self) -> dict[str, Any]:
        return {"item_id": f"msg_{self._name}", "output_index": 0, "content_index": 0}

    def _items(self, entries: Entries) -> list[Any]:
        return [] if self._speller is None else [self._speller.item(logprob) for _, logprob in entries]

    def _item(self, status: str, text: str | None, logprobs: Sequence[Any] = ()) -> dict[str, Any]:
        content = [] if text is None else [self._part(text, logprobs)]
        return {
            "id": f"msg_{self._name}",
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": content,
        }

    @staticmethod
    def _part(text: str, logprobs: Sequence[Any] = ()) -> dict[str, Any]:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
