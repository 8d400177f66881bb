"""The compiler when something goes wrong or must end: failing tools and planners, cancelling, deadlines, budgets."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from stretto import workflow as wf
from stretto.core.clock import Clock, VirtualClock, simulate_async
from tests.workflow.compiling import compiler, on_both, script, waiting

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
        assert first[1] == "skipped: task 1 failed"
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
