"""Mutants of deployments and of the far decisions that their simulation leaps by."""

from __future__ import annotations

import pytest

from .test_mutants import Mutant, run

pytestmark = pytest.mark.slow

TESTS = [f"tests/serve/deploy/test_{name}.py" for name in ("costs", "layouts", "simulate", "traces")]
TESTS += ["tests/serve/test_horizon.py"]
MUTANTS = [
    Mutant(
        "attention does not read what is cached",
        "serve/deploy/costs.py",
        "self._attend(lane.decoders, lane.cached, lane.cached)",
        "self._attend(lane.decoders, lane.decoders, lane.decoders)",
    ),
    Mutant(
        "a chunk attends to itself alone",
        "serve/deploy/costs.py",
        "pairs = new * cached + new * (new + 1) // 2",
        "pairs = new * (new + 1) // 2",
    ),
    Mutant(
        "the host costs nothing",
        "serve/deploy/costs.py",
        "host = engine.host_step_s / layout.stages",
        "host = 0.0",
    ),
    Mutant(
        "a pipeline's group passes one stage",
        "serve/deploy/costs.py",
        "return Parts(*(self.layout.stages * value for value in longest))",
        "return longest",
    ),
    Mutant(
        "cells with a common number of replicas are listed twice",
        "serve/deploy/layouts.py",
        "if gcd(attention, mlp) > 1 or (attention % mlp and mlp % attention):",
        "if attention % mlp and mlp % attention:",
    ),
    Mutant(
        "a division may cross a branch",
        "serve/deploy/tree.py",
        "groups % count == 0 and all(",
        "groups % count == 0 or all(",
    ),
    Mutant(
        "KV heads are split beyond their number",
        "serve/deploy/layout.py",
        "kv_heads = 1\n        heads = -(-group // (ranks // spec.kv_heads))",
        "kv_heads = 1\n        heads = group",
    ),
    Mutant(
        "arrivals are seen a step late",
        "serve/deploy/simulate.py",
        "done = steps_until(arrival - begin,",
        "done = steps_until(arrival + first.total - begin,",
    ),
    Mutant(
        "all requests go to one lane's numbers",
        "serve/deploy/load.py",
        "np.arange(first, len(self), count)",
        "np.arange(0, len(self), count)",
    ),
    Mutant(
        "pages of steps that were not taken are kept",
        "serve/scheduler.py",
        "if step > done])",
        "if step > done + 10**9])",
    ),
    Mutant(
        "pages come back in the wrong order",
        "serve/blocks.py",
        "self._free.extendleft(pages)",
        "self._free.extend(pages)",
    ),
    Mutant(
        "whole prompts run beside decoding rows",
        "serve/scheduler.py",
        'decoders = [] if prefill and self.config.prefill == "whole" else self._decoders()',
        "decoders = self._decoders()",
    ),
    Mutant(
        "Mooncake's milliseconds are seconds",
        "serve/deploy/traces.py",
        "seconds=_number(1e-3)",
        "seconds=_number(1.0)",
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.wrong.replace(" ", "-") for mutant in MUTANTS])
def test_deployments(mutant: Mutant) -> None:
    done = run(TESTS, mutant)
    assert done.returncode == 1, f"{mutant.wrong}: not noticed\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert "mutant's text" not in done.stderr


def test_the_tests_pass_without_a_mutant() -> None:
    done = run(TESTS, None)
    assert done.returncode == 0, done.stdout[-2000:]
