"""The ReAct baseline: think, call one tool, read, think again; what the compiler is compared with."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from stretto.core.clock import Clock, RealClock
from stretto.core.errors import require
from stretto.core.graph import Graph
from stretto.core.record import Recorder
from stretto.core.trace import Key
from stretto.workflow import prompts
from stretto.workflow.compiler import Answer
from stretto.workflow.joiner import parse_verdict
from stretto.workflow.model import Model, Round, Usage, written
from stretto.workflow.parse import PlannedTask, parse_plan
from stretto.workflow.tasks import Tasks
from stretto.workflow.tool import Tool, tools_by_name

_CALL = re.compile(r"^[ \t]*Action[ \t]*:[ \t]*(?!Finish\b)(\w+[ \t]?\(.*\))[ \t]*$", re.MULTILINE | re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class ReAct:
    """One model call a tool call, with the whole transcript sent each time.

    Attributes:
        model: writes the steps.
        tools: what steps may call.
        max_steps: model calls in all.
    """

    model: Model
    tools: Sequence[Tool]
    max_steps: int = 20
    by_name: dict[str, Tool] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        require(self.max_steps >= 1, "max_steps", self.max_steps, "at least 1")
        object.__setattr__(self, "by_name", tools_by_name(self.tools))

    def run(self, question: str) -> Answer:
        """Answer a question."""
        return asyncio.run(self.arun(question))

    async def arun(self, question: str, *, clock: Clock | None = None) -> Answer:
        """Answer a question; a step that is neither a call nor an answer is the answer."""
        clock = clock or RealClock()
        recorder = Recorder("simulated" if clock.is_virtual else "measured")
        usage: dict[str, Usage] = {"step": Usage()}
        steps: list[Round] = []
        spent, text = 0.0, None
        while text is None and len(steps) < self.max_steps:
            prompt = prompts.step_prompt(self.by_name, question, steps)
            start = clock.now
            said = await written(self.model, prompt, clock, usage["step"])
            recorder.span("step 0", start, clock.now, Key("step", len(steps)))
            call = _CALL.search(said)
            if call is None:
                text = parse_verdict(said).answer
                break
            graph = Graph(clock, recorder)
            tasks = Tasks(graph, self.by_name, usage).next_round()
            tasks.add(self._task(len(steps) + 1, said[: call.start()], call.group(1)))
            graph.close()
            steps.append(Round(tasks=tasks.executed(await graph.run())))
            spent += graph.spent
        return Answer(
            text=text,
            failure=None if text is not None else f"no answer after {self.max_steps} steps",
            rounds=tuple(steps),
            usage=usage,
            spent=spent + usage["step"].cost,
            trace=recorder.trace(),
        )

    def _task(self, number: int, said: str, call: str) -> PlannedTask:
        thought = said.partition("Thought:")[2].strip()
        tasks = parse_plan(f"{number}. {call}", self.by_name).tasks
        if not tasks:  # the end of a plan, which a step has none of
            problem = f"{call} is no tool; call one, or finish"
            return PlannedTask(number=number, tool="join", thought=thought, line=1, text=call, problem=problem)
        return replace(tasks[0], thought=thought)
