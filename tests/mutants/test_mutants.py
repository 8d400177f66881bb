"""Each technique's mutants are killed by its tests; and the tests pass without them, so that a kill means something."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Mutant:
    """One wrong: `old`, which occurs once in the file, becomes `new`."""

    wrong: str
    file: str
    old: str
    new: str


TEMPORAL_FUSION_TESTS = [f"tests/serve/test_{name}.py" for name in ("slots", "temporal_fusion", "engine", "sampling")]
TEMPORAL_FUSION = [
    Mutant("a row decodes at the position after its own", "serve/engine.py", "start=position - 1,", "start=position,"),
    Mutant("a hole is left in the range", "serve/slots.py", "and holes > 0", "and holes > 1"),
    Mutant(
        "a row moves without its last position",
        "serve/local.py",
        "layer[target, :, :positions] = layer[source, :, :positions]",
        "layer[target, :, : positions - 1] = layer[source, :, : positions - 1]",
    ),
    Mutant(
        "a row moves without its last layer",
        "serve/local.py",
        "for layer in self._cache.layers:",
        "for layer in self._cache.layers[:-1]:",
    ),
    Mutant(
        "a row that moved still reads its old slot",
        "serve/engine.py",
        "self._tables[request] = (target,)",
        "self._tables[request] = self._tables[request]",
    ),
    Mutant(
        "a draw depends on who is alive",
        "serve/sampling.py",
        "_draw(logits[row], how, position[row])",
        "_draw(logits[row], how, position[row] + row)",
    ),
    Mutant(
        "all requests share one seed",
        "serve/sampling.py",
        "uniform(how.seed, _STREAM, position)",
        "uniform(0, _STREAM, position)",
    ),
    Mutant("the window is the last of equal ones", "serve/slots.py", "if inside > most:", "if inside >= most:"),
    Mutant(
        "a row outside the window stays there",
        "serve/slots.py",
        "return list(zip(outside, holes, strict=True))",
        "return list(zip(outside, holes, strict=True))[1:]",
    ),
    Mutant(
        "a slot is not given back",
        "serve/slots.py",
        "self._holder[slot] = None\n        super().release(request)",
        "pass\n        super().release(request)",
    ),
    Mutant("the range ends before its last slot", "serve/slots.py", "(used[0], used[-1] + 1)", "(used[0], used[-1])"),
    Mutant(
        "a newcomer takes the slot that makes the range longest",
        "serve/slots.py",
        "return min(inside)",
        "return max(self._free)",
    ),
    Mutant(
        "one request joins a step",
        "serve/joining/continuous.py",
        "waiting[: self.slots - running]",
        "waiting[: min(1, self.slots - running)]",
    ),
    Mutant(
        "newcomers wait until all are done",
        "serve/joining/continuous.py",
        "waiting[: self.slots - running]",
        "waiting[: self.slots if not running else 0]",
    ),
    Mutant("rows of holes write into slot 0", "serve/local.py", "(cache.pages - 1,)", "(0,)"),
    Mutant("holes are not computed", "serve/backend.py", "return high - low - len(", "return 0 * len("),
    Mutant("a prompt comes in one piece", "serve/scheduler.py", "count = min(left, budget)", "count = left"),
]


@pytest.mark.parametrize("mutant", TEMPORAL_FUSION, ids=[mutant.wrong.replace(" ", "-") for mutant in TEMPORAL_FUSION])
def test_temporal_fusion(mutant: Mutant) -> None:
    assert_killed(TEMPORAL_FUSION_TESTS, mutant)


def test_the_tests_pass_without_a_mutant() -> None:
    assert_green(TEMPORAL_FUSION_TESTS)


def run(tests: list[str], mutant: Mutant | None) -> subprocess.CompletedProcess[str]:
    """Run `tests` with a mutant, until the first that fails."""
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--timeout", "60", "-p", "no:cacheprovider", *tests]
    environment = dict(os.environ)
    if mutant is not None:
        command[3:3] = ["-p", "tests.mutants.plugin"]
        environment["MUTANT"] = json.dumps([mutant.file, mutant.old, mutant.new])
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


def assert_killed(tests: list[str], mutant: Mutant) -> None:
    """A test fails with the mutant, and not because its text is not in the file."""
    done = run(tests, mutant)
    assert done.returncode == 1, f"{mutant.wrong}: not noticed\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert "the mutant's text occurs" not in done.stdout + done.stderr


def by_area(mutants: Mapping[str, Sequence[Mutant]]) -> list[Any]:
    """(area, mutant) for a test each, named after both."""
    return [
        pytest.param(area, mutant, id=f"{area}-{mutant.wrong}".replace(" ", "-"))
        for area, each in mutants.items()
        for mutant in each
    ]


def assert_green(tests: list[str]) -> None:
    done = run(tests, None)
    assert done.returncode == 0, done.stdout[-2000:]
