"""What tests of the compiler share: plans drawn by a seed, tools that take their time, scripted planners."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

from stretto import workflow as wf
from stretto.core.clock import Clock, RealClock, simulate_async
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


def script(text: str, tokens: int = 10) -> list[Line]:
    return [Line(line, tokens) for line in text.splitlines()]


def compiler(plans: Sequence[str], tools: Sequence[wf.Tool], unit: float = 1.0, **options: Any) -> wf.Compiler:
    model = wf.SimulatedModel(plans=[script(plan) for plan in plans], first_token_s=unit, token_s=0.1 * unit)
    return wf.Compiler(planner=model, tools=tools, **{"joiner": wf.last_result, **options})
