"""Planned tasks as nodes of a graph: results filled in, arguments checked, equal calls of pure tools made once."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from stretto.core.graph import Failure, Graph, Paid, PaidError, Terms
from stretto.workflow.literals import filled
from stretto.workflow.model import Executed, Usage
from stretto.workflow.parse import PlannedTask
from stretto.workflow.tool import Tool

Watch = Callable[[PlannedTask, Any], None]

_REFUSED = Terms(kind="", on_error="feed")


class Tasks:
    """The tasks of all rounds of one run.

    Args:
        graph: where they run.
        tools: by name.
        usage: calls and money by tool, filled in as calls are made.
        watch: called with each task and its outcome when it ends.
    """

    def __init__(
        self, graph: Graph, tools: Mapping[str, Tool], usage: dict[str, Usage], watch: Watch | None = None
    ) -> None:
        self._graph = graph
        self._watch = watch
        self._planned: dict[int, PlannedTask] = {}
        self._tools = tools
        self._usage = usage
        self._calls: dict[str, asyncio.Future[Any]] = {}
        self._same: Counter[str] = Counter()
        self.rounds: list[TaskRound] = []

    def next_round(self) -> TaskRound:
        self.rounds.append(TaskRound(self))
        return self.rounds[-1]

    def ended(self, node: int, outcome: Any) -> None:
        """A node of the graph has ended."""
        if self._watch is not None and node in self._planned:
            self._watch(self._planned[node], outcome)

    def add(self, task: PlannedTask, nodes: Mapping[int, int], keys: Mapping[int, str]) -> tuple[int, str]:
        """A node for `task`, after the nodes of the tasks it refers to; returns it with its name.

        The name is made of the call and of the names of what it refers to, so that it is the same in a later run
        whatever else the plan then holds. The durable log knows the node by it, and repeats by their number beside it.
        """
        call = repr((filled(list(task.args), keys), sorted(filled(dict(task.kwargs), keys).items())))
        key = f"{task.tool}:{hashlib.blake2b(call.encode('utf-8', 'replace'), digest_size=16).hexdigest()}"
        tool, name = self._tools.get(task.tool), f"task {task.number}"
        if task.problem is not None or tool is None:
            node = self._graph.add(_refuse(task), terms=_REFUSED, key=f"refused {key}", name=name)
        else:
            self._same[key] += 1
            numbered = f"{key}#{self._same[key]}"
            logged = key if tool.pure and self._same[key] == 1 else numbered  # attempts of equal calls are told apart
            key = key if tool.pure else numbered
            after = [nodes[before] for before in task.after]
            node = self._graph.add(self._call(task, tool), after=after, terms=tool.terms, key=logged, name=name)
        self._planned[node] = task
        at_once = self._graph.outcomes[node]
        if isinstance(at_once, Failure):
            self.ended(node, at_once)
        return node, key

    def _call(self, task: PlannedTask, tool: Tool) -> Any:
        async def call(*values: Any) -> Any:
            head = values[:1] if tool.keyed else ()
            try:
                args, kwargs = tool.bind(
                    task.args, task.kwargs, dict(zip(task.after, values[len(head) :], strict=True))
                )
            except (TypeError, ValueError) as problem:
                raise PaidError(str(problem), again=False) from None
            return await self._once(tool, head, args, kwargs)

        return call

    async def _once(self, tool: Tool, head: tuple[Any, ...], args: list[Any], kwargs: dict[str, Any]) -> Any:
        name = _name(tool, args, kwargs) if tool.pure else None
        while name is not None and name in self._calls:
            earlier = self._calls[name]
            await asyncio.wait([earlier])
            if not earlier.cancelled():
                return Paid(earlier.result(), 0.0)
        if name is None:
            return await self._made(tool, head, args, kwargs)
        future = self._calls[name] = asyncio.get_running_loop().create_future()
        try:
            value = await self._made(tool, head, args, kwargs)
        except BaseException:
            del self._calls[name]
            future.cancel()
            raise
        future.set_result(value.value if isinstance(value, Paid) else value)
        return value

    async def _made(self, tool: Tool, head: tuple[Any, ...], args: list[Any], kwargs: dict[str, Any]) -> Any:
        usage = self._usage.setdefault(tool.name, Usage())
        usage.calls += 1
        cost = tool.price
        try:
            value = await tool.call(self._graph.clock, [*head, *args], kwargs)
            cost = value.cost if isinstance(value, Paid) else cost
        except PaidError as problem:
            cost = problem.cost
            raise
        finally:
            usage.cost += cost
        return value


class TaskRound:
    """The tasks of one plan, by their numbers."""

    def __init__(self, tasks: Tasks) -> None:
        self.planned: list[PlannedTask] = []
        self.nodes: dict[int, int] = {}
        self._keys: dict[int, str] = {}
        self._tasks = tasks

    def add(self, task: PlannedTask) -> None:
        self.planned.append(task)
        self.nodes[task.number], self._keys[task.number] = self._tasks.add(task, self.nodes, self._keys)

    def executed(self, outcomes: list[Any]) -> tuple[Executed, ...]:
        """Each task with what came of it."""
        return tuple(Executed(task=task, outcome=outcomes[self.nodes[task.number]]) for task in self.planned)


def _refuse(task: PlannedTask) -> Any:
    async def call() -> None:
        raise PaidError(task.problem or f"there is no tool {task.tool}", again=False)

    return call


def _name(tool: Tool, args: list[Any], kwargs: dict[str, Any]) -> str | None:
    """Tool and arguments as text, by position or by name alike; None where arguments are no plain values.

    By `repr`, which tells apart what JSON writes alike: keys 1 and "1", lists and tuples.
    """
    names = [parameter.name for parameter in tool.parameters if not parameter.many]
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    try:
        plain = _is_plain([named, args])
        return f"{tool.name}{sorted(named.items())!r}{args[len(names) :]!r}" if plain else None
    except RecursionError:
        return None


def _is_plain(value: Any) -> bool:
    if isinstance(value, dict):
        return type(value) is dict and all(_is_plain(key) and _is_plain(item) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return type(value) in (list, tuple) and all(map(_is_plain, value))
    return type(value) in (str, int, float, bool, bytes, type(None))
