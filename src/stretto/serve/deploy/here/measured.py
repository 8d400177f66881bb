"""Seconds of the steps of a copy on this machine as they were measured, and where they are measured.

They stand in for `StepCosts`: a decoding step is a straight line over the positions that it reads, whose ends lie on
lines over its rows; a step with prompts is a line over their rows, to which each decoding row adds what it adds to a
batch that decodes, and what was cached before is read again. Prompts have two lines, since one that finds an idle core
takes 2 to 20 % longer than in a row of passes.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

import numpy as np

from stretto.hardware.table import Table
from stretto.serve.deploy.costs import Lane, Parts
from stretto.serve.deploy.layout import Layout
from stretto.serve.deploy.load import Load
from stretto.serve.scheduler_config import SchedulerConfig

STEPS = 12
"""Steps of a decoding batch that are timed together."""
PAUSE_S = 0.1
"""Seconds that a core has had nothing to do when it is idle; shorter pauses count in part."""
_LEAST_SPREAD = 0.1
"""Passes that are timed in a row differ less than they do from those of a load."""


@dataclass(frozen=True, kw_only=True)
class Points:
    """Where passes are timed.

    Attributes:
        rows: batches that decode, in ascending order.
        contexts: positions before them; two, so that what a position costs shows.
        prompts: lengths of lone prompts, in ascending order.
    """

    rows: tuple[int, ...] = (1, 4, 12)
    contexts: tuple[int, int] = (16, 80)
    prompts: tuple[int, ...] = (8, 64, 176)

    @classmethod
    def of(cls, config: SchedulerConfig, longest_prompt: int) -> Points:
        """Points about what a scheduler decides, all of which fit into its pages."""
        room = (config.pages - config.slots) * config.page_tokens  # a page of each row may not be full
        far = max(24, min(96, room // config.slots - STEPS))
        rows = max(1, min(config.slots, room // (far + STEPS)))
        most = max(9, min(max(config.prefill_tokens, longest_prompt), 512, room))
        return cls(
            rows=tuple(sorted({1, min(4, rows), rows})),
            contexts=(min(16, far // 2), far),
            prompts=tuple(sorted({8, min(64, most), most})),
        )

    def trial(self, copies: int) -> Load:
        """The largest batch and the longest prompt for each copy, all at once."""
        rows = self.rows[-1]
        prompt = np.repeat([self.contexts[-1]] * rows + [self.prompts[-1]], copies)
        return Load(np.zeros(len(prompt)), prompt, np.repeat([STEPS] * rows + [1], copies))

    def __str__(self) -> str:
        return "-".join(",".join(map(str, values)) for values in (self.rows, self.contexts, self.prompts))


@dataclass(frozen=True, kw_only=True)
class MeasuredCosts:
    """Seconds of the steps of one copy, host work and waiting for workers included.

    Attributes:
        decode: (rows, seconds without any cached position, seconds a cached position of all rows together).
        prompts: (tokens, seconds just after another pass, seconds after a pause) of a lone prompt.
        spread: by which share passes of one kind differed, in the middle of all kinds.
    """

    layout: Layout
    decode: tuple[tuple[int, float, float], ...]
    prompts: tuple[tuple[int, float, float], ...]
    spread: float = _LEAST_SPREAD

    def prompt_attention_s(self, new: int, cached: int) -> float:
        """What was cached is read again by each new row: as dear as so many rows that decode there."""
        return self._decoding(1)[1] * new * cached

    def copy_s(self, positions: int) -> float:
        """Swaps are not measured here."""
        assert not positions, "swaps are not measured"
        return 0.0

    def stage(self, lanes: Sequence[Lane]) -> Parts:
        """The seconds of one lane's step."""
        (lane,) = lanes
        if not lane.rows:
            return Parts(0.0, 0.0, 0.0)
        base, each = self._decoding(lane.decoders)
        if lane.eager:
            beside = base - self._decoding(0)[0] + each * lane.cached if lane.decoders else 0.0
            alone = self._prompt_s(lane.rows - lane.decoders, min(1.0, lane.pause_s / PAUSE_S))
            return Parts(alone + lane.prompt_s + beside, 0.0, 0.0)
        return Parts(base + each * lane.cached, 0.0, 0.0)

    def cycle(self, groups: Iterable[Sequence[Lane]]) -> Parts:
        """Copies have no stages here."""
        (lanes,) = groups
        return self.stage(lanes)

    def _decoding(self, rows: int) -> tuple[float, float]:
        xs, bases, slopes = zip(*self.decode, strict=True)
        return _line(xs, bases, rows), _line(xs, slopes, rows)

    def _prompt_s(self, tokens: int, idle: float) -> float:
        xs, in_a_row, paused = zip(*self.prompts, strict=True)
        return (1 - idle) * _line(xs, in_a_row, tokens) + idle * _line(xs, paused, tokens)

    def at_pace(self, pace: float) -> MeasuredCosts:
        """The costs of a machine that takes `pace` times as long."""
        return replace(
            self,
            decode=tuple((rows, base * pace, each * pace) for rows, base, each in self.decode),
            prompts=tuple((tokens, in_a_row * pace, paused * pace) for tokens, in_a_row, paused in self.prompts),
        )

    def mean(self, *others: MeasuredCosts) -> MeasuredCosts:
        """In the middle of this and other measurements of the same points."""
        each = (self, *others)
        return MeasuredCosts(
            layout=self.layout,
            decode=_means([one.decode for one in each]),
            prompts=_means([one.prompts for one in each]),
            spread=max(one.spread for one in each),
        )

    def to_tables(self, name: str) -> dict[str, Table]:
        """The same as tables of a device, whose names begin with `name`."""
        columns = {
            "base": ("rows", [(float(rows), base) for rows, base, _ in self.decode]),
            "position": ("rows", [(float(rows), each) for rows, _, each in self.decode]),
            "prompt": ("tokens", [(float(tokens), seconds) for tokens, seconds, _ in self.prompts]),
            "paused": ("tokens", [(float(tokens), seconds) for tokens, _, seconds in self.prompts]),
        }
        return {
            f"{name}/{column}": Table(
                axes=(axis,),
                points=tuple((x,) for x, _ in points),
                values=tuple(y for _, y in points),
                scale="linear",
                beyond="slope",
                spread=self.spread,
                source="measured here by stretto.serve.deploy.here",
            )
            for column, (axis, points) in columns.items()
        }

    @classmethod
    def from_tables(cls, tables: Mapping[str, Table], name: str, layout: Layout) -> MeasuredCosts | None:
        """What `to_tables` made; None where there is nothing of that name."""
        if f"{name}/prompt" not in tables:
            return None
        base, each, prompt, paused = (tables[f"{name}/{column}"] for column in ("base", "position", "prompt", "paused"))
        return cls(layout=layout, decode=_joined(base, each), prompts=_joined(prompt, paused), spread=prompt.spread)


def _means(measured: Sequence[tuple[tuple[int, float, float], ...]]) -> tuple[tuple[int, float, float], ...]:
    """Both figures of each point, in the middle of all measurements."""
    return tuple(
        (same[0][0], fmean(first for _, first, _ in same), fmean(second for *_, second in same))
        for same in zip(*measured, strict=True)
    )


def _joined(first: Table, second: Table) -> tuple[tuple[int, float, float], ...]:
    """Two tables over the same points as one tuple of both figures."""
    return tuple((int(x), a, b) for (x,), a, b in zip(first.points, first.values, second.values, strict=True))


def spread_of(seconds: Sequence[float]) -> float:
    """Half of what lies between the quartiles, as a share of the median, and never less than a machine's own noise."""
    ordered = sorted(seconds)
    low, middle, high = (ordered[int(share * (len(ordered) - 1))] for share in (0.25, 0.5, 0.75))
    return max(_LEAST_SPREAD, (high - low) / 2 / middle)


def _line(xs: Sequence[int], ys: Sequence[float], x: float) -> float:
    """Straight lines between points, and the last slope beyond; one point is a constant."""
    if len(xs) == 1:
        return ys[0]
    i = min(max(bisect_left(xs, x), 1), len(xs) - 1)
    return ys[i - 1] + (ys[i] - ys[i - 1]) * (x - xs[i - 1]) / (xs[i] - xs[i - 1])
