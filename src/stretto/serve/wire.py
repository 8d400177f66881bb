"""What an engine and its worker processes say to each other: JSON objects in frames, over pipes.

A frame is four bytes, the length that follows (big-endian), and so many bytes of UTF-8 JSON. The parent asks, and each
question has one answer, in order:

- `{"set_up": {...}}`, the fields of `SetUp`: `{"ready": true}`, or `{"error": "..."}` in words for the user.
- `{"run": {...}}`, a pass: `{"tokens": [[request, [token, ...]], ...], "span": [start, finish], "slots": "..."}` with
  instants of `time.monotonic()` and the digest of `SlotMap`; only rank 0 has tokens. Beside them, for rows that ask,
  `"logprobs": [[request, [[token, logprob, [[token, logprob], ...]], ...]], ...]`.
- `{"quit": true}`, or the end of the input: no answer, the worker ends.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, BinaryIO

from stretto.core.errors import require
from stretto.serve.backend import Pass, Row
from stretto.serve.logprobs import Logprob
from stretto.serve.sampling import Sampling

MAX_FRAME_BYTES = 64 * 2**20
_HEADER_BYTES = 4

Frame = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class SetUp:
    """What a worker must know before it can run passes.

    Attributes:
        model, dtype, path, threads: as `load_model` takes them.
        pages, page_tokens: size of the KV cache.
        spare_pages: size of the spare memory for requests that are put back.
        rank, world: which part of the model is its own.
        rendezvous: the file over which the ranks meet; None if there is one rank.
        timeout_s: how long to wait for another rank.
        cpus: the CPUs to stay on; None for all that the parent may use.
    """

    model: str
    dtype: str
    threads: int
    pages: int
    page_tokens: int
    path: str = "torch"
    spare_pages: int = 0
    rank: int = 0
    world: int = 1
    rendezvous: str | None = None
    timeout_s: float = 600.0
    cpus: Sequence[int] | None = None

    def __post_init__(self) -> None:
        require(self.world >= 1, "world", self.world, "at least 1")
        require(0 <= self.rank < self.world, "rank", self.rank, f"from 0 to {self.world - 1}")
        require(self.timeout_s > 0, "timeout_s", self.timeout_s, "positive")
        require(self.cpus is None or len(self.cpus) > 0, "cpus", self.cpus, "at least one CPU, or none for all")

    def to_json(self) -> Frame:
        return asdict(self)

    @classmethod
    def from_json(cls, fields: Mapping[str, Any]) -> SetUp:
        return cls(**fields)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ran:
    """One rank's answer to a pass.

    Attributes:
        tokens: the tokens drawn, by request.
        span: start and finish, of `time.monotonic()`.
        slots: what this rank believes to be in its pages, as a digest.
        logprobs: those that were asked for, by request.
    """

    tokens: Mapping[int, tuple[int, ...]]
    span: tuple[float, float]
    slots: str
    logprobs: Mapping[int, tuple[Logprob, ...]] = field(default_factory=dict)

    def to_json(self) -> Frame:
        logprobs = [(i, [(one.token, one.logprob, one.top) for one in found]) for i, found in self.logprobs.items()]
        return {"tokens": list(self.tokens.items()), "span": self.span, "slots": self.slots, "logprobs": logprobs}

    @classmethod
    def from_json(cls, answer: Mapping[str, Any]) -> Ran:
        """Raises ValueError for anything else than such an answer."""
        try:
            tokens = {int(request): tuple(int(token) for token in drawn) for request, drawn in answer["tokens"]}
            start, finish = answer["span"]
            logprobs = {int(i): tuple(_logprob(one) for one in found) for i, found in answer.get("logprobs", ())}
            if any(len(found) != len(tokens[i]) for i, found in logprobs.items()):
                raise ValueError("tokens and logprobs differ in number")
            return cls(tokens=tokens, span=(float(start), float(finish)), slots=str(answer["slots"]), logprobs=logprobs)
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"no answer to a pass: {str(answer)[:200]}") from None


def _logprob(fields: Sequence[Any]) -> Logprob:
    token, logprob, top = fields
    return Logprob(token=int(token), logprob=float(logprob), top=tuple((int(t), float(p)) for t, p in top))


def pass_to_json(work: Pass) -> Frame:
    """A pass as JSON; `pass_from_json` gives it back."""
    return {
        "step": work.step,
        "prefill": [_row_to_json(row) for row in work.prefill],
        "decode": [_row_to_json(row) for row in work.decode],
        "moves": work.moves,
        "slots": work.slots,
        "swap_out": work.swap_out,
        "swap_in": work.swap_in,
    }


def pass_from_json(fields: Mapping[str, Any]) -> Pass:
    return Pass(
        step=fields["step"],
        prefill=tuple(_row_from_json(row) for row in fields["prefill"]),
        decode=tuple(_row_from_json(row) for row in fields["decode"]),
        moves=_copies(fields["moves"]),
        slots=None if fields["slots"] is None else (fields["slots"][0], fields["slots"][1]),
        swap_out=_copies(fields["swap_out"]),
        swap_in=_copies(fields["swap_in"]),
    )


def _copies(fields: Sequence[Sequence[int]]) -> tuple[tuple[int, int, int], ...]:
    return tuple((source, target, positions) for source, target, positions in fields)


def _row_to_json(row: Row) -> Frame:
    return {
        "id": row.id,
        "tokens": row.tokens,
        "start": row.start,
        "table": row.table,
        "sampling": None if row.sampling is None else asdict(row.sampling),
        "position": row.position,
        "logprobs": row.logprobs,
        "mask": None if row.mask is None else base64.b64encode(row.mask).decode("ascii"),
    }


def _row_from_json(fields: Mapping[str, Any]) -> Row:
    return Row(
        id=fields["id"],
        tokens=tuple(fields["tokens"]),
        start=fields["start"],
        table=tuple(fields["table"]),
        sampling=None if fields["sampling"] is None else Sampling(**fields["sampling"]),
        position=fields["position"],
        logprobs=fields["logprobs"],
        mask=None if fields["mask"] is None else base64.b64decode(fields["mask"]),
    )


def pack(frame: Mapping[str, Any]) -> bytes:
    """The bytes of a frame; ValueError if it is too long."""
    text = json.dumps(frame, separators=(",", ":")).encode()
    require(len(text) <= MAX_FRAME_BYTES, "frame", len(text), f"at most {MAX_FRAME_BYTES} bytes")
    return len(text).to_bytes(_HEADER_BYTES) + text


def read(pipe: BinaryIO) -> Frame | None:
    """The next frame, waiting for it; None at the end of the input, ValueError for what is no frame."""
    header = pipe.read(_HEADER_BYTES)
    if not header:
        return None
    return _unpacked(pipe.read(_length(header)))


async def receive(pipe: asyncio.StreamReader) -> Frame:
    """The next frame; EOFError at the end of the input, ValueError for what is no frame."""
    header = await pipe.readexactly(_HEADER_BYTES)
    return _unpacked(await pipe.readexactly(_length(header)))


def _length(header: bytes) -> int:
    length = int.from_bytes(header)
    require(length <= MAX_FRAME_BYTES, "frame", length, f"at most {MAX_FRAME_BYTES} bytes")
    return length


def _unpacked(text: bytes) -> Frame:
    frame = json.loads(text)
    if not isinstance(frame, dict):
        raise ValueError("a frame must hold a JSON object")
    return frame
