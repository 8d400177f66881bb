"""Choosing the next token from logits: greedy, temperature, top-k, top-p, min-p.

A request's draws come from a counter-based stream of its own seed and the token's position, so they do not
depend on which other requests share the batch, on the slot, or on a restart in the middle.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stretto.core.errors import require
from stretto.core.random import uniform

Floats = NDArray[np.float32]

HEAD = 512
"""Most likely tokens that are ordered at first; a draw seldom falls behind them."""
_STREAM = 0x73616D70  # "samp": keeps these draws apart from other users of the same seed


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How a request's tokens are drawn.

    Attributes:
        temperature: 0 takes the most likely token; else logits are divided by it.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of most likely tokens whose probability reaches this.
        min_p: drop tokens less likely than this share of the most likely one.
        seed: of this request's draws.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        require(0.0 <= self.temperature <= 100.0, "temperature", self.temperature, "in 0 .. 100")
        require(self.top_k >= 0, "top_k", self.top_k, ">= 0 (0 keeps every token)")
        require(0.0 < self.top_p <= 1.0, "top_p", self.top_p, "in (0, 1]")
        require(0.0 <= self.min_p < 1.0, "min_p", self.min_p, "in [0, 1)")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


def sample(logits: Floats, sampling: Sequence[Sampling], position: Sequence[int]) -> list[int]:
    """One token for each row.

    Args:
        logits: [rows, vocabulary].
        sampling: how each row is drawn.
        position: the position that each row's token will take in its text; with the seed it fixes the draw.
    """
    tokens: list[int] = logits.argmax(axis=1).tolist()
    for row, how in enumerate(sampling):
        if not how.greedy:
            tokens[row] = _draw(logits[row], how, position[row])
    return tokens


def _draw(logits: Floats, how: Sampling, position: int) -> int:
    point = float(uniform(how.seed, _STREAM, position))
    kept, probabilities = _head(logits, how, point) or distribution(logits, how)
    chosen = int(np.searchsorted(np.cumsum(probabilities), point, side="right"))
    return int(kept[min(chosen, len(kept) - 1)])


def _head(logits: Floats, how: Sampling, point: float) -> tuple[NDArray[np.int64], NDArray[np.float64]] | None:
    """The beginning of `distribution`, if the draw at `point` falls into it: ordering all tokens takes far longer."""
    if how.top_k or len(logits) < 4 * HEAD:
        return None
    order = most_likely(logits, HEAD)
    scaled = logits.astype(np.float64) / how.temperature
    weights = np.exp(scaled - scaled[order[0]])
    p = weights[order] / weights.sum()
    reached = float(p.sum())
    if how.top_p < 1.0:
        if reached < how.top_p:
            return None
        keep = max(1, int((np.cumsum(p) - p < how.top_p).sum()))
        order, p = order[:keep], p[:keep] / p[:keep].sum()
    if how.min_p > 0.0:
        keep = int((p >= how.min_p * p[0]).sum())
        if keep == HEAD:
            return None
        order, p = order[:keep], p[:keep] / p[:keep].sum()
    return (order, p) if point < float(p.sum()) else None


def distribution(logits: Floats, how: Sampling) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The tokens that may be drawn, most likely first (ties by number), and their probabilities, which sum to 1."""
    order = most_likely(logits, how.top_k)
    scaled = logits[order].astype(np.float64) / how.temperature
    p = np.exp(scaled - scaled[0])
    p /= p.sum()
    if how.top_p < 1.0:
        before = np.cumsum(p) - p
        keep = max(1, int((before < how.top_p).sum()))
        order, p = order[:keep], p[:keep]
    if how.min_p > 0.0:
        keep = int((p >= how.min_p * p[0]).sum())
        order, p = order[:keep], p[:keep]
    return order, p / p.sum()


def most_likely(logits: Floats, top_k: int) -> NDArray[np.int64]:
    """Token numbers by falling logit; all of them, or the first `top_k`."""
    if 0 < top_k < len(logits):
        threshold = np.partition(logits, len(logits) - top_k)[len(logits) - top_k]
        candidates = np.flatnonzero(logits >= threshold)
    else:
        candidates = np.arange(len(logits))
    order: NDArray[np.int64] = candidates[np.argsort(-logits[candidates], kind="stable")]
    return order[:top_k] if top_k else order
