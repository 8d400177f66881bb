"""A model for use without a server: prompts in, answers out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from stretto.core.clock import RealClock
from stretto.core.errors import UserError, require
from stretto.serve.grammar import Grammars, GrammarSource
from stretto.serve.handle import Handle
from stretto.serve.logprobs import MOST_ALTERNATIVES, Logprob
from stretto.serve.request import Answer, Request
from stretto.serve.sampling import Sampling
from stretto.serve.settings import EngineSettings, load, new_backend, new_engine
from stretto.serve.text import AnswerText

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Completion:
    """What came of one prompt.

    Attributes:
        prompt: as it was given, or as the chat template made it.
        prompt_tokens: its length in tokens.
        text: of the answer.
        tokens: of the answer, the ending one included.
        reason: "stop", "length", "cancelled", "failed" or "grammar", as in `Answer`.
        first_token_s: seconds from the request to its first token; None if there was none.
        seconds: from the request to its end.
        logprobs: of each token, the ending one included; None if they were not asked for.
    """

    prompt: str
    prompt_tokens: int
    text: str
    tokens: tuple[int, ...]
    reason: str
    first_token_s: float | None
    seconds: float
    logprobs: tuple[Logprob, ...] | None = None


class LLM:
    """A model for use without a server.

        llm = stretto.LLM("smollm2-135m-instruct")
        for answer in llm.generate(["The capital of France is"], max_tokens=8):
            print(answer.text)

    Not for several threads at once. Works inside a running event loop too (a notebook), where calls block it.

    Args:
        model: a name, a path (.gguf or a Hugging Face folder) or a Hugging Face id.
        options: the fields of `EngineSettings`: dtype, slots, threads, max_model_len and so on.

    Raises:
        UserError: the model cannot be loaded, or does not fit.
        FieldError: an option is out of its range.
    """

    def __init__(self, model: str = "smollm2-135m-instruct", **options: Any) -> None:
        self.settings = EngineSettings(model=model, **options)
        self.model = load(self.settings)
        self._clock = RealClock()
        self._backend = new_backend(self.model, self.settings, self._clock)
        self._grammars = Grammars(self.model.tokenizer, self.model.spec.vocab)

    def generate(
        self,
        prompts: str | Sequence[str],
        sampling: Sampling | None = None,
        *,
        max_tokens: int = 128,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        logprobs: int | None = None,
        json_schema: Mapping[str, Any] | str | None = None,
        regex: str | None = None,
    ) -> list[Completion]:
        """Continue each prompt; answers come in the order of the prompts.

        Args:
            prompts: texts, each continued as it stands.
            sampling: how tokens are drawn, greedily when None; prompt i uses seed + i.
            max_tokens: most new tokens of an answer.
            stop: strings before which an answer ends.
            ignore_eos: go on to `max_tokens` whatever the model says.
            logprobs: how many alternatives to tell the logprobs of beside each token's own, 0 to 20; None for none.
            json_schema: every answer is JSON that fits this schema, on one line; an answer that reaches `max_tokens` is
                the beginning of one.
            regex: every answer fits this regular expression as a whole, likewise.

        Raises:
            UserError: a prompt is empty, or does not fit into `max_model_len` together with its answer; a schema or a
                regular expression cannot be followed.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        encoded = [tuple(self.model.tokenizer.encode(text)) for text in texts]
        return self._answers(
            texts, encoded, sampling, max_tokens, tuple(stop), ignore_eos, logprobs, _source(json_schema, regex)
        )

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]] | Sequence[Sequence[Mapping[str, Any]]],
        sampling: Sampling | None = None,
        *,
        max_tokens: int = 128,
        stop: Sequence[str] = (),
        ignore_eos: bool = False,
        logprobs: int | None = None,
        json_schema: Mapping[str, Any] | str | None = None,
        regex: str | None = None,
    ) -> list[Completion]:
        """Answer one conversation, or several at once, through the model's chat template; else as `generate`.

        Args:
            messages: mappings with "role" and "content", or a list of such conversations.

        Raises:
            UserError: as `generate`, and when the model has no chat template or it refuses the messages.
        """
        one = bool(messages) and isinstance(messages[0], Mapping)
        conversations: Any = [messages] if one else messages
        texts = [self.model.tokenizer.chat(conversation) for conversation in conversations]
        encoded = [tuple(self.model.tokenizer.encode(text, special=False)) for text in texts]
        return self._answers(
            texts, encoded, sampling, max_tokens, tuple(stop), ignore_eos, logprobs, _source(json_schema, regex)
        )

    def _answers(
        self,
        texts: Sequence[str],
        encoded: Sequence[tuple[int, ...]],
        sampling: Sampling | None,
        max_tokens: int,
        stop: tuple[str, ...],
        ignore_eos: bool,
        logprobs: int | None,
        source: GrammarSource | None,
    ) -> list[Completion]:
        require(max_tokens >= 1, "max_tokens", max_tokens, ">= 1")
        require(all(stop), "stop", stop, "strings that are not empty")
        able = logprobs is None or 0 <= logprobs <= MOST_ALTERNATIVES
        require(able, "logprobs", logprobs, f"in 0 .. {MOST_ALTERNATIVES}, or None")
        longest = self.settings.longest(self.model.spec)
        for number, prompt in enumerate(encoded):
            if not prompt:
                raise UserError("has no tokens", field=f"prompts.{number}", right="a text that is not empty")
            if max(prompt) >= self.model.spec.vocab:
                raise UserError(
                    f"token {max(prompt)} is outside of the vocabulary of {self.model.spec.vocab}",
                    field=f"prompts.{number}",
                    right="a text without that token; the tokenizer has more than the model",
                )
            if len(prompt) + max_tokens > longest:
                raise UserError(
                    f"{len(prompt)} tokens and {max_tokens} new ones exceed max_model_len, {longest}",
                    field=f"prompts.{number}",
                    right="shorten it, lower max_tokens or raise max_model_len",
                )
        how = sampling or Sampling()
        grammar = None if source is None else self._grammars.compile(source)
        requests = [
            Request(
                id=number,
                prompt=prompt,
                limit=max_tokens,
                sampling=replace(how, seed=how.seed + number),
                stop_tokens=frozenset() if ignore_eos else self.model.tokenizer.eos_ids,
                stop=stop,
                logprobs=logprobs,
                grammar=grammar,
            )
            for number, prompt in enumerate(encoded)
        ]
        answers = _run(lambda: self._serve(requests))
        return [
            Completion(
                prompt=text,
                prompt_tokens=len(request.prompt),
                text=answer.text,
                tokens=answer.tokens,
                reason=answer.reason,
                first_token_s=None if answer.first_token_s is None else answer.first_token_s - answer.arrived_s,
                seconds=answer.latency_s,
                logprobs=answer.logprobs,
            )
            for text, request, answer in zip(texts, requests, answers, strict=True)
        ]

    async def _serve(self, requests: Sequence[Request]) -> list[Answer]:
        engine = new_engine(self.model, self.settings, self._backend, self._clock)
        handles: list[Handle] = [
            engine.submit(request, AnswerText(self.model.tokenizer, request.stop)) for request in requests
        ]
        engine.close()
        await engine.run()
        return [handle.result() for handle in handles]


def _source(json_schema: Mapping[str, Any] | str | None, regex: str | None) -> GrammarSource | None:
    if json_schema is not None and regex is not None:
        raise UserError("an answer has one form", field="regex", right="ask for a schema or for a regular expression")
    if json_schema is not None:
        return GrammarSource.json_schema(json_schema)
    return None if regex is None else GrammarSource(kind="regex", text=regex)


def _run(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """`asyncio.run(main())`, in a thread of its own where a loop is running already."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(main())
    with ThreadPoolExecutor(max_workers=1) as aside:
        return aside.submit(lambda: asyncio.run(main())).result()
