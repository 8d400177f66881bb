"""Plans as a model writes them, read line by line while they are written.

    1. search("Scott Derrickson")
    2. search("Ed Wood")
    Thought: both are people.
    3. same($1["country"] ...)          <- refused: an expression, not a literal
    4. join()
    <END_OF_PLAN>

Plan language of "An LLM Compiler for Parallel Function Calling" (ICML 2024). Any cut of the text into pieces gives the
same tasks as the whole. Nothing is evaluated. A mistake is told with its line; a task that cannot be read still has its
number, so that those after it learn of its failure. What can be repaired is, with a note: a missing `join`, gaps in the
numbers, text after the end, chatter between the lines, a call of bare words (which becomes one string).
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from stretto.workflow.literals import LiteralError, Reader, Value, references
from stretto.workflow.tool import JOIN

END_OF_PLAN = "<END_OF_PLAN>"
MOST_LINE_CHARACTERS = 65_536
MOST_TASKS = 10_000
MOST_PROBLEMS = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedTask:
    """One line of a plan.

    Attributes:
        number: as the plan gives it.
        tool, args, kwargs: the call; results of earlier tasks stand in it as references.
        after: the tasks it refers to, in order.
        thought: what the plan said before it.
        line: where it stands, from 1.
        problem: why it cannot be run, if it cannot.
    """

    number: int
    tool: str
    args: tuple[Value, ...] = ()
    kwargs: Mapping[str, Value] = field(default_factory=dict)
    after: tuple[int, ...] = ()
    thought: str = ""
    line: int = 0
    text: str = ""
    problem: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Note:
    """What was wrong at a line, and what was made of it."""

    line: int
    message: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.message}"


@dataclass(frozen=True, kw_only=True, slots=True)
class ParsedPlan:
    """A whole plan. `notes` tell what was wrong; a plan without any is as it should be."""

    tasks: tuple[PlannedTask, ...]
    notes: tuple[Note, ...]


_NUMBERED = re.compile(r"\s*(\d{1,9})\s*[.:)]\s*(.*)", re.DOTALL)
_CALL = re.compile(r"([A-Za-z_]\w*)[ \t]?\((.*)\)", re.DOTALL)
_THOUGHT = re.compile(r"\s*Thought\s*:\s*(.*)", re.IGNORECASE | re.DOTALL)


class PlanParser:
    """Reads one plan: feed it pieces, take the tasks that have become whole.

    Args:
        tools: the names that may be called.
        most_tasks: tasks beyond this many are refused.
    """

    def __init__(self, tools: Collection[str], most_tasks: int = MOST_TASKS) -> None:
        self.notes: list[Note] = []
        self.ended = False
        self._tools = tools
        self._most_tasks = most_tasks
        self._known: set[int] = set()
        self._last = 0
        self._line = 0
        self._pieces: list[str] = []
        self._length = 0
        self._thought = ""

    def feed(self, piece: str) -> Iterator[PlannedTask]:
        """Take in a piece of the text; yields the tasks whose lines it ends."""
        begin = 0
        while (end := piece.find("\n", begin)) >= 0:
            self._hold(piece[begin:end])
            yield from self._take_line()
            begin = end + 1
        self._hold(piece[begin:])

    def end(self) -> Iterator[PlannedTask]:
        """The text is over; yields the task of its last line, if that is one."""
        if self._length:
            yield from self._take_line()
        if not self.ended:
            self.ended = True
            if not self._last:
                self._note("the plan has no task")
            else:
                self._note("join() is missing; it was added")

    def _hold(self, piece: str) -> None:
        """Keep a piece of the line, up to one character more than a line may have."""
        if piece and self._length <= MOST_LINE_CHARACTERS:
            kept = piece[: MOST_LINE_CHARACTERS + 1 - self._length]
            self._pieces.append(kept)
            self._length += len(kept)

    def _note(self, message: str) -> None:
        if len(self.notes) < MOST_PROBLEMS:
            self.notes.append(Note(line=self._line, message=message))

    def _take_line(self) -> Iterator[PlannedTask]:
        text = "".join(self._pieces)
        self._pieces.clear()
        self._length = 0
        self._line += 1
        if not text.strip():
            return
        if self.ended:
            if text.strip() != END_OF_PLAN:
                self._note("text after the end of the plan was left out")
            return
        before_mark, mark, _ = text.partition(END_OF_PLAN)
        if before_mark.strip():
            task = self._read(before_mark)
            if task is not None:
                yield task
        if mark and not self.ended:
            self.ended = True
            self._note("join() is missing; it was added")

    def _read(self, text: str) -> PlannedTask | None:
        """The task of a line; None for thoughts, chatter, `join` and what has no number of its own."""
        numbered = _NUMBERED.match(text)
        if text.strip() == f"{JOIN}()":
            self.ended = True
            return None
        if numbered is None:
            self._think(text)
            return None
        number, rest = int(numbered.group(1)), numbered.group(2).rstrip().rstrip(".;").rstrip()
        call = _CALL.fullmatch(rest)
        if (call.group(1) if call else rest.removesuffix("()")) == JOIN:
            self.ended = True
            return None
        if number <= self._last or number == 0:
            self._note(f"task {number} comes after task {self._last}; it was left out, as numbers must rise from 1")
            return None
        if number - self._last > 1:
            self._note(f"task {number} follows task {self._last}: a gap in the numbers")
        if len(self._known) >= self._most_tasks:
            self._note(f"more than {self._most_tasks} tasks; the rest were left out")
            return None
        task = self._task(number, text, rest, call)
        self._last = number
        self._known.add(number)
        self._thought = ""
        return task

    def _think(self, text: str) -> None:
        thought = _THOUGHT.match(text)
        words = (thought.group(1) if thought else text).strip()
        if thought is None:
            self._note("neither a task nor a thought; it was taken for a thought")
        self._thought = f"{self._thought}\n{words}".strip()[:MOST_LINE_CHARACTERS]

    def _task(self, number: int, text: str, rest: str, call: re.Match[str] | None) -> PlannedTask:
        problem, args, kwargs = None, (), dict[str, Value]()
        tool = call.group(1) if call else rest.partition("(")[0].strip()[:80]
        if len(text) > MOST_LINE_CHARACTERS:
            problem = f"the line has more than {MOST_LINE_CHARACTERS} characters"
        elif call is None:
            problem = "not a call; write it as NUMBER. TOOL(ARGUMENTS)"
        elif tool not in self._tools:
            problem = f"there is no tool {tool}; there is {', '.join(sorted(self._tools)[:20]) or 'none'}"
        else:
            args, kwargs, problem = self._arguments(call.group(2))
        if problem is not None:
            self._note(f"task {number}: {problem}")
        wanted = sorted(references(list(args)) | references(kwargs))
        return PlannedTask(
            number=number,
            tool=tool,
            args=args,
            kwargs=kwargs,
            after=tuple(wanted),
            thought=self._thought,
            line=self._line,
            text=rest[:MOST_LINE_CHARACTERS],
            problem=problem,
        )

    def _arguments(self, text: str) -> tuple[tuple[Value, ...], dict[str, Value], str | None]:
        try:
            args, kwargs = Reader(text, self._known.__contains__).arguments()
        except LiteralError as problem:
            if _BARE_WORDS.fullmatch(text):
                self._note("an argument without quotes was taken for one string")
                return (text.strip(),), {}, None
            return (), {}, f"its arguments are not literals: {problem}"
        return args, kwargs, None


_BARE_WORDS = re.compile(r"\s*[^\W\d][\w .,:;!?'&/-]*")


def parse_plan(text: str, tools: Collection[str], most_tasks: int = MOST_TASKS) -> ParsedPlan:
    """The tasks of a whole plan, with what was wrong by line.

    >>> plan = parse_plan('1. search("a")\\n2. search("b of $1")\\n3. join()', ["search"])
    >>> [(task.number, task.after) for task in plan.tasks], plan.notes
    ([(1, ()), (2, (1,))], ())
    """
    parser = PlanParser(tools, most_tasks)
    tasks = [*parser.feed(text), *parser.end()]
    return ParsedPlan(tasks=tuple(tasks), notes=tuple(parser.notes))
