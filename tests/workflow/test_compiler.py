"""What must hold of the compiler, on real and on virtual time: order, makespan, streaming, references."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto import workflow as wf
from stretto.core.clock import Clock, RealClock, VirtualClock, simulate_async
from tests.workflow.compiling import compiler, critical_path, executed, on_both, random_plan, script, waiting

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
