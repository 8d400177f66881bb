"""The workflow domain: its job and plan types, and the planner's questions answered by this room's modules."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from stretto.core.plan import Context, Plan, Prediction, Progress, Refusal, Result
from stretto.workflow.job import WorkflowJob
from stretto.workflow.plan import WorkflowPlan, candidates, width
from stretto.workflow.predict import check, play, predict
from stretto.workflow.run import run_plan
from stretto.workflow.steps import problem_of


class WorkflowDomain:
    """See `stretto.core.plan.Domain`. Machines matter little here: what is waited for is elsewhere."""

    name = "workflow"
    job_type: type = WorkflowJob
    plan_type: type = WorkflowPlan

    def candidates(self, job: WorkflowJob, cluster: Any) -> Iterable[WorkflowPlan]:
        if problem_of(job, {}) is not None:
            return [WorkflowPlan(max_parallel=job.max_parallel or 1)]
        free = play(replace(job, budget=None, deadline_s=None), None)
        return candidates(width(free.trace), job.max_parallel)

    def check(self, job: WorkflowJob, plan: WorkflowPlan, cluster: Any) -> Refusal | None:
        return check(job, plan)

    def objective(self, job: WorkflowJob) -> str:
        return "seconds"

    def higher_is_better(self, job: WorkflowJob) -> bool:
        return False

    def bound(self, job: WorkflowJob, plan: WorkflowPlan, cluster: Any) -> float:
        """Seconds of the longest step, which no plan can be under."""
        free = play(replace(job, budget=None, deadline_s=None), None)
        return float((free.trace.spans.finish - free.trace.spans.start).max(initial=0.0))

    def simulate(self, job: WorkflowJob, plan: WorkflowPlan, cluster: Any) -> Prediction:
        return predict(job, plan)

    def prepare(self, job: WorkflowJob, cluster: Any, progress: Progress) -> Any:
        return cluster

    def run(self, plan: Plan[WorkflowJob, WorkflowPlan], ctx: Context) -> Result:
        return run_plan(plan, predict(plan.job, plan.choices), ctx)
