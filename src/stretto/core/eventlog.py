"""What a policy saw and what it decided, step by step: enough to ask it again and compare.

A policy is a pure object: `apply(event)` changes its state, `decide()` gives the next decision. The log of a
real run, replayed on a fresh policy, must give equal decisions; where it does not, something outside the
events leaked into the policy.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from stretto.core.errors import UserError


class Policy(Protocol):
    """Pure decisions: no clock, no tensors, no I/O, no randomness of its own."""

    def apply(self, event: dict[str, Any]) -> None:
        """Take in one event (plain JSON values)."""

    def decide(self) -> dict[str, Any]:
        """The next decision (plain JSON values)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Entry:
    """Events that reached the policy before decision number `step`, and that decision."""

    step: int
    at: float
    events: tuple[dict[str, Any], ...]
    decision: dict[str, Any]


@dataclass
class EventLog:
    """Entries in order of decision; `header` holds what is needed to build the policy anew."""

    header: dict[str, Any] = field(default_factory=dict)
    entries: list[Entry] = field(default_factory=list)
    _waiting: list[dict[str, Any]] = field(default_factory=list)

    def saw(self, event: dict[str, Any]) -> None:
        self._waiting.append(event)

    def decided(self, at: float, decision: dict[str, Any]) -> None:
        """Close the step: `decision` was taken at `at` seconds after the events seen since the last one."""
        self.entries.append(Entry(step=len(self.entries), at=at, events=tuple(self._waiting), decision=decision))
        self._waiting = []

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Entry]:
        return iter(self.entries)

    def save(self, path: Path) -> None:
        """Write one JSON object a line, the header first.

        Raises:
            UserError: the file cannot be written.
        """
        lines = [json.dumps(self.header)]
        lines += [
            json.dumps({"at": e.at, "events": e.events, "decision": e.decision}, separators=(",", ":"))
            for e in self.entries
        ]
        if self._waiting:
            lines.append(json.dumps({"events": self._waiting}, separators=(",", ":")))
        try:
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        except OSError as problem:
            right = "name a folder that may be written"
            raise UserError(
                f"the event log cannot be written: {problem.strerror}", file=str(path), right=right
            ) from None

    @classmethod
    def load(cls, path: Path) -> EventLog:
        """Read what `save` wrote.

        Raises:
            UserError: for a file or a line that is not of that form.
        """
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as problem:
            raise UserError(f"the event log cannot be read: {problem}", file=str(path), right=_RIGHT) from None
        if not lines:
            raise UserError("the event log is empty", file=str(path), right=_RIGHT)
        log = cls()
        for number, line in enumerate(lines, start=1):
            try:
                record = _mapping(json.loads(line))
                if number == 1:
                    log.header = record
                    continue
                for event in record["events"]:
                    log.saw(_mapping(event))
                if number < len(lines) or "at" in record:
                    log.decided(float(record["at"]), _mapping(record["decision"]))
            except (ValueError, KeyError, TypeError) as problem:
                raise UserError(
                    f"not an event log entry: {problem}", file=str(path), line=number, right=_RIGHT
                ) from None
        return log


_RIGHT = "use a file that `run` wrote"


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{value!r} is not a mapping")
    return value


@dataclass(frozen=True, kw_only=True)
class Replay:
    """How many decisions were asked again, and the steps at which the answer differed (logged, replayed)."""

    decisions: int
    different: tuple[tuple[int, dict[str, Any], dict[str, Any]], ...]

    @property
    def equal(self) -> bool:
        return self.decisions > 0 and not self.different


def replay(log: Iterable[Entry], policy: Policy) -> Replay:
    """Feed the logged events to a fresh `policy` and compare each of its decisions with the logged one."""
    count = 0
    different = []
    for entry in log:
        for event in entry.events:
            policy.apply(event)
        decision = json.loads(json.dumps(policy.decide()))
        count += 1
        if decision != json.loads(json.dumps(entry.decision)):
            different.append((entry.step, entry.decision, decision))
    return Replay(decisions=count, different=tuple(different))
