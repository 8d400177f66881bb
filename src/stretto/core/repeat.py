"""Copies of a run of tasks, one after another, as one block of rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from stretto.core.columns import Block
from stretto.core.timed import Ragged, offsets

Advancing = Literal["step", "micro_batch"]
"""The part of a task's key that may count the copies."""


def repeated(
    block: Block,
    template: range,
    times: int,
    carried: Sequence[tuple[int, int]],
    advance: Advancing | None,
    end: int,
) -> Block:
    """`times` copies of the tasks `template`, whose rows are `block`, to be appended behind task `end`.

    See `Schedule.repeat` for the other arguments.
    """
    plain = {name: np.tile(values, times) for name, values in block.plain.items()}
    if advance is not None:
        copy = np.repeat(np.arange(1, times + 1, dtype=np.int32), len(template))
        plain[advance] = np.where(plain[advance] >= 0, plain[advance] + copy, plain[advance])
    return Block(
        plain,
        Ragged(offsets(np.tile(np.diff(block.lanes.ptr), times)), np.tile(block.lanes.values, times)),
        _after(block.after, template, times, carried, end),
        offsets(np.tile(np.diff(block.memory_ptr), times)),
        np.tile(block.memory_space, times),
        np.tile(block.memory_bytes, times),
        np.tile(block.memory_gives, times),
    )


def _after(after: Ragged, template: range, times: int, carried: Sequence[tuple[int, int]], end: int) -> Ragged:
    """The dependencies of all copies: those inside the template and the carried ones are moved along."""
    pairs = np.array(carried, np.int64).reshape(-1, 2)
    owner = np.concatenate([after.owner, pairs[:, 1] - template.start])
    target = np.concatenate([after.values.astype(np.int64), pairs[:, 0]])
    inside = (target >= template.start) & (target < template.stop)
    back = np.arange(len(owner)) >= len(after.values)
    order = np.argsort(owner, kind="stable")
    owner, target, inside, back = owner[order], target[order], inside[order], back[order]

    size = len(template)
    first = end + size * np.arange(-1, times, dtype=np.int64) - template.start  # shift of copy k, from k = 0
    first[0] = 0
    shift = np.where(back, first[:-1, None], first[1:, None])
    index = (target + np.where(inside, shift, 0)).astype(np.int32)
    counts = np.tile(np.bincount(owner, minlength=size), times)
    return Ragged(offsets(counts), index.ravel())
