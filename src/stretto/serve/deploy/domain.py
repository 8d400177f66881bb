"""The deployment domain: its job and plan types, and the planner's questions answered by this folder's modules.

A job whose engine is the product's own is measured and run on this machine (`here`); all others are planned from data
sheets, for machines that need not be here, and started there by the command that `emit` prints.
"""

from __future__ import annotations

from collections.abc import Iterable

from stretto.core.errors import UserError
from stretto.core.plan import Context, Plan, Prediction, Progress, Refusal, Result
from stretto.core.record import Recorder
from stretto.hardware.cluster import Cluster
from stretto.hardware.probe import is_this_machine
from stretto.serve.deploy import plan as choices
from stretto.serve.deploy.bound import optimistic_bound
from stretto.serve.deploy.costs import StepCosts
from stretto.serve.deploy.drawn import load_of
from stretto.serve.deploy.engines import DEFAULT, HERE
from stretto.serve.deploy.here.choices import is_here
from stretto.serve.deploy.here.domain import HereDomain
from stretto.serve.deploy.job import DeploymentJob
from stretto.serve.deploy.memory import device_bytes
from stretto.serve.deploy.plan import DeploymentPlan
from stretto.serve.deploy.planned import planned_spec
from stretto.serve.deploy.report import described, metrics, outside, require_power, require_price, spread
from stretto.serve.deploy.simulate import Served
from stretto.serve.deploy.tree import machine_of
from stretto.serve.deploy.two_lanes import play


class AbroadDomain:
    """See `stretto.core.plan.Domain`; on machines that are known by their data sheets."""

    def candidates(self, job: DeploymentJob, cluster: Cluster) -> Iterable[DeploymentPlan]:
        return choices.candidates(job, cluster)

    def check(self, job: DeploymentJob, plan: DeploymentPlan, cluster: Cluster) -> Refusal | None:
        return choices.check(job, plan, cluster)

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
        found = metrics(
            load,
            served,
            layout=plan.layout,
            device=costs.machine.device.name,
            wide=spread(costs, served),
            slo=job.slo,
            prices=job.prices,
            memory=memory,
        )
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
        if job.engine == HERE:
            raise UserError(
                f"{HERE} is measured on this machine and knows nothing of {machine.device.name}",
                field="engine",
                right=f"leave it out, or {DEFAULT}",
            )
        if job.objective == "cost":
            require_price(machine.device.name, job.prices)
        if job.objective == "energy":
            require_power(machine.device.name)
        planned_spec(job.model)
        load_of(job.load)
        return cluster

    def run(self, plan: Plan[DeploymentJob, DeploymentPlan], ctx: Context) -> Result:
        if is_this_machine(plan.cluster):
            raise UserError(
                f"{plan.job.engine} is planned for and not started from here",
                field="engine",
                right=f"{HERE}, which runs on this machine",
            )
        raise UserError(
            f"a deployment is planned for {plan.cluster.name} and not started from here",
            right="`stretto plan --emit vllm|sglang|llama.cpp` prints the command that starts it there",
        )


_HERE, _ABROAD = HereDomain(), AbroadDomain()


class DeploymentDomain:
    """See `stretto.core.plan.Domain`."""

    name = "deployment"
    job_type: type = DeploymentJob
    plan_type: type = DeploymentPlan

    def _place(self, job: DeploymentJob, cluster: Cluster) -> HereDomain | AbroadDomain:
        return _HERE if is_here(job, cluster) else _ABROAD

    def candidates(self, job: DeploymentJob, cluster: Cluster) -> Iterable[DeploymentPlan]:
        return self._place(job, cluster).candidates(job, cluster)

    def check(self, job: DeploymentJob, plan: DeploymentPlan, cluster: Cluster) -> Refusal | None:
        return self._place(job, cluster).check(job, plan, cluster)

    def objective(self, job: DeploymentJob) -> str:
        return job.objective

    def higher_is_better(self, job: DeploymentJob) -> bool:
        return job.objective in ("throughput", "slo")

    def bound(self, job: DeploymentJob, plan: DeploymentPlan, cluster: Cluster) -> float:
        return self._place(job, cluster).bound(job, plan, cluster)

    def simulate(self, job: DeploymentJob, plan: DeploymentPlan, cluster: Cluster) -> Prediction:
        return self._place(job, cluster).simulate(job, plan, cluster)

    def prepare(self, job: DeploymentJob, cluster: Cluster, progress: Progress) -> Cluster:
        return self._place(job, cluster).prepare(job, cluster, progress)

    def run(self, plan: Plan[DeploymentJob, DeploymentPlan], ctx: Context) -> Result:
        return self._place(plan.job, plan.cluster).run(plan, ctx)


def _bottleneck(served: Served, costs: StepCosts) -> str:
    total = served.parts.total
    names = ("kernels", "messages between devices", "the engine's host and launches")
    shares = sorted(zip(served.parts, names, strict=True), reverse=True)
    busy = total / (costs.layout.replicas * served.makespan_s)
    text = ", ".join(f"{value / total:.0%} {name}" for value, name in shares if value > 0.005 * total)
    evicted = f", {served.preempted} put back for want of pages" if served.preempted else ""
    return f"busy {min(1.0, busy):.0%} of the time: {text}{evicted}"


def _assumed(job: DeploymentJob, costs: StepCosts, served: Served) -> str:
    beyond = outside(costs, served)
    mark = f"; extrapolated beyond what {costs.engine.name} was measured on: {beyond}" if beyond else ""
    return f"{described(load_of(job.load))}; constants of {costs.engine.name}{mark}"
