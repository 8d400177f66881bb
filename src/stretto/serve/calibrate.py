"""Measuring the engine's own host work on this machine: choosing tokens from logits, scheduling, handing out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import numpy as np

from stretto.core.clock import RealClock
from stretto.core.record import Recorder
from stretto.hardware.table import Table
from stretto.models.spec import ModelSpec
from stretto.models.thread import submit
from stretto.models.tokenizer import Tokenizer
from stretto.serve.backend import Pass, PassResult
from stretto.serve.engine import Engine
from stretto.serve.predict import host_signature
from stretto.serve.request import Request
from stretto.serve.sampling import Sampling, sample
from stretto.serve.scheduler import Scheduler
from stretto.serve.scheduler_config import SchedulerConfig
from stretto.serve.text import AnswerText

ROWS = (1, 4, 16, 64)
STEPS = 24


def calibrate(
    spec: ModelSpec, tokenizer: Tokenizer, sampling: Sampling, *, threads: int, path: str = "torch"
) -> dict[str, Table]:
    """Tables over rows of "step" and "sample" seconds, by signature with "@threads" behind it; about a second."""
    signatures = {"step": [(float(n), asyncio.run(_step_s(n, tokenizer))) for n in ROWS]}
    if path == "torch" or not sampling.greedy:  # else the pass itself picks
        rng = np.random.default_rng(0)
        logits = rng.standard_normal((max(ROWS), spec.vocab), dtype=np.float32)
        signatures["sample"] = [
            (float(n), _median(lambda n=n: sample(logits[:n], [sampling] * n, [5] * n)))  # type: ignore[misc]
            for n in ROWS
        ]
    return {
        f"{host_signature(what, spec, path)}@{threads}": Table.line(
            "rows", found, spread=0.2, source="measured here by calibrate"
        )
        for what, found in signatures.items()
    }


def _median(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return float(np.median(seconds))


class _Instant:
    """A backend that answers in a worker thread, as the real one does, with tokens out of the air and no work."""

    steps_at_once = 1

    def __init__(self, clock: RealClock, vocab: int) -> None:
        self._clock = clock
        self._vocab = vocab
        self.inside_s = 0.0

    async def run(self, work: Pass, steps: int, news: asyncio.Event) -> PassResult:
        start, finish = await asyncio.wrap_future(submit(self._answer))
        self.inside_s += finish - start
        tokens = {row.id: ((row.position * 37) % (self._vocab // 2) + 100,) for row in (*work.prefill, *work.decode)}
        return PassResult(tokens=tokens, spans_s=((start, finish),))

    def _answer(self) -> tuple[float, float]:
        start = self._clock.now
        return start, self._clock.now

    def wipe(self) -> None:
        """Nothing is held."""

    def forget(self, ids: object) -> None:
        """Likewise."""


async def _step_s(rows: int, tokenizer: Tokenizer) -> float:
    """Seconds a step of the real engine takes when the passes take none."""
    clock = RealClock()
    config = SchedulerConfig(joining="continuous", slots=rows, pages=rows, page_tokens=64, prefill_tokens=1024)
    backend = _Instant(clock, tokenizer.size)
    engine = Engine(Scheduler(config), backend, clock, Recorder("calibration"))
    for i in range(rows):
        engine.submit(Request(id=i, prompt=(100,) * 4, limit=STEPS), AnswerText(tokenizer, ()))
    engine.close()
    start = clock.now
    await engine.run()
    return (clock.now - start - backend.inside_s) / STEPS
