"""An answer's text as it grows: characters are given out when they are whole, and held back while a stop
string may be forming.
"""

from __future__ import annotations

from stretto.models.tokenizer import Tokenizer


class AnswerText:
    """A `TextStream` of the engine over a tokenizer.

    Args:
        tokenizer: of the model.
        stop: strings before which the text ends.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...]) -> None:
        self._stream = tokenizer.stream()
        self._stop = stop
        self._held = ""
        self._ended = False
        self.text = ""

    @property
    def length(self) -> int:
        """Characters of whole pieces, given out or held back: where the text of the next token begins."""
        return len(self.text) + len(self._held)

    def push(self, token: int) -> bool:
        """Take one token; true if a stop string is complete, which then is not part of the text."""
        return self._take(self._stream.push(token))

    def finish(self) -> None:
        """Give out what was held back, unless a stop string has ended the text."""
        if not self._ended and not self._take(self._stream.finish()):
            self.text += self._held
        self._held = ""

    def _take(self, piece: str) -> bool:
        pending = self._held + piece
        found = [at for at in (pending.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.text += pending[: min(found)]
            self._held, self._ended = "", True
            return True
        keep = max((_overlap(pending, stop) for stop in self._stop), default=0)
        self.text += pending[: len(pending) - keep]
        self._held = pending[len(pending) - keep :]
        return False


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    for size in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
