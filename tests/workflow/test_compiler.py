"""What must hold of the compiler, on real and on virtual time: order, makespan, streaming, faults, joins, isolation."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stretto import workflow as wf
from stretto.core.clock import Clock, RealClock, VirtualClock, simulate_async
from stretto.core.errors import FieldError
from stretto.core.eventlog import EventLog, replay
from stretto.core.graph_policy import GraphPolicy
from stretto.core.record import Recorder
from stretto.core.trace import Trace
from stretto.workflow.simulated import Line


def on_both(main: Any) -> list[Any]:
    """What `main(clock, unit)` gives on virtual time with a unit of 1 s, and on real time with one of 20 ms."""
    return [simulate_async(lambda clock: main(clock, 1.0)), asyncio.run(main(RealClock(), 0.02))]


def waiting(unit: float = 1.0, **options: Any) -> wf.Tool:
    """`work(name, seconds, *others)`: takes its time; gives its name and what it was given."""

    async def work(name: str, seconds: float, *others: Any) -> list[Any]:
        """Work for some time."""
        await asyncio.sleep(seconds * unit)
        return [name, *others]

    return wf.tool(**options)(work)


def random_plan(seed: int, size: int | None = None) -> tuple[str, list[tuple[float, tuple[int, ...]]]]:
    """A plan of `work` calls as text, and of each its seconds and what it comes after."""
    draw = random.Random(seed)
    size = size if size is not None else draw.randint(1, 20)
    lines, rows = [], []
    for number in range(1, size + 1):
        after = tuple(sorted(draw.sample(range(1, number), min(number - 1, draw.choice([0, 1, 2])))))
        seconds = draw.choice([0.0, 0.25, 0.5, 1.0])
        others = "".join(f", ${before}" for before in after)
        lines.append(f'{number}. work("t{number}", {seconds}{others})')
        rows.append((seconds, after))
    return "\n".join([*lines, f"{size + 1}. join()", "<END_OF_PLAN>"]), rows


def critical_path(rows: Sequence[tuple[float, tuple[int, ...]]]) -> float:
    finish: list[float] = []
    for seconds, after in rows:
        finish.append(seconds + max((finish[before - 1] for before in after), default=0.0))
    return max(finish)


async def executed(
    clock: Clock, text: str, tools: Sequence[wf.Tool], **options: Any
) -> tuple[tuple[wf.Executed, ...], Trace]:
    recorder = Recorder("test")
    done = await wf.execute(
        wf.parse_plan(text, [one.name for one in tools]), tools, clock=clock, recorder=recorder, **options
    )
    return done, recorder.trace()


# 1 and 2: order, equality with sequential execution, makespan.


@pytest.mark.parametrize("seed", range(60))
def test_parallel_is_sequential_in_what_it_gives_and_bounded_in_what_it_takes(seed: int) -> None:
    text, rows = random_plan(seed)
    total, path = sum(row[0] for row in rows), critical_path(rows)

    async def main(clock: VirtualClock, workers: int | None) -> tuple[list[Any], float]:
        done, trace = await executed(clock, text, [waiting()], max_parallel=workers)
        spans = {span.key.step: span for span in trace}
        assert len(spans) == len(trace) == len(rows), "every task once"
        for place, (_, after) in enumerate(rows):
            for before in after:
                assert spans[before - 1].finish <= spans[place].start + 1e-12
        return [one.outcome for one in done], clock.now

    one, sequential = simulate_async(lambda clock: main(clock, 1))
    many, parallel = simulate_async(lambda clock: main(clock, None))
    three, bounded = simulate_async(lambda clock: main(clock, 3))
    assert one == many == three
    assert sequential == pytest.approx(total)
    assert parallel == pytest.approx(path)
    assert bounded <= total / 3 + path + 1e-9


@given(st.integers(0, 1000), st.integers(0, 1000))
def test_results_do_not_depend_on_how_long_tools_take(seed: int, other: int) -> None:
    text, _ = random_plan(seed)

    async def main(clock: VirtualClock, stretch: float) -> list[Any]:
        done, _ = await executed(clock, text, [waiting(stretch)])
        return [one.outcome for one in done]

    assert simulate_async(lambda clock: main(clock, 1.0)) == simulate_async(lambda clock: main(clock, other / 100))


@pytest.mark.parametrize("seed", range(5))
def test_slack_on_real_time_is_under_two_milliseconds_a_hop(seed: int) -> None:
    text, rows = random_plan(seed, size=12)

    async def main() -> tuple[list[Any], float]:
        done, trace = await executed(RealClock(), text, [waiting(0.05)])
        spans = {span.key.step: span for span in trace}
        late = []
        for place, (_, after) in enumerate(rows):
            ready = max((spans[before - 1].finish for before in after), default=0.0)
            assert spans[place].start >= ready
            if after:
                late.append(spans[place].start - ready)
        return [one.outcome for one in done], sorted(late)[len(late) // 2] if late else 0.0

    outcomes, slack = asyncio.run(main())
    assert not any(isinstance(outcome, wf.Failure) for outcome in outcomes)
    assert slack < 0.002


# 3 and 4: streaming.


def script(text: str, tokens: int = 10) -> list[Line]:
    return [Line(line, tokens) for line in text.splitlines()]


def compiler(plans: Sequence[str], tools: Sequence[wf.Tool], unit: float = 1.0, **options: Any) -> wf.Compiler:
    model = wf.SimulatedModel(plans=[script(plan) for plan in plans], first_token_s=unit, token_s=0.1 * unit)
    return wf.Compiler(planner=model, tools=tools, **{"joiner": wf.last_result, **options})


@pytest.mark.parametrize("seed", range(40))
def test_streaming_is_never_later_than_blocking_and_as_the_latency_model_says(seed: int) -> None:
    text, rows = random_plan(seed)

    def makespan(stream: bool) -> tuple[float, wf.Answer]:
        async def main(clock: VirtualClock) -> tuple[float, wf.Answer]:
            answer = await compiler([text], [waiting()], stream=stream).arun("?", clock=clock)
            return clock.now, answer

        return simulate_async(main)

    emitted = [1.0 + 1.0 * number for number in range(1, len(rows) + 3)]
    finish: list[float] = []
    for place, (seconds, after) in enumerate(rows):
        finish.append(max([emitted[place], *(finish[before - 1] for before in after)]) + seconds)
    streamed, answer = makespan(True)
    blocked, same = makespan(False)
    assert streamed == pytest.approx(max([*finish, emitted[len(rows)]]))
    assert blocked == pytest.approx(emitted[len(rows) + 1] + critical_path(rows))
    assert streamed <= blocked
    assert answer.text == same.text


def test_the_first_task_starts_before_the_last_line_arrives() -> None:
    text = '1. work("a", 0.5)\n2. work("b", 0.5, $1)\n3. join()'

    async def main(clock: Clock, unit: float) -> tuple[bool, str | None]:
        model = wf.SimulatedModel(plans=[script(text)], first_token_s=unit, token_s=unit / 10)
        answer = await wf.Compiler(planner=model, tools=[waiting(unit)], joiner=wf.last_result).arun("?", clock=clock)
        plan, first = (next(s for s in answer.trace if s.key.phase == phase) for phase in ("plan", "work"))
        return first.start < plan.finish, answer.text

    assert on_both(main) == [(True, '["b", ["a"]]')] * 2


def test_dependents_start_while_the_planner_is_silent() -> None:
    """The original looks for ready tasks when the planner writes its next line; here they start at once."""

    async def main(clock: VirtualClock) -> float:
        async def pieces() -> Any:
            yield '1. work("a", 1)\n2. work("b", 1, $1)\n'
            await clock.sleep(10.0)
            yield '3. work("c", 0, $2)\n4. join()\n'

        planner = wf.Called(lambda prompt: pieces())
        answer = await wf.Compiler(planner=planner, tools=[waiting()], joiner=wf.last_result).arun("?", clock=clock)
        return next(span.start for span in answer.trace if span.key.step == 3)

    assert simulate_async(main) == 1.0


# 5: references (see test_parse for the reader).


def test_references_are_typed_and_filled_in_once() -> None:
    @wf.tool
    async def give(what: Any) -> Any:
        """Give it back."""
        return what

    @wf.tool
    async def show(text: str) -> str:
        """Give a text back."""
        return text

    text = """1. give([1, 2.5])
2. give("$1 costs $100, see $2")
3. give({"a": [$1, "$1"], "b": "x${1}y$2"})
4. show($1)
5. give($2)
6. show("<$2>")
7. give("$10 and $12 not $1")
8. join()"""

    async def main(clock: Clock, unit: float) -> list[Any]:
        done, _ = await executed(clock, text, [give, show])
        return [one.outcome for one in done]

    for outcomes in on_both(main):
        second = "[1, 2.5] costs $100, see $2"
        assert outcomes == [
            [1, 2.5],
            second,
            {"a": [[1, 2.5], [1, 2.5]], "b": f"x[1, 2.5]y{second}"},
            "[1, 2.5]",
            second,
            f"<{second}>",
            "$10 and $12 not [1, 2.5]",
        ]


# 6: faults.


@pytest.mark.parametrize("on_error", ["skip", "feed"])
def test_a_failure_is_an_observation_and_others_finish(on_error: str) -> None:
    @wf.tool
    async def broken(x: int) -> None:
        """Fails."""
        raise ValueError("it's broken")

    @wf.tool(timeout_s=0.5)
    async def endless() -> None:
        """Never ends."""
        await asyncio.sleep(1e6)

    @wf.tool(on_error=on_error)
    async def use(what: Any) -> str:
        """Use a result."""
        return f"used {what}"

    text = """1. broken(1)
2. use($1)
3. use("fine")
4. endless()
5. use("after $4")
6. nosuch(1)
7. use($6)
8. use(1, 2)
9. join()"""
    seen: list[wf.Prompt] = []

    def judge(prompt: wf.Prompt) -> str:
        seen.append(prompt)
        return "done"

    async def main(clock: Clock, unit: float) -> list[str]:
        planner = wf.Scripted(plans=[text])
        answer = await wf.Compiler(planner=planner, tools=[broken, endless, use], joiner=judge).arun("?", clock=clock)
        assert answer.text == "done"
        return [str(one.outcome) for one in answer.rounds[0].tasks]

    first, *_ = found = on_both(main)
    assert found[0] == found[1]
    assert first[0] == "raised: ValueError: it's broken"
    assert first[2] == "used fine"
    assert first[3] == "timeout: took more than 0.5 s"
    assert first[5] == "raised: there is no tool nosuch; there is broken, endless, use"
    assert "takes 1 arguments, 2 are given" in first[7]
    if on_error == "skip":
        assert first[1] == "skipped: node 2 failed"
        assert [text.partition(":")[0] for text in (first[4], first[6])] == ["skipped", "skipped"]
    else:
        assert first[1] == "used raised: ValueError: it's broken"
        assert first[4] == "used after timeout: took more than 0.5 s"
    assert "Error: raised: ValueError: it's broken" in seen[0].messages[1].text


@pytest.mark.parametrize(
    "plan",
    ["", "chatter", "1. join()", "1. work('a', 0)", "<END_OF_PLAN>", "1. work($1, 0)\n2. work($3, 0)\n3. join()\nmore"],
)
def test_odd_plans_end_with_a_verdict_that_knows_what_was_wrong(plan: str) -> None:
    async def main(clock: Clock, unit: float) -> Any:
        planner = wf.Scripted(plans=[plan])
        judge = lambda prompt: f"{len(prompt.rounds[-1].tasks)} {len(prompt.rounds[-1].notes)}"  # noqa: E731
        return (await wf.Compiler(planner=planner, tools=[waiting()], joiner=judge).arun("?", clock=clock)).text

    virtual, real = on_both(main)
    assert virtual == real
    count, notes = map(int, virtual.split())
    assert count or notes or plan == "1. join()"


def test_a_planner_or_a_joiner_that_fails_is_told() -> None:
    def fails(prompt: wf.Prompt) -> str:
        raise ConnectionError("no route")

    async def main(clock: Clock, unit: float) -> list[str]:
        planner = wf.Scripted(plans=['1. work("a", 1)\n2. join()'])
        bad_planner = wf.Compiler(planner=wf.Called(fails), tools=[waiting(unit)])
        bad_joiner = wf.Compiler(planner=planner, tools=[waiting(unit)], joiner=fails)
        return [str(await one.arun("?", clock=clock)) for one in (bad_planner, bad_joiner)]

    for said in on_both(main):
        assert said == [
            "no answer: the planner raised: ConnectionError: no route",
            "no answer: the joiner raised: ConnectionError: no route",
        ]


def test_ten_thousand_tasks_and_megabytes_of_results_end() -> None:
    @wf.tool
    async def big(number: int) -> str:
        """A long text."""
        return "x" * 1_000_000 if number < 3 else "y"

    lines = [f"{n}. big({n})" for n in range(1, 10_001)]
    prompts: list[wf.Prompt] = []

    async def main(clock: VirtualClock) -> wf.Answer:
        def judge(prompt: wf.Prompt) -> str:
            prompts.append(prompt)
            return "ok"

        planner = wf.Scripted(plans=["\n".join([*lines, "10001. join()"])])
        return await wf.Compiler(planner=planner, tools=[big], joiner=judge).arun("?", clock=clock)

    answer = simulate_async(main)
    assert answer.text == "ok"
    assert len(answer.rounds[0].tasks) == 10_000
    assert len(prompts[0].messages[1].text) < 2_000_000


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


# 8: isolation and cancellation.


def test_two_runs_of_one_compiler_share_nothing() -> None:
    text = '1. work("a", 1)\n2. work("b", 1, $1)\n3. join()'

    async def main(clock: Clock, unit: float) -> list[Any]:
        made = compiler([text], [waiting(unit)], unit, max_parallel=1)
        first, second = await asyncio.gather(*(made.arun(q, clock=clock) for q in "pq"))
        assert first.usage is not second.usage
        return [(a.text, len(a.trace), len(a.rounds), a.usage["work"].calls) for a in (first, second)]

    for found in on_both(main):
        assert found == [('["b", ["a"]]', 3 + 1, 1, 2)] * 2


def test_cancelling_a_run_cancels_all_tools() -> None:
    async def main(clock: Clock, unit: float) -> list[str]:
        seen: list[str] = []

        @wf.tool
        async def careful(name: str) -> None:
            """Cleans up."""
            seen.append(f"{name} begins")
            try:
                await asyncio.sleep(1000 * unit)
            finally:
                seen.append(f"{name} ends")

        planner = wf.Scripted(plans=["\n".join(f'{n}. careful("{n}")' for n in range(1, 5))])
        run = asyncio.create_task(wf.Compiler(planner=planner, tools=[careful]).arun("?", clock=clock))
        await asyncio.sleep(unit)
        run.cancel()
        with pytest.raises(asyncio.CancelledError):
            await run
        assert len(asyncio.all_tasks()) == 1, "no task outlives its run"
        return sorted(seen)

    for seen in on_both(main):
        assert seen == sorted(f"{n} {what}" for n in range(1, 5) for what in ("begins", "ends"))


def test_a_deadline_ends_the_run_with_what_is_done() -> None:
    async def main(clock: Clock, unit: float) -> Any:
        planner = wf.Scripted(plans=['1. work("a", 1)\n2. work("b", 100)\n3. join()'])
        made = wf.Compiler(planner=planner, tools=[waiting(unit)], deadline_s=5 * unit)
        answer = await made.arun("?", clock=clock)
        outcomes = [one.outcome for one in answer.rounds[0].tasks]
        return answer.text, "deadline" in str(answer.failure), outcomes[0], outcomes[1].why

    assert on_both(main) == [(None, True, ["a"], "cancelled")] * 2


def test_the_budget_holds_for_models_and_tools_together() -> None:
    async def main(clock: VirtualClock) -> tuple[wf.Answer, list[Any]]:
        text = "\n".join([*(f'{n}. work("{n}", 1)' for n in range(1, 11)), "11. join()"])
        model = wf.SimulatedModel(plans=[script(text)], output_price=1e6 / 100)
        made = wf.Compiler(planner=model, tools=[waiting(price=1.0)], joiner=wf.last_result, budget=5.0)
        answer = await made.arun("?", clock=clock)
        return answer, [one.outcome for one in answer.rounds[0].tasks]

    answer, outcomes = simulate_async(main)
    poor = [outcome for outcome in outcomes if isinstance(outcome, wf.Failure)]
    assert answer.usage["plan"].cost == pytest.approx(11 * 10 / 100)
    assert {failure.why for failure in poor} == {"no budget"}
    assert answer.spent == pytest.approx(answer.usage["plan"].cost + answer.usage["work"].cost)
    assert answer.spent <= 5.0
    assert len(poor) == 10 - 3


def test_a_watcher_sees_each_task_end_once() -> None:
    plan = '1. work("a", 1)\n2. nosuch()\n3. work("b", 1, $2)\n4. work("c", "x")\n5. work("d", 2, $1)\n6. join()'

    async def main(clock: Clock, unit: float) -> list[tuple[int, str]]:
        seen: list[tuple[int, str]] = []

        async def slowly() -> Any:
            for line in plan.splitlines(keepends=True):
                await clock.sleep(unit / 10)
                yield line

        made = wf.Compiler(planner=wf.Called(lambda prompt: slowly()), tools=[waiting(unit)], joiner=wf.last_result)
        await made.arun("?", clock=clock, watch=lambda task, outcome: seen.append((task.number, str(outcome)[:7])))
        return seen

    assert on_both(main) == [[(2, "raised:"), (3, "skipped"), (4, "raised:"), (1, "['a']"), (5, "['d', [")]] * 2


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
