"""What can be asked of the portfolio domain: steps, the models that may try them, a budget, a deadline; and its plans.

A job file names no code: what a sample does is what its estimates say. With real attempts a portfolio is run from
Python, by `portfolio.run`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from stretto.core.errors import FieldError, require
from stretto.workflow.portfolio.baselines import Seq
from stretto.workflow.portfolio.estimates import Estimates, Workflow
from stretto.workflow.portfolio.laws import Moments
from stretto.workflow.portfolio.planner import LEVELS, MCPP, Policy
from stretto.workflow.portfolio.problem import MAX_SAMPLES, Problem, Rules, check_levels


@dataclass(frozen=True, kw_only=True)
class Try:
    """What is known of a step on one model.

    Attributes:
        success: the probability that a sample passes its check.
        latency_s, latency_std_s: mean and standard deviation of its seconds.
        tokens: output tokens of a sample, charged at the model's price.
    """

    success: float
    latency_s: float
    latency_std_s: float = 0.0
    tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Step:
    """A node of the workflow.

    Attributes:
        after: the steps that must have succeeded before.
        models: those that may try it.
    """

    name: str
    models: Mapping[str, Try]
    after: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class PortfolioJob:
    """A workflow to be finished in time and money.

    Attributes:
        prices: dollars for a million output tokens, by model.
        budget: dollars.
        deadline_s: seconds.
        levels: sample counts that a plan may give a step at once.
        ends: whether all samples of a step are waited for ("batch"), or its "first" success ends it.
        refund: share of a cancelled sample's unused price that comes back.
        trials: simulated runs from which a plan's figures come.
        seed: of everything random.
    """

    steps: tuple[Step, ...]
    prices: Mapping[str, float]
    budget: float
    deadline_s: float
    kind: Literal["portfolio"] = "portfolio"
    levels: tuple[int, ...] = LEVELS
    ends: Literal["batch", "first"] = "batch"
    refund: float = 0.0
    trials: int = 100
    seed: int = 0

    def __post_init__(self) -> None:
        require(0 <= self.budget < math.inf, "budget", self.budget, "a finite number >= 0")
        require(0 <= self.deadline_s < math.inf, "deadline_s", self.deadline_s, "a finite number >= 0")
        require(1 <= self.trials <= 10_000, "trials", self.trials, "in 1 .. 10000")
        check_levels(self.levels)
        for model, price in self.prices.items():
            require(0 <= price < math.inf, f"prices.{model}", price, "a finite number >= 0")
        names = [step.name for step in self.steps]
        for at, step in enumerate(self.steps):
            require(step.name not in names[:at], f"steps.{at}.name", step.name, "a name that no other step has")
            require(bool(step.models), f"steps.{at}.models", {}, "at least one model")
            for parent in step.after:
                require(parent in names, f"steps.{at}.after", parent, "the name of a step")
        assert self.problem

    @cached_property
    def problem(self) -> Problem:
        """The workflow with its laws."""
        names = tuple(step.name for step in self.steps)
        edges = tuple((parent, step.name) for step in self.steps for parent in step.after)
        workflow = Workflow(nodes=names, edges=edges)
        moments = {
            step.name: {
                model: self._moments(f"steps.{at}.models.{model}", model, tried) for model, tried in step.models.items()
            }
            for at, step in enumerate(self.steps)
        }
        rules = Rules(ends=self.ends, refund=self.refund)
        return Problem(workflow=workflow, estimates=Estimates.from_moments(moments), rules=rules)

    def _moments(self, where: str, model: str, tried: Try) -> Moments:
        require(model in self.prices, "prices", tuple(self.prices), f"given for {model} too")
        require(tried.tokens >= 0, f"{where}.tokens", tried.tokens, ">= 0")
        try:
            return Moments(
                success=tried.success,
                latency_s=tried.latency_s,
                latency_std_s=tried.latency_std_s,
                cost=tried.tokens * self.prices[model] / 1e6,
            )
        except FieldError as problem:
            raise FieldError(f"{where}.{problem.field}", problem.value, problem.right) from None


@dataclass(frozen=True, kw_only=True)
class PortfolioPlan:
    """How samples are chosen.

    Attributes:
        policy: "mcpp", planned anew at each event, or "seq", the same for every step.
        model, count: of "seq".
    """

    policy: Literal["mcpp", "seq"] = "mcpp"
    model: str = ""
    count: int = 0

    def __post_init__(self) -> None:
        fixed = self.policy == "seq"
        require(fixed == bool(self.model), "model", self.model, "a model's name" if fixed else "empty for mcpp")
        right = f"in 1 .. {MAX_SAMPLES}" if fixed else "0 for mcpp"
        require((1 <= self.count <= MAX_SAMPLES) if fixed else self.count == 0, "count", self.count, right)

    def of(self, job: PortfolioJob) -> Policy:
        """The policy itself."""
        if self.policy == "seq":
            return Seq(problem=job.problem, model=self.model, count=self.count)
        return MCPP(job.problem, levels=job.levels, seed=job.seed)
