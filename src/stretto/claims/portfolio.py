"""What "On Time, Within Budget" (2026) shows of money and time, from the planner and driver that runs use.

The published table is of 462 CodeFlow problems on four models, means over problems of 100 trials. Its problems are not
here: ours are drawn from the published quartiles of nodes, and how many nodes a problem has is assumed (1 to 32, each
order of magnitude as likely). So only ratios between cells are judged, with room for that, and the one absolute figure
is reported. The null model lets money and time act independently.
"""

from __future__ import annotations

import math
from functools import lru_cache

from stretto.claims.registry import Figure, claim
from stretto.core.random import uniform
from stretto.workflow.portfolio.library import PRICES, draw_problem
from stretto.workflow.portfolio.planner import MCPP
from stretto.workflow.portfolio.problem import Rules
from stretto.workflow.portfolio.simulate import simulate

SETTING = "CodeFlow problems on four Qwen3 models; budgets in dollars, deadlines in seconds"
CONSTANTS = {
    "nodes": "published quartiles of success, latency and tokens over 5,000 rollout rows",
    "prices": "the publication's dollars a million output tokens",
    "sizes": "assumed: 1 to 32 nodes, log-uniform",
}
_PROBLEMS, _QUICK, _TRIALS = 40, 10, 2
_LARGEST = 32


@lru_cache(maxsize=32)
def completed(budget: float, deadline_s: float, quick: bool) -> float:
    """The share of runs, over drawn problems, that complete in time and money."""
    count = _QUICK if quick else _PROBLEMS
    total = 0.0
    for number in range(count):
        nodes = round(_LARGEST ** float(uniform(number, 77, 0)))
        problem = draw_problem(number, nodes=nodes, models=tuple(PRICES), rows=40, rules=Rules(charge="realised"))
        planner = MCPP(problem, samples=32, first=8, max_actions=16)
        total += float(simulate(problem, planner, budget, deadline_s, trials=_TRIALS).completed.mean())
    return total / count


def _ratio(more: tuple[float, float], less: tuple[float, float], quick: bool) -> float:
    return completed(*more, quick) / completed(*less, quick)


@claim(
    system="mcpp",
    says="within 30 s, 20 dollars complete no more than 0.02 dollars do",
    kind="simulated",
    published=28.3 / 28.3,
    unit="x",
    setting=SETTING,
    constants=CONSTANTS,
    tolerance=0.25,
)
def money_at_short_deadlines(quick: bool) -> Figure:
    null = _ratio((20.0, 7200.0), (0.02, 7200.0), quick)
    note = "null: money helps as it does within 7,200 s"
    return Figure(ours=_ratio((20.0, 30.0), (0.02, 30.0), quick), null=null, note=note)


@claim(
    system="mcpp",
    says="with 0.02 dollars, 1,804 s complete 1.72 times as many as 30 s",
    kind="simulated",
    published=48.8 / 28.3,
    unit="x",
    setting=SETTING,
    constants=CONSTANTS,
    tolerance=0.25,
)
def time_at_small_budgets(quick: bool) -> Figure:
    null = _ratio((20.0, 1804.0), (20.0, 30.0), quick)
    note = "null: time helps as it does with 20 dollars"
    return Figure(ours=_ratio((0.02, 1804.0), (0.02, 30.0), quick), null=null, note=note)


@claim(
    system="mcpp",
    says="with 0.02 dollars, 7,200 s complete no more than 1,804 s",
    kind="simulated",
    published=48.8 / 48.8,
    unit="x",
    setting=SETTING,
    constants=CONSTANTS,
    tolerance=0.1,
)
def time_saturates(quick: bool) -> Figure:
    same_growth = math.log(7200 / 1804) / math.log(307 / 30)
    null = _ratio((0.02, 307.0), (0.02, 30.0), quick) ** same_growth
    note = "null: each doubling of the time brings what it brought from 30 to 307 s"
    return Figure(ours=_ratio((0.02, 7200.0), (0.02, 1804.0), quick), null=null, note=note)


@claim(
    system="mcpp",
    says="20 dollars and 7,200 s complete 93.4 %",
    kind="simulated",
    published=93.4,
    unit="%",
    setting=SETTING,
    constants=CONSTANTS,
    tolerance=0.1,
    doubtful=True,
)
def far_corner(quick: bool) -> Figure:
    note = "null: all; the sizes of the published problems are not known"
    return Figure(ours=100 * completed(20.0, 7200.0, quick), null=100.0, note=note)
