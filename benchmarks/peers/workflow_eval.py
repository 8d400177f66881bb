"""Chains, fans and two branches of no-op or sleeping nodes in LangGraph, LlamaIndex workflows and dask, for
workflow_overhead.py: reads {"peer", "shape", "nodes", "rounds"} from stdin, writes {"seconds", "version"}.

Each peer runs as its documents do it, in its lightest setting: no checkpointer, no verbose mode, graphs compiled
before the clock starts. Shape "logged" is a chain in LangGraph with its SQLite checkpointer, which writes before the
next node starts (`durability="sync"`) and, as ours, waits for no fsync (`PRAGMA synchronous=OFF`). Versions from PyPI;
see `make peers`.
"""

import asyncio
import json
import operator
import sys
import tempfile
import time
from importlib.metadata import version
from typing import Annotated, Any, TypedDict

BRANCHES = {"a": (0.05, 0.40), "b": (0.40, 0.05)}


def langgraph(shape: str, nodes: int) -> float:
    from langgraph.graph import END, START, StateGraph

    class State(TypedDict):
        seen: Annotated[int, operator.add]

    async def node(state: State) -> dict[str, int]:
        return {"seen": 1}

    def sleeping(seconds: float) -> Any:
        async def call(state: State) -> dict[str, int]:
            await asyncio.sleep(seconds)
            return {"seen": 1}

        return call

    graph = StateGraph(State)
    if shape in ("chain", "logged"):
        for number in range(nodes):
            graph.add_node(f"n{number}", node)
            graph.add_edge(f"n{number - 1}" if number else START, f"n{number}")
        graph.add_edge(f"n{nodes - 1}", END)
    elif shape == "fan":
        graph.add_node("join", node)
        for number in range(nodes):
            graph.add_node(f"n{number}", node)
            graph.add_edge(START, f"n{number}")
        graph.add_edge([f"n{number}" for number in range(nodes)], "join")
        graph.add_edge("join", END)
    else:
        for name, (first, second) in BRANCHES.items():
            graph.add_node(f"{name}1", sleeping(first))
            graph.add_node(f"{name}2", sleeping(second))
            graph.add_edge(START, f"{name}1")
            graph.add_edge(f"{name}1", f"{name}2")
            graph.add_edge(f"{name}2", END)
    limit = {"recursion_limit": nodes + 10}

    async def main() -> float:
        app = graph.compile()
        start = time.perf_counter()
        await app.ainvoke({"seen": 0}, limit)
        return time.perf_counter() - start

    async def logged() -> float:
        from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

        with tempfile.TemporaryDirectory() as folder:
            async with AsyncSqliteSaver.from_conn_string(f"{folder}/log.db") as saver:
                await saver.setup()
                await saver.conn.execute("PRAGMA synchronous=OFF")
                app = graph.compile(checkpointer=saver)
                start = time.perf_counter()
                await app.ainvoke({"seen": 0}, {**limit, "configurable": {"thread_id": "1"}}, durability="sync")
                return time.perf_counter() - start

    return asyncio.run(logged() if shape == "logged" else main())


def llama_index(shape: str, nodes: int) -> float:
    from workflows import Context, Workflow, step
    from workflows.events import Event, StartEvent, StopEvent

    class Next(Event):
        left: int

    class Part(Event):
        pass

    class Done(Event):
        pass

    class Chain(Workflow):
        @step
        async def begin(self, event: StartEvent) -> Next:
            return Next(left=nodes - 2)

        @step
        async def go(self, event: Next) -> Next | StopEvent:
            return Next(left=event.left - 1) if event.left > 1 else StopEvent(result=0)

    class Fan(Workflow):
        @step
        async def begin(self, ctx: Context, event: StartEvent) -> Part | None:
            for _ in range(nodes):
                ctx.send_event(Part())
            return None

        @step(num_workers=64)
        async def part(self, event: Part) -> Done:
            return Done()

        @step
        async def join(self, ctx: Context, event: Done) -> StopEvent | None:
            found = ctx.collect_events(event, [Done] * nodes)
            return None if found is None else StopEvent(result=0)

    class Slow(Event):
        name: str

    class Branches(Workflow):
        @step
        async def begin(self, ctx: Context, event: StartEvent) -> Slow | None:
            for name in BRANCHES:
                ctx.send_event(Slow(name=name))
            return None

        @step(num_workers=4)
        async def branch(self, event: Slow) -> Done:
            for seconds in BRANCHES[event.name]:
                await asyncio.sleep(seconds)
            return Done()

        @step
        async def join(self, ctx: Context, event: Done) -> StopEvent | None:
            found = ctx.collect_events(event, [Done] * 2)
            return None if found is None else StopEvent(result=0)

    kind = {"chain": Chain, "fan": Fan, "branches": Branches}[shape]

    async def main() -> float:
        flow = kind(timeout=300, verbose=False)
        start = time.perf_counter()
        await flow.run()
        return time.perf_counter() - start

    return asyncio.run(main())


def dask(shape: str, nodes: int) -> float:
    from dask.threaded import get

    def node(*values: Any) -> int:
        return 1

    def sleeping(seconds: float, *values: Any) -> int:
        time.sleep(seconds)
        return 1

    if shape == "chain":
        graph: dict[str, Any] = {f"n{k}": (node, f"n{k - 1}") if k else (node,) for k in range(nodes)}
        wanted = f"n{nodes - 1}"
    elif shape == "fan":
        graph = {f"n{k}": (node,) for k in range(nodes)}
        graph["join"] = (node, *graph)
        wanted = "join"
    else:
        graph = {f"{name}1": (sleeping, first) for name, (first, _) in BRANCHES.items()}
        graph |= {f"{name}2": (sleeping, second, f"{name}1") for name, (_, second) in BRANCHES.items()}
        graph["join"] = (node, *(f"{name}2" for name in BRANCHES))
        wanted = "join"
    start = time.perf_counter()
    get(graph, wanted)
    return time.perf_counter() - start


PEERS = {
    "langgraph": (langgraph, "langgraph"),
    "llama-index-workflows": (llama_index, "llama-index-workflows"),
    "dask": (dask, "dask"),
}

if __name__ == "__main__":
    asked = json.load(sys.stdin)
    run, package = PEERS[asked["peer"]]
    seconds = [run(asked["shape"], asked["nodes"]) for _ in range(asked["rounds"] + 1)][1:]
    json.dump({"seconds": seconds, "version": version(package)}, sys.stdout)
