"""Logprobs in the protocol's two forms. A token whose bytes are no whole characters is written `bytes:\\xe2\\x82`,
one without a text `token_id:7`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stretto.models.tokenizer import Tokenizer
from stretto.serve.logprobs import Logprob
from stretto.serve.request import Answer

Entries = Sequence[tuple[int, Logprob]]
"""Tokens, each with the characters of text before it."""
_LEAST = -9999.0
"""What stands for less; the protocol has no infinity."""


def entries_of(answer: Answer) -> Entries:
    """The tokens of an answer whose text begins within the answer's: not the ending one, nor what a stop string cut."""
    entries = zip(answer.offsets, answer.logprobs or (), strict=True)
    return [(offset, logprob) for offset, logprob in entries if offset < len(answer.text)]


class Speller:
    """Writes tokens as clients see them.

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def chat(self, entries: Entries) -> dict[str, Any]:
        """The `logprobs` of a chat choice."""
        return {"content": [self.item(logprob) for _, logprob in entries], "refusal": None}

    def item(self, logprob: Logprob) -> dict[str, Any]:
        """One token with its alternatives."""
        top = [self._token(token, value) for token, value in logprob.top]
        return {**self._token(logprob.token, logprob.logprob), "top_logprobs": top}

    def completion(self, entries: Entries) -> dict[str, Any]:
        """The `logprobs` of a completion choice; the drawn token is always among its alternatives."""
        return {
            "tokens": [self._text(one.token) for _, one in entries],
            "token_logprobs": [_bounded(one.logprob) for _, one in entries],
            "top_logprobs": [
                {self._text(token): _bounded(value) for token, value in (*one.top, (one.token, one.logprob))}
                for _, one in entries
            ],
            "text_offset": [offset for offset, _ in entries],
        }

    def _token(self, token: int, value: float) -> dict[str, Any]:
        return {
            "token": self._text(token),
            "logprob": _bounded(value),
            "bytes": list(self._tokenizer.token_bytes(token)),
        }

    def _text(self, token: int) -> str:
        return spelt(self._tokenizer.token_bytes(token)) or f"token_id:{token}"


def spelt(raw: bytes) -> str:
    """The text of a token's bytes.

    >>> spelt("é".encode()), spelt("é".encode()[:1])
    ('é', 'bytes:\\\\xc3')
    """
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


def _bounded(value: float) -> float:
    return max(value, _LEAST)
