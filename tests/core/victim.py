"""A process to be killed: runs a graph of calls with a durable log, and notes each call and charge in files.

`python victim.py FOLDER SEED`: writes the answer as JSON if it lives to the end.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

from stretto.core.clock import RealClock
from stretto.core.durable import DurableLog
from stretto.core.graph import Graph, Paid, Terms

NODES, BUDGET = 40, 60.0


def note(path: Path, text: str) -> None:
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, (text + "\n").encode())
    os.close(file)


async def main(folder: Path, seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    with DurableLog(folder / "log", of=f"victim {seed}") as log:
        graph = Graph(RealClock(), log=log, limits={"compute": 3}, budget=BUDGET)

        def plain(node: int, seconds: float, cost: float) -> Any:
            async def call(*values: Any) -> Any:
                note(folder / "calls", str(node))
                await asyncio.sleep(seconds)
                return Paid([node, sum(value[1] for value in values) % 1009 + node], cost)

            return call

        def keyed(node: int, seconds: float, cost: float) -> Any:
            async def call(key: str, *values: Any) -> Any:
                note(folder / "calls", str(node))
                await asyncio.sleep(seconds / 2)
                note(folder / "charges", f"{key} {cost}")  # a backend that honours keys charges each once
                await asyncio.sleep(seconds / 2)
                return Paid([node, sum(value[1] for value in values) % 1009 + node], cost)

            return call

        for node in range(NODES):
            after = draw.sample(range(node), min(node, draw.choice([0, 1, 2, 3])))
            seconds, cost, honours = draw.random() * 0.03, draw.choice([0.0, 0.25, 0.5]), draw.random() < 0.5
            make = keyed if honours else plain
            terms = Terms(kind=draw.choice(["compute", "search"]), bound=cost, keyed=honours)
            graph.add(make(node, seconds, cost), after=after, terms=terms)
        graph.close()
        sys.stderr.write("ready\n")
        outcomes = await graph.run()
        return {"outcomes": outcomes, "spent": graph.spent}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asyncio.run(main(Path(sys.argv[1]), int(sys.argv[2])))))
