"""The planner's questions about a deployment on this machine."""

from __future__ import annotations

import math
from collections.abc import Iterable

from stretto.core.errors import UserError
from stretto.core.plan import Context, Plan, Prediction, Progress, Refusal, Result
from stretto.core.record import Recorder
from stretto.hardware.cluster import Cluster
from stretto.serve.deploy.drawn import load_of
from stretto.serve.deploy.here import choices
from stretto.serve.deploy.job import DeploymentJob
from stretto.serve.deploy.plan import DeploymentPlan
from stretto.serve.deploy.report import described, metrics
from stretto.serve.deploy.simulate import Served, serve


class HereDomain:
    """See `stretto.core.plan.Domain`; `deploy.domain` asks this one where a job runs here."""

    def candidates(self, job: DeploymentJob, cluster: Cluster) -> Iterable[DeploymentPlan]:
        return choices.candidates(job, cluster)

    def check(self, job: DeploymentJob, plan: DeploymentPlan, cluster: Cluster) -> Refusal | None:
        return choices.check(job, plan, cluster)

    def bound(self, job: DeploymentJob, plan: DeploymentPlan, cluster: Cluster) -> float:
        """Nothing is pruned: layouts of one machine are few, and all were measured."""
        return 0.0 if job.objective == "latency" else math.inf

    def simulate(self, job: DeploymentJob, plan: DeploymentPlan, cluster: Cluster) -> Prediction:
        load, costs = load_of(job.load), choices.costs_of(job, plan, cluster)
        config = choices.scheduler_config(job, plan, cluster)
        recorder = Recorder("simulated")
        served = serve(load, costs, config, recorder=recorder)
        memory = choices.memory_bytes(job, plan, cluster)
        recorder.memory("this machine", 0.0, memory)
        found = metrics(
            load,
            served,
            layout=plan.layout,
            device=choices.device_of(cluster).name,
            wide=costs.spread,
            slo=job.slo,
            prices={},
            memory=memory,
        )
        return Prediction(
            metrics=found,
            bottleneck=_bottleneck(served, plan),
            assumed=f"{described(load)}; passes as they were timed here",
            phases={"passes": served.parts.total},
            trace=recorder.trace(),
        )

    def prepare(self, job: DeploymentJob, cluster: Cluster, progress: Progress) -> Cluster:
        if job.objective in ("energy", "cost"):
            raise UserError(
                f"the {job.objective} of this machine is not known",
                field="objective",
                right="throughput, latency or slo",
            )
        from stretto.serve.deploy.here.prepare import prepare

        load_of(job.load)
        try:
            choices.path_of(job.model, 1)  # the model is here
        except UserError as problem:
            raise problem.at(field="model") from None
        return prepare(job, cluster, progress)

    def run(self, plan: Plan[DeploymentJob, DeploymentPlan], ctx: Context) -> Result:
        from stretto.serve.deploy.here.run import run

        return run(plan, self.simulate(plan.job, plan.choices, plan.cluster), ctx)


def _bottleneck(served: Served, plan: DeploymentPlan) -> str:
    busy = min(1.0, served.parts.total / (plan.replicas * served.makespan_s))
    evicted = f", {served.preempted} put back for want of pages" if served.preempted else ""
    return f"busy {busy:.0%} of the time{evicted}"
