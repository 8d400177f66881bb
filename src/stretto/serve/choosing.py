"""From logits to what a pass gives out: each row's next token, within its grammar, and its logprobs where asked for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stretto.serve.backend import Row
from stretto.serve.logprobs import Logprob, logprob_of
from stretto.serve.sampling import Floats, sample


def choose(logits: Floats, rows: Sequence[Row]) -> tuple[dict[int, tuple[int, ...]], dict[int, tuple[Logprob, ...]]]:
    """The next token of each row, and the logprobs of those rows that ask for them, both by request.

    Args:
        logits: [rows, vocabulary].
        rows: those that draw, in the order of the logits.
    """
    tokens = _draw(logits, rows)
    asked: dict[int, tuple[Logprob, ...]] = {
        row.id: (logprob_of(logits[index], tokens[index], row.logprobs),)
        for index, row in enumerate(rows)
        if row.logprobs is not None
    }
    return {row.id: (token,) for row, token in zip(rows, tokens, strict=True)}, asked


def _draw(logits: Floats, rows: Sequence[Row]) -> list[int]:
    how = [row.sampling for row in rows if row.sampling is not None]
    tokens = sample(logits, how, [row.position for row in rows]) if rows else []
    for index, row in enumerate(rows):
        if row.mask is not None:
            allowed = allowed_tokens(row.mask, logits.shape[1])
            within = logits[index : index + 1, allowed]
            tokens[index] = int(allowed[sample(within, [how[index]], [row.position])[0]])
    return tokens


def allowed_tokens(mask: bytes, vocabulary: int) -> NDArray[np.int64]:
    """The ids whose bits are set, ascending; bit t % 8 of byte t // 8 is that of token t.

    >>> allowed_tokens(bytes([0b101, 0b10]), 16).tolist()
    [0, 2, 9]
    """
    bits = np.unpackbits(np.frombuffer(mask, dtype=np.uint8), bitorder="little")
    return np.flatnonzero(bits[:vocabulary])
