"""What LLMCompiler (ICML 2024) states of its speed, from the compiler and the ReAct loop themselves on virtual time.

The planner, the joiner and the steps of ReAct are scripts of a fixed number of tokens; tools take a fixed time. The
publication gives neither its models' pace nor the tokens of a line, so these five constants were chosen, once for all
claims, with its table in view: figures that agree with it are consistent, no more. ReAct takes one model call a tool
call and one for the answer, as the publication's own loop does where it does not go astray. Beside ours stands what
counting model calls alone says: n + 1 of them against two.
"""

from __future__ import annotations

import random
from functools import lru_cache

from stretto.claims.registry import Figure, claim
from stretto.core.clock import VirtualClock, simulate_async

FIRST_TOKEN_S, TOKEN_S, TOOL_S = 0.5, 0.03, 0.6
STEP_TOKENS, LINE_TOKENS, JSON_TOKENS = 45, 12, 20
CONSTANTS = {
    "0.5 s to the first token, 30 ms a token, 0.6 s a tool": "chosen: of the order of hosted models of 2023",
    "45 tokens a ReAct step or verdict, 12 a line of a plan, 20 a JSON call": "chosen: as examples of such text have",
}
TABLE = "the table of latencies, in view when the constants were chosen"


def compiled_s(calls: int, *, stream: bool = True, line_tokens: int = LINE_TOKENS, chains: int = 0) -> float:
    """Seconds of the compiler for so many calls; blocking with JSON's tokens, it is parallel calling.

    Args:
        chains: calls stand in so many chains, whose calls need each other's results; 0: all are independent.
    """
    from stretto import workflow as wf

    def call(number: int) -> str:
        needed = f", ${number - chains}" if 0 < chains < number else ""
        return f'{number}. search("{number}"{needed})'

    lines = [wf.Line(call(number), line_tokens) for number in range(1, calls + 1)]
    model = wf.SimulatedModel(
        plans=[[*lines, wf.Line(f"{calls + 1}. join()", 0)]],
        joins=[[wf.Line("Action: Finish(x)", STEP_TOKENS)]],
        first_token_s=FIRST_TOKEN_S,
        token_s=TOKEN_S,
    )
    tools = [wf.simulated_tool("search", [wf.CallRow(seconds=TOOL_S)])]

    async def main(clock: VirtualClock) -> float:
        answer = await wf.Compiler(planner=model, tools=tools, stream=stream).arun("?", clock=clock)
        assert answer.text == "x"
        return clock.now

    return simulate_async(main)


@lru_cache(maxsize=16)
def react_s(calls: int) -> float:
    """Seconds of the ReAct loop for the same calls."""
    from stretto import workflow as wf

    steps = [[wf.Line(f'Action: search("{number}")', STEP_TOKENS)] for number in range(calls)]
    model = wf.SimulatedModel(
        steps=[*steps, [wf.Line("Action: Finish(x)", STEP_TOKENS)]], first_token_s=FIRST_TOKEN_S, token_s=TOKEN_S
    )
    tools = [wf.simulated_tool("search", [wf.CallRow(seconds=TOOL_S)])]

    async def main(clock: VirtualClock) -> float:
        answer = await wf.ReAct(model=model, tools=tools).arun("?", clock=clock)
        assert answer.text == "x"
        return clock.now

    return simulate_async(main)


def _over_react(calls: int) -> Figure:
    ours, react = compiled_s(calls), react_s(calls)
    return Figure(ours=react / ours, null=(calls + 1) / 2, note=f"{react:.2f} s and {ours:.2f} s")


@claim(
    system="llmcompiler",
    says="tasks start while the plan is still being written, and no plan takes longer for that",
    kind="exact",
    published=None,
    setting="plans of 1 to 12 calls in 1 to 4 chains, 1 to 40 tokens a line, streamed and blocking",
)
def streamed(quick: bool) -> Figure:
    draw = random.Random(0)
    gains = []
    for calls in range(1, 13):
        for chains in range(1, 2 if quick else 5):
            tokens = draw.randint(1, 40)
            whole = compiled_s(calls, stream=False, line_tokens=tokens, chains=chains)
            gains.append(whole / compiled_s(calls, line_tokens=tokens, chains=chains))
    note = f"{min(gains):.3f} to {max(gains):.3f} times as fast as blocking plans"
    return Figure(ours=min(gains) >= 1.0 and max(gains) > 1.0, note=note)


@claim(
    system="llmcompiler",
    says="up to 3.7 times faster than ReAct",
    kind="simulated",
    published=3.7,
    setting="8 independent searches (film recommendation)",
    constants=CONSTANTS,
    fitted_on=TABLE,
    tolerance=0.1,
)
def films(quick: bool) -> Figure:
    return _over_react(8)


@claim(
    system="llmcompiler",
    says="1.8 times faster than ReAct where two searches are compared",
    kind="simulated",
    published=1.8,
    setting="2 independent searches (comparison questions)",
    constants=CONSTANTS,
    fitted_on=TABLE,
    tolerance=0.1,
    doubtful=True,
)
def comparisons(quick: bool) -> Figure:
    return _over_react(2)


@claim(
    system="llmcompiler",
    says="up to 1.35 times faster than a model's own parallel calls",
    kind="simulated",
    published=1.35,
    setting="8 independent searches; parallel calls are written as JSON and start when all are written",
    constants=CONSTANTS,
    fitted_on=TABLE,
    tolerance=0.1,
)
def parallel_calls(quick: bool) -> Figure:
    ours, theirs = compiled_s(8), compiled_s(8, stream=False, line_tokens=JSON_TOKENS)
    return Figure(
        ours=theirs / ours, null=1.0, note=f"{theirs:.2f} s and {ours:.2f} s; null: the model calls are as many"
    )
