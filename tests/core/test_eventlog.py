"""Event logs: written, read, and asked again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from stretto.core.errors import UserError
from stretto.core.eventlog import Entry, EventLog, replay


class Counting:
    """A policy that decides on how much it has seen; a `leak` is what the log does not know."""

    def __init__(self, leak: int = 0) -> None:
        self.total = 0
        self.leak = leak

    def apply(self, event: dict[str, Any]) -> None:
        self.total += event["n"]

    def decide(self) -> dict[str, Any]:
        extra = self.leak if self.total > 3 else 0
        return {"total": self.total + extra, "rows": (self.total, 0)}


def recorded() -> EventLog:
    policy, log = Counting(), EventLog(header={"slots": 4, "name": "naïve\u2028"})
    for at, numbers in enumerate([[1, 2], [], [4]]):
        for n in numbers:
            event = {"n": n, "text": "über\nall"}
            policy.apply(event)
            log.saw(event)
        log.decided(at + 0.1, policy.decide())
    return log


def test_entries_hold_the_events_since_the_last_decision() -> None:
    log = recorded()
    assert [(e.step, e.at, [event["n"] for event in e.events]) for e in log] == [
        (0, 0.1, [1, 2]),
        (1, 1.1, []),
        (2, 2.1, [4]),
    ]
    assert len(log) == 3


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    log, path = recorded(), tmp_path / "events.jsonl"
    log.save(path)
    assert len(path.read_text().splitlines()) == 4
    loaded = EventLog.load(path)
    assert loaded.header == log.header
    assert loaded.entries[0] == Entry(
        step=0,
        at=0.1,
        events=({"n": 1, "text": "über\nall"}, {"n": 2, "text": "über\nall"}),
        decision={"total": 3, "rows": [3, 0]},
    )
    again = tmp_path / "again.jsonl"
    loaded.save(again)
    assert again.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "damage", ["{", '{"at": 1, "events": []}', '{"at": "x", "events": [], "decision": {}}', "3", ""]
)
def test_a_damaged_line_is_named(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    recorded().save(path)
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], damage, *lines[3:]]) + "\n")
    with pytest.raises(UserError) as caught:
        EventLog.load(path)
    assert (caught.value.line, caught.value.file) == (3, str(path))


def test_replay_of_the_same_policy_is_equal(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    recorded().save(path)
    for log in (recorded(), EventLog.load(path)):
        result = replay(log, Counting())
        assert result.equal
        assert result.decisions == 3


def test_replay_notices_what_leaked_in() -> None:
    result = replay(recorded(), Counting(leak=1))
    assert not result.equal
    assert [step for step, _, _ in result.different] == [2]
    _, logged, replayed = result.different[0]
    assert (logged["total"], replayed["total"]) == (7, 8)


def test_an_empty_log_proves_nothing() -> None:
    assert not replay(EventLog(), Counting()).equal


@pytest.mark.parametrize(
    "data",
    [b"", b'{}\n{"at":0,"events":[],"decision":{"t":"\xff"}}\n', b'{}\n{"at":0,"events":["boo"],"decision":{}}\n'],
)
def test_damage_of_any_kind_is_the_users_mistake(data: bytes, tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(data)
    with pytest.raises(UserError, match="log"):
        EventLog.load(tmp_path / "log")


def test_events_after_the_last_decision_are_kept(tmp_path: Path) -> None:
    log = EventLog()
    log.saw({"type": "cancel", "id": 1})
    log.save(tmp_path / "log")
    again = EventLog.load(tmp_path / "log")
    again.decided(1.0, {})
    assert again.entries[0].events == ({"type": "cancel", "id": 1},)
