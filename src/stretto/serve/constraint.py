"""What binds an answer to a form, as the engine sees it: a mask for the next token, and where the answer stands.

The state belongs to the answer and follows from its tokens alone. It lives in front of the backend, so that neither a
preemption nor a backend that is lost touches it: keys and values are computed again, the state stays.
"""

from __future__ import annotations

from typing import Protocol


class Constraint(Protocol):
    """Where one answer stands in its grammar.

    Attributes:
        mask: the tokens that may come next, a bit each, the lowest bit of a byte first; at least one is set.
    """

    mask: bytes

    def accept(self, token: int) -> str | None:
        """Take a token that the mask allowed; why the answer ends here ("stop" or "grammar"), or None if it goes on."""


class Grammar(Protocol):
    """What answers may look like; compiled once, for any number of answers."""

    def start(self) -> Constraint:
        """The state of an answer before its first token."""
