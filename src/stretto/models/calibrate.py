"""Measuring the operations of a model on this machine, so that a prediction rests on what this very code does here.

Whole passes of the real model run on made-up tokens, over a grid of rows and contexts, with a timer at each
boundary between two operations; the medians go into tables under the signatures that `ModelSpec.operations`
gives them. No job is run, and an operation of another model with the same shape finds the same table.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from stretto.hardware.table import Table
from stretto.models.batching import Segment
from stretto.models.passes import PassShape
from stretto.models.thread import compute

if TYPE_CHECKING:
    from stretto.models.kv_cache import KVCache
    from stretto.models.load import Model
    from stretto.models.spec import ModelSpec

PAGE_TOKENS = 2048
DECODE_ROWS = (1, 2, 4, 6, 8, 12, 16, 32)
DECODE_CONTEXTS = dict.fromkeys((1, 4, 16), (32, 512, 1700))
SHORT_CONTEXT = 128
PREFILL_CACHED = {32: (0, 512), 128: (0, 512), 384: (0, 1300)}
MOST_REPEATS, POINT_S = 7, 0.2
"""Each point is timed at least twice and at most this often, for about so many seconds."""
DISTURBED = 1.25
"""Samples this many times the median are left out: something else had the core."""

Progress = Callable[[str, float, float], None]


@dataclass(frozen=True, slots=True)
class _Point:
    """One pass of the grid: new and cached tokens of each of its sequences."""

    new: tuple[int, ...]
    cached: tuple[int, ...]

    @property
    def shape(self) -> PassShape:
        return PassShape(new_tokens=self.new, cached=self.cached)


def pass_signature(spec: ModelSpec, dtype: str) -> str:
    """The signature of what a pass costs besides its operations: laying it out, and calling the layers."""
    return f"pass/{dtype}/layers{spec.layers}"


def is_calibrated(measured: Mapping[str, Table], spec: ModelSpec, dtype: str, threads: int) -> bool:
    """Whether every operation of `spec` has its table."""
    wanted = {op.signature for op in spec.operations(PassShape(new_tokens=(1, 2), cached=(8, 8)), dtype=dtype)}
    return all(f"{name}@{threads}" in measured for name in (*wanted, pass_signature(spec, dtype)))


def calibrate(model: Model, *, threads: int, progress: Progress = lambda what, done, total: None) -> dict[str, Table]:
    """Tables of every operation of `model` under `threads` threads, by signature with "@threads" behind it.

    Takes a few seconds for a small model. The machine should be quiet.
    """
    compute(_set_threads, threads)
    spec = model.spec
    points = [p for p in _grid() if max(n + c for n, c in zip(p.new, p.cached, strict=True)) <= spec.max_positions]
    cache = compute(_filled_cache, model)
    samples: dict[str, dict[tuple[float, ...], list[float]]] = defaultdict(lambda: defaultdict(list))
    what = f"measuring {model.dtype} on {threads} thread{'s' if threads > 1 else ''}"
    for number, point in enumerate(points):
        for seconds in _timed(model, cache, point):
            _note(samples, spec, model.dtype, point, seconds)
        progress(what, number + 1, len(points))
    return {f"{name}@{threads}": _table(name, found) for name, found in samples.items()}


def drift(model: Model, tables: Mapping[str, Table], *, threads: int) -> float:
    """How much slower (positive) or faster a few passes are now than `tables` say, as a share; well under a second."""
    compute(_set_threads, threads)
    cache = compute(_filled_cache, model)
    ratios = []
    for point in (_Point((1,) * 8, _ragged(256, 8)), _Point((1,), (256,)), _Point((128,), (0,))):
        said = sum(
            tables[f"{op.signature}@{threads}"].at(*op.at).value * op.count
            for op in model.spec.operations(point.shape, dtype=model.dtype)
        )
        own = tables[f"{pass_signature(model.spec, model.dtype)}@{threads}"]
        said += own.at(float(point.shape.rows)).value
        ratios.append(float(np.median([seconds[""] for seconds in _timed(model, cache, point)])) / said)
    return float(np.median(ratios)) - 1.0


def warm_up(model: Model) -> None:
    """Two small passes on made-up tokens, so that the first real one does not pay for lazy set-up."""
    cache = model.transformer.new_cache(pages=2, page_tokens=32)
    for point in (_Point((16,), (0,)), _Point((1, 1), (16, 12))):
        compute(_run, model, cache, point)


def _set_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def _grid() -> Iterator[_Point]:
    for rows in DECODE_ROWS:
        for context in DECODE_CONTEXTS.get(rows, (SHORT_CONTEXT,)):
            yield _Point((1,) * rows, _ragged(context, rows))
    for new, cached in PREFILL_CACHED.items():
        for before in cached:
            yield _Point((new,), (before,))


def _timed(model: Model, cache: KVCache, point: _Point) -> Iterator[dict[str, float]]:
    """Seconds by section of some passes, after one that is not counted unless a pass is long."""
    spent = 0.0
    first = compute(_run, model, cache, point)
    if first[""] > POINT_S:
        yield first
        spent += first[""]
    for number in range(MOST_REPEATS):
        if number >= 2 and spent > POINT_S:
            return
        seconds = compute(_run, model, cache, point)
        spent += seconds[""]
        yield seconds


def _ragged(context: int, rows: int) -> tuple[int, ...]:
    """Contexts of some rows around `context`: requests of one batch rarely have the same length."""
    return tuple(max(1, context - context * (i % 8) // 64) for i in range(rows))


def _filled_cache(model: Model) -> KVCache:
    """A cache with something in it: memory that was never written would be read from one single page."""
    pages = max(DECODE_ROWS)
    page_tokens = min(PAGE_TOKENS, model.spec.max_positions)
    cache = model.transformer.new_cache(pages=pages, page_tokens=page_tokens)
    long = max(DECODE_CONTEXTS)
    for layer in cache.layers:
        layer[:long].fill_(0.01)
        layer[long:, :, : SHORT_CONTEXT + 64].fill_(0.01)
    return cache


def _run(model: Model, cache: KVCache, point: _Point) -> dict[str, float]:
    """Run one pass; seconds by section, and of the whole under ""."""
    import torch

    segments, row = [], 0
    for slot, (new, cached) in enumerate(zip(point.new, point.cached, strict=True)):
        segments.append(Segment(row, new, cached, (slot,), 1))
        row += new
    tokens = torch.arange(row, dtype=torch.int64) % min(1000, model.spec.vocab)
    seconds: dict[str, float] = defaultdict(float)
    clock = time.perf_counter
    began = last = clock()

    def mark(section: str) -> None:
        nonlocal last
        now = clock()
        seconds[section] += now - last
        last = now

    model.transformer.forward(tokens, segments, cache, mark)
    seconds[""] = clock() - began
    return seconds


def _note(
    samples: dict[str, dict[tuple[float, ...], list[float]]],
    spec: ModelSpec,
    dtype: str,
    point: _Point,
    seconds: Mapping[str, float],
) -> None:
    """File one timed pass under the signatures of its operations; what belongs to none is the pass's own."""
    left = seconds[""]
    for op in spec.operations(point.shape, dtype=dtype):
        spent = seconds.get(op.name, 0.0)
        left -= spent
        if op.name == "attention_decode" and len(point.new) not in DECODE_CONTEXTS:
            continue  # a row of the table needs more than one context
        samples[op.signature][op.at].append(max(spent / op.count, 1e-9))
    samples[pass_signature(spec, dtype)][(float(sum(point.new)),)].append(max(left, 1e-9))


def _table(name: str, found: Mapping[tuple[float, ...], Sequence[float]]) -> Table:
    points = sorted(found)
    values = [_typical(found[p]) for p in points]
    spreads = [_spread(found[p]) for p in points]
    axes = ("rows",) if len(points[0]) == 1 else ("rows", "context" if "decode" in name else "context_per_row")
    return Table(
        axes=axes,
        points=tuple(points),
        values=tuple(values),
        scale="log",
        beyond="slope" if len(axes) == 2 else "proportional",
        spread=float(np.median(spreads)),
        source="measured here by calibrate",
    )


def _typical(samples: Sequence[float]) -> float:
    """The mean of the undisturbed samples: runs add passes up, and means add where medians do not."""
    seconds = np.asarray(samples)
    return float(seconds[seconds <= DISTURBED * np.median(seconds)].mean())


def _spread(samples: Sequence[float]) -> float:
    low, middle, high = np.quantile(samples, [0.25, 0.5, 0.75])
    return float((high - low) / middle)
