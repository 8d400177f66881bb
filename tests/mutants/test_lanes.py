"""Mutants of two lanes: of their scheduler, their engine, their simulation and its law."""

from __future__ import annotations

import pytest

from .test_mutants import Mutant, assert_green, assert_killed

pytestmark = pytest.mark.slow

TESTS = ["tests/serve/test_lanes.py", "tests/serve/test_lanes_planned.py", "tests/serve/deploy/test_lanes.py"]
MUTANTS = [
    Mutant(
        "pages of a pass under way are taken",
        "serve/lanes.py",
        "reversed([r for r in self.running if r.id not in begun])",
        "reversed(self.running)",
    ),
    Mutant(
        "a row gives way to a pass under way",
        "serve/lanes.py",
        "return None if begun and victim is request else victim",
        "return victim",
    ),
    Mutant(
        "prompts begin while a row waits for a page",
        "serve/lanes.py",
        'if free["prompts"] and not self._short else None',
        'if free["prompts"] else None',
    ),
    Mutant(
        "who goes leaves its pages while a pass writes to them",
        "serve/lanes.py",
        'if event["id"] in self.members("prompts") | self.members("tokens"):',
        "if False:",
    ),
    Mutant(
        "who has gone keeps its pages for ever",
        "serve/lanes.py",
        "gone | set(event",
        "set() | set(event",
    ),
    Mutant(
        "a cut decision keeps the pages of its later steps",
        "serve/lanes.py",
        'kept = [(step, request) for step, request in self._ahead if step <= event["steps"]]\n'
        '        self._hand_back(event["steps"])\n'
        "        self._ahead = kept",
        "pass",
    ),
    Mutant(
        "who has gone comes back when all is lost",
        "serve/lanes.py",
        "self._drop(self._gone)",
        "pass",
    ),
    Mutant(
        "rows look ahead before prompts get their pages",
        "serve/lanes.py",
        'decision = self._prompts() if free["prompts"] and not self._short else None\n'
        "        if decision is None and decoders:",
        'decision = None\n        if not decoders and free["prompts"] and not self._short:\n'
        "            decision = self._prompts()\n        if decision is None and decoders:",
    ),
    Mutant(
        "the engine does not cut what it has begun",
        "serve/lane_engine.py",
        "if not task.done() and course.done + 1 < course.steps:",
        "if False:",
    ),
    Mutant(
        "all starts over while the other lane's pass goes on",
        "serve/lane_engine.py",
        "if self._failing and not self._under_way:",
        "if self._failing:",
    ),
    Mutant(
        "what a pass computed on lost pages is handed out",
        "serve/lane_engine.py",
        "return None if self._failing else result",
        "return result",
    ),
    Mutant(
        "a lane has all of the arithmetic",
        "serve/deploy/sharing.py",
        "peak * share for dtype",
        "peak * max(1.0, share) for dtype",
    ),
    Mutant(
        "memory is not shared",
        "serve/deploy/sharing.py",
        '{"memory": self.memory_s,',
        '{"memory": 0.0 * self.memory_s,',
    ),
    Mutant(
        "prompts have the share of decoding rows",
        "serve/deploy/sharing.py",
        '"prompts": 1 - decode_share',
        '"prompts": decode_share',
    ),
    Mutant(
        "a step in which something comes is taken before it does",
        "serve/deploy/two_lanes.py",
        "slope, steps) - 1\n",
        "slope, steps)\n",
    ),
    Mutant(
        "whose prompt is done waits for the end of the decision",
        "serve/deploy/two_lanes.py",
        "            course.left = 1\n",
        "            return\n",
    ),
    Mutant(
        "seconds of two lanes at once count twice",
        "serve/deploy/two_lanes.py",
        "(until - now) / len(self.courses) /",
        "(until - now) /",
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.wrong.replace(" ", "-") for mutant in MUTANTS])
def test_lanes(mutant: Mutant) -> None:
    assert_killed(TESTS, mutant)


def test_the_tests_pass_without_a_mutant() -> None:
    assert_green(TESTS)
