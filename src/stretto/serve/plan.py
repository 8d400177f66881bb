"""The choices of a serving plan, which of them are worth weighing, and why one is impossible."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from stretto.core.errors import require
from stretto.core.plan import Refusal
from stretto.hardware.cluster import Cluster
from stretto.hardware.device import Device
from stretto.models.kv_cache import PAGE_TOKENS
from stretto.models.kv_packed import PAGE_TOKENS as KV_PAGE_TOKENS
from stretto.serve.job import ServeJob
from stretto.serve.joining import JOININGS
from stretto.serve.slots import Reorder
from stretto.serve.workload import Workload

SLOTS = (1, 2, 4, 8, 16, 32)
DTYPES = ("bf16", "fp32")
LAYOUTS = ("pages", "slots")
WORKSPACE_BYTES = 0.5e9
"""Room left for activations, logits, the tokenizer and Python itself; seen on this package's own processes."""


@dataclass(frozen=True, kw_only=True)
class ServePlan:
    """How a serving job is carried out.

    Attributes:
        device: path of the device that computes.
        dtype: type of the KV cache, and of the products of path "torch"; "int4", for the other paths, keeps pages of 64
            positions in 4 bits.
        path: how passes are computed: "torch" operation by operation; or by the fused decoder on weights that stay
            packed, with activations "exact" (24 bits), "bf16" (16 bits) or "fast" (8 bits).
        threads: CPU threads of the passes; with two lanes, of those of each.
        slots: most requests that run at once.
        joining: who joins the running batch, and when; the name of a policy in `serve.joining`.
        page_tokens: length of a KV page; as long as the longest request, it makes each slot one contiguous page.
        prefill_tokens: most prompt tokens in one pass.
        layout: "pages" computes the rows of a step by their block tables; "slots", temporal fusion, computes one
            contiguous range of slots, each of which holds one whole request.
        reorder: when holes in the range are closed, with "slots": "eager", "threshold" or "never".
        prefix_cache: whether requests share the pages of texts that begin alike, with "pages".
        prefill: "mixed" puts prompts into the passes of decoding rows; "lanes" gives them passes that run beside those,
            on as many cores of their own, so that no prompt makes others wait.
        instances: copies of the model that run side by side, each in a process of its own with these slots and
            threads; requests go to the one with the fewest.
    """

    device: str
    dtype: Literal["fp32", "bf16", "int4"]
    path: Literal["torch", "exact", "bf16", "fast"] = "torch"
    threads: int
    slots: int
    joining: str
    page_tokens: int
    prefill_tokens: int = 512
    layout: Literal["pages", "slots"] = "pages"
    reorder: Reorder = "eager"
    prefix_cache: bool = False
    prefill: Literal["mixed", "lanes"] = "mixed"
    instances: int = 1

    def __post_init__(self) -> None:
        require(1 <= self.threads <= 4096, "threads", self.threads, "in 1 .. 4096")
        require(1 <= self.slots <= 4096, "slots", self.slots, "in 1 .. 4096")
        require(1 <= self.page_tokens <= 2**24, "page_tokens", self.page_tokens, "in 1 .. 2**24")
        require(1 <= self.prefill_tokens <= 2**20, "prefill_tokens", self.prefill_tokens, "in 1 .. 2**20")
        require(1 <= self.instances <= 64, "instances", self.instances, "in 1 .. 64")
        require(self.joining in JOININGS, "joining", self.joining, f"one of {', '.join(JOININGS)}")

    def pages(self, longest: int) -> int:
        """Pages of an instance's pool: each slot can hold a request of `longest` tokens."""
        return self.slots * -(-longest // self.page_tokens)

    @property
    def cores(self) -> int:
        """CPU cores that compute at the same time."""
        return self.threads * self.instances * (2 if self.prefill == "lanes" else 1)

    def __str__(self) -> str:
        how = self.dtype if self.path == "torch" else f"fused {self.path} with {self.dtype} KV"
        copies = f"{self.instances} instances of " if self.instances > 1 else ""
        layout = f", fused slots ({self.reorder} reordering)" if self.layout == "slots" else ""
        layout += ", shared prefixes" if self.prefix_cache else ""
        each = " in each of two lanes" if self.prefill == "lanes" else ""
        return (
            f"{copies}{self.slots} slots, {self.joining} joining{layout}, {how} on {self.threads} "
            f"thread{'s' if self.threads > 1 else ''}{each} of {self.device}, "
            f"{self.prefill_tokens} prompt tokens a pass"
        )


def candidates(job: ServeJob, work: Workload, cluster: Cluster) -> Iterator[ServePlan]:
    """Every combination worth weighing; those that cannot run are among them, to be refused with a reason."""
    for where, device in cluster.devices().items():
        for dtype, path in _types(job, work, device):
            for threads in _threads(job, device):
                for slots in _slots(job):
                    for joining in _joinings(job, slots):
                        plan = ServePlan(
                            device=where,
                            dtype=dtype,  # type: ignore[arg-type]
                            path=path,  # type: ignore[arg-type]
                            threads=threads,
                            slots=slots,
                            joining=joining,
                            page_tokens=work.longest,
                            reorder=job.reorder,
                            instances=job.instances,
                        )
                        for laid_out in _laid_out(job, plan):
                            yield from _with_prompts(job, laid_out)


def _laid_out(job: ServeJob, plan: ServePlan) -> Iterator[ServePlan]:
    """`plan` in each layout; layouts are weighed where requests join freely."""
    freely = plan.joining == "continuous" and plan.slots > 1
    layouts = (LAYOUTS if freely else ("pages",)) if job.layout == "auto" else (job.layout,)
    for layout in layouts:
        small = (
            layout == "pages" and plan.path != "torch"
        )  # torch's attention gathers pages, so that it wants one alone
        yield replace(
            plan,
            layout=layout,  # type: ignore[arg-type]
            page_tokens=_page_tokens(plan) if small else plan.page_tokens,
            prefix_cache=small,
        )


def _with_prompts(job: ServeJob, plan: ServePlan) -> Iterator[ServePlan]:
    """`plan` with each way of computing prompts."""
    for prefill in ("mixed", "lanes") if job.prefill == "auto" else (job.prefill,):
        yield replace(plan, prefill=prefill)


def _page_tokens(plan: ServePlan) -> int:
    return KV_PAGE_TOKENS if plan.dtype == "int4" else min(PAGE_TOKENS, plan.page_tokens)


def _types(job: ServeJob, work: Workload, device: Device) -> Iterator[tuple[str, str]]:
    """Type of the KV cache and path of the products; packed weights go with the paths that keep them so."""
    able = work.not_packed is None and device.kind == "cpu"
    for dtype in DTYPES if job.dtype == "auto" else (job.dtype,):
        if job.path != "auto":
            yield dtype, job.path
        elif able:
            yield dtype, "exact" if dtype == "fp32" else "bf16"
        else:
            yield dtype, "torch"


def _threads(job: ServeJob, device: Device) -> list[int]:
    if job.threads is not None:
        return [job.threads]
    if device.kind != "cpu":
        return [1]
    most = max(1, min(device.units, job.limits.threads or device.units) // job.instances)
    halves = most > 4 or (most > 1 and job.prefill != "mixed")  # of two lanes each has a half
    return sorted({1, most} | ({most // 2} if halves else set()))


def _slots(job: ServeJob) -> list[int]:
    if job.slots is not None:
        return [job.slots]
    count = len(job.prompts)
    return sorted({min(slots, count) for slots in SLOTS} | ({count} if count <= SLOTS[-1] else set()))


def _joinings(job: ServeJob, slots: int) -> tuple[str, ...]:
    if job.joining != "auto":
        return (job.joining,)
    return tuple(JOININGS) if slots > 1 else ("continuous",)


def memory_bytes(plan: ServePlan, work: Workload) -> float:
    """Bytes of weights, KV pool and workspace, over all instances."""
    tokens = plan.pages(work.longest) * plan.page_tokens
    weights = work.spec.weight_bytes(plan.dtype) if plan.path == "torch" else work.packed_bytes
    one = weights + tokens * work.spec.kv_bytes_per_token(plan.dtype) + WORKSPACE_BYTES
    return plan.instances * one


def check(job: ServeJob, plan: ServePlan, work: Workload, cluster: Cluster) -> Refusal | None:
    """None if `plan` can run, else why not and the nearest change that would make it run."""
    if plan.device not in cluster.devices():
        known = ", ".join(list(cluster.devices())[:4])
        return Refusal(reason=f"there is no device {plan.device}", nearest=f"it has {known}")
    device = cluster.device(plan.device)
    if work.longest > work.spec.max_positions:
        return Refusal(
            reason=f"the longest prompt ({work.longest_prompt} tokens) and {job.max_new_tokens} new tokens exceed "
            f"the model's {work.spec.max_positions} positions",
            nearest=f"at most {max(0, work.spec.max_positions - work.longest_prompt)} new tokens would fit",
        )
    if device.kind == "cpu" and plan.threads > device.units:
        return Refusal(reason=f"{plan.threads} threads on {device.units} cores", nearest=f"threads: {device.units}")
    if plan.path != "torch" and (work.not_packed is not None or device.kind != "cpu"):
        reason = work.not_packed or f"{device.name} is no CPU"
        return Refusal(reason=f"path {plan.path} needs packed weights: {reason}", nearest="path: torch")
    if plan.layout == "slots" and plan.page_tokens < work.longest:
        return Refusal(
            reason=f"a slot holds a whole request, here up to {work.longest} tokens, not {plan.page_tokens}",
            nearest=f"page_tokens: {work.longest}",
        )
    if job.limits.threads is not None and plan.cores > job.limits.threads:
        return Refusal(
            reason=f"{plan.cores} threads, limits.threads is {job.limits.threads}",
            nearest=f"threads: {max(1, job.limits.threads * plan.threads // plan.cores)}",
        )
    if plan.prefill == "lanes" and (refusal := _check_lanes(plan, device)) is not None:
        return refusal
    if plan.dtype == "int4":
        return _check_int4(plan, work) or _check_memory(job, plan, work, device)
    if plan.dtype not in device.peak_flops:
        able = " or ".join(dtype for dtype in DTYPES if dtype in device.peak_flops)
        return Refusal(reason=f"{device.name} has no {plan.dtype} arithmetic", nearest=f"dtype: {able}")
    if "fp32" not in device.peak_flops:
        reason = f"{device.name} has no peak of fp32, in which norms and sums are computed"
        return Refusal(reason=reason, nearest="a peak_flops of fp32 in the cluster file")
    return _check_memory(job, plan, work, device)


def _check_lanes(plan: ServePlan, device: Device) -> Refusal | None:
    if plan.path == "torch":
        reason = "two lanes compute by the fused decoder, of which each has one, and torch has one pool of threads"
        return Refusal(reason=reason, nearest="prefill: mixed")
    if plan.layout == "slots":
        reason = "steps of layout slots work on a range in which both lanes' rows would lie"
        return Refusal(reason=reason, nearest="layout: pages")
    if plan.dtype == "int4":
        return Refusal(reason="open pages of a cache in 4 bits belong to one lane", nearest="dtype: bf16")
    if plan.instances > 1:
        return Refusal(reason="instances have no lanes", nearest="instances: 1")
    if plan.cores > device.units:
        return Refusal(
            reason=f"two lanes of {plan.threads} threads on {device.units} cores",
            nearest=f"threads: {device.units // 2}" if device.units > 1 else "prefill: mixed",
        )
    return None


def _check_int4(plan: ServePlan, work: Workload) -> Refusal | None:
    if plan.path == "torch":
        reason = "path torch keeps no keys and values in 4 bits"
        return Refusal(reason=reason, nearest="dtype: bf16" if work.not_packed else "path: bf16")
    if work.spec.head_dim % 32:
        return Refusal(reason=f"heads of {work.spec.head_dim} have no cache in 4 bits", nearest="dtype: bf16")
    if plan.layout == "slots" or plan.page_tokens != KV_PAGE_TOKENS:
        return Refusal(reason=f"a cache in 4 bits has pages of {KV_PAGE_TOKENS} tokens", nearest="layout: pages")
    if plan.instances > 1:
        return Refusal(reason="instances keep no keys and values in 4 bits", nearest="instances: 1")
    return None


def _check_memory(job: ServeJob, plan: ServePlan, work: Workload, device: Device) -> Refusal | None:
    needed = memory_bytes(plan, work)
    limit = min(device.memory_bytes, (job.limits.memory_gb or float("inf")) * 1e9)
    if needed <= limit:
        return None
    whose = "limits.memory_gb" if limit < device.memory_bytes else device.name
    a_slot = plan.pages(work.longest) // plan.slots * plan.page_tokens * work.spec.kv_bytes_per_token(plan.dtype)
    fitting = int((limit - (needed - plan.slots * a_slot)) // a_slot)
    if plan.instances > 1:
        one = needed / plan.instances
        return Refusal(
            reason=f"{plan.instances} instances need {needed / 1e9:.2f} GB, {whose} is {limit / 1e9:.2f} GB",
            nearest=f"instances: {int(limit // one)}" if limit >= one else "one instance with fewer slots",
        )
    nearest = (
        f"slots: {fitting}" if fitting >= 1 else f"{(needed - (plan.slots - 1) * a_slot) / 1e9:.2f} GB for one slot"
    )
    return Refusal(reason=f"needs {needed / 1e9:.2f} GB, {whose} is {limit / 1e9:.2f} GB", nearest=nearest)
