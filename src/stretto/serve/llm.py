"""A model behind an engine, ready to be asked: what the server and the offline `LLM` are both built on.

Unless told otherwise, the engine's pool holds `slots` requests of the longest length, so that an admitted request is
never put back for want of pages.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from stretto.core.clock import RealClock
from stretto.core.errors import FieldError, UserError, require
from stretto.core.record import Recorder
from stretto.core.trace import Key
from stretto.hardware.probe import memory_bytes_here
from stretto.models.calibrate import warm_up
from stretto.models.kv_cache import PAGE_TOKENS
from stretto.models.kv_packed import PAGE_TOKENS as KV_PAGE_TOKENS
from stretto.models.load import DTYPES, PATHS, Model, load_model, open_model
from stretto.models.packable import why_not_fused
from stretto.models.passes import arithmetic
from stretto.models.spec import ModelSpec
from stretto.serve.backend import Backend
from stretto.serve.engine import Engine
from stretto.serve.grammar import Grammars, GrammarSource
from stretto.serve.handle import Handle
from stretto.serve.joining import JOININGS
from stretto.serve.lane_engine import engine_of
from stretto.serve.local import LocalBackend
from stretto.serve.local_lanes import LaneBackend
from stretto.serve.logprobs import MOST_ALTERNATIVES, Logprob
from stretto.serve.plan import WORKSPACE_BYTES
from stretto.serve.request import Answer, Request
from stretto.serve.sampling import Sampling
from stretto.serve.scheduler import SchedulerConfig
from stretto.serve.slots import Reorder
from stretto.serve.text import AnswerText

T = TypeVar("T")

LONGEST_BY_DEFAULT = 4096
"""Positions of a request unless more are asked for, or the model has fewer."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How a model is run when requests are not known beforehand.

    Attributes:
        model: a name, a path (.gguf or a Hugging Face folder) or a Hugging Face id.
        dtype: type of the products and of the KV cache; "auto" takes bf16 where the CPU computes in it, else fp32;
            "int4" keeps keys and values in 4 bits.
        path: how passes are computed, as in `ServePlan`; "auto" takes the fused decoder where the weights can stay
            packed ("bf16" or, in fp32, "exact"), else "torch".
        threads: CPU threads of the passes, with two lanes of those of each; None takes all, or half of them.
        slots: most requests that run at once.
        max_model_len: positions of the longest request, prompt and answer; None takes the model's own, at most 4,096.
        prefill_tokens: most prompt tokens in one pass.
        prefill: "mixed" puts prompts into the passes of decoding rows, "lanes" beside them, as in `ServePlan`.
        joining: who joins the running batch, and when.
        layout: of the KV cache, as in `ServePlan`.
        prefix_cache: whether requests share the pages of texts that begin alike, in layout "pages".
        reorder: when holes are closed in layout "slots".
        pool_tokens: positions of the KV pool, with layout "pages"; None has room for every slot's longest request. With
            fewer, more requests run as long as they are short, and when pages run out the least urgent is put back.
        preemption: what becomes of the pages of a request that is put back: "recompute", or "swap" to spare memory.
        spare_tokens: positions of that memory.
    """

    model: str = "smollm2-135m-instruct"
    dtype: Literal["auto", "fp32", "bf16", "int4"] = "auto"
    path: Literal["auto", "torch", "exact", "bf16", "fast"] = "auto"
    threads: int | None = None
    slots: int = 8
    max_model_len: int | None = None
    prefill_tokens: int = 512
    prefill: Literal["mixed", "lanes"] = "mixed"
    joining: str = "continuous"
    layout: Literal["pages", "slots"] = "pages"
    prefix_cache: bool = True
    reorder: Reorder = "eager"
    pool_tokens: int | None = None
    preemption: Literal["recompute", "swap"] = "recompute"
    spare_tokens: int = 0

    def __post_init__(self) -> None:
        require(self.dtype in ("auto", *DTYPES), "dtype", self.dtype, f"one of auto, {', '.join(DTYPES)}")
        require(self.dtype != "int4" or self.layout == "pages", "layout", self.layout, "pages, for a cache in 4 bits")
        require(self.path in ("auto", *PATHS), "path", self.path, f"one of auto, {', '.join(PATHS)}")
        require(self.threads is None or 1 <= self.threads <= 4096, "threads", self.threads, "in 1 .. 4096")
        require(1 <= self.slots <= 4096, "slots", self.slots, "in 1 .. 4096")
        require(self.max_model_len is None or self.max_model_len >= 2, "max_model_len", self.max_model_len, ">= 2")
        require(1 <= self.prefill_tokens <= 2**20, "prefill_tokens", self.prefill_tokens, "in 1 .. 2**20")
        require(self.prefill in ("mixed", "lanes"), "prefill", self.prefill, "mixed or lanes")
        require(self.preemption in ("recompute", "swap"), "preemption", self.preemption, "recompute or swap")
        swaps = self.preemption == "swap" and self.dtype == "int4"
        require(not swaps, "preemption", self.preemption, "recompute, for a cache in 4 bits")
        paged = self.layout == "pages"
        sized = self.pool_tokens is None or (paged and 1 <= self.pool_tokens <= 2**40)
        require(sized, "pool_tokens", self.pool_tokens, "in 1 .. 2**40, and with layout pages")
        require(0 <= self.spare_tokens <= 2**40, "spare_tokens", self.spare_tokens, "in 0 .. 2**40")
        able = [name for name in JOININGS if name != "static"]
        right = f"one of {', '.join(able)} (static batches wait for the last request, and a server has none)"
        require(self.joining in able, "joining", self.joining, right)
        if self.prefill == "lanes":
            beside = "where prompts have lanes"
            require(self.layout == "pages", "layout", self.layout, f"pages, {beside}")
            require(self.preemption == "recompute", "preemption", self.preemption, f"recompute, {beside}")
            require(self.path != "torch", "path", self.path, f"exact, bf16 or fast, {beside}")
            require(self.dtype != "int4", "dtype", self.dtype, f"fp32 or bf16, {beside}")

    @property
    def lane_threads(self) -> int:
        """CPU threads of each of two lanes."""
        return self.threads or max(1, len(os.sched_getaffinity(0)) // 2)

    def longest(self, spec: ModelSpec) -> int:
        """Positions of the longest request.

        Raises:
            FieldError: if more are asked for than the model has.
        """
        if self.max_model_len is None:
            return min(spec.max_positions, LONGEST_BY_DEFAULT)
        if self.max_model_len > spec.max_positions:
            raise FieldError("max_model_len", self.max_model_len, f"at most {spec.max_positions}, the model's own")
        return self.max_model_len

    def scheduler(self, spec: ModelSpec) -> SchedulerConfig:
        """The scheduler of these settings; its pool holds every slot's longest request unless it is to be smaller.

        Raises:
            FieldError: if the longest request does not fit into the pool.
        """
        longest = self.longest(spec)
        if self.layout == "slots":
            page = longest
        else:
            page = KV_PAGE_TOKENS if self.dtype == "int4" else min(PAGE_TOKENS, longest)
        pages = self.slots * -(-longest // page) if self.pool_tokens is None else -(-self.pool_tokens // page)
        fits = pages * page >= longest
        require(fits, "pool_tokens", self.pool_tokens, f"at least {longest}, the positions of the longest request")
        return SchedulerConfig(
            joining=self.joining,
            slots=self.slots,
            pages=pages,
            page_tokens=page,
            prefill_tokens=self.prefill_tokens,
            prefill=self.prefill,
            layout=self.layout,
            prefix_cache=self.prefix_cache and self.layout == "pages",
            reorder=self.reorder,
            preemption=self.preemption,
            spare_pages=-(-self.spare_tokens // page) if self.preemption == "swap" else 0,
        )


class NoRecorder(Recorder):
    """Keeps nothing: an engine that serves for days must not grow a trace."""

    def __init__(self) -> None:
        super().__init__("unrecorded")

    def span(self, lane: str, start: float, finish: float, key: Key) -> None:
        return None

    def request(self, lane: str, start: float, finish: float, key: Key) -> None:
        return None

    def counter(self, name: str, at: float, value: float) -> None:
        return None


def load(settings: EngineSettings) -> Model:
    """Load the model of `settings` and run it once, so that the first request does not pay for lazy set-up.

    Raises:
        UserError: as `load_model`, and if weights and KV pool exceed this machine's memory.
        FieldError: if more positions are asked for than the model has, or two lanes of a model that cannot run fused.
    """
    dtype = _native_dtype() if settings.dtype == "auto" else settings.dtype
    path = _native_path(settings.model, dtype) if settings.path == "auto" else settings.path
    if settings.prefill == "lanes" and path == "torch":
        raise FieldError("prefill", settings.prefill, "mixed, for a model whose weights do not stay packed")
    model = load_model(settings.model, dtype=dtype, threads=settings.threads, path=path)
    _check_memory(model, settings)
    warm_up(model)
    return model


def _native_dtype() -> str:
    """bf16 where the CPU multiplies it, else fp32, in which products of bf16 would be computed anyway."""
    flags = _cpu_flags()
    return "bf16" if flags & {"amx_bf16", "avx512_bf16", "bf16"} else "fp32"


def _native_path(model: str, dtype: str) -> str:
    """The fused decoder where the weights can stay packed."""
    files = open_model(model)
    if why_not_fused(files.spec, files.weights) is not None:
        return "torch"
    return "exact" if dtype == "fp32" else "bf16"


def _cpu_flags() -> set[str]:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return set()
    lines = (line.partition(":") for line in text.splitlines())
    return next((set(value.split()) for name, _, value in lines if name.strip() in ("flags", "Features")), set())


def _check_memory(model: Model, settings: EngineSettings) -> None:
    available = float(memory_bytes_here())
    config = settings.scheduler(model.spec)
    pages = config.pages + config.spare_pages
    pool = pages * config.page_tokens * model.spec.kv_bytes_per_token(model.dtype)
    rest = model.spec.weight_bytes(arithmetic(model.dtype, model.path)) + WORKSPACE_BYTES
    if rest + pool > available:
        fitting = int((available - rest) // (pool / config.slots))
        right = f"{fitting} slots would fit" if fitting >= 1 else "take a smaller model or fewer positions"
        raise UserError(
            f"weights and {config.slots} slots of {settings.longest(model.spec)} positions need "
            f"{(rest + pool) / 1e9:.1f} GB, this machine has {available / 1e9:.1f} GB",
            field="slots",
            right=right,
        )


def new_backend(model: Model, settings: EngineSettings, clock: RealClock) -> Backend:
    """A backend whose cache has the pages of `settings`."""
    config = settings.scheduler(model.spec)
    size = {"pages": config.pages, "page_tokens": config.page_tokens}
    if settings.prefill == "lanes":
        return LaneBackend(model, clock=clock, threads=settings.lane_threads, **size)
    return LocalBackend(model, clock=clock, spare_pages=config.spare_pages, **size)


def new_engine(model: Model, settings: EngineSettings, backend: Backend, clock: RealClock) -> Engine:
    """An engine that records nothing."""
    return engine_of(settings.scheduler(model.spec), backend, clock, NoRecorder())


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
