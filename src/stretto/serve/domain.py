"""The serving domain: its job and plan types, and the planner's questions answered by this room's modules."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from stretto.core.plan import Context, Plan, Prediction, Progress, Refusal, Result
from stretto.hardware.cluster import Cluster
from stretto.serve import plan as choices
from stretto.serve.job import ServeJob
from stretto.serve.plan import ServePlan
from stretto.serve.workload import workload

BEYOND_PEAK = 1.5
"""How far an optimistic bound goes beyond measured peaks: caches can serve part of what memory is charged for."""


class ServeDomain:
    """See `stretto.core.plan.Domain`."""

    name = "serve"
    job_type: type = ServeJob
    plan_type: type = ServePlan

    def candidates(self, job: ServeJob, cluster: Cluster) -> Iterable[ServePlan]:
        return choices.candidates(job, workload(job), cluster)

    def check(self, job: ServeJob, plan: ServePlan, cluster: Cluster) -> Refusal | None:
        return choices.check(job, plan, workload(job), cluster)

    def objective(self, job: ServeJob) -> str:
        return job.objective

    def higher_is_better(self, job: ServeJob) -> bool:
        return job.objective == "throughput"

    def bound(self, job: ServeJob, plan: ServePlan, cluster: Cluster) -> float:
        """Throughput or latency if every step read the weights once at peak bandwidth and did nothing else."""
        work, device = workload(job), cluster.device(plan.device)
        fused = plan.path != "torch"
        peak = max(device.peak_flops.values()) if fused else device.peak(plan.dtype)
        held = work.packed_bytes if fused else work.spec.weight_bytes(plan.dtype)
        fast = max([device.bandwidth, *(cache.bandwidth or 0.0 for cache in device.caches if cache.bytes >= held)])
        weights = held / (fast * BEYOND_PEAK)
        flops = 2.0 * work.spec.parameters() / (peak * BEYOND_PEAK)
        length, count = job.assumed_new_tokens, len(work.prompts)
        if job.objective == "latency":
            return length * weights
        batches = -(-count // (plan.slots * plan.instances))
        return count * length / max(batches * length * weights, count * length * flops)

    def simulate(self, job: ServeJob, plan: ServePlan, cluster: Cluster) -> Prediction:
        from stretto.serve.predict import predict

        return predict(job, plan, workload(job), cluster.device(plan.device))

    def prepare(self, job: ServeJob, cluster: Cluster, progress: Progress) -> Cluster:
        from stretto.serve.prepare import prepare

        return prepare(job, workload(job), cluster, progress)

    def run(self, plan: Plan[ServeJob, ServePlan], ctx: Context) -> Result:
        from stretto.serve.run import run

        work: Any = workload(plan.job)
        return run(plan, work, self.simulate(plan.job, plan.choices, plan.cluster), ctx)
