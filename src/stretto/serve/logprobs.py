"""Log-probabilities of a drawn token and of its likeliest alternatives, as OpenAI's API means them: the model's own,
over the whole vocabulary, before temperature, before any cut of the distribution, and before a grammar's mask.

A row's figures come from that row's logits alone: where logits do not depend on who shares the pass, neither do they.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stretto.serve.sampling import Floats, most_likely

MOST_ALTERNATIVES = 20
"""Most alternatives that a request may ask to see beside each token."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Logprob:
    """What the model thought of a token that was drawn.

    Attributes:
        token: its id.
        logprob: its natural logarithm of probability.
        top: the likeliest tokens at that place, most likely first (ties by number), each with its logprob.
    """

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


def logprob_of(logits: Floats, token: int, count: int) -> Logprob:
    """The logprob of `token` and of the `count` likeliest tokens.

    Args:
        logits: [vocabulary], as the model gave them.
    """
    wide = logits.astype(np.float64)
    peak = wide.max()
    total = peak + np.log(np.exp(wide - peak).sum())
    order = most_likely(logits, count).tolist() if count else []
    return Logprob(
        token=token,
        logprob=float(wide[token] - total),
        top=tuple((each, float(wide[each] - total)) for each in order),
    )
