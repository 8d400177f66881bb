"""Text into sequences of tokens, and which sequences each step sees: a function of the seed and the step alone.

All text is one stream of tokens, cut into sequences; a target is the token that comes next. Epoch after epoch the
sequences come in an order drawn from (seed, epoch), so a job that goes on after a stop, on however many ranks, sees
what it would have seen.
"""

from __future__ import annotations

import glob
import importlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from stretto.core.errors import UserError, require
from stretto.core.random import uniform

REFERENCE = "python-reference"
_HUB = "hub:"
_MOST_BYTES = 2**33


class Encoder(Protocol):
    """What turns text into tokens."""

    @property
    def size(self) -> int:
        """How many tokens there are."""

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The tokens of a text."""


class Bytes:
    """One token a byte of UTF-8."""

    size = 256

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """The bytes of `text`."""
        return list(text.encode("utf-8"))


@dataclass(frozen=True, kw_only=True, eq=False)
class Samples:
    """Sequences of `length` tokens cut from a stream; each has its successor token by token as targets.

    Attributes:
        tokens: int32, the stream.
        length: of a sequence.
        seed: of their order.
    """

    tokens: NDArray[np.int32]
    length: int
    seed: int = 0

    def __len__(self) -> int:
        return max(0, (len(self.tokens) - 1) // self.length)

    @cached_property
    def digest(self) -> str:
        """Of the stream's tokens."""
        return sha256(np.ascontiguousarray(self.tokens).data).hexdigest()[:16]

    def at(self, numbers: Sequence[int]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens and targets int64 [len(numbers), length] of some sequences."""
        starts = np.asarray(numbers, np.int64)[:, None] * self.length
        index = starts + np.arange(self.length + 1)
        found = self.tokens[index].astype(np.int64)
        return found[:, :-1].copy(), found[:, 1:].copy()  # they share nothing: a target may be crossed out

    def batch(self, step: int, size: int) -> list[int]:
        """The sequences of a step, from 0, of `size` sequences a step; a step may reach into the next epoch."""
        count = len(self)
        places = range(step * size, (step + 1) * size)
        return [int(_order(self.seed, place // count, count)[place % count]) for place in places]


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    return np.argsort(uniform(seed, epoch, np.arange(count)), kind="stable")


def samples(
    sources: Sequence[str], encoder: Encoder, *, length: int, held_out: float, seed: int
) -> tuple[Samples, Samples]:
    """Sequences to train on, and those that are kept for evaluation: the last ones.

    Raises:
        UserError: a source is missing or not text, or there is less than one sequence of each kind that is wanted.
    """
    stream = np.concatenate([np.asarray(encoder.encode(text, special=False), np.int32) for text in texts(sources)])
    count = (len(stream) - 1) // length
    kept = min(count - 1, max(1, round(count * held_out))) if held_out else 0
    if count < 1 + (held_out > 0):
        raise UserError(
            f"has {len(stream)} tokens, less than {1 + (held_out > 0)} sequences of {length}",
            field="data",
            right="more text, or a shorter `sequence`",
        )
    cut = (count - kept) * length
    train = Samples(tokens=stream[: cut + 1], length=length, seed=seed)
    return train, Samples(tokens=stream[cut:], length=length, seed=seed)


def check_sources(sources: Sequence[str]) -> None:
    """Raise as `samples` does for a file that is not there, before anything is read."""
    for number, source in enumerate(sources):
        if source != REFERENCE and not source.startswith(_HUB):
            _files(source, f"data.{number}")


def texts(sources: Sequence[str]) -> Iterable[str]:
    """Every text of the sources, one after another; raises as `samples` does."""
    for number, source in enumerate(sources):
        if source == REFERENCE:
            yield _reference()
        elif source.startswith(_HUB):
            yield from _from_hub(source, f"data.{number}")
        else:
            yield from _from_files(source, f"data.{number}")


def _reference() -> str:
    """The language reference in the standard library's own help."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return "\n".join(topics[name] for name in sorted(topics))


def _files(pattern: str, field: str) -> list[Path]:
    try:
        named = Path(pattern).expanduser()
    except RuntimeError as problem:
        right = "the path of a text file"
        raise UserError(f"{pattern!r} cannot be found: {problem}", field=field, right=right) from None
    if named.is_file():  # a name may hold what is a pattern elsewhere
        return [named]
    files = [Path(name) for name in sorted(glob.glob(str(named), recursive=True)) if Path(name).is_file()]
    if not files:
        right = f"{REFERENCE}, the path of a text file, or {_HUB}NAME for a Hugging Face data set"
        raise UserError(f"there is no file {pattern!r}", field=field, right=right)
    return files


def _from_files(pattern: str, field: str) -> Iterable[str]:
    for file in _files(pattern, field):
        if file.stat().st_size > _MOST_BYTES:
            raise UserError("is too large", file=str(file), field=field, right=f"at most {_MOST_BYTES} bytes a file")
        try:
            yield file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as problem:
            raise UserError(f"cannot be read: {problem}", file=str(file), field=field, right="UTF-8 text") from None


def _from_hub(source: str, field: str) -> Iterable[str]:
    name, _, split = source.removeprefix(_HUB).partition(":")
    require(bool(name), field, source, f"{_HUB}NAME or {_HUB}NAME:SPLIT")
    try:
        datasets: Any = importlib.import_module("datasets")
    except ImportError:
        raise UserError("a Hugging Face data set needs `datasets`", field=field, right="pip install datasets") from None
    try:
        rows = datasets.load_dataset(name, split=split or "train")
    except Exception as problem:  # noqa: BLE001 (the library raises of every kind)
        told = str(problem).strip().splitlines()[:1]
        raise UserError(
            f"{name!r} cannot be loaded: {' '.join(told)}", field=field, right="a data set's name"
        ) from None
    if "text" not in rows.column_names:
        columns = ", ".join(rows.column_names)
        raise UserError(f"{name!r} has the columns {columns}", field=field, right="a data set with a column `text`")
    yield from rows["text"]
