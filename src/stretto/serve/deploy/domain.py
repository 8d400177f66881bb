"""The deployment domain: its job and plan types, and the planner's questions answered by this folder's modules."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from stretto.core.errors import UserError
from stretto.core.plan import Context, Plan, Prediction, Progress, Refusal, Result
from stretto.core.record import Recorder
from stretto.hardware.cluster import Cluster
from stretto.serve.deploy import plan as choices
from stretto.serve.deploy.bound import optimistic_bound
from stretto.serve.deploy.costs import StepCosts
from stretto.serve.deploy.drawn import load_of
from stretto.serve.deploy.job import DeploymentJob
from stretto.serve.deploy.memory import device_bytes
from stretto.serve.deploy.plan import DeploymentPlan
from stretto.serve.deploy.planned import planned_spec
from stretto.serve.deploy.report import metrics, outside, require_price
from stretto.serve.deploy.simulate import Served
from stretto.serve.deploy.tree import machine_of
from stretto.serve.deploy.two_lanes import play


class DeploymentDomain:
    """See `stretto.core.plan.Domain`."""

    name = "deployment"
    job_type: type = DeploymentJob
    plan_type: type = DeploymentPlan

    def candidates(self, job: DeploymentJob, cluster: Cluster) -> Iterable[DeploymentPlan]:
        return choices.candidates(job, cluster)

    def check(self, job: DeploymentJob, plan: DeploymentPlan, cluster: Cluster) -> Refusal | None:
        return choices.check(job, plan, cluster)

    def objective(self, job: DeploymentJob) -> str:
        return job.objective

    def higher_is_better(self, job: DeploymentJob) -> bool:
        return job.objective in ("throughput", "slo")

    def bound(self, job: DeploymentJob, plan: DeploymentPlan, cluster: Cluster) -> float:
        return optimistic_bound(job, plan, cluster)

    def simulate(self, job: DeploymentJob, plan: DeploymentPlan, cluster: Cluster) -> Prediction:
        load, costs = load_of(job.load), choices.costs_of(job, plan, cluster)
        config = choices.scheduler_config(job, plan, cluster)
        recorder = Recorder("simulated")
        served = play(load, costs, config, recorder=recorder)
        used = round(served.most_pages * config.pages) * config.page_tokens * plan.stages
        memory = device_bytes(costs.spec, plan.layout, plan.weights, plan.kv, costs.engine, used)
        recorder.memory("a device", 0.0, memory)
        found = metrics(load, served, costs, slo=job.slo, prices=job.prices, memory=memory)
        parts = dict(zip(("kernels", "messages", "engine"), served.parts, strict=True))
        return Prediction(
            metrics=found,
            bottleneck=_bottleneck(served, costs),
            assumed=_assumed(job, costs, served),
            phases=parts,
            trace=recorder.trace(),
        )

    def prepare(self, job: DeploymentJob, cluster: Cluster, progress: Progress) -> Cluster:
        machine, _ = machine_of(cluster, job.devices)
        if job.objective == "cost":
            require_price(machine.device.name, job.prices)
        planned_spec(job.model)
        load_of(job.load)
        return cluster

    def run(self, plan: Plan[DeploymentJob, DeploymentPlan], ctx: Context) -> Result:
        raise UserError(
            f"a deployment is planned for {plan.cluster.name} and not started from here",
            right="`stretto plan --emit vllm|sglang|llama.cpp` prints the command that starts it there",
        )


def _bottleneck(served: Served, costs: StepCosts) -> str:
    total = served.parts.total
    names = ("kernels", "messages between devices", "the engine's host and launches")
    shares = sorted(zip(served.parts, names, strict=True), reverse=True)
    busy = total / (costs.layout.replicas * served.makespan_s)
    text = ", ".join(f"{value / total:.0%} {name}" for value, name in shares if value > 0.005 * total)
    evicted = f", {served.preempted} put back for want of pages" if served.preempted else ""
    return f"busy {min(1.0, busy):.0%} of the time: {text}{evicted}"


def _assumed(job: DeploymentJob, costs: StepCosts, served: Served) -> str:
    load, constants = load_of(job.load), costs.engine
    rate = (len(load) - 1) / max(float(load.arrival_s[-1]), 1e-9) if len(load) > 1 else 0.0
    text = f"{len(load)} requests, {np.mean(load.prompt):.0f} prompt and {np.mean(load.output):.0f} output tokens"
    text += f" in the mean, {rate:.3g} a second" if load.arrival_s[-1] else " in the mean, all at once"
    beyond = outside(costs, served)
    mark = f"; extrapolated beyond what {constants.name} was measured on: {beyond}" if beyond else ""
    return f"{text}; constants of {constants.name}{mark}"
