"""Which instructions a process uses: the machine's best, or what the environment asks for."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from stretto.core.errors import UserError
from stretto.kernels import levels


@pytest.mark.parametrize("best", levels.LEVELS)
def test_any_level_up_to_the_best_can_be_asked_for(best: str) -> None:
    place = levels.LEVELS.index(best)
    assert levels.chosen("", best) == best
    for better in levels.LEVELS[:place]:
        with pytest.raises(UserError, match=f"STRETTO_KERNELS: '{better}' is no level of this machine; one of {best}"):
            levels.chosen(better, best)
    assert [levels.chosen(level, best) for level in levels.LEVELS[place:]] == list(levels.LEVELS[place:])


def told(level: str, *command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {levels.VARIABLE: level}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_a_process_computes_at_the_level_it_was_asked_for() -> None:
    code = "from stretto.kernels.levels import BEST_LEVEL; print(BEST_LEVEL)"
    assert told("plain", sys.executable, "-c", code).stdout == "plain\n"


def test_an_unknown_level_is_one_line() -> None:
    done = told("sse9", sys.executable, "-m", "stretto", "serve", "--port", "0")
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert "STRETTO_KERNELS: 'sse9' is no level of this machine; one of" in line
