"""Declared steps as nodes of a graph: on the real clock with the tools themselves, on virtual time with their twins."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stretto.core.clock import Clock
from stretto.core.durable import DurableLog
from stretto.core.graph import Failure, Graph, Paid, PaidError, Terms
from stretto.core.record import Recorder
from stretto.core.trace import Trace
from stretto.workflow.job import Source, Step, WorkflowJob, filled
from stretto.workflow.literals import text_of
from stretto.workflow.llm import Endpoint
from stretto.workflow.model import Message, Model, Prompt, Usage, written
from stretto.workflow.simulated import Line, SimulatedModel
from stretto.workflow.tool import Tool, tool, tools_by_name

BUILT_IN = ("wait", "text", "ask")
_STEPS, _CALLS_OF = " steps", " calls of "
"""Names of limits; no step has one that begins with a blank."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run of steps gave.

    Attributes:
        results: of each step, a value or a `Failure`, by name.
        usage: tokens and money of each step, by name.
        spent: money in all.
        overrun: money that was charged beyond the bounds of calls, which no budget can stop; 0 without a budget.
        ended: "completed", "failed" (a step failed), "deadline" or "cancelled".
    """

    results: dict[str, Any]
    usage: dict[str, Usage]
    spent: float
    ended: str
    trace: Trace
    overrun: float = 0.0


@tool
async def wait(seconds: float, result: str = "") -> str:
    """Take some time, and give a text."""
    await asyncio.sleep(seconds)
    return result


@tool
async def text(text: str) -> str:
    """Give a text, with results in it."""
    return text


class Steps:
    """The steps of one run on one clock.

    Args:
        tools: beside those built in; on virtual time each takes its step's `expected_s`.
        ended: called with (step's name, outcome) when one ends.
    """

    def __init__(
        self,
        job: WorkflowJob,
        clock: Clock,
        *,
        max_parallel: int | None,
        tools: Sequence[Tool] = (),
        log: DurableLog | None = None,
        ended: Callable[[str, Any], None] = lambda name, outcome: None,
    ) -> None:
        self._job = job
        self._clock = clock
        self._tools = tools_by_name(tools)
        self._usage = {step.name: Usage() for step in job.steps}
        self._recorder = Recorder("simulated" if clock.is_virtual else "measured")
        self._late = self._stopped = False
        self.graph = Graph(
            clock,
            self._recorder,
            limits=self._limits(max_parallel),
            budget=job.budget,
            seed=job.seed,
            log=log,
            watch=lambda node, outcome: ended(job.steps[node].name, outcome),
        )

    def cancel(self) -> None:
        self._stopped = True
        self.graph.cancel()

    async def run(self) -> Outcome:
        """All steps, to the end or to the deadline."""
        job, timer = self._job, None
        if job.deadline_s is not None:
            timer = asyncio.get_running_loop().call_later(job.deadline_s, self._out_of_time)
        nodes: dict[str, int] = {}
        for step in job.steps:
            before = step.before(nodes)
            terms = self._terms(step)
            call = self._call(step, before)
            nodes[step.name] = self.graph.add(
                call, after=[nodes[one] for one in before], terms=terms, key=step.name, name=step.name
            )
        self.graph.close()
        try:
            outcomes = await self.graph.run()
        finally:
            if timer is not None:
                timer.cancel()
        failed = any(isinstance(outcome, Failure) for outcome in outcomes)
        ended = "deadline" if self._late else "cancelled" if self._stopped else "failed" if failed else "completed"
        return Outcome(
            results={name: outcomes[node] for name, node in nodes.items()},
            usage=self._usage,
            spent=self.graph.spent,
            overrun=self.graph.overrun,
            ended=ended,
            trace=self._recorder.trace(),
        )

    def _out_of_time(self) -> None:
        self._late = self.graph.live > 0
        self.graph.cancel()

    def _limits(self, max_parallel: int | None) -> dict[str, int]:
        """Of all steps together, and of those that call a tool with a limit."""
        limits = {f"{_CALLS_OF}{one.name}": one.limit for one in self._tools.values() if one.limit is not None}
        return limits if max_parallel is None else {**limits, _STEPS: max_parallel}

    def _terms(self, step: Step) -> Terms:
        """A step's own terms, and where it says nothing its tool's."""
        known = self._tools.get(step.tool)
        silent = Step(name=step.name, tool=step.tool)
        other = step if known is None else known
        return Terms(
            kind=step.name,
            pools=(_STEPS, f"{_CALLS_OF}{step.tool}"),
            timeout_s=other.timeout_s if step.timeout_s == silent.timeout_s else step.timeout_s,
            attempts=max(step.attempts, other.attempts),
            backoff_s=other.backoff_s if step.backoff_s == silent.backoff_s else step.backoff_s,
            on_error=other.on_error if step.on_error == silent.on_error else step.on_error,
            bound=bound_of(self._job, step, self._tools),
            keyed=known is not None and known.keyed,
        )

    def _call(self, step: Step, before: Sequence[str]) -> Any:
        async def call(*values: Any) -> Any:
            head = values[: len(values) - len(before)]
            results = dict(zip(before, values[len(head) :], strict=True))
            try:
                args = {name: filled(value, results, text_of) for name, value in step.args.items()}
            except ValueError as problem:
                raise PaidError(str(problem), again=False) from None
            if step.tool == "ask":
                return await self._ask(step, args)
            chosen = _tool_of(step, self._tools)
            try:
                _, kwargs = chosen.bind((), args, {})
            except TypeError as problem:
                raise PaidError(str(problem), again=False) from None
            if self._clock.is_virtual and step.tool in self._tools:
                await self._clock.sleep(step.expected_s)
                return f"{step.tool}({step.name})"
            value = await chosen.call(self._clock, head, kwargs)
            bound = bound_of(self._job, step, self._tools)
            self._usage[step.name].add(Usage(calls=1, cost=value.cost if isinstance(value, Paid) else bound))
            return value

        return call

    async def _ask(self, step: Step, args: Mapping[str, Any]) -> Paid:
        model = model_of(self._job.sources[str(args["source"])], simulated=self._clock.is_virtual)
        usage = Usage()
        try:
            answer = await written(model, prompt_of(text_of(args["prompt"])), self._clock, usage)
        finally:
            self._usage[step.name].add(usage)
        return Paid(answer.strip(), usage.cost)


def prompt_of(text: str) -> Prompt:
    return Prompt(part="plan", question=text, messages=(Message(role="user", text=text),))


def model_of(source: Source, *, simulated: bool) -> Model:
    """The endpoint, or a model that takes its time: with the script's words, or on virtual time with none."""
    if source.base_url is not None and not simulated:
        return Endpoint(
            base_url=source.base_url,
            model=source.model,
            max_tokens=source.max_tokens,
            input_price=source.input_price,
            output_price=source.output_price,
        )
    answer = Line("...", source.expected_tokens)
    if source.script is not None:
        answer = Line(source.script, len(source.script) // 4 + 1)
    return SimulatedModel(
        plans=[[answer]],
        first_token_s=source.first_token_s,
        token_s=source.token_s,
        input_price=source.input_price,
        output_price=source.output_price,
    )


def bound_of(job: WorkflowJob, step: Step, tools: Mapping[str, Tool]) -> float:
    """The most that a call of a step can cost: as it says, or its tool's price.

    The prompt of an `ask` is not known before its results are: it is taken to have at most four tokens of results for
    each that may be written, and what is beyond is told as an overrun.
    """
    if step.cost is not None:
        return step.cost
    if step.tool == "ask":
        source = job.sources.get(str(step.args.get("source")))
        if source is None:
            return 0.0
        prompt = str(step.args.get("prompt")).encode("utf-8", "replace")
        most = len(prompt) + 32 + 4 * source.max_tokens * len(step.used)
        return (most * source.input_price + source.max_tokens * source.output_price) / 1e6
    return tools[step.tool].price if step.tool in tools else 0.0


def problem_of(job: WorkflowJob, tools: Mapping[str, Tool]) -> tuple[str, str] | None:
    """What a step asks for that there is not, and what would be right."""
    for step in job.steps:
        if step.tool not in BUILT_IN and step.tool not in tools:
            known = ", ".join([*BUILT_IN, *tools])
            right = f"use one of {known}; tools of one's own are passed from Python: wf.run(job, tools=[...])"
            return f"step {step.name} calls {step.tool}, and there is no such tool", right
        if step.tool == "ask":
            if step.args.keys() != {"source", "prompt"}:
                return f"step {step.name} gives ask {', '.join(step.args) or 'nothing'}", "give it source and prompt"
            if not isinstance(step.args["source"], str) or step.args["source"] not in job.sources:
                known = ", ".join(job.sources) or "none: add it under `sources`"
                return (
                    f"step {step.name} asks {step.args['source']!r}, and there is no such source",
                    f"there is {known}",
                )
        else:
            chosen = _tool_of(step, tools)
            problem = _names_problem(chosen, step)
            if problem is not None:
                return f"step {step.name}: {problem}", f"call it as {chosen.signature}"
    return None


def _tool_of(step: Step, tools: Mapping[str, Tool]) -> Tool:
    return {"wait": wait, "text": text, **tools}[step.tool]


def _names_problem(chosen: Tool, step: Step) -> str | None:
    names = {parameter.name for parameter in chosen.parameters}
    unknown = [name for name in step.args if name not in names]
    missing = [p.name for p in chosen.parameters if p.required and p.name not in step.args]
    if unknown:
        return f"{chosen.name} has no parameter {unknown[0]}"
    return f"{chosen.name} needs {', '.join(missing)}" if missing else None
