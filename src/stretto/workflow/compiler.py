"""The compiler: a planner's text becomes a graph of calls while it is written, and a joiner answers or replans.

"An LLM Compiler for Parallel Function Calling" (ICML 2024), event driven: a task is a node as soon as its line is
whole, a node starts the moment the last result it refers to is there, and nobody waits for a level, a poll or the
planner. Plans, calls and verdicts are nodes of one graph, so that one budget, one deadline, one durable log and one
cancellation hold for all of them.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import asdict, dataclass, field
from typing import Any

from stretto.core.clock import Clock, RealClock
from stretto.core.durable import DurableLog
from stretto.core.errors import require
from stretto.core.eventlog import EventLog
from stretto.core.graph import Failure, Graph, Paid, Terms
from stretto.core.record import Recorder
from stretto.core.trace import Trace
from stretto.workflow import joiner as joining
from stretto.workflow import prompts
from stretto.workflow.joiner import Joiner, Verdict
from stretto.workflow.model import Executed, Model, Round, Usage
from stretto.workflow.parse import MOST_TASKS, Note, ParsedPlan, PlannedTask, PlanParser
from stretto.workflow.tasks import TaskRound, Tasks, Watch
from stretto.workflow.tool import Tool, tools_by_name

MOST_PLAN_CHARACTERS = 4 * 2**20
_BOOKKEEPING = Terms(kind="", durable=False, on_error="feed")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a run gave.

    Attributes:
        text: the answer; None where there is none, and `failure` says why.
        rounds: plans with the results of their calls; the last one may be cut short.
        usage: calls, tokens and money by part: "plan", "join" and each tool.
        spent: money in all, in units of the budget.
        overrun: what endpoints or tools charged beyond their bounds; no budget can stop that.
        trace: a span for each plan, call and verdict, by lanes of their kinds.
    """

    text: str | None
    failure: str | None
    rounds: tuple[Round, ...]
    usage: dict[str, Usage]
    spent: float
    overrun: float = 0.0
    trace: Trace

    def __str__(self) -> str:
        return self.text if self.text is not None else f"no answer: {self.failure}"


@dataclass(frozen=True, kw_only=True)
class Compiler:
    """Plans calls with a model and runs them in parallel. It holds no state: one object serves any number of runs.

    Attributes:
        planner: writes plans.
        tools: what plans may call.
        joiner: judges results; the planner does if left out.
        max_rounds: plans in all; the last one's verdict is an answer.
        max_parallel: most calls at once; None: no limit.
        budget: most money a run may spend, on models and tools; None: no limit.
        deadline_s: seconds after which a run is cancelled; None: never.
        stream: whether calls start while the plan is still written.
        most_tasks: of one plan.
        examples: plans shown to the planner.
        seed: of the pauses between attempts.
    """

    planner: Model
    tools: Sequence[Tool]
    joiner: Joiner | None = None
    max_rounds: int = 2
    max_parallel: int | None = None
    budget: float | None = None
    deadline_s: float | None = None
    stream: bool = True
    most_tasks: int = MOST_TASKS
    examples: str = ""
    seed: int = 0
    by_name: dict[str, Tool] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        require(1 <= self.max_rounds <= 100, "max_rounds", self.max_rounds, "in 1 .. 100")
        require(self.max_parallel is None or self.max_parallel >= 1, "max_parallel", self.max_parallel, "at least 1")
        require(self.deadline_s is None or self.deadline_s > 0, "deadline_s", self.deadline_s, "> 0 seconds")
        object.__setattr__(self, "by_name", tools_by_name(self.tools))

    def run(self, question: str, *, log: DurableLog | None = None) -> Answer:
        """Answer a question; see `arun`."""
        return asyncio.run(self.arun(question, log=log))

    async def arun(
        self,
        question: str,
        *,
        clock: Clock | None = None,
        log: DurableLog | None = None,
        events: EventLog | None = None,
        watch: Watch | None = None,
    ) -> Answer:
        """Answer a question. Failures are told in the answer; cancelled, it cancels all that runs.

        Args:
            clock: real if left out.
            log: keeps plans, results and verdicts, so that a run that was killed goes on.
            events: where decisions go, to be replayed.
            watch: called with each task and its outcome when it ends.
        """
        return await _Run(self, question, clock or RealClock(), log, events, watch).answer()


def limits_of(tools: Sequence[Tool], max_parallel: int | None) -> dict[str, int]:
    """The graph's limits: of each tool, and of all together."""
    limits = {one.name: one.limit for one in tools if one.limit is not None}
    if max_parallel is not None:
        limits["tools"] = min(max_parallel, limits.get("tools", max_parallel))  # a tool may have that name
    return limits


class _Run:
    """One run of a compiler.

    A round is five nodes around its tasks: plan, unfold (the tasks not yet added), gather (after all tasks), join,
    and turn (an answer, or the next plan). Plan and join are kept in a durable log; the others are done again.
    """

    def __init__(
        self,
        compiler: Compiler,
        question: str,
        clock: Clock,
        log: DurableLog | None,
        events: EventLog | None,
        watch: Watch | None,
    ) -> None:
        self._compiler = compiler
        self._question = question
        self._clock = clock
        self._recorder = Recorder("simulated" if clock.is_virtual else "measured")
        self._graph = Graph(
            clock,
            self._recorder,
            limits=limits_of(compiler.tools, compiler.max_parallel),
            budget=compiler.budget,
            seed=compiler.seed,
            log=log,
            events=events,
            watch=lambda node, outcome: self._tasks.ended(node, outcome),
        )
        self._usage: dict[str, Usage] = {"plan": Usage(), "join": Usage()}
        self._tasks = Tasks(self._graph, compiler.by_name, self._usage, watch)
        self._rounds: list[Round] = []
        self._notes: tuple[Note, ...] = ()
        self._text: str | None = None
        self._failure: str | None = None

    async def answer(self) -> Answer:
        deadline_s, timer = self._compiler.deadline_s, None
        if deadline_s is not None:
            timer = asyncio.get_running_loop().call_later(deadline_s, self._out_of_time, deadline_s)
        self._ask()
        try:
            await self._graph.run()
        finally:
            if timer is not None:
                timer.cancel()
        if self._text is None and len(self._tasks.rounds) > len(self._rounds):
            self._rounds.append(Round(tasks=self._tasks.rounds[-1].executed(self._graph.outcomes), notes=self._notes))
        return Answer(
            text=self._text,
            failure=self._failure,
            rounds=tuple(self._rounds),
            usage=self._usage,
            spent=self._graph.spent,
            overrun=self._graph.overrun,
            trace=self._recorder.trace(),
        )

    def _out_of_time(self, deadline_s: float) -> None:
        self._fail(f"the deadline of {deadline_s:g} s has passed")
        self._graph.cancel()

    def _fail(self, failure: str) -> None:
        self._failure = self._failure or failure

    def _step(self, call: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
        """A node that adds nodes: if it fails, nobody would go on, so that the run ends."""

        async def step(*values: Any) -> None:
            try:
                await call(*values)
            except Exception as problem:
                self._fail(f"{type(problem).__name__}: {problem}")
                self._graph.cancel()
                raise

        return step

    def _key(self, what: str, number: int) -> str:
        """A node's name in the durable log, which another question must not find."""
        asked = hashlib.blake2b(self._question.encode("utf-8", "replace"), digest_size=8).hexdigest()
        return f"{what} {number} of {asked}"

    def _ask(self) -> None:
        """Add the nodes of the next plan."""
        compiler, number = self._compiler, len(self._rounds)
        prompt = prompts.plan_prompt(compiler.by_name, self._question, self._rounds, compiler.examples)
        live = _Live(PlanParser(compiler.by_name, compiler.most_tasks), self._tasks.next_round())

        async def plan() -> Paid:
            usage, pieces, length = Usage(), list[str](), 0
            try:
                async with aclosing(compiler.planner.stream(prompt, self._clock, usage)) as stream:
                    async for piece in stream:
                        pieces.append(piece)
                        length += len(piece)
                        if compiler.stream:
                            live.feed(piece)
                        if live.parser.ended or length > MOST_PLAN_CHARACTERS:
                            break
            finally:
                self._usage["plan"].add(usage)
            return Paid("".join(pieces), usage.cost)

        async def unfold(text: str | Failure) -> None:
            if isinstance(text, Failure):
                self._fail(f"the planner {text}")
                self._graph.close()
                return
            live.finish(text)
            self._notes = tuple(live.parser.notes)
            after = list(live.tasks.nodes.values())
            self._graph.add(self._step(gather), after=after, terms=_BOOKKEEPING, key=self._key("gather", number))

        async def gather(*outcomes: Any) -> None:
            self._judge(Round(tasks=live.tasks.executed(self._graph.outcomes), notes=self._notes))

        terms = Terms(kind="plan", bound=compiler.planner.bound(prompt))
        node = self._graph.add(plan, terms=terms, key=self._key("plan", number))
        self._graph.add(self._step(unfold), after=[node], terms=_BOOKKEEPING, key=self._key("unfold", number))

    def _judge(self, done: Round) -> None:
        """Add the nodes of the verdict on a round."""
        compiler, number = self._compiler, len(self._rounds)
        last = number + 1 == compiler.max_rounds
        joiner = compiler.joiner or compiler.planner
        prompt = prompts.join_prompt(self._question, [*self._rounds, done], last=last)

        async def join() -> Paid:
            usage = Usage()
            try:
                verdict = await joining.ask(joiner, prompt, self._clock, usage)
            finally:
                self._usage["join"].add(usage)
            return Paid(asdict(verdict), usage.cost)

        async def turn(said: dict[str, Any] | Failure) -> None:
            verdict = None if isinstance(said, Failure) else Verdict(**said)
            thought = "" if verdict is None else verdict.thought or ("" if verdict.finish else verdict.answer)
            self._rounds.append(Round(tasks=done.tasks, notes=done.notes, thought=thought))
            if verdict is not None and not verdict.finish:
                self._ask()
                return
            if verdict is None:
                self._fail(f"the joiner {said}")
            else:
                self._text = verdict.answer
            self._graph.close()

        bound = joiner.bound(prompt) if isinstance(joiner, Model) else 0.0
        node = self._graph.add(join, terms=Terms(kind="join", bound=bound), key=self._key("join", number))
        self._graph.add(self._step(turn), after=[node], terms=_BOOKKEEPING, key=self._key("turn", number))


@dataclass(slots=True)
class _Live:
    """A plan on its way into the graph."""

    parser: PlanParser
    tasks: TaskRound
    fed: bool = False

    def feed(self, piece: str) -> None:
        self.fed = True
        for task in self.parser.feed(piece):
            self.tasks.add(task)

    def finish(self, text: str) -> None:
        """Add what is left of the plan: its last line, or all of it where it was not fed in pieces."""
        if not self.fed:
            self.feed(text[:MOST_PLAN_CHARACTERS])
        for task in self.parser.end():
            self.tasks.add(task)


async def execute(
    plan: ParsedPlan | Sequence[PlannedTask],
    tools: Sequence[Tool],
    *,
    clock: Clock | None = None,
    max_parallel: int | None = None,
    budget: float | None = None,
    log: DurableLog | None = None,
    recorder: Recorder | None = None,
) -> tuple[Executed, ...]:
    """Run a plan without any model; a task that cannot run, or fails, gives a `Failure`.

    `max_parallel=1` is the sequential baseline: one call after another, in the order of the plan.
    """
    planned = plan.tasks if isinstance(plan, ParsedPlan) else plan
    limits = limits_of(tools, max_parallel)
    graph = Graph(clock or RealClock(), recorder, limits=limits, budget=budget, log=log)
    tasks = Tasks(graph, tools_by_name(tools), {}).next_round()
    for task in planned:
        tasks.add(task)
    graph.close()
    return tasks.executed(await graph.run())
