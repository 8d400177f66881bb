"""The real backend of two lanes: passes of prompts and of decoding rows at once, on two teams of threads and one cache.

Each lane has a thread that computes, a native decoder with scratch memory of its own, and cores that the other does not
touch. Weights and pages are the same memory; who writes where is the scheduler's concern, and a row's bits depend on
its own text alone, so tokens are those of one lane.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING

from stretto.core.clock import RealClock
from stretto.core.errors import require
from stretto.serve.backend import Pass, PassResult
from stretto.serve.decision import Lane
from stretto.serve.local import next_tokens

if TYPE_CHECKING:
    from stretto.models.load import Model

LANES: tuple[Lane, Lane] = ("tokens", "prompts")


class LaneBackend:
    """A `Backend` on `model` that carries out one pass of each lane at a time.

    Nothing is begun ahead of its asking: pages that a decoding row gives back may be in a prompt's pass already.

    Args:
        model: loaded, on a fused path, with keys and values that are not in 4 bits.
        pages, page_tokens: size of the KV cache.
        clock: the engine's.
        threads: of each lane. Each gets cores of its own where there are enough.
    """

    steps_at_once = 1

    def __init__(self, model: Model, *, pages: int, page_tokens: int, clock: RealClock, threads: int) -> None:
        from stretto.models.fused import FusedDecoder

        require(model.path != "torch", "path", model.path, "exact, bf16 or fast, where prompts have lanes")
        require(model.dtype != "int4", "dtype", model.dtype, "not int4, where prompts have lanes")
        decoder = model.transformer
        assert isinstance(decoder, FusedDecoder)
        self._cache = decoder.new_cache(pages=pages + 1, page_tokens=page_tokens)
        self._clock = clock
        self._models = {
            lane: replace(model, transformer=decoder.beside(threads, crew=number)) for number, lane in enumerate(LANES)
        }
        self._threads = {
            lane: ThreadPoolExecutor(1, f"stretto-{lane}", _stay_on, (cpus,))
            for lane, cpus in zip(LANES, _cores(threads), strict=True)
        }

    async def run(self, work: Pass, steps: int, news: asyncio.Event) -> PassResult:
        lane: Lane = "prompts" if work.prefill else "tokens"
        return await asyncio.wrap_future(self._threads[lane].submit(self._compute, lane, work))

    def _compute(self, lane: Lane, work: Pass) -> PassResult:
        start = self._clock.now
        tokens, logprobs = next_tokens(self._models[lane], self._cache, (*work.prefill, *work.decode))
        return PassResult(tokens=tokens, spans_s=((start, self._clock.now),), logprobs=logprobs)

    def wipe(self) -> None:
        """The next pass over a position writes its keys and values anew."""

    def forget(self, ids: Iterable[int]) -> None:
        """Nothing is kept for a request beside its pages."""

    def close(self) -> None:
        """End the lanes' threads when their passes are done."""
        for threads in self._threads.values():
            threads.shutdown()


def _cores(threads: int) -> Sequence[set[int]]:
    """The cores of each lane: `threads` of this process's own each, or all of them where they are too few."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < threads * len(LANES):
        return [set(cores)] * len(LANES)
    return [set(cores[number * threads : (number + 1) * threads]) for number in range(len(LANES))]


def _stay_on(cpus: set[int]) -> None:
    """Keep this thread, and the helpers that it will start, on these cores."""
    os.sched_setaffinity(0, cpus)
