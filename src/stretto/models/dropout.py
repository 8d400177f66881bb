"""Dropout whose masks follow from what is dropped, so that every layout of a model over ranks drops the same.

Nothing is drawn in turn: whether a number stays is a function of the job's seed, the step, its sequence's number in the
data, its position, its layer and place there, and its channel. So a rank that holds a part finds that part of the mask,
a pass that is computed again finds the mask it had, and a run that goes on finds those it would have had. Philox (see
`core.random`) makes a 64-bit key of seed, step, sequence and position, once for each token; SplitMix64's mixing
function (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014) spreads it over places
and channels, one word for four channels. A chance is kept to a multiple of 2**-16, and what stays is scaled by exactly
that.

Shapes: B sequences, L tokens of each that lie here, C channels that lie here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from stretto.core.random import philox

_STREAM = 0x64726F70
"""Sets these draws apart from others of the same seed."""
_LEVELS = 2**16
_PER_WORD = 4


def _signed(word: int) -> int:
    """The 64-bit word as torch's int64 holds it."""
    return word - 2**64 if word >= 2**63 else word


_STRIDE = _signed(0x9E3779B97F4A7C15)
_MIXES = ((30, _signed(0xBF58476D1CE4E5B9)), (27, _signed(0x94D049BB133111EB)))
_LAST_SHIFT = 31


def token_keys(seed: int, step: int, samples: Sequence[int], positions: torch.Tensor) -> torch.Tensor:
    """Keys int64 [B, L] of the tokens at `positions` int64 [L] of the sequences of these numbers."""
    numbers = np.asarray(samples, np.uint64)[:, None]
    counter = np.empty((len(samples), len(positions), 4), np.uint32)
    counter[..., 0] = positions.numpy()
    counter[..., 1] = numbers & np.uint64(0xFFFFFFFF)
    counter[..., 2] = step & 0xFFFFFFFF
    counter[..., 3] = (numbers >> np.uint64(32)).astype(np.uint32) ^ np.uint32(_STREAM)
    words = philox(counter, np.array([seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF], np.uint32))
    return torch.from_numpy(np.ascontiguousarray(words[..., :2]).view(np.int64)[..., 0])


class Dropout(nn.Module):
    """Sets numbers to 0 by chance and scales the others, so that their mean stays.

    Args:
        chance: of each number, in [0, 1).
        place: a number of its own for every place in the model.
        first: the number, in the whole, of the first of the channels that lie here.
    """

    def __init__(self, chance: float, place: int, first: int = 0):
        super().__init__()
        self.level = round(chance * _LEVELS)
        self.place, self.first = place, first

    def forward(self, x: torch.Tensor, keys: torch.Tensor | None) -> torch.Tensor:
        """`x` [B, L, C] with some numbers dropped; `keys` as of `token_keys`, None: nothing is dropped."""
        if keys is None or self.level == 0:
            return x
        stays = draws(keys, self.place, self.first, x.shape[-1]) >= self.level - _LEVELS // 2
        out: torch.Tensor = _Kept.apply(x, stays, _LEVELS / (_LEVELS - self.level))  # type: ignore[no-untyped-call]
        return out


class _Kept(torch.autograd.Function):
    """x times a scale where it stays and 0 elsewhere; a byte a number waits for backward.

    Multiplying by the mask as numbers is faster than `masked_fill`, whose loop is not vectorised.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, stays: torch.Tensor, scale: float) -> torch.Tensor:
        ctx.save_for_backward(stays)
        ctx.scale = scale
        return stays.to(x.dtype).mul_(scale).mul_(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (stays,) = ctx.saved_tensors
        return stays.to(gradient.dtype).mul_(ctx.scale).mul_(gradient), None, None


def draws(keys: torch.Tensor, place: int, first: int, channels: int) -> torch.Tensor:
    """Even over all of int16, [B, L, channels], for the channels from `first` on of a place."""
    skipped = first % _PER_WORD
    words = torch.arange(first // _PER_WORD, -(-(first + channels) // _PER_WORD)).add_(1).mul_(_STRIDE)
    own = _mixed(keys + _signed((place + 1) * _STRIDE % 2**64))
    return _mixed(own[..., None] + words).view(torch.int16)[..., skipped : skipped + channels]


def _mixed(words: torch.Tensor) -> torch.Tensor:
    """SplitMix64's output function of int64 words, in place; products wrap."""
    for shift, factor in _MIXES:
        words.bitwise_xor_(_shifted(words, shift)).mul_(factor)
    return words.bitwise_xor_(_shifted(words, _LAST_SHIFT))


def _shifted(words: torch.Tensor, shift: int) -> torch.Tensor:
    """Shifted right, with zeros coming in: torch's own shift brings the sign."""
    return (words >> shift).bitwise_and_((1 << (64 - shift)) - 1)
