"""Measuring the operations of a model on this machine, so that a prediction rests on what this very code does here.

Whole passes of the real model run on made-up tokens, over a grid of rows and contexts, with a timer at each
boundary between two operations; the medians go into tables under the signatures that `ModelSpec.operations`
gives them. No job is run, and an operation of another model with the same shape finds the same table.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from stretto.hardware.table import Table
from stretto.models.kv_cache import PAGE_TOKENS as SHORT_PAGE
from stretto.models.kv_packed import PAGE_TOKENS as KV_PAGE_TOKENS
from stretto.models.passes import PassShape, pass_operations
from stretto.models.segment import Segment
from stretto.models.thread import compute

if TYPE_CHECKING:
    from stretto.models.kv_packed import Cache
    from stretto.models.load import Model
    from stretto.models.spec import ModelSpec

PAGE_TOKENS = 2048
DECODE_ROWS = (1, 2, 4, 6, 8, 12, 16, 32)
DECODE_CONTEXTS = dict.fromkeys((1, 4, 16), (32, 512, 1700))
SHORT_CONTEXT = 128
PREFILL_CACHED = {32: (0, 512), 128: (0, 512), 384: (0, 1300)}
MOST_REPEATS, POINT_S, LONG_S = 7, 0.2, 1.0
"""Each point is timed at most this often, for about so many seconds: at least twice, a pass that takes long once."""
DISTURBED = 1.25
"""Samples this many times the median are left out: something else had the core."""

Progress = Callable[[str, float, float], None]


USUAL_PASSES: Sequence[tuple[PassShape, float]] = tuple(
    (PassShape(new_tokens=new, cached=cached), 1.0)
    for new, cached in (((1,) * 8, (256,) * 8), ((1,), (256,)), ((128,), (0,)))
)
"""What `pace` tries where nobody says which passes matter: shapes, and how often each occurs."""
REFERENCE = PassShape(new_tokens=(1,) * 4, cached=(SHORT_CONTEXT,) * 4)
"""Timed between any two points of the grid: how its seconds vary is how the machine's pace varies."""
TOLERANCE = 0.08
"""Tables stand for a machine whose pace differs by no more than this; it is part of their spread."""
PACE_S, PACE_ROUNDS = 0.6, 60
"""A pace is the mean over about so many seconds and at most so many rounds."""


def pass_signature(spec: ModelSpec, dtype: str, path: str = "torch") -> str:
    """The signature of what a pass costs besides its operations: laying it out, and calling the layers."""
    return f"pass/{dtype if path == 'torch' else path}/layers{spec.layers}"


def is_calibrated(
    measured: Mapping[str, Table], spec: ModelSpec, dtype: str, threads: int, path: str = "torch"
) -> bool:
    """Whether every operation of `spec` has its table."""
    shape = PassShape(new_tokens=(1, 2), cached=(8, 8))
    wanted = {op.signature for op in pass_operations(spec, shape, dtype=dtype, path=path)}
    return all(f"{name}@{threads}" in measured for name in (*wanted, pass_signature(spec, dtype, path)))


def calibrate(model: Model, *, threads: int, progress: Progress = lambda what, done, total: None) -> dict[str, Table]:
    """Tables of every operation of `model` under `threads` threads, by signature with "@threads" behind it.

    Takes a few seconds for a small model. The machine should be quiet.
    """
    compute(_set_threads, threads)
    spec = model.spec
    points = [p for p in _grid() if _within(p, spec.max_positions) == p]
    cache = compute(_filled_cache, model)
    samples: dict[str, dict[tuple[float, ...], list[float]]] = defaultdict(lambda: defaultdict(list))
    kind = model.dtype if model.path == "torch" else model.path
    what = f"measuring {kind} on {threads} thread{'s' if threads > 1 else ''}"
    reference = []
    for number, point in enumerate(points):
        for seconds in _timed(model, cache, point):
            _note(samples, model, point, seconds)
        reference += [compute(_run, model, cache, REFERENCE)[""] for _ in range(2)]
        progress(what, number + 1, len(points))
    moves = TOLERANCE + _variation(reference)
    return {f"{name}@{threads}": _table(name, found, moves) for name, found in samples.items()}


def pace(
    model: Model,
    tables: Mapping[str, Table],
    *,
    threads: int,
    passes: Sequence[tuple[PassShape, float]] = USUAL_PASSES,
) -> float:
    """How many times as long as `tables` say passes take at this moment: 1.1 is a machine ten per cent slower.

    Args:
        passes: shapes, each with how often it occurs. In the place of each, the nearest one that was calibrated is
            tried, so that what the tables make of shapes in between does not count as pace.
    """
    compute(_set_threads, threads)
    cache = compute(_filled_cache, model)
    shapes = [_nearest(shape, _slot_tokens(model)) for shape, _ in passes]
    times = [often for _, often in passes]
    rounds: list[list[float]] = []
    spent = 0.0
    while len(rounds) < 2 or (spent < PACE_S and len(rounds) < PACE_ROUNDS):
        rounds.append([compute(_run, model, cache, shape)[""] for shape in shapes])
        spent += sum(rounds[-1])
    said = [_said(model, tables, threads, shape) for shape in shapes]
    return float(np.dot(np.mean(rounds[1:], axis=0), times) / np.dot(said, times))


def _said(model: Model, tables: Mapping[str, Table], threads: int, shape: PassShape) -> float:
    """Seconds of a pass by the tables."""
    own = tables[f"{pass_signature(model.spec, model.dtype, model.path)}@{threads}"].at(float(shape.rows)).value
    operations = pass_operations(model.spec, shape, dtype=model.dtype, path=model.path)
    return own + sum(tables[f"{op.signature}@{threads}"].at(*op.at).value * op.count for op in operations)


def warm_up(model: Model) -> None:
    """Two small passes on made-up tokens, so that the first real one does not pay for lazy set-up."""
    cache = model.transformer.new_cache(pages=2, page_tokens=32)
    for new, cached in (((16,), (0,)), ((1, 1), (16, 12))):
        compute(_run, model, cache, PassShape(new_tokens=new, cached=cached))


def _set_threads(threads: int) -> None:
    import torch

    torch.set_num_threads(threads)


def _grid() -> Iterator[PassShape]:
    for rows in DECODE_ROWS:
        for context in DECODE_CONTEXTS.get(rows, (SHORT_CONTEXT,)):
            yield PassShape(new_tokens=(1,) * rows, cached=_ragged(context, rows))
    for new, cached in PREFILL_CACHED.items():
        for before in cached:
            yield PassShape(new_tokens=(new,), cached=(before,))


def _nearest(shape: PassShape, most: int) -> PassShape:
    """The calibrated pass most like `shape`, a pass of prompts or of single tokens, within so many tokens each."""

    def size(of: PassShape) -> tuple[float, float]:
        return math.log(of.rows), math.log(sum(of.cached) / len(of.cached) + of.rows / len(of.cached))

    alike = [p for p in _grid() if (max(p.new_tokens) > 1) == (max(shape.new_tokens) > 1) and _within(p, most) == p]
    return min(alike, key=lambda p: math.dist(size(p), size(shape)), default=_within(shape, most))


def _within(shape: PassShape, most: int) -> PassShape:
    """The shape with contexts cut so that each sequence fits in `most` tokens."""
    new = tuple(min(n, most) for n in shape.new_tokens)
    return PassShape(new_tokens=new, cached=tuple(min(c, most - n) for n, c in zip(new, shape.cached, strict=True)))


def _timed(model: Model, cache: Cache, point: PassShape) -> Iterator[dict[str, float]]:
    """Seconds by section of some passes, after one that is not counted unless a pass is long."""
    spent, times = 0.0, 0
    first = compute(_run, model, cache, point)
    if first[""] > POINT_S:
        yield first
        spent, times = first[""], 1
    while times < MOST_REPEATS and spent <= (POINT_S if times >= 2 else LONG_S):
        seconds = compute(_run, model, cache, point)
        spent, times = spent + seconds[""], times + 1
        yield seconds


def _ragged(context: int, rows: int) -> tuple[int, ...]:
    """Contexts of some rows around `context`: requests of one batch rarely have the same length."""
    return tuple(max(1, context - context * (i % 8) // 64) for i in range(rows))


def _slot_tokens(model: Model) -> int:
    return min(PAGE_TOKENS, model.spec.max_positions)


def _filled_cache(model: Model) -> Cache:
    """A cache with something in it: memory that was never written would be read from one single page."""
    import torch

    slots, slot_tokens = max(DECODE_ROWS), _slot_tokens(model)
    page = slot_tokens  # torch's attention gathers pages, so that it wants one alone
    if model.path != "torch":
        page = KV_PAGE_TOKENS if model.dtype == "int4" else SHORT_PAGE
    each = -(-slot_tokens // page)
    cache = model.transformer.new_cache(pages=slots * each, page_tokens=page)
    for layer in cache.layers:
        whole, rest = layer[: max(DECODE_CONTEXTS) * each], layer[max(DECODE_CONTEXTS) * each :]
        for part, positions in ((whole, slot_tokens), (rest, SHORT_CONTEXT + 64)):
            if layer.dtype == torch.uint8:
                part.fill_(0x11)
            elif each == 1:
                part[:, :, :positions].fill_(0.01)
            else:
                part.view(-1, each, *part.shape[1:])[:, : -(-positions // page)].fill_(0.01)
    return cache


def _run(model: Model, cache: Cache, point: PassShape) -> dict[str, float]:
    """Run one pass, greedy; seconds by section, and of the whole under ""."""
    import torch

    from stretto.models.fused import FusedDecoder
    from stretto.models.kv_cache import KVCache

    segments, row = [], 0
    for slot, (new, cached) in enumerate(zip(point.new_tokens, point.cached, strict=True)):
        each = cache.pages // max(DECODE_ROWS) or 1  # pages of a slot
        table = tuple(range(slot * each, (slot + 1) * each))
        segments.append(Segment(row, new, cached, table, 1))
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

    if isinstance(model.transformer, FusedDecoder):
        model.transformer.pick(tokens.tolist(), segments, cache)
        seconds |= model.transformer.seconds
    else:
        assert isinstance(cache, KVCache)
        model.transformer.forward(tokens, segments, cache, mark)
    seconds[""] = clock() - began
    return seconds


def _note(
    samples: dict[str, dict[tuple[float, ...], list[float]]],
    model: Model,
    point: PassShape,
    seconds: Mapping[str, float],
) -> None:
    """File one timed pass under the signatures of its operations; what belongs to none is the pass's own."""
    left = seconds[""]
    for op in pass_operations(model.spec, point, dtype=model.dtype, path=model.path):
        spent = seconds.get(op.name, 0.0)
        left -= spent
        if op.name == "attention_decode" and len(point.new_tokens) not in DECODE_CONTEXTS:
            continue  # a row of the table needs more than one context
        samples[op.signature][op.at].append(max(spent / op.count, 1e-9))
    samples[pass_signature(model.spec, model.dtype, model.path)][(float(point.rows),)].append(max(left, 1e-9))


def _table(name: str, found: Mapping[tuple[float, ...], Sequence[float]], moves: float) -> Table:
    """A table whose spread is that of its samples, and how far the machine's pace moves besides."""
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
        spread=float(np.median(spreads)) + moves,
        source="measured here by calibrate",
    )


def _typical(samples: Sequence[float]) -> float:
    """The mean of the undisturbed samples: runs add passes up, and means add where medians do not."""
    seconds = np.asarray(samples)
    return float(seconds[seconds <= DISTURBED * np.median(seconds)].mean())


def _spread(samples: Sequence[float]) -> float:
    low, middle, high = np.quantile(samples, [0.25, 0.5, 0.75])
    return float((high - low) / middle)


def _variation(reference: Sequence[float]) -> float:
    """How far one and the same pass strays from its median, as a share: eight of ten stray no further."""
    low, middle, high = np.quantile(reference, [0.1, 0.5, 0.9])
    return float(max(high / middle, middle / low) - 1.0)
