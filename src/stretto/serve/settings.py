"""How an engine is run whose requests are not known beforehand, and what is made of that: model, backend, engine.

Unless told otherwise, the engine's pool holds `slots` requests of the longest length, so that an admitted request is
never put back for want of pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stretto.core.clock import RealClock
from stretto.core.errors import FieldError, UserError, require
from stretto.core.record import Recorder
from stretto.core.trace import Key
from stretto.hardware.probe import cores_here, memory_bytes_here
from stretto.models.calibrate import warm_up
from stretto.models.kv_cache import PAGE_TOKENS
from stretto.models.kv_packed import PAGE_TOKENS as KV_PAGE_TOKENS
from stretto.models.load import DTYPES, PATHS, Model, load_model, open_model
from stretto.models.packable import why_not_fused
from stretto.models.passes import arithmetic
from stretto.models.spec import ModelSpec
from stretto.serve.backend import Backend
from stretto.serve.engine import Engine
from stretto.serve.joining import JOININGS
from stretto.serve.lane_engine import engine_of
from stretto.serve.local import LocalBackend
from stretto.serve.local_lanes import LaneBackend
from stretto.serve.plan import WORKSPACE_BYTES
from stretto.serve.scheduler_config import SchedulerConfig
from stretto.serve.slots import Reorder

LONGEST_BY_DEFAULT = 4096
"""Positions of a request unless more are asked for, or the model has fewer."""


@dataclass(frozen=True, kw_only=True)
class EngineSettings:
    """How a model is run when requests are not known beforehand.

    Attributes:
        model: a name, a path (.gguf or a Hugging Face folder) or a Hugging Face id.
        dtype: type of the products and of the KV cache; "auto" takes bf16 on the fused decoder and where the CPU
            computes in it, else fp32; "int4" keeps keys and values in 4 bits.
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
        return self.threads or max(1, cores_here() // 2)

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
    dtype, path = chosen(settings)
    if settings.prefill == "lanes" and path == "torch":
        raise FieldError("prefill", settings.prefill, "mixed, for a model whose weights do not stay packed")
    model = load_model(settings.model, dtype=dtype, threads=settings.threads, path=path)
    _check_memory(model, settings)
    warm_up(model)
    return model


def chosen(settings: EngineSettings) -> tuple[str, str]:
    """Type and path: what was asked for, and where that says "auto" what is fastest at next to no loss.

    That is the fused decoder where the weights can stay packed, in bf16 also on a CPU without such arithmetic, since
    its products are of whole numbers; else torch, in bf16 where the CPU multiplies it.
    """
    dtype, path = settings.dtype, settings.path
    if path == "auto":
        files = open_model(settings.model)
        if why_not_fused(files.spec, files.weights) is not None:
            path = "torch"
        else:
            path = "exact" if dtype == "fp32" else "bf16"
    if dtype == "auto":
        dtype = "bf16" if path == "bf16" or _cpu_flags() & {"amx_bf16", "avx512_bf16", "bf16"} else "fp32"
    return dtype, path


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
