"""What no schedule of a plan can beat: weights and keys read at the sheet's bandwidth, products at its peak."""

from __future__ import annotations

import numpy as np

from stretto.hardware.cluster import Cluster
from stretto.serve.deploy.drawn import load_of
from stretto.serve.deploy.job import DeploymentJob
from stretto.serve.deploy.layout import layer_weight_bytes, stage_layers, table_bytes
from stretto.serve.deploy.plan import DeploymentPlan, arithmetic_of
from stretto.serve.deploy.planned import planned_spec
from stretto.serve.deploy.report import joules
from stretto.serve.deploy.tree import machine_of


def optimistic_bound(job: DeploymentJob, plan: DeploymentPlan, cluster: Cluster) -> float:
    """The job's objective if every step took its FLOPs at peak or its weights at full bandwidth, whichever is longer,
    no request waited for another, and of prompts that share anything only the last token had to be computed.
    """
    spec, load, layout = planned_spec(job.model), load_of(job.load), plan.layout
    machine, _ = machine_of(cluster, job.devices)
    device = machine.device
    ranks = layout.stages * layout.devices
    used = _active_parameters(spec.parameters(), spec.experts, spec.top_k, 3 * spec.hidden * spec.ffn * spec.layers)
    token_s = 2.0 * used / ranks / device.peak(arithmetic_of(machine))
    stages = stage_layers(spec.layers, layout.stages)  # rows of the embedding are looked up, the head is read
    layer = layer_weight_bytes(spec, layout, plan.weights)
    read = layout.stages * max(stages[0] * layer, stages[-1] * layer + table_bytes(spec, layout))
    share = spec.top_k / spec.experts if spec.experts else 1.0
    step_s = read * share / device.bandwidth
    prompt = np.ones_like(load.prompt) if plan.prefix_cache and load.prefixes else load.prompt
    lone = load.output * step_s + prompt * token_s
    tokens = float(load.output.sum())
    work_s = float((load.output + prompt).sum()) * token_s / layout.replicas
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
