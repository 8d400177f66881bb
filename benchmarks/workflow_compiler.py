"""The compiler beside what it replaces: a ReAct loop, a blocking planner, a poll, a scheduler that waits for lines.

Models are scripts behind a real HTTP server with real delays (0.3 s to the first token, 20 ms a token); tools sleep
0.2 to 1 s. Tokens are fixed here: 35 a ReAct step (a thought and an action), 10 a line of a plan, 25 a verdict; ReAct
takes one model call a tool call and one for the answer. Goals, over ReAct in the same run: 1.8 for two searches and
a comparison, 3.7 for eight calls at once, 2.1 for a graph of three levels; 4 times fewer tokens sent for eight calls.
Streaming over blocking plans of ten tasks 1.25; a chain of a hundred no-op tasks in 50 ms; dependents that start
while the planner is silent 1.3 over a scheduler that looks when a line arrives; work bound by the processor on two
processes 1.8 over one. Without --quick, SmolLM2-135M plans under a grammar; reported is how many of its plans are
valid, and how many look up both things that were asked about: so small a model keeps to the form and often misses the
point.

Usage: python benchmarks/workflow_compiler.py [--json] [--quick]
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import harness
from stretto import workflow as wf
from stretto.core.clock import Clock, RealClock
from stretto.workflow.model import Model, Prompt, Usage
from stretto.workflow.simulated import Line
from stretto.workflow.stand_in import stand_in

FIRST_TOKEN_S, TOKEN_S = 0.3, 0.02
STEP_TOKENS, LINE_TOKENS, JOIN_TOKENS = 35, 10, 25
RESULT_CHARACTERS = 400
GOALS = {"two searches, one comparison": 1.8, "eight calls": 3.7, "three levels": 2.1}
GOAL_TOKENS, GOAL_STREAM, GOAL_CHAIN_S, GOAL_SILENT, GOAL_PROCESSES = 4.0, 1.25, 0.05, 1.3, 1.8


@wf.tool
async def search(title: str) -> str:
    """Search an encyclopaedia for a title."""
    await asyncio.sleep(seconds_of(title))
    return f"{title}: ".ljust(RESULT_CHARACTERS, "x")


@wf.tool
async def compare(*texts: str) -> str:
    """Compare texts."""
    await asyncio.sleep(0.3)
    return "the first".ljust(RESULT_CHARACTERS, "x")


def seconds_of(title: str) -> float:
    """0.2 to 1 s, by the title alone."""
    return 0.2 + 0.8 * int.from_bytes(hashlib.blake2b(title.encode(), digest_size=2).digest()) / 65535


@dataclass(frozen=True)
class Case:
    """A question as a plan; the ReAct loop makes the same calls in the same order."""

    calls: Sequence[str]

    def plan(self) -> list[Line]:
        lines = [Line(f"{number}. {call}", LINE_TOKENS) for number, call in enumerate(self.calls, start=1)]
        return [*lines, Line(f"{len(lines) + 1}. join()", LINE_TOKENS)]

    def step(self, turn: int) -> list[Line]:
        if turn == len(self.calls):
            return [Line("Thought: enough.\nAction: Finish(done)", STEP_TOKENS)]
        return [
            Line(f"Thought: next.\nAction: {re.sub(r'[$][0-9]+', repr('a result'), self.calls[turn])}", STEP_TOKENS)
        ]

    def reply(self, body: dict[str, Any]) -> list[Line]:
        system, user = (message["content"] for message in body["messages"])
        if "plan of calls" in system:
            return self.plan()
        if "one at a time" in system:
            return self.step(user.count("Observation:"))
        return [Line("Thought: enough.\nAction: Finish(done)", JOIN_TOKENS)]


CASES = {
    "two searches, one comparison": Case(['search("Mount Kenya")', 'search("Mont Blanc")', "compare($1, $2)"]),
    "eight calls": Case([f'search("film number {number}")' for number in range(1, 9)]),
    "three levels": Case(
        [
            *(f'search("city {number}")' for number in range(1, 5)),
            "compare($1, $2)",
            "compare($3, $4)",
            "compare($5, $6)",
        ]
    ),
}


async def over_http(case: Case, *, react: bool) -> tuple[float, int]:
    """Seconds of a run, and the tokens of all its prompts."""
    async with stand_in(case.reply, first_token_s=FIRST_TOKEN_S, token_s=TOKEN_S) as url:
        model = wf.llm(url, "script")
        tools = [search, compare]
        runner: wf.ReAct | wf.Compiler = (
            wf.ReAct(model=model, tools=tools) if react else wf.Compiler(planner=model, tools=tools)
        )
        start = time.perf_counter()
        answer = await runner.arun("Which?")
        seconds = time.perf_counter() - start
    assert answer.text == "done", answer
    made = sum(len(round_.tasks) for round_ in answer.rounds)
    assert made == len(case.calls)
    return seconds, sum(part.prompt_tokens for part in answer.usage.values())


def faster(name: str, ours: float, peer: float, goal: float) -> harness.Row:
    """A row of seconds beside a peer's."""
    return harness.Row(name=name, ours=ours, peer=peer, ratio=peer / ours, unit="s", goal=goal)


def beside_react(rounds: int) -> Iterator[harness.Row]:
    for name, case in CASES.items():
        ours, theirs = [], []
        for _ in range(rounds):
            theirs.append(asyncio.run(over_http(case, react=True)))
            ours.append(asyncio.run(over_http(case, react=False)))
        mine, peer = (statistics.median(seconds for seconds, _ in found) for found in (ours, theirs))
        yield harness.Row(
            name=f"{name}, over ReAct", ours=mine, peer=peer, ratio=peer / mine, unit="s", goal=GOALS[name]
        )
        if name == "eight calls":
            sent, sent_by_react = ours[0][1], theirs[0][1]
            yield harness.Row(
                name="tokens sent for eight calls",
                ours=sent,
                peer=sent_by_react,
                ratio=sent_by_react / sent,
                unit="tokens",
                goal=GOAL_TOKENS,
            )


async def streamed(*, stream: bool) -> float:
    """Ten tasks in three chains of 0.6 s each."""

    @wf.tool
    async def work(name: str, *before: str) -> str:
        """Work."""
        await asyncio.sleep(0.6)
        return name

    calls = [f'work("{n}")' if n <= 3 else f'work("{n}", ${n - 3})' for n in range(1, 11)]
    async with stand_in(Case(calls).reply, first_token_s=FIRST_TOKEN_S, token_s=TOKEN_S) as url:
        compiler = wf.Compiler(planner=wf.llm(url, "script"), tools=[work], stream=stream)
        start = time.perf_counter()
        answer = await compiler.arun("Which?")
    assert answer.text == "done", answer
    return time.perf_counter() - start


def streaming() -> harness.Row:
    blocked, ours = asyncio.run(streamed(stream=False)), asyncio.run(streamed(stream=True))
    return harness.Row(
        name="streaming over blocking, ten tasks",
        ours=ours,
        peer=blocked,
        ratio=blocked / ours,
        unit="s",
        goal=GOAL_STREAM,
    )


@wf.tool(pure=False)
async def nothing(*before: int) -> int:
    """Do nothing."""
    return 1


def chain(rounds: int) -> harness.Row:
    """From the plan's text to the result of its last task; a poll every 10 ms takes one a task."""
    text = "\n".join([f"{n}. nothing({'' if n == 1 else f'${n - 1}'})" for n in range(1, 101)] + ["101. join()"])
    plan = wf.parse_plan(text, ["nothing"])

    async def ours() -> float:
        start = time.perf_counter()
        await wf.Compiler(planner=wf.Scripted(plans=[text]), tools=[nothing], joiner=wf.last_result).arun("?")
        return time.perf_counter() - start

    async def polled() -> float:
        start, done, running = time.perf_counter(), set[int](), set[int]()
        while len(done) < len(plan.tasks):
            for task in plan.tasks:
                if task.number not in running and done.issuperset(task.after):
                    running.add(task.number)
                    asyncio.ensure_future(nothing()).add_done_callback(lambda _, n=task.number: done.add(n))
            await asyncio.sleep(0.01)
        return time.perf_counter() - start

    mine = [asyncio.run(ours()) for _ in range(rounds)]
    return harness.Row(
        name="chain of a hundred no-op tasks",
        ours=statistics.median(mine),
        unit="s",
        goal=GOAL_CHAIN_S,
        at_most=True,
        note=f"a scheduler that polls every 10 ms takes {asyncio.run(polled()):.2f} s",
    )


class Thinking(Model):
    """Writes two tasks, thinks for 2 s, and writes a third."""

    async def stream(self, prompt: Prompt, clock: Clock, usage: Usage) -> AsyncGenerator[str, None]:
        await clock.sleep(FIRST_TOKEN_S)
        for text, tokens in (
            ("1. work(0.4)", 10),
            ("2. work(2, $1)", 10),
            ("Thought: ...", 100),
            ("3. work(0.4)", 10),
        ):
            await clock.sleep(tokens * TOKEN_S)
            yield f"{text}\n"
        yield "4. join()\n"


@wf.tool(pure=False)
async def work(seconds: float, *before: Any) -> float:
    """Work for some time."""
    await asyncio.sleep(seconds)
    return seconds


async def when_lines_arrive() -> float:
    """The same planner with a scheduler that looks for ready tasks when a line has arrived, and at the end polls."""
    parser, start = wf.PlanParser(["work"]), time.perf_counter()
    waiting: list[wf.PlannedTask] = []
    done: dict[int, asyncio.Future[Any]] = {}

    def look() -> None:
        for task in list(waiting):
            if all(before in done and done[before].done() for before in task.after):
                waiting.remove(task)
                done[task.number] = asyncio.ensure_future(work(task.args[0]))

    async for piece in Thinking().stream(Prompt(part="plan", question="?"), RealClock(), Usage()):
        waiting += parser.feed(piece)
        look()
    while waiting or not all(future.done() for future in done.values()):
        await asyncio.sleep(0.01)
        look()
    return time.perf_counter() - start


def silent() -> harness.Row:
    async def ours() -> float:
        start = time.perf_counter()
        await wf.Compiler(planner=Thinking(), tools=[work], joiner=wf.last_result).arun("?")
        return time.perf_counter() - start

    peer, mine = asyncio.run(when_lines_arrive()), asyncio.run(ours())
    return harness.Row(
        name="dependents while the planner is silent",
        ours=mine,
        peer=peer,
        ratio=peer / mine,
        unit="s",
        goal=GOAL_SILENT,
    )


def burn(seed: int) -> str:
    """About a quarter of a second of hashing."""
    data = str(seed).encode()
    for _ in range(250_000):
        data = hashlib.sha256(data).digest()
    return data.hex()


def processes(rounds: int) -> harness.Row:
    plan = wf.parse_plan("\n".join([*(f"{n}. burn({n})" for n in range(1, 9)), "9. join()"]), ["burn"])
    seconds: dict[int, list[float]] = {1: [], 2: []}
    pools = {count: ProcessPoolExecutor(count) for count in seconds}
    for pool in pools.values():
        list(pool.map(burn, range(4)))
    for _ in range(rounds):
        for count, pool in pools.items():
            start = time.perf_counter()
            done = asyncio.run(wf.execute(plan, [wf.tool(executor=pool)(burn)]))
            seconds[count].append(time.perf_counter() - start)
            assert all(len(one.outcome) == 64 for one in done)
    for pool in pools.values():
        pool.shutdown()
    one, two = (min(found) for found in seconds.values())
    return harness.Row(
        name="eight hashes on two processes over one",
        ours=two,
        peer=one,
        ratio=one / two,
        unit="s",
        goal=GOAL_PROCESSES,
    )


QUESTIONS = [
    f"Is {first} older than {second}?"
    for first, second in (
        ("Mozart", "Beethoven"),
        ("Rome", "Athens"),
        ("the telephone", "the bicycle"),
        ("Oxford", "Harvard"),
        ("gold", "bronze"),
        ("chess", "poker"),
        ("the moon", "the sun"),
        ("Latin", "Greek"),
    )
]


@contextmanager
def smollm2() -> Iterator[str]:
    """stretto's own server on this machine, with the packaged model."""
    command = [sys.executable, "-m", "stretto", "serve", "--port", "0", "--json-logs"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        for line in process.stderr:
            found = re.search(r"http://127\.0\.0\.1:\d+", line)
            if found:
                break
        else:
            raise SystemExit("stretto serve did not start")
        yield f"{found.group()}/v1"
    finally:
        process.terminate()
        process.wait(60)


def validity() -> harness.Row:
    """Plans without a mistake, with every call running, of those that SmolLM2-135M writes under a grammar."""
    extra = {"plan": {"guided_grammar": wf.plan_grammar({"search": search, "compare": compare}, most_calls=4)}}
    valid = calls = related = 0
    with smollm2() as url:
        planner = wf.llm(url, "smollm2-135m-instruct", max_tokens=200, extra=extra)
        compiler = wf.Compiler(planner=planner, tools=[search, compare], joiner=wf.last_result)
        for question in QUESTIONS:
            answer = asyncio.run(compiler.arun(question))
            (round_,) = answer.rounds
            valid += bool(round_.tasks) and not round_.notes and not any(one.failed for one in round_.tasks)
            calls += len(round_.tasks)
            names = re.sub(r"^Is |\?$|the ", "", question).split(" older than ")
            related += all(any(name in one.task.text for one in round_.tasks) for name in names)
    count = len(QUESTIONS)
    return harness.Row(
        name="valid plans by SmolLM2-135M under a grammar",
        ours=valid / count,
        unit="of all",
        goal=None,
        note=f"{calls / count:.1f} calls a plan; {related} of {count} look up both things asked about; the scripted"
        " planner's plans are valid by construction",
    )


def measure(quick: bool) -> Sequence[harness.Row]:
    rounds = 1 if quick else 3
    found = [*beside_react(rounds), streaming(), chain(5 * rounds), silent(), processes(rounds)]
    if not quick:
        found.append(validity())
    return found


if __name__ == "__main__":
    sys.exit(harness.main(measure, __doc__ or ""))
