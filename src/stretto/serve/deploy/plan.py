"""The choices of a deployment, which are worth weighing, and why one is impossible."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Any, Literal

from stretto.core.errors import UserError, require
from stretto.core.plan import Refusal
from stretto.hardware.cluster import Cluster
from stretto.serve.deploy.costs import StepCosts
from stretto.serve.deploy.curves import Machine, Types
from stretto.serve.deploy.drawn import load_of
from stretto.serve.deploy.engines import DEFAULT, EngineConstants, engine
from stretto.serve.deploy.job import DeploymentJob
from stretto.serve.deploy.layout import Layout, Split
from stretto.serve.deploy.layouts import attention_fits, layouts
from stretto.serve.deploy.load import Load
from stretto.serve.deploy.memory import device_bytes, pool_pages
from stretto.serve.deploy.planned import planned_spec
from stretto.serve.deploy.sharing import SharedCosts
from stretto.serve.deploy.tree import Tree, machine_of
from stretto.serve.scheduler_config import SchedulerConfig

Policy = Literal["whole", "chunked", "static", "lanes"]
CHUNK_TOKENS = 2048
"""Prompt tokens of a chunked step: beyond about this many a step computes rather than reads weights (Sarathi)."""
DECODE_SHARES = (0.25, 0.5, 0.75)
"""Shares of the arithmetic that are tried for the lane of decoding rows: it saturates early, a prompt never does."""
MOST_SHARE = 0.97
"""Share of a device's memory that an engine can be told to take; the runtime keeps the rest."""


@dataclass(frozen=True, kw_only=True)
class DeploymentPlan:
    """How a load is served.

    Attributes:
        replicas: copies of the model; requests are dealt to them in turn.
        stages: pipeline stages of a copy.
        devices: devices of a stage, over which its cells are split.
        attention_replicas, mlp_replicas: data parallelism of the cells within a stage.
        mlp_split: MLPs are cut by columns ("tensor") or by whole experts ("expert").
        policy: how prompts join: "whole" in steps of their own, "chunked" beside decoding rows, in "static" batches,
            or in "lanes", passes that run beside those of the decoding rows on the same devices.
        decode_share: of each device's multiprocessors, what the lane of decoding rows has, with "lanes".
        prefill_tokens: most prompt tokens of a step.
        slots: most sequences of a batch.
        memory_share: share of a device's memory that is used.
        weights, kv: number types of matrices, and of keys and values.
        prefix_cache: whether requests of a batch's pool share the pages of texts that begin alike.
    """

    replicas: int = 1
    stages: int = 1
    devices: int = 1
    attention_replicas: int = 1
    mlp_replicas: int = 1
    mlp_split: Split = "tensor"
    policy: Policy = "whole"
    decode_share: float = 0.5
    prefill_tokens: int = 8192
    slots: int = 256
    memory_share: float = 0.9
    weights: Literal["bf16", "fp8"] = "bf16"
    kv: Literal["bf16", "fp8"] = "bf16"
    prefix_cache: bool = False

    def __post_init__(self) -> None:
        require(self.layout.total <= 65536, "devices", self.layout.total, "at most 65536 in all")
        require(1 <= self.prefill_tokens <= 2**24, "prefill_tokens", self.prefill_tokens, "in 1 .. 2**24")
        require(1 <= self.slots <= 65536, "slots", self.slots, "in 1 .. 65536")
        require(0 < self.memory_share <= 1, "memory_share", self.memory_share, "in (0, 1]")
        require(0.05 <= self.decode_share <= 0.95, "decode_share", self.decode_share, "in 0.05 .. 0.95")

    @property
    def layout(self) -> Layout:
        return Layout(
            replicas=self.replicas,
            stages=self.stages,
            devices=self.devices,
            attention_replicas=self.attention_replicas,
            mlp_replicas=self.mlp_replicas,
            mlp_split=self.mlp_split,
        )

    def with_layout(self, layout: Layout) -> DeploymentPlan:
        """The same policy on another layout."""
        return replace(
            self,
            replicas=layout.replicas,
            stages=layout.stages,
            devices=layout.devices,
            attention_replicas=layout.attention_replicas,
            mlp_replicas=layout.mlp_replicas,
            mlp_split=layout.mlp_split,
        )

    def __str__(self) -> str:
        how = f"{self.policy} prompts"
        if self.policy == "chunked":
            how += f" of {self.prefill_tokens}"
        elif self.policy == "lanes":
            how = f"two lanes, {self.decode_share:.0%} to decoding rows"
        cache = ", shared prefixes" if self.prefix_cache else ""
        return f"{self.layout}, {how}, {self.slots} sequences a batch{cache}"


def candidates(job: DeploymentJob, cluster: Cluster) -> Iterator[DeploymentPlan]:
    """Every layout on the job's devices under every policy that it allows, impossible ones included.

    Raises:
        UserError: if the devices differ or the model is unknown.
    """
    spec, constants, load = planned_spec(job.model), constants_of(job), load_of(job.load)
    _, tree = machine_of(cluster, job.devices)
    for layout, (policy, decode_share), cache in product(
        layouts(spec, tree), _policies(job, constants), caches(job, load)
    ):
        yield DeploymentPlan(
            policy=policy,
            decode_share=decode_share,
            prefill_tokens=prefill_tokens(policy, constants, spec.max_positions),
            slots=job.slots or constants.slots,
            memory_share=job.memory_share or constants.memory_share,
            weights=job.weights,
            kv=job.kv,
            prefix_cache=cache,
        ).with_layout(layout)


def constants_of(job: DeploymentJob) -> EngineConstants:
    """The constants of the job's engine on machines that are not here."""
    return engine(job.engine or DEFAULT)


def caches(job: DeploymentJob, load: Load) -> tuple[bool, ...]:
    """With and without a prefix cache, where that makes a difference and the job leaves it open."""
    if job.prefix_cache is not None:
        return (job.prefix_cache,)
    return (False, True) if load.prefixes else (False,)


def prefill_tokens(policy: Policy, constants: EngineConstants, max_positions: int) -> int:
    """Prompt tokens a step: of whole prompts, any that the model takes, within the engine's bound."""
    return CHUNK_TOKENS if policy in ("chunked", "lanes") else min(constants.prefill_tokens, max(2048, max_positions))


def _policies(job: DeploymentJob, constants: EngineConstants) -> list[tuple[Policy, float]]:
    """Policies, each with the share of decoding rows where there are lanes; engines as they come have none."""
    even = 0.5
    if job.policy == "lanes":
        return [("lanes", share) for share in DECODE_SHARES]
    if job.policy != "auto":
        return [(job.policy, even)]
    return [("whole", even), ("chunked", even)] if constants.policy == "whole" else [("chunked", even)]


def arithmetic_of(machine: Machine) -> str:
    """The 16-bit type that the devices compute in.

    Raises:
        UserError: if they have none.
    """
    for dtype in ("bf16", "fp16"):
        if dtype in machine.device.peak_flops:
            return dtype
    raise UserError(f"{machine.device.name} computes in neither bf16 nor fp16", right="devices that do")


_PREFILL: Mapping[Policy, Literal["mixed", "whole", "lanes"]] = {
    "chunked": "mixed",
    "whole": "whole",
    "static": "whole",
    "lanes": "lanes",
}


@lru_cache(maxsize=512)
def costs_of(job: DeploymentJob, plan: DeploymentPlan, cluster: Cluster) -> StepCosts:
    """Seconds of the plan's steps."""
    machine, _ = machine_of(cluster, job.devices)
    of: dict[str, Any] = {
        "spec": planned_spec(job.model),
        "layout": plan.layout,
        "machine": machine,
        "types": Types(arithmetic=arithmetic_of(machine), weights=plan.weights, kv=plan.kv),
        "engine": constants_of(job),
        "most_rows": max(plan.prefill_tokens, 1024),
    }
    return SharedCosts(decode_share=plan.decode_share, **of) if plan.policy == "lanes" else StepCosts(**of)


def scheduler_config(job: DeploymentJob, plan: DeploymentPlan, cluster: Cluster) -> SchedulerConfig:
    """The scheduler of each lane of a plan that fits."""
    machine, _ = machine_of(cluster, job.devices)
    constants = constants_of(job)
    pages = pool_pages(
        planned_spec(job.model), plan.layout, plan.weights, plan.kv, machine, constants, plan.memory_share
    )
    return SchedulerConfig(
        joining="static" if plan.policy == "static" else "continuous",
        slots=plan.slots,
        pages=max(1, pages),
        page_tokens=constants.page_tokens,
        prefill_tokens=plan.prefill_tokens,
        prefill=_PREFILL[plan.policy],
        prefix_cache=plan.prefix_cache,
        preemption=job.preemption,
        spare_pages=max(1, pages) if job.preemption == "swap" else 0,
        horizon="shortage",
    )


def check(job: DeploymentJob, plan: DeploymentPlan, cluster: Cluster) -> Refusal | None:
    """None if `plan` can serve the job's load, else which limit breaks, by how much, and the nearest change."""
    spec, load = planned_spec(job.model), load_of(job.load)
    machine, tree = machine_of(cluster, job.devices)
    ranks = plan.layout.attention_ranks
    if not attention_fits(spec, ranks):
        return Refusal(
            reason=f"{ranks} ranks share {spec.heads} heads in {spec.kv_heads} KV groups",
            nearest=f"at most {spec.heads} ranks, and a multiple of {spec.kv_heads} beyond that many",
        )
    return (
        _check_layout(job, plan, tree)
        or _check_lanes(job, plan)
        or lengths_refusal(job, load)
        or _check_links(plan, machine)
        or _check_memory(job, plan, machine, tree, load)
    )


def _check_layout(job: DeploymentJob, plan: DeploymentPlan, tree: Tree) -> Refusal | None:
    spec, layout = planned_spec(job.model), plan.layout
    if layout.total > tree.size:
        return Refusal(
            reason=f"the plan takes {layout.total} devices, there are {tree.size}: {layout.total - tree.size} too few",
            nearest=f"replicas: {max(1, tree.size // (layout.stages * layout.devices))}",
        )
    if layout.stages > spec.layers:
        reason = f"{spec.layers} layers leave {layout.stages - spec.layers} of {layout.stages} stages without any"
        return Refusal(reason=reason, nearest=f"stages: {spec.layers}")
    if layout.mlp_split == "expert" and spec.experts < layout.mlp_ranks:
        reason = f"{spec.experts} experts on {layout.mlp_ranks} devices"
        return Refusal(reason=reason, nearest="mlp_split: tensor")
    return None


def _check_lanes(job: DeploymentJob, plan: DeploymentPlan) -> Refusal | None:
    if plan.policy != "lanes":
        return None
    if plan.stages > 1:
        reason = f"{plan.stages} stages keep their batches in step, which passes of two lengths cannot"
        return Refusal(reason=f"two lanes in a pipeline: {reason}", nearest="stages: 1")
    if plan.attention_replicas > 1:
        reason = f"{plan.attention_replicas} attention replicas keep in step, which passes of two lengths cannot"
        return Refusal(reason=f"two lanes in each of several replicas: {reason}", nearest="attention_replicas: 1")
    if job.preemption == "swap":
        return Refusal(
            reason="two lanes copy no pages to spare memory: the other lane's pass could be writing there",
            nearest="preemption: recompute",
        )
    return None


def lengths_refusal(job: DeploymentJob, load: Load) -> Refusal | None:
    """Why the model cannot hold the load's requests; None if it can."""
    most = planned_spec(job.model).max_positions
    if load.longest <= most:
        return None
    over = int(((load.prompt + load.output) > most).sum())
    return Refusal(
        reason=f"{over} of {len(load)} requests are longer than the model's {most} positions, the longest has "
        f"{load.longest}: {load.longest - most} too many",
        nearest=f"requests of at most {most} tokens, prompt and answer together",
    )


def _check_links(plan: DeploymentPlan, machine: Machine) -> Refusal | None:
    together = plan.stages * plan.devices
    if together > 1 and machine.link(together) is None:
        return Refusal(
            reason=f"a replica takes {together} devices, but nothing joins more than {machine.node_devices}",
            nearest="name the network between the nodes in the cluster file",
        )
    return None


def _check_memory(job: DeploymentJob, plan: DeploymentPlan, machine: Machine, tree: Tree, load: Load) -> Refusal | None:
    constants = constants_of(job)
    spec = planned_spec(job.model)
    needed_pages = -(-(load.longest - 1) // constants.page_tokens)

    def pages(tried: DeploymentPlan) -> int:
        return pool_pages(spec, tried.layout, tried.weights, tried.kv, machine, constants, tried.memory_share)

    found = pages(plan)
    if found >= needed_pages:
        return None
    tokens = needed_pages * constants.page_tokens * plan.stages
    needed = device_bytes(spec, plan.layout, plan.weights, plan.kv, constants, tokens)
    limit = machine.device.memory_bytes * plan.memory_share
    what = "weights and the longest request" if found >= 0 else "weights"
    return Refusal(
        reason=f"{plan.layout}: a device needs {needed / 1e9:.1f} GB for {what}, of which {limit / 1e9:.1f} GB are "
        f"given: {(needed - limit) / 1e9:.1f} GB too few",
        nearest=_nearest(plan, tree, lambda tried: pages(tried) >= needed_pages, needed),
    )


def _nearest(plan: DeploymentPlan, tree: Tree, fits: Callable[[DeploymentPlan], bool], needed: float) -> str:
    """The smallest change that fits: more of the memory, narrower numbers, more devices a replica, else the bytes."""
    changes: list[tuple[str, DeploymentPlan]] = []
    if plan.memory_share < MOST_SHARE:
        changes.append((f"memory_share: {MOST_SHARE}", replace(plan, memory_share=MOST_SHARE)))
    wider = replace(plan, memory_share=max(plan.memory_share, MOST_SHARE))
    if plan.kv != "fp8":
        changes.append(("kv: fp8", replace(plan, kv="fp8")))
    if plan.weights != "fp8":
        changes.append(("weights: fp8", replace(plan, weights="fp8")))
        changes.append((f"weights: fp8 with memory_share: {MOST_SHARE}", replace(wider, weights="fp8")))
    factor = 2
    while plan.devices * factor <= 4096:
        more = replace(plan, devices=plan.devices * factor)
        beyond = "" if more.layout.total <= tree.size else f", {more.layout.total - tree.size} devices more in all"
        if plan.replicas % factor == 0:
            more, beyond = replace(more, replicas=plan.replicas // factor), ""
        changes.append((f"{more.devices} devices a stage{beyond}", more))
        factor *= 2
    found = next((name for name, tried in changes if fits(tried)), None)
    return found or f"devices of {needed / plan.memory_share / 1e9:.0f} GB"
