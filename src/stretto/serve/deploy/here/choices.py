"""What can be chosen for a deployment on this machine: copies and tensor ranks over its cores, and how prompts join."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

from stretto.core.errors import UserError
from stretto.core.plan import Refusal
from stretto.hardware.cluster import Cluster
from stretto.hardware.device import Device
from stretto.hardware.probe import is_this_machine
from stretto.models.kv_cache import PAGE_TOKENS
from stretto.models.load import open_model
from stretto.models.packable import why_not_fused
from stretto.serve.deploy.drawn import load_of
from stretto.serve.deploy.engines import HERE
from stretto.serve.deploy.here.measured import MeasuredCosts, Points
from stretto.serve.deploy.job import DeploymentJob
from stretto.serve.deploy.layout import Layout, device_weight_bytes, kv_bytes_per_token
from stretto.serve.deploy.layouts import layouts
from stretto.serve.deploy.plan import DeploymentPlan, Policy, caches, lengths_refusal
from stretto.serve.deploy.planned import planned_spec
from stretto.serve.deploy.tree import flat
from stretto.serve.scheduler_config import SchedulerConfig

SLOTS = 8
MEMORY_SHARE = 0.5
PREFILL_TOKENS = 512
CHUNK_TOKENS = 128
"""Prompt tokens of a chunked step: a core's products are as fast on so many rows as on more."""
WORKSPACE_BYTES = 0.5e9
"""A process's own: activations, logits, libraries."""


def is_here(job: DeploymentJob, cluster: Cluster) -> bool:
    """Whether `job` runs on this machine with the product's own engine."""
    return job.engine in (None, HERE) and is_this_machine(cluster)


def device_of(cluster: Cluster) -> Device:
    """This machine's processor."""
    (device,) = cluster.devices().values()
    return device


def cores_of(job: DeploymentJob, cluster: Cluster) -> int:
    """Cores that the job takes.

    Raises:
        UserError: if there are not so many.
    """
    cores = device_of(cluster).units
    if job.devices is not None and job.devices > cores:
        raise UserError(
            f"{job.devices} cores are asked for, there are {cores}", field="devices", right=f"at most {cores}"
        )
    return job.devices or cores


def candidates(job: DeploymentJob, cluster: Cluster) -> Iterator[DeploymentPlan]:
    """Every layout on all of the job's cores, those that cannot run here included, and one copy on fewer."""
    spec, cores, load = planned_spec(job.model), cores_of(job, cluster), load_of(job.load)
    fewer = [Layout(devices=ranks) for ranks in range(1, cores) if cores % ranks == 0]
    policies: tuple[Policy, ...] = ("whole", "chunked") if job.policy == "auto" else (job.policy,)
    for layout in [*layouts(spec, flat(cores)), *fewer]:
        for policy in policies:
            for cache in caches(job, load):
                yield DeploymentPlan(
                    policy=policy,
                    prefill_tokens=CHUNK_TOKENS if policy == "chunked" else PREFILL_TOKENS,
                    slots=job.slots or SLOTS,
                    memory_share=job.memory_share or MEMORY_SHARE,
                    weights=job.weights,
                    kv=job.kv,
                    prefix_cache=cache,
                ).with_layout(layout)


def check(job: DeploymentJob, plan: DeploymentPlan, cluster: Cluster) -> Refusal | None:
    """None if `plan` can run here, else why not and the nearest change that would make it run."""
    spec, load, layout = planned_spec(job.model), load_of(job.load), plan.layout
    if layout.stages > 1:
        return Refusal(reason="pipeline stages do not run on this machine", nearest="stages: 1")
    if layout.attention_replicas > 1 or layout.mlp_replicas > 1 or layout.mlp_split == "expert":
        reason = "cells of unlike replicas and whole experts do not run on this machine"
        return Refusal(reason=reason, nearest="attention_replicas: 1, mlp_replicas: 1, mlp_split: tensor")
    cores = cores_of(job, cluster)
    if layout.total > cores:
        reason = f"the plan takes {layout.total} cores, there are {cores}: {layout.total - cores} too few"
        return Refusal(reason=reason, nearest=f"replicas: {max(1, cores // layout.devices)}")
    if layout.devices > spec.kv_heads:
        reason = f"{layout.devices} ranks share {spec.kv_heads} KV heads, which are not repeated here"
        return Refusal(reason=reason, nearest=f"devices: {spec.kv_heads}")
    if "fp8" in (plan.weights, plan.kv):
        return Refusal(reason="this machine does not compute in fp8", nearest="weights: bf16 and kv: bf16")
    if plan.policy == "lanes":
        reason = "worker processes have one lane; a serving job with `prefill: lanes` has two on this machine"
        return Refusal(reason=reason, nearest="policy: whole or chunked")
    if job.preemption == "swap":
        return Refusal(reason="copies to spare memory are not measured here", nearest="preemption: recompute")
    return lengths_refusal(job, load) or _check_memory(job, plan, cluster)


def _check_memory(job: DeploymentJob, plan: DeploymentPlan, cluster: Cluster) -> Refusal | None:
    longest = -(-load_of(job.load).longest // PAGE_TOKENS)
    if _fitting_pages(job, plan, cluster) >= longest:
        return None
    given = device_of(cluster).memory_bytes * plan.memory_share
    needed = plan.layout.total * _process_bytes(job, plan, longest)
    return Refusal(
        reason=f"{plan.layout}: {needed / 1e9:.1f} GB for weights and the longest request of each copy, of which "
        f"{given / 1e9:.1f} GB are given",
        nearest=f"replicas: {plan.replicas // 2}" if plan.replicas > 1 else "a larger memory_share or a smaller model",
    )


def _process_bytes(job: DeploymentJob, plan: DeploymentPlan, pages: int) -> float:
    """Bytes of one worker with so many pages; products keep weights in 16 bits at most."""
    spec, part = planned_spec(job.model), Layout(devices=plan.devices)
    cached = pages * PAGE_TOKENS * kv_bytes_per_token(spec, part, "bf16")
    return WORKSPACE_BYTES + device_weight_bytes(spec, part, "bf16") + cached


def _fitting_pages(job: DeploymentJob, plan: DeploymentPlan, cluster: Cluster) -> int:
    each = device_of(cluster).memory_bytes * plan.memory_share / plan.layout.total
    empty = _process_bytes(job, plan, 0)
    page = _process_bytes(job, plan, 1) - empty
    return int((each - empty) // page) if each > empty else 0


def memory_bytes(job: DeploymentJob, plan: DeploymentPlan, cluster: Cluster) -> float:
    """Bytes of all workers."""
    return plan.layout.total * _process_bytes(job, plan, scheduler_config(job, plan, cluster).pages)


def scheduler_config(job: DeploymentJob, plan: DeploymentPlan, cluster: Cluster) -> SchedulerConfig:
    """The scheduler of each copy: pages for as many of the longest request as run at once, where memory allows."""
    wanted = plan.slots * -(-load_of(job.load).longest // PAGE_TOKENS)
    return SchedulerConfig(
        joining="static" if plan.policy == "static" else "continuous",
        slots=plan.slots,
        pages=max(1, min(wanted, _fitting_pages(job, plan, cluster))),
        page_tokens=PAGE_TOKENS,
        prefill_tokens=plan.prefill_tokens,
        prefill="mixed" if plan.policy == "chunked" else "whole",
        prefix_cache=plan.prefix_cache,
    )


def points_of(job: DeploymentJob, plan: DeploymentPlan, cluster: Cluster) -> Points:
    """Where the plan's passes are timed; alike for all plans of a layout."""
    config = scheduler_config(job, plan, cluster)
    return Points.of(config, max(PREFILL_TOKENS, int(load_of(job.load).prompt.max())))


@lru_cache(maxsize=8)
def path_of(model: str, ranks: int) -> str:
    """How passes are computed: packed weights in the fused decoder, which is not split over ranks, or torch."""
    if ranks > 1:
        return "torch"
    files = open_model(model)
    return "bf16" if why_not_fused(files.spec, files.weights) is None else "torch"


def dtype_of(cluster: Cluster) -> str:
    """The 16-bit type where this machine computes in it."""
    return "bf16" if "bf16" in device_of(cluster).peak_flops else "fp32"


def table_name(job: DeploymentJob, layout: Layout, slots: int) -> str:
    """The beginning of the names of a layout's tables on the device."""
    return f"deployment {job.model} {layout.replicas}x{layout.devices} {slots}"


def costs_of(job: DeploymentJob, plan: DeploymentPlan, cluster: Cluster) -> MeasuredCosts:
    """The seconds of the plan's steps, as `prepare` measured them.

    Raises:
        UserError: if nothing was measured.
    """
    name = table_name(job, plan.layout, plan.slots)
    found = MeasuredCosts.from_tables(device_of(cluster).measured, name, plan.layout)
    if found is None:
        raise UserError(f"nothing is measured of {plan.layout} with {job.model}", right="plan anew on this machine")
    return found
