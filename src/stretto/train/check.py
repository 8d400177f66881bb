"""Why a plan is impossible, and the nearest change that would make it possible."""

from __future__ import annotations

from collections import Counter

from stretto.core.errors import FieldError
from stretto.core.plan import Refusal
from stretto.hardware.cluster import Cluster
from stretto.models.parallel.layout import pieces
from stretto.models.spec import ModelSpec
from stretto.train.costs import modelled_dtype
from stretto.train.job import TrainJob
from stretto.train.memory import peak_bytes
from stretto.train.plan import TrainPlan, balanced


def check(job: TrainJob, plan: TrainPlan, spec: ModelSpec, cluster: Cluster) -> Refusal | None:
    """None if the plan can run, else why not and the nearest change that would."""
    return (
        check_layout(job, plan, spec)
        or _check_devices(job, plan, cluster)
        or _check_links(plan, cluster)
        or _check_memory(job, plan, spec, cluster)
    )


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


def _check_devices(job: TrainJob, plan: TrainPlan, cluster: Cluster) -> Refusal | None:
    known = cluster.devices()
    for path, ranks in Counter(plan.devices).items():
        if path not in known:
            first = ", ".join(list(known)[:4])
            return Refusal(reason=f"there is no device {path}", nearest=f"it has {first}; plan anew for these machines")
        device = known[path]
        if device.kind == "gpu" and ranks > 1:
            gpus = sum(each.kind == "gpu" for each in known.values())
            return Refusal(reason=f"{ranks} ranks are on {path}, and a GPU runs one", nearest=f"processes: {gpus}")
        dtype = modelled_dtype(job, device)
        if dtype not in device.peak_flops:
            able = [name for name in ("fp32", "bf16") if name in device.peak_flops]
            has = ", ".join(device.peak_flops) or "none"
            return Refusal(
                reason=f"{device.name} has no peak for {dtype} (peak_flops: {has})",
                nearest=f"dtype: {able[0]}" if able else f"the device's peak_flops.{dtype}",
            )
    return None


def _check_links(plan: TrainPlan, cluster: Cluster) -> Refusal | None:
    """Ranks of a group talk to their neighbours, the last one to the first."""
    if cluster.whole:
        return None
    for axis, size in plan.grid.axes:
        for group in plan.grid.groups(axis) if size > 1 else ():
            paths = [plan.devices[rank] for rank in group]
            for a, b in zip(paths, [*paths[1:], paths[0]], strict=True):
                if a != b and not cluster.joins(a, b):
                    return Refusal(
                        reason=f"ranks of {axis} are on {a} and {b}, and the cluster names no link between them",
                        nearest="`link` of the node, or `network` of the cluster",
                    )
    return None


def _check_memory(job: TrainJob, plan: TrainPlan, spec: ModelSpec, cluster: Cluster) -> Refusal | None:
    ranks = len(plan.devices) // plan.pp
    crowds = Counter(plan.devices)
    for place, needed in enumerate(peak_bytes(job, plan, spec)):
        for path in dict.fromkeys(plan.devices[place * ranks : (place + 1) * ranks]):
            allowed = cluster.device(path).memory_bytes / crowds[path]
            if job.limits.memory_gb is not None:
                allowed = min(allowed, job.limits.memory_gb * 1e9)
            if needed > allowed:
                return _too_full(plan, path, needed, allowed)
    return None


def _too_full(plan: TrainPlan, path: str, needed: float, allowed: float) -> Refusal:
    change = (
        "recompute" if not plan.recompute else "more ranks of pp or tp" if plan.micro_batch == 1 else "a smaller pass"
    )
    return Refusal(
        reason=f"a rank on {path} needs {needed / 1e9:.2f} GB and may have {allowed / 1e9:.2f} GB",
        nearest=f"{change} needs less",
    )
