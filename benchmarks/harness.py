"""What all benchmarks share: rows with goals, a wait for quiet, the command line, the exit code."""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import date

from stretto import __version__

QUIET_SHARE = 0.15
QUIET_WAIT_S = 60.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """One figure beside its goal.

    Attributes:
        ours, peer: the two figures, in `unit`; peer is None where a bound stands instead of a rival.
        ratio: how many times better ours is than the peer's, or ours itself where there is no peer.
        goal: what `ratio` (or `ours`, without a peer) is held against.
        at_most: whether the goal is an upper bound.
        spread: interquartile range over the median, of ours.
    """

    name: str
    ours: float
    unit: str
    goal: float | None
    at_most: bool = False
    peer: float | None = None
    ratio: float | None = None
    spread: float | None = None
    note: str = ""

    @property
    def passed(self) -> bool:
        judged = self.ours if self.ratio is None else self.ratio
        if self.goal is None:
            return True
        return judged <= self.goal if self.at_most else judged >= self.goal


def wait_for_quiet() -> float:
    """Wait (a minute at most) until other processes leave the machine idle; returns the share that others used last."""
    deadline = time.monotonic() + QUIET_WAIT_S
    while True:
        share = _others_share(0.5)
        if share < QUIET_SHARE or time.monotonic() > deadline:
            return share


def _others_share(seconds: float) -> float:
    def read() -> tuple[float, float]:
        with open("/proc/stat", encoding="ascii") as stat:
            fields = [float(x) for x in stat.readline().split()[1:]]
        return sum(fields), fields[3] + fields[4]

    total, idle = read()
    time.sleep(seconds)
    total_after, idle_after = read()
    spent = total_after - total
    return 1.0 - (idle_after - idle) / spent if spent > 0 else 0.0


def main(
    measure: Callable[[bool], Sequence[Row]],
    doc: str,
    *,
    add: Callable[[argparse.ArgumentParser], None] | None = None,
) -> int:
    """Run `measure(quick)`, print its rows, return 0 if every goal was met.

    With `add`, further options are put on the parser and `measure` finds them in `options`.
    """
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    if add is not None:
        add(parser)
    found = parser.parse_args()
    vars(options).update(vars(found))
    busy = wait_for_quiet()
    rows = list(measure(found.quick))
    if found.json:
        json.dump(_document(rows, busy), sys.stdout, indent=2)
        print()
    else:
        _print(rows, busy)
    return 0 if all(row.passed for row in rows) else 1


options = argparse.Namespace()
"""The parsed command line, for benchmarks with options of their own."""


def _document(rows: Sequence[Row], busy: float) -> dict[str, object]:
    return {
        "machine": {"cpus": os.cpu_count(), "platform": platform.platform(), "busy_before": round(busy, 3)},
        "stretto": __version__,
        "date": date.today().isoformat(),
        "rows": [{**asdict(row), "pass": row.passed} for row in rows],
    }


def _print(rows: Sequence[Row], busy: float) -> None:
    if busy >= QUIET_SHARE:
        print(f"note: others used {busy:.0%} of this machine before the first round")
    for row in rows:
        peer = "" if row.peer is None else f"  peer {row.peer:.4g} {row.unit}"
        ratio = "" if row.ratio is None else f"  ratio {row.ratio:.3g}"
        spread = "" if row.spread is None else f"  spread {row.spread:.0%}"
        goal = "reported" if row.goal is None else f"goal {'<=' if row.at_most else '>='} {row.goal:g}"
        verdict = "" if row.goal is None else ("  ok" if row.passed else "  MISSED")
        print(f"{row.name}: {row.ours:.4g} {row.unit}{peer}{ratio}{spread}  {goal}{verdict}")
        if row.note:
            print(f"    {row.note}")
