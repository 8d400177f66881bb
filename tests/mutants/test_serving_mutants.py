"""Mutants of what the engine promises beside throughput: shared prompts, urgency, spare memory, logprobs, grammars."""

from __future__ import annotations

import pytest

from .test_mutants import Mutant, assert_green, assert_killed

pytestmark = pytest.mark.slow

TESTS = [f"tests/serve/{name}.py" for name in ("test_logprobs", "test_urgency", "test_engine", "http/test_logprobs")]
TESTS += ["tests/serve/test_grammar.py", "tests/serve/http/test_llm.py"]
MUTANTS = [
    Mutant(
        "a newcomer computes what one ahead of it computes",
        "serve/scheduler.py",
        "return next(lacking, None) in coming",
        "return False",
    ),
    Mutant(
        "the last to join is put back however urgent",
        "serve/scheduler.py",
        "return max(reversed(self.running), key=lambda r: r.priority)",
        "return self.running[-1]",
    ),
    Mutant(
        "of equals the first to join is put back",
        "serve/scheduler.py",
        "max(reversed(self.running), key",
        "max(self.running, key",
    ),
    Mutant(
        "who is put back goes behind its peers",
        "serve/scheduler.py",
        "by_urgency([victim, *self.waiting])",
        "by_urgency([*self.waiting, victim])",
    ),
    Mutant(
        "prompts are computed in order of joining",
        "serve/scheduler.py",
        "for request in by_urgency(self.running):\n            if request.decoding or not budget:",
        "for request in self.running:\n            if request.decoding or not budget:",
    ),
    Mutant(
        "who is cancelled leaves its pages in spare memory",
        "serve/scheduler.py",
        'self.spare.release(event["id"])',
        "pass",
    ),
    Mutant(
        "a lost backend is believed to have kept spare memory",
        "serve/scheduler.py",
        "self.spare.release_all()",
        "pass",
    ),
    Mutant(
        "pages come back one position short",
        "serve/spare.py",
        "inner[page, :, :positions] = outer[away, :, :positions]",
        "inner[page, :, : positions - 1] = outer[away, :, : positions - 1]",
    ),
    Mutant("a pass that comes twice is copied twice", "serve/spare.py", "if work == self._last:", "if False:"),
    Mutant(
        "the twin copies for nothing", "serve/backend.py", "(*self.moves, *self.swap_out, *self.swap_in)", "self.moves"
    ),
    Mutant("deadlines are an hour late", "serve/engine.py", "call_later(request.deadline_s,", "call_later(3600.0,"),
    Mutant(
        "all rows are told the logprobs of the first",
        "serve/choosing.py",
        "logprob_of(logits[index], tokens[index]",
        "logprob_of(logits[0], tokens[index]",
    ),
    Mutant(
        "a bound row draws from the logits of the first",
        "serve/choosing.py",
        "logits[index : index + 1, allowed]",
        "logits[0:1, allowed]",
    ),
    Mutant(
        "text that is held back is not counted",
        "serve/text.py",
        "return len(self.text) + len(self._held)",
        "return len(self.text)",
    ),
    Mutant(
        "one token alone ends a bound answer",
        "serve/grammar.py",
        "mask[token // 8] |= 1 << token % 8",
        "mask[byte] |= bit",
    ),
    Mutant(
        "answers share the state of their grammar",
        "serve/grammar.py",
        "Following(self._matcher.deep_copy(),",
        "Following(self._matcher,",
    ),
    Mutant("nested repetitions add up", "serve/grammar.py", "last *= max(1,", "last += max(1,"),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.wrong.replace(" ", "-") for mutant in MUTANTS])
def test_serving(mutant: Mutant) -> None:
    assert_killed(TESTS, mutant)


def test_the_tests_pass_without_a_mutant() -> None:
    assert_green(TESTS)
