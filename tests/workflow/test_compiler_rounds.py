"""The compiler over several rounds: joins, replans, equal calls, and the log that a run goes on from."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto import workflow as wf
from stretto.core.clock import Clock, VirtualClock, simulate_async
from stretto.core.errors import FieldError
from stretto.core.eventlog import EventLog, replay
from stretto.core.graph_policy import GraphPolicy
from tests.workflow.compiling import compiler, executed, on_both, random_plan, waiting

# 7: joining and replanning.


def test_rounds_end_at_the_limit_and_actions_are_not_repeated() -> None:
    calls: list[str] = []

    @wf.tool
    async def look(what: str) -> str:
        """Look."""
        calls.append(what)
        return f"{what} seen"

    plans = ['1. look("a")\n2. join()', '1. look("a")\n2. look("b $1")\n3. join()', "never asked"]
    joins = ["Thought: more\nAction: Replan(b is missing)", "Thought: still\nAction: Replan(c is missing)"]

    async def main(clock: Clock, unit: float) -> Any:
        calls.clear()
        planner = wf.Scripted(plans=plans, joins=joins)
        answer = await wf.Compiler(planner=planner, tools=[look], max_rounds=2).arun("?", clock=clock)
        return answer.text, [round_.thought for round_ in answer.rounds], list(calls), answer.usage["look"].calls

    for found in on_both(main):
        assert found == ("c is missing", ["more", "still"], ["a", "b a seen"], 2)


def test_the_next_plan_is_told_what_was_done() -> None:
    seen: list[wf.Prompt] = []

    def plan(prompt: wf.Prompt) -> str:
        seen.append(prompt)
        return '1. work("a", 0)\n2. join()'

    async def main(clock: VirtualClock) -> str | None:
        judge = lambda prompt: wf.Verdict(finish=prompt.last, answer="x", thought="not yet")  # noqa: E731
        made = wf.Compiler(planner=wf.Called(plan), tools=[waiting()], joiner=judge, max_rounds=3)
        return (await made.arun("?", clock=clock)).text

    assert simulate_async(main) == "x"
    assert [len(prompt.rounds) for prompt in seen] == [0, 1, 2]
    told = seen[2].messages[1].text
    assert told.count("Previous plan:") == 2
    assert '1. work("a", 0)\nObservation: "[\\"a\\"]"\nThought: not yet' in told


def test_equal_calls_of_one_plan_are_made_once_unless_the_tool_is_not_pure() -> None:
    calls = {"pure": 0, "impure": 0}

    @wf.tool
    async def pure(x: int) -> int:
        """Pure."""
        calls["pure"] += 1
        await asyncio.sleep(0.001)
        return calls["pure"]

    @wf.tool(pure=False)
    async def impure(x: int) -> int:
        """Not pure."""
        calls["impure"] += 1
        return calls["impure"]

    async def main(clock: VirtualClock) -> list[Any]:
        done, _ = await executed(
            clock, "1. pure(1)\n2. pure(x=1)\n3. pure(1)\n4. impure(1)\n5. impure(1)\n6. join()", [pure, impure]
        )
        return [one.outcome for one in done]

    assert simulate_async(main) == [1, 1, 1, 1, 2]


def test_a_call_that_failed_is_made_again_by_the_next_that_asks() -> None:
    calls = 0

    @wf.tool
    async def flaky(x: int) -> int:
        """Fails the first time."""
        nonlocal calls
        calls += 1
        await asyncio.sleep(0.001)
        if calls == 1:
            raise OSError("busy")
        return calls

    async def main(clock: VirtualClock) -> list[str]:
        done, _ = await executed(clock, "1. flaky(1)\n2. flaky(1)\n3. flaky(1)\n4. join()", [flaky])
        return [str(one.outcome) for one in done]

    assert simulate_async(main) == ["raised: OSError: busy", "2", "2"]


def test_decisions_replay() -> None:
    events = EventLog()
    text, _ = random_plan(3)

    async def main() -> None:
        await compiler([text], [waiting(0.01)], 0.01).arun("?", events=events)

    asyncio.run(main())
    header = events.header
    assert replay(events, GraphPolicy(header["limits"], header["budget"], header["seed"])).equal


# The durable log over rounds.


def test_a_run_goes_on_from_its_log_whatever_was_finished(tmp_path: Path) -> None:
    """The log of a whole run cut after each record: the rest is done, and nothing twice."""
    made: list[str] = []

    def count(name: str, text: str) -> Any:
        def answer(prompt: wf.Prompt) -> str:
            made.append(f"{name} {len(prompt.rounds)}")
            return text if not (name == "join" and not prompt.last) else "Action: Replan(more)"

        return wf.Called(answer)

    @wf.tool(pure=False)
    async def note(text: str) -> str:
        """Note it."""
        made.append(text)
        return f"{text}!"

    planner = count("plan", '1. note("a")\n2. note("b $1")\n3. note("a")\n4. join()')
    joined = count("join", "Action: Finish(all (of) it)")

    def run(path: Path) -> tuple[wf.Answer, list[str]]:
        made.clear()

        async def main(clock: VirtualClock) -> wf.Answer:
            with wf.DurableLog(path, beat_s=None) as log:
                return await wf.Compiler(planner=planner, tools=[note], joiner=joined).arun("?", clock=clock, log=log)

        return simulate_async(main), list(made)

    whole, everything = run(tmp_path / "whole")
    assert whole.text == "all (of) it"
    assert len(everything) == 4 + 6
    records = (tmp_path / "whole").read_bytes().splitlines(keepends=True)
    for kept in range(1, len(records) + 1):
        (tmp_path / "cut").write_bytes(b"".join(records[:kept]))
        again, rest = run(tmp_path / "cut")
        assert (again.text, [r.tasks for r in again.rounds]) == (whole.text, [r.tasks for r in whole.rounds])
        assert len(rest) == len(everything) - (kept - 1)


def test_calls_are_told_apart_in_the_log_by_what_they_are_given(tmp_path: Path) -> None:
    made: list[str] = []

    @wf.tool
    async def look(what: str) -> str:
        """Look."""
        made.append(what)
        return f"{what} seen"

    plan = wf.parse_plan(
        '1. look("a")\n2. look("b")\n3. look($1)\n4. look("$2")\n5. look(what="c")\n6. join()', ["look"]
    )

    async def main(clock: VirtualClock) -> list[Any]:
        with wf.DurableLog(tmp_path / "log", beat_s=None) as log:
            return [one.outcome for one in await wf.execute(plan, [look], clock=clock, log=log)]

    whole = simulate_async(main)
    assert whole == ["a seen", "b seen", "a seen seen", "b seen seen", "c seen"]
    assert simulate_async(main) == whole
    assert len(made) == 5


def test_the_log_of_another_question_answers_nothing(tmp_path: Path) -> None:
    asked: list[str] = []

    def plan(prompt: wf.Prompt) -> str:
        asked.append("plan")
        return f'1. work("{len(asked)}", 0)\n2. join()'

    def run(question: str) -> str | None:
        async def main(clock: VirtualClock) -> str | None:
            with wf.DurableLog(tmp_path / "log", beat_s=None) as log:
                made = wf.Compiler(planner=wf.Called(plan), tools=[waiting()], joiner=wf.last_result)
                return (await made.arun(question, clock=clock, log=log)).text

        return simulate_async(main)

    first, same, other = run("which?"), run("which?"), run("another?")
    assert first == same != other
    assert len(asked) == 2


def test_equal_calls_at_once_are_paid_once_also_when_going_on(tmp_path: Path) -> None:
    tool = waiting(price=1.0)
    plan = wf.parse_plan("\n".join(f'{i}. work("a", 1)' for i in range(1, 10)) + "\n10. join()", ["work"])

    async def main(clock: VirtualClock) -> None:
        with wf.DurableLog(tmp_path / "log", beat_s=None) as log:
            await wf.execute(plan, [tool], clock=clock, log=log)

    simulate_async(main)
    with wf.DurableLog(tmp_path / "log", beat_s=None) as log:
        assert log.spent == 1.0


def test_settings_are_checked_where_they_are_given() -> None:
    planner = wf.Scripted()
    for wrong in ({"max_rounds": 0}, {"max_parallel": 0}, {"deadline_s": 0.0}, {"tools": [len]}):
        with pytest.raises(FieldError, match=next(iter(wrong))):
            wf.Compiler(**{"planner": planner, "tools": [], **wrong})  # type: ignore[arg-type]
    with pytest.raises(FieldError, match="tools of different names"):
        wf.Compiler(planner=planner, tools=[waiting(), waiting()])


@settings(max_examples=50)
@given(st.text(max_size=300))
def test_any_text_as_a_plan_ends(text: str) -> None:
    async def main(clock: VirtualClock) -> str | None:
        made = wf.Compiler(planner=wf.Scripted(plans=[text]), tools=[waiting()], joiner=lambda prompt: "end")
        return (await made.arun("?", clock=clock)).text

    assert simulate_async(main) == "end"
