"""What a deployment has to serve: when requests come, and how long their prompts and answers are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
        prefixes: for each request a hash of each of its prompt's blocks, in order; empty where nothing is known of what
            requests share. A block's hash stands for the whole text up to the block's end, or to the prompt's.
        block_tokens: length of a block.
    """

    arrival_s: Floats
    prompt: Ints
    output: Ints
    prefixes: tuple[tuple[int, ...], ...] = ()
    block_tokens: int = MAX_TOKENS

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
        require(len(self.prefixes) in (0, count), "prefixes", len(self.prefixes), "one a request, or none")
        require(self.block_tokens >= 1, "block_tokens", self.block_tokens, "at least 1")

    def __len__(self) -> int:
        return len(self.arrival_s)

    @property
    def longest(self) -> int:
        """Positions of the longest request."""
        return int((self.prompt + self.output).max())

    def dealt(self, count: int) -> list[Ints]:
        """Which requests each of `count` takers gets, dealt round robin in order of arrival."""
        return [np.arange(first, len(self), count) for first in range(count)]

    def only(self, requests: Sequence[int]) -> Load:
        """These requests alone, given in order of arrival."""
        if len(requests) == len(self):
            return self
        kept = np.asarray(requests, np.int64)
        prefixes = tuple(self.prefixes[i] for i in requests) if self.prefixes else ()
        return replace(
            self, arrival_s=self.arrival_s[kept], prompt=self.prompt[kept], output=self.output[kept], prefixes=prefixes
        )

    def page_hashes(self, request: int, page_tokens: int) -> list[str]:
        """What each page of a prompt holds, as far as its blocks tell: two pages are equal if their hashes are.

        Only whole pages are hashed, up to the end of the last block that is known. A page's text is determined by the
        block in which it ends, since that block's hash stands for all before it, and by where it lies.
        """
        if not self.prefixes:
            return []
        blocks, size = self.prefixes[request], self.block_tokens
        known = min(int(self.prompt[request]), len(blocks) * size)
        return [f"{blocks[((page + 1) * page_tokens - 1) // size]}/{page}" for page in range(known // page_tokens)]

    def tokens(self, request: int, vocabulary: range) -> tuple[int, ...]:
        """A made-up prompt: the same tokens where the hashes of blocks are the same, others drawn anew."""
        size, found = int(self.prompt[request]), []
        blocks = self.prefixes[request] if self.prefixes else ()
        for number, block in enumerate(blocks[: -(-size // self.block_tokens)]):
            draw = np.random.default_rng([1, block % 2**63, number])
            found.append(draw.integers(vocabulary.start, vocabulary.stop, min(size, self.block_tokens)))
        draw = np.random.default_rng([2, request])
        found.append(draw.integers(vocabulary.start, vocabulary.stop, size))
        text: Ints = np.concatenate(found)[:size]
        return tuple(text.tolist())
