"""The joiner: looks at a round's results, and either answers or asks for another plan."""

from __future__ import annotations

import inspect
import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from stretto.core.clock import Clock
from stretto.workflow.literals import text_of
from stretto.workflow.model import Model, Prompt, Usage, written
from stretto.workflow.parse import END_OF_PLAN


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """Whether the question is answered, with what, and why; `answer` of a replan says what is missing."""

    finish: bool
    answer: str
    thought: str = ""


Joiner = Model | Callable[[Prompt], str | Verdict | Awaitable[str | Verdict]]
"""A model that is asked, or a Python function of the prompt that gives the answer or a verdict."""

_ACTION = re.compile(r"^[ \t]*(?:Action[ \t]*:[ \t]*)?(Finish|Replan)[ \t]*\(", re.IGNORECASE | re.MULTILINE)
_THOUGHT = re.compile(r"^[ \t]*Thought[ \t]*:", re.IGNORECASE | re.MULTILINE)


def parse_verdict(text: str) -> Verdict:
    """The verdict in a model's words; an answer may hold any parentheses, and words without an action are an answer.

    >>> parse_verdict("Thought: both.\\nAction: Finish(Ed Wood (1994))").answer
    'Ed Wood (1994)'
    """
    text = text.partition(END_OF_PLAN)[0].strip()
    action = _ACTION.search(text)
    said = text[: action.start()] if action else ""
    mark = _THOUGHT.search(said)
    thought = (said[mark.end() :] if mark else said).strip()
    if action is None:
        return Verdict(finish=True, answer=text, thought="")
    finish = action.group(1).lower() == "finish"
    return Verdict(finish=finish, answer=_inside(text[action.end() :]), thought=thought)


def _inside(text: str) -> str:
    """What stands before the parenthesis that closes: the last one where it ends the text, else the matching one."""
    text = text.strip()
    if text.endswith(")"):
        return text[:-1].strip()
    depth = 0
    for at, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth < 0:
            return text[:at].strip()
    return text


async def ask(joiner: Joiner, prompt: Prompt, clock: Clock, usage: Usage) -> Verdict:
    """The verdict of a joiner; in the last round it is an answer, whatever it says."""
    if isinstance(joiner, Model):
        verdict = parse_verdict(await written(joiner, prompt, clock, usage))
    else:
        usage.calls += 1
        said = joiner(prompt)
        said = await said if inspect.isawaitable(said) else said
        verdict = said if isinstance(said, Verdict) else Verdict(finish=True, answer=text_of(said))
    if prompt.last and not verdict.finish:
        return Verdict(finish=True, answer=verdict.answer, thought=verdict.thought)
    return verdict


def last_result(prompt: Prompt) -> str:
    """A joiner without a model: the result of the last call that has one."""
    results = [one.outcome for one in prompt.rounds[-1].tasks if not one.failed]
    return text_of(results[-1]) if results else "no call gave a result"
