"""What a deployment has to serve: when requests come, and how long their prompts and answers are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stretto.core.errors import require

MAX_REQUESTS = 1_000_000
MAX_TOKENS = 1 << 24

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Load:
    """Requests in order of arrival.

    Attributes:
        arrival_s: seconds from the start of the load, not decreasing.
        prompt, output: tokens of each prompt and of each answer, at least 1.
    """

    arrival_s: Floats
    prompt: Ints
    output: Ints

    def __post_init__(self) -> None:
        count = len(self.arrival_s)
        require(1 <= count <= MAX_REQUESTS, "requests", count, f"1 .. {MAX_REQUESTS}")
        require(len(self.prompt) == count == len(self.output), "requests", count, "as many lengths as arrivals")
        require(bool(np.all(np.diff(self.arrival_s) >= 0)), "arrival_s", "out of order", "not decreasing")
        require(bool(self.arrival_s[0] >= 0), "arrival_s", float(self.arrival_s[0]), "not negative")
        for name, lengths in (("prompt", self.prompt), ("output", self.output)):
            least, most = int(lengths.min()), int(lengths.max())
            require(least >= 1, name, least, "at least 1 token")
            require(most <= MAX_TOKENS, name, most, f"at most {MAX_TOKENS} tokens")

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def longest(self) -> int:
        """Positions of the longest request."""
        return int((self.prompt + self.output).max())

    def dealt(self, count: int) -> list[Ints]:
        """Which requests each of `count` takers gets, dealt round robin in order of arrival."""
        return [np.arange(first, len(self), count) for first in range(count)]
