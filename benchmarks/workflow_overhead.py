"""What a node of a graph costs when it does nothing, beside LangGraph, LlamaIndex workflows and dask, in one run.

A chain and a fan of no-op nodes; ours with its tracing on, and again with the durable log (a write a node before
the next one starts; fsync for the records of each 50 ms together). Then two branches of 0.05 + 0.40 s and 0.40 +
0.05 s, whose critical path is 0.45 s. Peers run before and after ours, in an environment of their own (`make
peers`), in their lightest setting and with no log, LangGraph again with its SQLite checkpointer, which like our log
writes before the next node starts and waits for no fsync. Microseconds a node are of the best round of each run,
their median over runs; goals: 30 with tracing, 100 with the log, four times under LangGraph with and without, and the
branches within 3 % of their critical path.

Usage: python benchmarks/workflow_overhead.py [--json] [--quick] [--peers PYTHON]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
from stretto.core.clock import RealClock
from stretto.core.durable import DurableLog
from stretto.core.graph import Graph
from stretto.core.record import Recorder

SCRIPT = Path(__file__).parent / "peers" / "workflow_eval.py"
PEERS = ("langgraph", "llama-index-workflows", "dask")
LOGGED = "langgraph"
"""The peer that is run with a log, too."""
NODES = {"chain": 200, "fan": 200}
BRANCHES, PATH_S = ((0.05, 0.40), (0.40, 0.05)), 0.45
GOAL_NODE_US, GOAL_LOGGED_US, GOAL_LANGGRAPH, GOAL_PATH = 30.0, 100.0, 4.0, 1.03


async def nothing(*values: Any) -> int:
    return 1


async def ours(shape: str, nodes: int, log: DurableLog | None = None) -> float:
    """Seconds from the first node to the last, with spans recorded."""
    graph = Graph(RealClock(), Recorder("measured"), log=log)
    start = time.perf_counter()
    if shape == "chain":
        last: tuple[int, ...] = ()
        for _ in range(nodes):
            last = (graph.add(nothing, after=last),)
    else:
        graph.add(nothing, after=[graph.add(nothing) for _ in range(nodes)])
    graph.close()
    await graph.run()
    return time.perf_counter() - start


async def branches() -> float:
    async def sleep(seconds: float) -> None:
        await asyncio.sleep(seconds)

    graph = Graph(RealClock(), Recorder("measured"))
    start = time.perf_counter()
    for first, second in BRANCHES:
        before = graph.add(lambda s=first: sleep(s))
        graph.add(lambda _, s=second: sleep(s), after=[before])
    graph.close()
    await graph.run()
    return time.perf_counter() - start


def best_of(shape: str, rounds: int, *, logged: bool) -> float:
    """Microseconds a node of the best round."""
    found = []
    for _ in range(rounds):
        if logged:
            with tempfile.TemporaryDirectory() as folder, DurableLog(Path(folder) / "log") as log:
                found.append(asyncio.run(ours(shape, NODES[shape], log)))
        else:
            found.append(asyncio.run(ours(shape, NODES[shape])))
    return min(found) / NODES[shape] * 1e6


def peer(python: Path, name: str, shape: str, rounds: int) -> tuple[float, str]:
    """Seconds of the best round, and the peer's version."""
    asked = {"peer": name, "shape": shape, "nodes": NODES.get(shape, NODES["chain"]), "rounds": rounds}
    done = subprocess.run(
        [python, SCRIPT], input=json.dumps(asked), capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode:
        raise SystemExit(f"{name} failed: {done.stderr[-1000:]}")
    found = json.loads(done.stdout)
    return min(found["seconds"]), f"{name} {found['version']}"


def measure(quick: bool) -> Sequence[harness.Row]:
    python = harness.options.peers
    runs, rounds = (1, 3) if quick else (3, 10)
    there = python.exists()
    if not there:
        print(f"{python} is missing: run `make peers` to compare", file=sys.stderr)
    us: dict[tuple[str, str], list[float]] = {}
    paths: dict[str, list[float]] = {}
    versions: dict[str, str] = {}

    def peers() -> None:
        for name in PEERS if there else ():
            for shape in NODES:
                seconds, versions[name] = peer(python, name, shape, rounds)
                us.setdefault((name, shape), []).append(seconds / NODES[shape] * 1e6)
            if name == LOGGED:
                seconds, _ = peer(python, name, "logged", rounds)
                us.setdefault((name, "logged"), []).append(seconds / NODES["chain"] * 1e6)
            paths.setdefault(name, []).append(peer(python, name, "branches", 1)[0])

    for _ in range(runs):
        peers()
        for shape in NODES:
            us.setdefault(("ours", shape), []).append(best_of(shape, rounds, logged=False))
            us.setdefault(("logged", shape), []).append(best_of(shape, rounds, logged=True))
        paths.setdefault("ours", []).append(asyncio.run(branches()))
        peers()
    return list(rows(us, paths, versions))


def rows(
    us: dict[tuple[str, str], list[float]], paths: dict[str, list[float]], versions: dict[str, str]
) -> list[harness.Row]:
    found = []
    for shape, nodes in NODES.items():
        mine = statistics.median(us["ours", shape])
        found.append(
            harness.Row(
                name=f"{shape} of {nodes}, traced",
                ours=mine,
                unit="us a node",
                goal=GOAL_NODE_US,
                at_most=True,
                spread=spread(us["ours", shape]),
            )
        )
        found.append(
            harness.Row(
                name=f"{shape} of {nodes}, traced and logged",
                ours=statistics.median(us["logged", shape]),
                unit="us a node",
                goal=GOAL_LOGGED_US,
                at_most=True,
                spread=spread(us["logged", shape]),
            )
        )
        for name, version in versions.items():
            theirs = statistics.median(us[name, shape])
            goal = GOAL_LANGGRAPH if name == "langgraph" else 1.0
            found.append(
                harness.Row(
                    name=f"{shape} of {nodes} beside {version}",
                    ours=mine,
                    peer=theirs,
                    ratio=theirs / mine,
                    unit="us a node",
                    goal=goal,
                    spread=spread(us["ours", shape]),
                )
            )
    if LOGGED in versions:
        mine, theirs = (statistics.median(us[who]) for who in (("logged", "chain"), (LOGGED, "logged")))
        found.append(
            harness.Row(
                name=f"logged chain beside {versions[LOGGED]} with SQLite",
                ours=mine,
                peer=theirs,
                ratio=theirs / mine,
                unit="us a node",
                goal=GOAL_LANGGRAPH,
                spread=spread(us["logged", "chain"]),
            )
        )
    path = statistics.median(paths["ours"])
    note = ", ".join(f"{versions[name]} {statistics.median(paths[name]):.3f} s" for name in versions)
    found.append(
        harness.Row(
            name="two branches over their critical path",
            ours=path / PATH_S,
            unit="times",
            goal=GOAL_PATH,
            at_most=True,
            note=f"{path:.4f} s of {PATH_S} s; {note}",
        )
    )
    return found


def spread(values: Sequence[float]) -> float | None:
    if len(values) < 2:
        return None
    return (max(values) - min(values)) / statistics.median(values)


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--peers", type=Path, default=Path(".peers/workflow/bin/python"), help="the peers' Python")


if __name__ == "__main__":
    sys.exit(harness.main(measure, __doc__ or "", add=add))
