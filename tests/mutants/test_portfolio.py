"""Mutants of portfolios, all killed: clairvoyance, books, deadlines, draws, halving, the exact answers themselves."""

from __future__ import annotations

import pytest

from tests.mutants.test_mutants import Mutant, assert_green, assert_killed

pytestmark = pytest.mark.slow

_TESTS = [f"tests/workflow/portfolio/test_{name}.py" for name in ("estimates", "rollouts", "course", "exact", "run")]
TESTS = [*_TESTS, "tests/workflow/portfolio/test_planner.py"]
MUTANTS = [
    Mutant(
        "planners see when samples in flight return",
        "portfolio/course.py",
        "            if clairvoyant\n            else None,",
        "            if True\n            else None,",
    ),
    Mutant(
        "time in flight is forgotten",
        "portfolio/draws.py",
        "from_row = bisect_right(law.latency_s, elapsed_s)",
        "from_row = bisect_right(law.latency_s, 0.0)",
    ),
    Mutant(
        "success and latency are drawn from two rows",
        "portfolio/draws.py",
        "success = at % _WORD < int(law.success[row] * _WORD)",
        "success = at % _WORD < int(law.success[row - 1] * _WORD)",
    ),
    Mutant(
        "models of a node meet another luck than native code's",
        "portfolio/draws.py",
        "counter[..., 2] = node",
        "counter[..., 2] = node + 1",
    ),
    Mutant(
        "what is cancelled is refunded in full",
        "portfolio/course.py",
        "return sample.cost * (1 - problem.rules.refund * (1 - elapsed_s / sample.latency_s))",
        "return sample.cost * elapsed_s / sample.latency_s",
    ),
    Mutant(
        "a batch with a success ends at once in any case",
        "portfolio/course.py",
        'if succeeded and problem.rules.ends == "first":',
        "if succeeded:",
    ),
    Mutant(
        "a failed batch counts as done",
        "portfolio/course.py",
        "        elif succeeded:\n            done.add(batch.node)",
        "        else:\n            done.add(batch.node)",
    ),
    Mutant(
        "a launch need not fit",
        "portfolio/run.py",
        "if not self.ledger.can_reserve(bound, each.count):",
        "if not self.ledger.can_reserve(bound, 1):",
    ),
    Mutant(
        "a return gives back the whole reservation",
        "portfolio/ledger.py",
        "self._free += _exact(bound) - charged",
        "self._free += _exact(bound)",
    ),
    Mutant(
        "a sample that raises costs nothing",
        "portfolio/run.py",
        'Outcome(success=False, cost=batch.bound), ""',
        'Outcome(success=False, cost=0.0), ""',
    ),
    Mutant(
        "nodes are launched after the deadline that planning has used up",
        "portfolio/run.py",
        "                self.plans += 1\n                if self.now >= self.deadline_s:",
        "                self.plans += 1\n                if self.now >= self.deadline_s + 1.0:",
    ),
    Mutant(
        "losers run on after the first success",
        "portfolio/run.py",
        "        for task in tasks:\n            task.cancel()\n",
        "        for task in tasks[1:]:\n            task.cancel()\n",
    ),
    Mutant(
        "what comes after the deadline counts",
        "portfolio/run.py",
        "if self.now > self.deadline_s or not any(task.done() for task in tasks):",
        "if not any(task.done() for task in tasks):",
    ),
    Mutant(
        "the worst pairs stay in the race",
        "portfolio/planner.py",
        'np.argsort(-wins, kind="stable")',
        'np.argsort(wins, kind="stable")',
    ),
    Mutant(
        "of equal pairs the last one is chosen",
        "portfolio/planner.py",
        "int(alive[np.argmax(wins)])",
        "int(alive[len(wins) - 1 - np.argmax(wins[::-1])])",
    ),
    Mutant(
        "the probability is that of the rollouts that made the choice",
        "portfolio/planner.py",
        "seed=self._mixed(state, fresh=True), count=self._fresh",
        "seed=self._mixed(state), count=self._fresh",
    ),
    Mutant(
        "all planners draw alike",
        "portfolio/planner.py",
        "repr((self._seed, fresh,",
        "repr((0, fresh,",
    ),
    Mutant(
        "dear models come first",
        "portfolio/problem.py",
        "(law.mean_cost, -law.success_rate,",
        "(-law.mean_cost, -law.success_rate,",
    ),
    Mutant(
        "a ready node may be left out of mixtures",
        "portfolio/candidates.py",
        "rows = np.array(firsts) * levels + level[:, None]",
        "rows = np.array(firsts) * levels + level[:, None] * 0 - levels",
    ),
    Mutant(
        "the exact answer forgets orders of samples",
        "portfolio/exact.py",
        "orders //= math.factorial(times)",
        "orders //= math.factorial(times) ** 2",
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.wrong.replace(" ", "-"))
def test_a_mutant_is_killed(mutant: Mutant) -> None:
    assert_killed(TESTS, mutant)


def test_the_tests_pass_without_a_mutant() -> None:
    assert_green(TESTS)
