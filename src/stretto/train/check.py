"""Why a plan is impossible, and the nearest change that would make it possible."""

from __future__ import annotations

from stretto.core.errors import FieldError
from stretto.core.plan import Refusal
from stretto.hardware.cluster import Cluster
from stretto.hardware.device import Device
from stretto.models.parallel.layout import pieces
from stretto.models.spec import ModelSpec
from stretto.train.job import TrainJob
from stretto.train.memory import peak_bytes
from stretto.train.plan import TrainPlan, balanced


def check(job: TrainJob, plan: TrainPlan, spec: ModelSpec, cluster: Cluster) -> Refusal | None:
    """None if the plan can run, else why not and the nearest change that would."""
    return check_layout(job, plan, spec) or _check_memory(job, plan, spec, cluster)


def check_layout(job: TrainJob, plan: TrainPlan, spec: ModelSpec) -> Refusal | None:
    """As `check`, whatever memory there is."""
    return _check_batch(job, plan, spec) or _check_cuts(job, plan, spec) or _check_order(job, plan, spec)


def _check_batch(job: TrainJob, plan: TrainPlan, spec: ModelSpec) -> Refusal | None:
    share = plan.data_ranks * plan.micro_batch
    if job.global_batch % share == 0:
        return None
    nearest = max(1, round(job.global_batch / share)) * share
    return Refusal(
        reason=f"a batch of {job.global_batch} sequences does not divide by {plan.data_ranks} data ranks x "
        f"{plan.micro_batch} a pass",
        nearest=f"a global_batch of {nearest} would",
    )


def _check_cuts(job: TrainJob, plan: TrainPlan, spec: ModelSpec) -> Refusal | None:
    if plan.tp > spec.kv_heads:
        return Refusal(
            reason=f"tp is {plan.tp}, but the model has {spec.kv_heads} KV heads, and each rank needs one",
            nearest=f"tp {spec.kv_heads} would do",
        )
    if sum(plan.layers) != spec.layers:
        return Refusal(
            reason=f"the stages have {sum(plan.layers)} layers, the model {spec.layers}",
            nearest=f"layers {'+'.join(map(str, balanced(spec, len(plan.layers))))} would do"
            if len(plan.layers) <= spec.layers
            else f"at most {spec.layers} stages",
        )
    if plan.ep > 1 and (spec.experts == 0 or spec.experts % plan.ep):
        return Refusal(
            reason=f"ep is {plan.ep}, but the model has {spec.experts} experts",
            nearest=f"an ep that divides {spec.experts}" if spec.experts else "ep 1",
        )
    if plan.attention == "all_to_all" and plan.cp > spec.kv_heads // plan.tp:
        return Refusal(
            reason=f"cp is {plan.cp}, but a rank of tp {plan.tp} has {spec.kv_heads // plan.tp} KV heads to exchange",
            nearest="blockwise attention takes any number",
        )
    try:
        pieces(job.sequence, 0, plan.cp, plan.cp_layout)
    except FieldError as problem:
        part = plan.cp * (2 if plan.cp_layout == "zigzag" else 1)
        return Refusal(reason=str(problem), nearest=f"a sequence of {-(-job.sequence // part) * part} would")
    return None


def _check_order(job: TrainJob, plan: TrainPlan, spec: ModelSpec) -> Refusal | None:
    if plan.pp == 1 and plan.chunks > 1:
        return Refusal(reason=f"{plan.chunks} chunks on one pipeline rank", nearest="chunks 1, or pp 2")
    try:
        plan.order(job)
    except FieldError as problem:
        nearest = "1f1b takes any number of micro-batches"
        if problem.field == "chunks":
            nearest = "chunks 1" if plan.chunks > 1 else "chunks 2"
        return Refusal(reason=str(problem), nearest=nearest)
    return None


def _check_memory(job: TrainJob, plan: TrainPlan, spec: ModelSpec, cluster: Cluster) -> Refusal | None:
    strange = next((path for path in plan.devices if path not in cluster.devices()), None)
    if strange is not None:
        known = ", ".join(list(cluster.devices())[:4])
        return Refusal(reason=f"there is no device {strange}", nearest=f"it has {known}; plan anew for these machines")
    device = cluster.device(plan.devices[0])
    needed = max(peak_bytes(job, plan, spec))
    allowed = _allowed(job, plan, device)
    if needed <= allowed:
        return None
    change = (
        "recompute" if not plan.recompute else "more ranks of pp or tp" if plan.micro_batch == 1 else "a smaller pass"
    )
    return Refusal(
        reason=f"the fullest rank needs {needed / 1e9:.2f} GB and may have {allowed / 1e9:.2f} GB",
        nearest=f"{change} needs less",
    )


def _allowed(job: TrainJob, plan: TrainPlan, device: Device) -> float:
    """Bytes that a rank may have: its device's, shared with the ranks beside it there, or the job's limit."""
    beside = plan.devices.count(plan.devices[0]) if device.kind == "cpu" else 1
    own = device.memory_bytes / beside
    return own if job.limits.memory_gb is None else min(own, job.limits.memory_gb * 1e9)
