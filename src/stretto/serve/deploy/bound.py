"""What no schedule of a plan can beat: weights and keys read at the sheet's bandwidth, products at its peak."""

from __future__ import annotations

from stretto.hardware.cluster import Cluster
from stretto.models.spec import bytes_of
from stretto.serve.deploy.drawn import load_of
from stretto.serve.deploy.job import DeploymentJob
from stretto.serve.deploy.layout import device_weight_bytes
from stretto.serve.deploy.plan import DeploymentPlan, arithmetic_of
from stretto.serve.deploy.planned import planned_spec
from stretto.serve.deploy.report import joules
from stretto.serve.deploy.tree import machine_of


def optimistic_bound(job: DeploymentJob, plan: DeploymentPlan, cluster: Cluster) -> float:
    """The job's objective if every step took its FLOPs at peak or its weights at full bandwidth, whichever is longer,
    and no request waited for another.
    """
    spec, load, layout = planned_spec(job.model), load_of(job.load), plan.layout
    machine, _ = machine_of(cluster, job.devices)
    device = machine.device
    ranks = layout.stages * layout.devices
    used = _active_parameters(spec.parameters(), spec.experts, spec.top_k, 3 * spec.hidden * spec.ffn * spec.layers)
    token_s = 2.0 * used / ranks / device.peak(arithmetic_of(machine))
    tables = spec.vocab * spec.hidden * bytes_of("bf16")  # rows of the embedding are looked up, not read as a whole
    read = device_weight_bytes(spec, layout, plan.weights) * layout.stages - tables
    share = spec.top_k / spec.experts if spec.experts else 1.0
    step_s = max(0.0, read * share) / device.bandwidth
    lone = load.output * step_s + load.prompt * token_s
    tokens = float(load.output.sum())
    work_s = float((load.output + load.prompt).sum()) * token_s / layout.replicas
    last = float((load.arrival_s + lone).max())
    makespan = max(work_s, last)
    if job.objective == "latency":
        return float(lone.mean())
    if job.objective == "slo":
        return 1.0
    if job.objective == "cost":
        return makespan / tokens * 1e6 * layout.total * job.prices[device.name] / 3600
    if job.objective == "energy":
        energy = joules(device.name, layout.total, work_s, makespan)
        return energy.low / tokens if energy is not None else 0.0
    return tokens / makespan


def _active_parameters(total: int, experts: int, top_k: int, mlps: int) -> float:
    """Weights that a token meets."""
    return float(total - mlps * (experts - top_k)) if experts else float(total)
