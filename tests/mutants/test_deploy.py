"""Mutants of deployments and of the far decisions that their simulation leaps by."""

from __future__ import annotations

import pytest

from .test_mutants import Mutant, assert_green, assert_killed

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
        "host = engine.host_step_s / self.layout.stages",
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
    Mutant(
        "an uneven pipeline goes at its last stage's pace",
        "serve/deploy/costs.py",
        "if self._most_layers == self._last_layers:",
        "if True:",
    ),
    Mutant(
        "every stage of an uneven pipeline has the head",
        "serve/deploy/costs.py",
        "self._stage_of(self._most_layers, layer, 0, rows, lanes)",
        "self._stage_of(self._most_layers, layer, tokens, rows, lanes)",
    ),
    Mutant(
        "memory is that of the lightest stage",
        "serve/deploy/layout.py",
        "layers = stage_layers(spec.layers, layout.stages)[0]",
        "layers = stage_layers(spec.layers, layout.stages)[-1]",
    ),
    Mutant(
        "the last stages have what is left over",
        "serve/deploy/layout.py",
        "return (each + 1,) * over + (each,) * (stages - over)",
        "return (each,) * (stages - over) + (each + 1,) * over",
    ),
    Mutant(
        "stages may be without a layer",
        "serve/deploy/layouts.py",
        "if stages > spec.layers or not",
        "if not",
    ),
    Mutant(
        "a page is known by the block in which it begins",
        "serve/deploy/load.py",
        "((page + 1) * page_tokens - 1) // size",
        "(page * page_tokens) // size",
    ),
    Mutant(
        "pages beyond the prompt are known",
        "serve/deploy/load.py",
        "known = min(int(self.prompt[request]), len(blocks) * size)",
        "known = len(blocks) * size",
    ),
    Mutant(
        "conversations are one and the same",
        "serve/deploy/drawn.py",
        "tuple((int(i),) for i in order // spec.turns)",
        "tuple((0,) for i in order // spec.turns)",
    ),
    Mutant(
        "the scheduler does not hear of prefixes",
        "serve/deploy/simulate.py",
        "if settings.prefix_cache else ()",
        "if False else ()",
    ),
    Mutant(
        "cached tokens are not counted",
        "serve/deploy/simulate.py",
        "self.clock.cached[chunk.id] = chunk.start",
        "self.clock.cached[chunk.id] = 0",
    ),
    Mutant(
        "what is cached is computed nevertheless",
        "serve/deploy/simulate.py",
        "rows=decoders + sum(chunk.count for chunk in decision.prefill)",
        "rows=decoders + sum(chunk.start + chunk.count for chunk in decision.prefill)",
    ),
    Mutant(
        "the last token of a prompt is adopted",
        "serve/scheduler.py",
        "return request.prefix[: (request.length - 1) // self.config.page_tokens]",
        "return request.prefix[: request.length // self.config.page_tokens]",
    ),
]
HERE_TESTS = ["tests/serve/deploy/test_here.py"]
HERE = [
    Mutant(
        "decoding rows beside a prompt cost nothing",
        "serve/deploy/here/measured.py",
        "+ lane.prompt_s + beside, 0.0, 0.0)",
        "+ lane.prompt_s, 0.0, 0.0)",
    ),
    Mutant(
        "one copy gets all requests",
        "serve/deploy/here/running.py",
        "engines[i % len(engines)]",
        "engines[0]",
    ),
    Mutant(
        "requests come at once",
        "serve/deploy/here/running.py",
        "while not stop.is_set() and arrival > self.clock.now:",
        "while False:",
    ),
    Mutant(
        "requests that were cut off count as served",
        "serve/deploy/here/running.py",
        'if handle.reason != "cancelled"]',
        "if True]",
    ),
    Mutant(
        "prompts that are timed are found in the cache",
        "serve/deploy/here/running.py",
        "default_rng(next(self._seeds))",
        "default_rng(0)",
    ),
    Mutant(
        "all made-up prompts are alike",
        "serve/deploy/load.py",
        "default_rng([2, request])",
        "default_rng([2, 0])",
    ),
    Mutant(
        "the machine's pace is not heeded",
        "serve/deploy/here/run.py",
        "costs.at_pace(played.pace)",
        "costs",
    ),
    Mutant(
        "what is old is believed",
        "serve/deploy/here/prepare.py",
        "read_tables(file, fresh_s=FRESH_S)",
        "read_tables(file)",
    ),
    Mutant(
        "more copies than cores",
        "serve/deploy/here/choices.py",
        "if layout.total > cores:",
        "if layout.total > cores + 1:",
    ),
    Mutant(
        "any engine runs here",
        "serve/deploy/here/choices.py",
        "return job.engine in (None, HERE) and is_this_machine(cluster)",
        "return is_this_machine(cluster)",
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.wrong.replace(" ", "-") for mutant in MUTANTS])
def test_deployments(mutant: Mutant) -> None:
    assert_killed(TESTS, mutant)


@pytest.mark.parametrize("mutant", HERE, ids=[mutant.wrong.replace(" ", "-") for mutant in HERE])
def test_deployments_here(mutant: Mutant) -> None:
    assert_killed(HERE_TESTS, mutant)


@pytest.mark.parametrize("tests", [TESTS, HERE_TESTS], ids=["anywhere", "here"])
def test_the_tests_pass_without_a_mutant(tests: list[str]) -> None:
    assert_green(tests)
