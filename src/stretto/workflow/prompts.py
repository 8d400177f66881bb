"""What language models are asked: for a plan, for a verdict on its results, for the next step of a ReAct loop.

Results stand in prompts as JSON strings, cut to a length, so that no result can look like a line of the prompt.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from stretto.core.graph import Failure
from stretto.workflow.literals import text_of
from stretto.workflow.model import Message, Prompt, Round
from stretto.workflow.parse import END_OF_PLAN
from stretto.workflow.tool import JOIN, Tool

MOST_RESULT_CHARACTERS = 4000

_PLAN = """Answer the user's question by a plan of calls that run in parallel as far as they can.
You may call these tools, and nothing else:
{tools}

Rules:
- One call a line: NUMBER. TOOL(ARGUMENTS). Numbers rise by 1, from 1.
- Arguments are literals: strings in quotes, numbers, lists, True, False, None. No comments, no expressions.
- $N as an argument is the result of call N; inside a string its text. Refer only to calls above.
- Calls that do not need each other's results must not refer to each other.
- A line "Thought: ..." may stand before a call.
- The last call is {join}(), which hands the results on. Then write {end}.{examples}"""

_JOIN = """Calls were made for a user's question; below are their results.
Write one line "Thought: ..." on what they say, and then one line
Action: Finish(THE ANSWER){replan}"""

_REPLAN = """
or, if the results do not answer the question and other calls would:
Action: Replan(WHAT IS MISSING)"""

_STEP = """Answer the user's question by calling tools, one at a time:
{tools}

At each turn write one line "Thought: ...", then one line, either
Action: TOOL(ARGUMENTS)
with literals as arguments, or, when you know the answer,
Action: Finish(THE ANSWER)"""


def tool_list(tools: Mapping[str, Tool]) -> str:
    """Numbered signatures with descriptions."""
    lines = (f"{number}. {one.signature}: {one.description}" for number, one in enumerate(tools.values(), start=1))
    return "\n".join(lines)


def plan_prompt(tools: Mapping[str, Tool], question: str, rounds: Sequence[Round], examples: str) -> Prompt:
    """A plan is asked for; earlier rounds are told, so that nothing is done twice."""
    system = _PLAN.format(
        tools=tool_list(tools),
        join=JOIN,
        end=END_OF_PLAN,
        examples=f"\n\nExamples:\n{examples}" if examples else "",
    )
    user = f"Question: {question}"
    if rounds:
        told = "\n\n".join(f"Previous plan:\n{told_round(one)}" for one in rounds)
        user += f"\n\n{told}\n\nThese calls were made: never repeat them. Write the current plan:"
    return Prompt(part="plan", question=question, messages=_messages(system, user), rounds=tuple(rounds))


def join_prompt(question: str, rounds: Sequence[Round], *, last: bool) -> Prompt:
    """A verdict is asked for on the last round; in the last one allowed it has to be an answer."""
    system = _JOIN.format(replan="" if last else _REPLAN)
    told = "\n\n".join(told_round(one) for one in rounds)
    user = f"Question: {question}\n\n{told or 'No call was made.'}"
    return Prompt(part="join", question=question, messages=_messages(system, user), rounds=tuple(rounds), last=last)


def step_prompt(tools: Mapping[str, Tool], question: str, steps: Sequence[Round]) -> Prompt:
    """The next step of a ReAct loop, with the growing transcript."""
    user = "\n".join([f"Question: {question}", *(told_round(step) for step in steps)])
    messages = _messages(_STEP.format(tools=tool_list(tools)), user)
    return Prompt(part="step", question=question, messages=messages, rounds=tuple(steps))


def told_round(one: Round) -> str:
    """Calls with their thoughts and results, and the joiner's thought."""
    lines = []
    for executed in one.tasks:
        if executed.task.thought:
            lines.append(f"Thought: {_one_line(executed.task.thought)}")
        lines.append(f"{executed.task.number}. {executed.task.text[:MOST_RESULT_CHARACTERS]}")
        lines.append(f"Observation: {told_result(executed.outcome)}")
    lines += [f"Note: {note}" for note in one.notes]
    if one.thought:
        lines.append(f"Thought: {_one_line(one.thought)}")
    return "\n".join(lines)


def told_result(outcome: Any) -> str:
    """A result on one line, as JSON, cut where it is long."""
    if isinstance(outcome, Failure):
        return f"Error: {_one_line(str(outcome))}"
    text = text_of(outcome)
    cut = f" (cut: {len(text)} characters in all)" if len(text) > MOST_RESULT_CHARACTERS else ""
    return json.dumps(text[:MOST_RESULT_CHARACTERS], ensure_ascii=False) + cut


def _one_line(text: str) -> str:
    return " ".join(text.split())[:MOST_RESULT_CHARACTERS]


def _messages(system: str, user: str) -> tuple[Message, ...]:
    return Message(role="system", text=system), Message(role="user", text=user)


def plan_grammar(tools: Mapping[str, Tool], most_calls: int = 8) -> str:
    """A context-free grammar of plans over `tools` (Lark's syntax), for servers that bind what a model writes.

    Whatever a model knows, what it then writes is a plan without a mistake: numbers rise from 1, calls get the literals
    they take, and refer to calls above. Whether it is a good plan is another matter.
    """
    rules = ["start: line1"]
    for number in range(1, most_calls + 2):
        end = f'"{JOIN}()\\n{END_OF_PLAN}"'
        if number > most_calls:
            rules.append(f'line{number}: "{number}. " {end}')
            continue
        calls = " | ".join(_call_rule(one, number) for one in tools.values())
        more = f'call{number} "\\n" line{number + 1}'
        rules.append(f'line{number}: "{number}. " ({more if number == 1 else f"{more} | {end}"})')
        rules.append(f"call{number}: {calls}")
        above = " | ".join(f'"${before}"' for before in range(1, number))
        for kind in ("STRING", "WHOLE", "NUMBER", "TRUTH", "ANY"):
            name = kind.lower()
            literal = "STRING | NUMBER" if kind == "ANY" else kind
            rules.append(f"{name}{number}: {literal}{f' | {above}' if above else ''}")
    return "\n".join([*rules, *_LITERALS])


_LITERALS = (
    r'STRING: "\"" /[^"\\\n$]{1,60}/ "\""',
    "WHOLE: /-?(0|[1-9][0-9]{0,8})/",
    r"NUMBER: /-?(0|[1-9][0-9]{0,8})(\.[0-9]{1,6})?/",
    'TRUTH: "True" | "False"',
)
_RULES = {str: "string", int: "whole", float: "number", bool: "truth"}


def _call_rule(one: Tool, number: int) -> str:
    """A call with what it must be given; a parameter that takes many gets one to four."""
    values = [f"{_RULES.get(p.annotation, 'any')}{number}" for p in one.parameters if p.required or p.many]
    if one.parameters and one.parameters[-1].many and values:
        values[-1] = f'{values[-1]} (", " {values[-1]})~0..3'
    arguments = ' ", " '.join(values)
    return f'"{one.name}(" {arguments} ")"' if arguments else f'"{one.name}()"'
