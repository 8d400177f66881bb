"""Portfolios: several samples of several models a step of a workflow, inside a budget and a deadline."""

from stretto.workflow.portfolio.baselines import SPLITS, Seq, Split
from stretto.workflow.portfolio.estimates import Estimates, Rollout, Workflow
from stretto.workflow.portfolio.grid import Surface, completion_surface, forecast, nominal_limits
from stretto.workflow.portfolio.laws import Law, Moments
from stretto.workflow.portfolio.library import draw_problem
from stretto.workflow.portfolio.outcome import Attempt, Outcome, Run, SampleRecord
from stretto.workflow.portfolio.planner import MCPP, Policy, Weighed
from stretto.workflow.portfolio.problem import Action, Launch, Problem, Rules
from stretto.workflow.portfolio.run import run
from stretto.workflow.portfolio.simulate import Simulated, simulate
from stretto.workflow.portfolio.simulated import SimulatedAttempts
from stretto.workflow.portfolio.state import Flight, State

__all__ = [
    "Action",
    "Attempt",
    "Estimates",
    "Flight",
    "Launch",
    "Law",
    "MCPP",
    "Moments",
    "Outcome",
    "Policy",
    "Problem",
    "Rollout",
    "Rules",
    "Run",
    "SPLITS",
    "SampleRecord",
    "Seq",
    "Simulated",
    "SimulatedAttempts",
    "Split",
    "State",
    "Surface",
    "Weighed",
    "Workflow",
    "completion_surface",
    "draw_problem",
    "forecast",
    "nominal_limits",
    "run",
    "simulate",
]
