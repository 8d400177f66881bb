"""A durable log of what the nodes of a run gave and cost: killed at any instant, the run goes on where it stood.

One record a line: eight hexadecimal digits of CRC-32, a blank, a JSON list. Lines and not length prefixes, so that a
log is read with the tools at hand, and so that a torn record cannot swallow the next: JSON escapes every newline. A
record is on its way to the disk when `write` returns, which outlives the process; `fsync`, which outlives the machine,
is done for the records of a beat together, or asked for per record. A torn tail is cut off on reading; a damaged line
with sound ones after it is no tail, and is refused. One process writes at a time: the file itself is locked, and the
lock goes with the process that holds it.

    ["log", version, run, of]             the first line: whose keys these are, and of what
    ["begin", key, bound]                 an attempt without an idempotency key begins, and may cost `bound`
    ["paid", key, cost]                   an attempt is over and cost so much, and the node is not finished
    ["end", key, cost, why, value]        the node is finished: its value, or why it failed and the message
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import threading
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args
from uuid import uuid4
from weakref import WeakSet

from stretto.core.errors import UserError
from stretto.core.graph_policy import Why

VERSION = 1
_SCALARS = (str, int, float, bool, type(None))
_dumps = json.JSONEncoder(separators=(",", ":")).encode


@dataclass(frozen=True, kw_only=True, slots=True)
class Finished:
    """What a log says of a finished node: its value, or why it failed and the message."""

    why: Why | None
    value: Any
    cost: float


class DurableLog:
    """Opens a log to go on with, or begins one.

    Args:
        path: the file.
        of: what is run: a hash or a name. A log of something else is refused.
        beat_s: seconds after which records are flushed to the disk together; None: only at `close` and when asked.

    Attributes:
        run: the first run's own name, the beginning of every idempotency key.
        finished: what is finished, by key.
        spent: what was spent; an attempt that was in flight when the log was opened counts at its bound.

    Raises:
        UserError: if the file cannot be opened or is locked, damaged, or of something else.
    """

    def __init__(self, path: str | Path, *, of: str = "", beat_s: float | None = 0.05) -> None:
        self.path = str(path)
        self.finished: dict[str, Finished] = {}
        self.spent = 0.0
        self.run = uuid4().hex
        self._file = self._open()
        self._dirty = threading.Event()
        self._closing = threading.Event()
        self._failure: OSError | None = None
        self._flusher: threading.Thread | None = None
        try:
            self._read(of)
        except BaseException:
            os.close(self._file)
            raise
        _OPEN.add(self)
        if beat_s is not None:
            self._flusher = threading.Thread(target=self._flush, args=(beat_s,), name="durable log", daemon=True)
            self._flusher.start()

    # What a run writes.

    def encode(self, value: Any) -> tuple[Any, str]:
        """The value as a later run will read it, and its text.

        Raises:
            TypeError: if it is not made of JSON's values.
        """
        text = _dumps(value)
        return (value if type(value) in _SCALARS else json.loads(text)), text

    def begin(self, key: str, bound: float) -> None:
        """An attempt that may cost `bound` begins."""
        self._append(f'["begin",{_dumps(key)},{bound!r}]')

    def paid(self, key: str, cost: float) -> None:
        """An attempt is over, and its node is not finished."""
        self._append(f'["paid",{_dumps(key)},{cost!r}]')
        self.spent += cost

    def finish(self, key: str, text: str, cost: float, why: Why | None = None, *, sync: bool = False) -> None:
        """A node is finished; `text` is from `encode`. With `sync` it is on the disk when this returns."""
        self._append(f'["end",{_dumps(key)},{cost!r},{_dumps(why)},{text}]')
        self.spent += cost
        self.finished[key] = Finished(why=why, value=json.loads(text), cost=cost)
        if sync:
            self.sync()

    def sync(self) -> None:
        """Wait until all records are on the disk."""
        self._dirty.clear()
        if self._failure is not None:
            raise self._error(self._failure)
        try:
            os.fsync(self._file)
        except OSError as problem:
            raise self._error(problem) from None

    def close(self) -> None:
        """Flush and release the log; a second call does nothing."""
        if self._closing.is_set():
            return
        self._closing.set()
        if self._flusher is not None:
            self._dirty.set()
            self._flusher.join()
        try:
            self.sync()
        finally:
            os.close(self._file)

    def __enter__(self) -> DurableLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _append(self, text: str) -> None:
        if self._failure is not None:
            raise self._error(self._failure)
        data = text.encode()
        line = b"%08x %b\n" % (zlib.crc32(data), data)
        try:
            written = os.write(self._file, line)
            while written < len(line):
                written += os.write(self._file, line[written:])
        except OSError as problem:
            self._failure = problem
            raise self._error(problem) from None
        self._dirty.set()

    def _flush(self, beat_s: float) -> None:
        while not self._closing.is_set():
            self._dirty.wait()
            if self._closing.wait(beat_s):
                return
            self._dirty.clear()
            try:
                os.fsync(self._file)
            except OSError as problem:
                self._failure = problem
                return

    def _error(self, problem: OSError) -> UserError:
        return UserError(
            f"the log cannot be written: {problem.strerror or problem}",
            file=self.path,
            right="make room or name another file; what was finished stays finished",
        )

    # Opening and reading.

    def _open(self) -> int:
        try:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as problem:
            raise UserError(
                f"the log cannot be opened: {problem.strerror}", file=self.path, right="name a file that can be written"
            ) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(file)
            raise UserError(
                "another process writes this log", file=self.path, right="wait for it, or name another file"
            ) from None
        return file

    def _read(self, of: str) -> None:
        with open(self.path, "rb") as lines:
            sound = self._take(lines.read(), of)
        try:
            os.ftruncate(self._file, sound)
            if sound == 0:
                self._append(_dumps(["log", VERSION, self.run, of]))
                folder = os.open(os.path.dirname(self.path) or ".", os.O_RDONLY)
                try:
                    os.fsync(folder)
                finally:
                    os.close(folder)
        except OSError as problem:
            raise self._error(problem) from None

    def _take(self, data: bytes, of: str) -> int:
        """Take in all sound records; returns where the torn tail begins."""
        sound, number, open_bounds = 0, 0, dict[str, float]()
        while sound < len(data):
            end = data.find(b"\n", sound)
            record = _record(data[sound:end]) if end >= 0 else None
            number += 1
            if record is None:
                if number == 1 and not _torn_header(data):
                    raise self._damaged(1, "is not the first of a durable log")
                self._refuse_damage(data[end + 1 :] if end >= 0 else b"", number)
                break
            try:
                self._apply(record, number, of, open_bounds)
            except (TypeError, ValueError, IndexError, KeyError):
                raise self._damaged(number, "is not a record of this log") from None
            sound = end + 1
        self.spent += sum(open_bounds.values())
        return sound

    def _apply(self, record: list[Any], number: int, of: str, open_bounds: dict[str, float]) -> None:
        kind, rest = record[0], record[1:]
        if (number == 1) != (kind == "log"):
            raise ValueError(kind)
        if kind == "log":
            version, self.run, was = rest
            if version != VERSION or was != of:
                raise UserError(
                    f"the log is of {was!r} in version {version}, this is {of!r} in version {VERSION}",
                    file=self.path,
                    right="run what it belongs to, or name another file",
                )
        elif kind == "begin":
            key, bound = rest
            self.spent += open_bounds.get(key, 0.0)
            open_bounds[key] = float(bound)
        elif kind == "paid":
            key, cost = rest
            open_bounds.pop(key, None)
            self.spent += float(cost)
        else:
            key, cost, why, value = rest
            if kind != "end" or (why is not None and why not in get_args(Why)):
                raise ValueError(kind)
            open_bounds.pop(key, None)
            self.spent += float(cost)
            self.finished[str(key)] = Finished(why=why, value=value, cost=float(cost))

    def _refuse_damage(self, rest: bytes, number: int) -> None:
        if any(_record(line) is not None for line in rest.split(b"\n")):
            raise self._damaged(number, "is damaged, and sound records follow it")

    def _damaged(self, number: int, what: str) -> UserError:
        return UserError(
            f"the record {what}", file=self.path, line=number, right="restore the file, or cut it before this line"
        )


_OPEN: WeakSet[DurableLog] = WeakSet()


def _leave_to_parent() -> None:
    """A process that was forked writes no log; what it holds open would keep one locked when its writer is gone."""
    for log in list(_OPEN):
        if not log._closing.is_set():
            log._closing.set()
            log._failure = OSError(errno.EBADF, "it is written by the process that this one was forked from")
            os.close(log._file)
    _OPEN.clear()


os.register_at_fork(after_in_child=_leave_to_parent)


def _torn_header(data: bytes) -> bool:
    """Whether a file without one sound record is a log whose first record was torn, and not somebody's text."""
    return b"\n" not in data and set(data[:8]) <= set(b"0123456789abcdef") and b' ["log",'.startswith(data[8:16])


def _record(line: bytes) -> list[Any] | None:
    """The record of a line, or None if the line is torn."""
    try:
        if line[8:9] != b" " or int(line[:8], 16) != zlib.crc32(line[9:]):
            return None
        record = json.loads(line[9:])
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, list) and record else None
