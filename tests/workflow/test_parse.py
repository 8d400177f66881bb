"""Plans and arguments: any chunking, references and their traps, mistakes by line, hostile text."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.workflow.literals import LiteralError, Reader, Reference, Template, filled, references, text_of
from stretto.workflow.parse import MOST_LINE_CHARACTERS, PlannedTask, PlanParser, parse_plan

TOOLS = ("search", "compare", "add", "write")
PLAN = """Thought: look both up
1. search("Scott Derrickson", most=3)
2. search('Ed Wood "(1994)"')
Thought: compare them
3. compare($1, "${2} and $1", [1, {"a": $2}])
4. join()
<END_OF_PLAN>"""


def read(text: str, known: int = 3) -> Any:
    args, kwargs = Reader(text, lambda task: 1 <= task <= known).arguments()
    return args if not kwargs else (args, kwargs)


def tasks(text: str) -> tuple[PlannedTask, ...]:
    return parse_plan(text, TOOLS).tasks


def notes(text: str) -> list[str]:
    return [str(note) for note in parse_plan(text, TOOLS).notes]


def test_a_plan_as_it_should_be() -> None:
    plan = parse_plan(PLAN, TOOLS)
    assert plan.notes == ()
    first, second, third = plan.tasks
    assert (first.tool, first.args, first.kwargs, first.after) == ("search", ("Scott Derrickson",), {"most": 3}, ())
    assert second.args == ('Ed Wood "(1994)"',)
    assert third.args == (Reference(1), Template((2, " and ", 1)), [1, {"a": Reference(2)}])
    assert third.after == (1, 2)
    assert (first.thought, second.thought, third.thought) == ("look both up", "", "compare them")
    assert [task.line for task in plan.tasks] == [2, 3, 5]


LINES = st.sampled_from(
    [
        '{n}. search("a $1 b")',
        "{n}. add($1, ${{2}}, 3.5)",
        "{n}. nosuch(1)",
        '{n}. search("unclosed)',
        "{n}. search(bare words)",
        "1. search('twice')",
        "Thought: hm",
        "chatter",
        "",
        "   ",
        '{n}. search("é\\u2028\\n")\r',
        "{n}. join()",
        "<END_OF_PLAN>",
        "x" * 70_000,
        '{n}. search("' + "y" * 70_000 + '")',
    ]
)


@given(st.lists(LINES, max_size=12), st.randoms(use_true_random=False), st.sampled_from([1, 7, 4096]))
def test_any_chunking_gives_what_the_whole_gives(lines: list[str], draw: random.Random, most: int) -> None:
    text = "\n".join(line.format(n=number) for number, line in enumerate(lines, start=1))
    whole = parse_plan(text, TOOLS)
    parser, found, at = PlanParser(TOOLS), [], 0
    most = max(most, len(text) // 2000)
    while at < len(text):
        size = draw.randint(1, most)
        found += parser.feed(text[at : at + size])
        at += size
    found += parser.end()
    assert (tuple(found), tuple(parser.notes)) == (whole.tasks, whole.notes)


def test_one_character_at_a_time_and_the_first_task_before_the_last_line() -> None:
    parser, found, first_at = PlanParser(TOOLS), [], 0
    for at, character in enumerate(PLAN):
        found += parser.feed(character)
        if found and not first_at:
            first_at = at
    found += parser.end()
    assert tuple(found) == tasks(PLAN)
    assert 0 < first_at < PLAN.index("2. search")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", ()),
        ("1, -2, 3.5, 1e3, 1_000", (1, -2, 3.5, 1000.0, 1000)),
        ("True, False, None, true, false, null", (True, False, None, True, False, None)),
        ("'a', \"b\"", ("a", "b")),
        (r"'it\'s', 'a\nb', '\u00e9\x41', 'C:\dir'", ("it's", "a\nb", "éA", "C:\\dir")),
        ("[1, [2, (3, 4)], {}]", ([1, [2, (3, 4)], {}],)),
        ("(1), (1,), ()", (1, (1,), ())),
        ('{"a": [$1], 2: "$2"}', ({"a": [Reference(1)], 2: Reference(2)},)),
        ("q='x', n=3", ((), {"q": "x", "n": 3})),
        ("1, n = $2", ((1,), {"n": Reference(2)})),
        ("$1, ${2}, '$3'", (Reference(1), Reference(2), Reference(3))),
        ("'$10 and $12 and $1'", (Template(("$10 and $12 and ", 1)),)),
        ("'it costs $100'", ("it costs $100",)),
        ("'it costs $1.50 or $1,000 not $1.'", (Template(("it costs $1.50 or $1,000 not ", 1, ".")),)),
        (r"'\$1 \\$1 $'", (Template(("$1 \\", 1, " $")),)),
        ("'$1$2${3}'", (Template((1, 2, 3)),)),
    ],
)
def test_literals(text: str, value: Any) -> None:
    assert read(text) == value


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("__import__('os')", "not a literal at column 1"),
        ("1 + 1", "a comma is missing at column 3"),
        ("[x for x in y]", "not a literal at column 2"),
        ("f'{x}'", "not a literal"),
        ("lambda: 0", "not a literal"),
        ("'open", "a string without its end"),
        ("[1, 2", "a comma is missing"),
        ("[1,", "a value is missing"),
        ("{1: 2", "a comma is missing"),
        ("{[1]: 2}", "a key must be"),
        ("{'$1': 2}", "a key must be"),
        ("$9", r"\$9 is not the result of a task above"),
        ("'${9}'", r"\$9 is not the result"),
        ("$x", "without the number"),
        ("a=1, 2", "positional argument after"),
        ("a=1, a=2", "given twice"),
        ("[" * 100 + "]" * 100, "more than 32 levels"),
        ("[" + "1," * 20_000 + "]", "more than 10000 values"),
        ("9" * 500, "more than 400 digits"),
    ],
)
def test_what_is_no_literal(text: str, problem: str) -> None:
    with pytest.raises(LiteralError, match=problem):
        read(text)


SIMPLE = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**18), 10**18)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=10,
)


@given(SIMPLE)
def test_what_json_writes_is_read(value: Any) -> None:
    text = json.dumps(value)
    if "$" not in text:
        (found,) = Reader(text, lambda task: False).arguments()[0]
        assert found == value
        assert json.dumps(found) == text


def test_results_are_filled_in_once() -> None:
    value = [Reference(1), Template(("<", 1, "|", 2, ">")), {"a": Reference(2)}, (Reference(2),)]
    results = {1: "$2 ${2} $1", 2: [1, "é"]}
    assert references(value) == {1, 2}
    assert filled(value, results) == ["$2 ${2} $1", '<$2 ${2} $1|[1, "é"]>', {"a": [1, "é"]}, ([1, "é"],)]


def test_a_text_that_grows_without_bound_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 4194304 characters"):
        filled(Template((1, 1, 1, 1, 1)), {1: "x" * 2**20})


def test_texts_of_results() -> None:
    assert [text_of(value) for value in ("a", 1, None, {"k": [1]}, {1})] == ["a", "1", "null", '{"k": [1]}', "{1}"]


@pytest.mark.parametrize(
    ("text", "numbers", "said"),
    [
        (
            "1. nosuch(1)\n2. join()",
            [1],
            ["line 1: task 1: there is no tool nosuch; there is add, compare, search, write"],
        ),
        (
            "1. search('a')\n1. search('b')\n2. join()",
            [1],
            ["line 2: task 1 comes after task 1; it was left out, as numbers must rise from 1"],
        ),
        (
            "1. search($2)\n2. search('a')\n3. join()",
            [1, 2],
            ["line 1: task 1: its arguments are not literals: $2 is not the result of a task above at column 1"],
        ),
        (
            "1. search($1)\n2. join()",
            [1],
            ["line 1: task 1: its arguments are not literals: $1 is not the result of a task above at column 1"],
        ),
        ("1. search('a')\n3. search('b')\n4. join()", [1, 3], ["line 2: task 3 follows task 1: a gap in the numbers"]),
        ("1. search('a')", [1], ["line 1: join() is missing; it was added"]),
        ("1. search('a')\n<END_OF_PLAN>", [1], ["line 2: join() is missing; it was added"]),
        ("", [], ["line 0: the plan has no task"]),
        ("1. join()", [], []),
        ("1. search('a')\n2. join()\nand so on", [1], ["line 3: text after the end of the plan was left out"]),
        (
            "Sure!\n1. search('a')\n2. join()",
            [1],
            ["line 1: neither a task nor a thought; it was taken for a thought"],
        ),
        ("1. search(Ed Wood)\n2. join()", [1], ["line 1: an argument without quotes was taken for one string"]),
        ("1. search\n2. join()", [1], ["line 1: task 1: not a call; write it as NUMBER. TOOL(ARGUMENTS)"]),
        ("1. search('a'\n2. join()", [1], ["line 1: task 1: not a call; write it as NUMBER. TOOL(ARGUMENTS)"]),
        (
            "0. search('a')\n1. join()",
            [],
            ["line 1: task 0 comes after task 0; it was left out, as numbers must rise from 1"],
        ),
        (
            "1. search(__import__('os').system('id'))\n2. join()",
            [1],
            ["line 1: task 1: its arguments are not literals: not a literal at column 1"],
        ),
    ],
)
def test_mistakes_are_told_by_line_and_repaired_where_that_is_safe(
    text: str, numbers: list[int], said: list[str]
) -> None:
    assert [task.number for task in tasks(text)] == numbers
    assert notes(text) == said


def test_what_a_plan_of_bare_words_calls() -> None:
    assert tasks("1. search(Ed Wood, born 1924)\n2. join()")[0].args == ("Ed Wood, born 1924",)
    assert tasks("1. search(os.system$(id))\n2. join()")[0].problem is not None


def test_ten_thousand_tasks_are_read_and_more_are_refused() -> None:
    start = time.perf_counter()
    plan = parse_plan("\n".join(f"{n}. add(${n - 1}, 1)" if n > 1 else "1. add(1, 1)" for n in range(1, 10_101)), TOOLS)
    assert len(plan.tasks) == 10_000
    assert str(plan.notes[0]) == "line 10001: more than 10000 tasks; the rest were left out"
    assert len(plan.notes) <= 101
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize(
    "text",
    [
        "1. search(" + " " * 60_000 + "x",
        "1. search()" + " " * 60_000 + "x",
        "1. search(" + ")" * 60_000 + "x",
        "1. search('" + "\\" * 60_001,
        "1. search('" + "$1" * 30_000 + "')",
        "1. search(" + "a=" * 30_000,
        "1. search(" + "(" * 60_000,
        "1. " + "s" * 60_000,
        "9" * 60_000,
        " " * 60_000 + "1. x",
        "Thought" + " " * 60_000,
        "1. search(" + "w " * 30_000 + "\\",
    ],
)
def test_hostile_lines_take_no_time(text: str) -> None:
    start = time.perf_counter()
    parse_plan(text + "\n2. join()", TOOLS)
    assert time.perf_counter() - start < 0.5


def test_megabytes_on_one_line_are_cut_and_told() -> None:
    parser = PlanParser(TOOLS)
    for _ in range(100):
        assert list(parser.feed("1. search('" + "x" * 100_000)) == []
    assert sum(map(len, parser._pieces)) == MOST_LINE_CHARACTERS + 1
    (task,) = parser.feed("')\n")
    assert task.problem == "the line has more than 65536 characters"


@pytest.mark.parametrize("odd", ["1_", "1__0", "2024_report", "-1_.5", "1_e"])
def test_odd_numbers_take_down_their_line_alone(odd: str) -> None:
    plan = parse_plan(f'1. f({odd})\n2. f("ok")\n3. join()', ["f"])
    assert [task.number for task in plan.tasks] == [1, 2]
    assert plan.tasks[1].problem is None
