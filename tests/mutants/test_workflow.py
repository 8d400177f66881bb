"""Mutants of workflows, all killed: the graph and its log, the reader of plans, the compiler."""

from __future__ import annotations

import pytest

from tests.mutants.test_mutants import Mutant, assert_green, assert_killed, by_area

pytestmark = pytest.mark.slow

TESTS = {
    "graphs": ["tests/core/test_graph.py", "tests/core/test_graph_ends.py", "tests/core/test_graph_money.py"],
    "logs": ["tests/core/test_durable.py", "tests/workflow/test_compiler_rounds.py"],
    "plans": ["tests/workflow/test_parse.py"],
    "compilers": [
        "tests/workflow/test_compiler.py",
        "tests/workflow/test_compiler_faults.py",
        "tests/workflow/test_compiler_rounds.py",
        "tests/workflow/test_tool.py",
        "tests/workflow/test_models.py",
    ],
}
MUTANTS = {
    "graphs": [
        Mutant(
            "a node waits for one of its parents only",
            "core/graph_policy.py",
            "self._missing[child] -= 1",
            "self._missing[child] = 0",
        ),
        Mutant(
            "a slot is not given back",
            "core/graph_policy.py",
            "free[name] += 1",
            "free[name] += 0",
        ),
        Mutant(
            "a reservation is not given back",
            "core/budget.py",
            "self.reserved -= bound",
            "self.reserved -= min(bound, cost)",
        ),
        Mutant(
            "money in flight is spent again",
            "core/budget.py",
            "self.spent + self.reserved + bound <= self.limit",
            "self.spent + bound <= self.limit",
        ),
        Mutant(
            "who waits for money is forgotten",
            "core/graph_policy.py",
            "if not self._poor or not self._spend_again():",
            "if True:",
        ),
        Mutant(
            "a failure is tried once more",
            "core/graph_policy.py",
            "self.attempt[node] < terms.attempts and",
            "self.attempt[node] <= terms.attempts and",
        ),
        Mutant(
            "those after a skipped node wait for ever",
            "core/graph_policy.py",
            "self._next.ended.append((node, why, cause))\n        if self._dependents[node] is not None:",
            "self._next.ended.append((node, why, cause))\n        if cause < 0 and self._dependents[node] is not None:",
        ),
        Mutant(
            "a keyed call is charged for each attempt",
            "core/graph_policy.py",
            "if not (again and terms.keyed):",
            "if True:",
        ),
        Mutant(
            "a node that is cancelled before it begins is lost",
            "core/graph.py",
            "task.add_done_callback(partial(self._never_began, node))",
            "pass",
        ),
        Mutant(
            "a pause is drawn from the clock",
            "core/graph_policy.py",
            "uniform(self.seed, node",
            "uniform(id(self), node",
        ),
        Mutant(
            "a late value counts",
            "core/graph.py",
            "        if scope.expired():\n            raise _TimedOut\n        return value",
            "        return value",
        ),
        Mutant(
            "a cancelled run starts what waited",
            "core/graph_policy.py",
            "for node in reversed(range(len(self._state))):",
            "for node in range(len(self._state)):",
        ),
        Mutant("spans share a lane", "core/graph.py", "return heappop(lanes.free)", "return lanes.free[0]"),
    ],
    "logs": [
        Mutant(
            "an attempt in flight was free",
            "core/durable.py",
            "self.spent += sum(open_bounds.values())",
            "self.spent += 0.0",
        ),
        Mutant("a begun attempt is not written", "core/graph.py", "self._log.begin(", "(lambda *_: None)("),
        Mutant(
            "failures are not finished",
            "core/graph.py",
            "log.finish(key, json.dumps(failure.message), paid, failure.why)",
            "pass",
        ),
        Mutant("a torn record is taken", "core/durable.py", "!= zlib.crc32(line[9:])", "!= int(line[:8], 16)"),
        Mutant("the tail stays", "core/durable.py", "os.ftruncate(self._file, sound)", "pass"),
        Mutant(
            "two write at once", "core/durable.py", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH | fcntl.LOCK_NB"
        ),
        Mutant(
            "a value changes its type in the log",
            "core/durable.py",
            "else json.loads(text)), text",
            "else value), text",
        ),
        Mutant(
            "a call's name in the log forgets what it refers to",
            "workflow/tasks.py",
            "filled(list(task.args), keys)",
            "task.tool",
        ),
        Mutant(
            "an unfolded plan is not unfolded again",
            "workflow/compiler.py",
            "if not self.fed:",
            "if False:",
        ),
    ],
    "plans": [
        Mutant("$1 is found in $10", "workflow/literals.py", r"(\d{1,9})(?![\d]|[.,]\d))", r"(\d)(?![.,]\d))"),
        Mutant("money is a reference", "workflow/literals.py", r"(?![\d]|[.,]\d)", r"(?![\d])"),
        Mutant(
            "a reference to nothing is let through",
            "workflow/literals.py",
            "if not self._known(task):",
            "if False:",
        ),
        Mutant("a number may come twice", "workflow/parse.py", "number <= self._last or number == 0", "number == 0"),
        Mutant(
            "the end of a piece ends a line",
            "workflow/parse.py",
            "self._hold(piece[begin:])",
            "self._hold(piece[begin:]); yield from self._take_line()",
        ),
        Mutant(
            "a line may be endless",
            "workflow/parse.py",
            "kept = piece[: MOST_LINE_CHARACTERS + 1 - self._length]",
            "kept = piece",
        ),
        Mutant(
            "depth is not counted",
            "workflow/literals.py",
            "items.append(self._value(depth + 1))",
            "items.append(self._value(depth))",
        ),
        Mutant(
            "text after the end is read",
            "workflow/parse.py",
            "        if self.ended:\n            if text.strip()",
            "        if False:\n            if text.strip()",
        ),
        Mutant(
            "the last line is dropped",
            "workflow/parse.py",
            "        if self._length:\n            yield from",
            "        if False:\n            yield from",
        ),
        Mutant(
            "a thought sticks to every task after it",
            "workflow/parse.py",
            '        self._thought = ""\n        return task',
            "        return task",
        ),
    ],
    "compilers": [
        Mutant("tasks wait for the whole plan", "workflow/compiler.py", "if compiler.stream:", "if False:"),
        Mutant("an action is repeated", "workflow/tasks.py", "future = self._calls[name] =", "future ="),
        Mutant(
            "rounds have no end", "workflow/compiler.py", "last = number + 1 == compiler.max_rounds", "last = False"
        ),
        Mutant(
            "the last verdict may ask for more",
            "workflow/joiner.py",
            "if prompt.last and not verdict.finish:",
            "if False:",
        ),
        Mutant(
            "an answer ends at its first parenthesis",
            "workflow/joiner.py",
            'if text.endswith(")"):\n        return text[:-1].strip()',
            'if ")" in text:\n        return text.partition(")")[0]',
        ),
        Mutant("arguments are not checked", "workflow/tool.py", "if not accepts(annotation, found):", "if False:"),
        Mutant(
            "a result becomes text",
            "workflow/literals.py",
            "        return results[value.task]",
            "        return str(results[value.task])",
        ),
        Mutant(
            "results stand raw in prompts",
            "workflow/prompts.py",
            "return json.dumps(text[:MOST_RESULT_CHARACTERS], ensure_ascii=False) + cut",
            "return text + cut",
        ),
        Mutant(
            "runs share their rounds",
            "workflow/compiler.py",
            "self._rounds: list[Round] = []",
            "self._rounds: list[Round] = compiler.by_name.setdefault('', [])",
        ),
        Mutant("all tools together have no limit", "workflow/tool.py", 'pools=("tools",),', "pools=(),"),
        Mutant(
            "prompts cost nothing",
            "workflow/llm.py",
            "counted.prompt_tokens * self.input_price",
            "0 * self.input_price",
        ),
        Mutant(
            "a failed planner is waited for",
            "workflow/compiler.py",
            '                self._fail(f"the planner {text}")\n                self._graph.close()\n',
            "                self._graph.close()\n",
        ),
    ],
}


@pytest.mark.parametrize(("area", "mutant"), by_area(MUTANTS))
def test_a_mutant_is_killed(area: str, mutant: Mutant) -> None:
    assert_killed(TESTS[area], mutant)


@pytest.mark.parametrize("area", TESTS)
def test_the_tests_pass_without_a_mutant(area: str) -> None:
    assert_green(TESTS[area])
