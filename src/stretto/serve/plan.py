"""The choices of a serving plan, which of them are worth weighing, and why one is impossible."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from stretto.core.errors import require
from stretto.core.plan import Refusal
from stretto.hardware.cluster import Cluster
from stretto.hardware.device import Device
from stretto.serve.job import ServeJob
from stretto.serve.workload import Workload

SLOTS = (1, 2, 4, 8, 16, 32)
DTYPES = ("bf16", "fp32")
JOININGS = ("continuous", "dynamic", "static")
WORKSPACE_BYTES = 0.5e9
"""Room left for activations, logits, the tokenizer and Python itself; seen on this package's own processes."""


@dataclass(frozen=True, kw_only=True)
class ServePlan:
    """How a serving job is carried out.

    Attributes:
        device: path of the device that computes.
        dtype: type of the products and of the KV cache.
        threads: CPU threads of the passes.
        slots: most requests that run at once.
        joining: who joins the running batch, and when.
        page_tokens: length of a KV page; as long as the longest request, it makes each slot one contiguous page.
        prefill_tokens: most prompt tokens in one pass.
    """

    device: str
    dtype: Literal["fp32", "bf16"]
    threads: int
    slots: int
    joining: Literal["continuous", "dynamic", "static"]
    page_tokens: int
    prefill_tokens: int = 512

    def __post_init__(self) -> None:
        require(1 <= self.threads <= 4096, "threads", self.threads, "in 1 .. 4096")
        require(1 <= self.slots <= 4096, "slots", self.slots, "in 1 .. 4096")
        require(1 <= self.page_tokens <= 2**24, "page_tokens", self.page_tokens, "in 1 .. 2**24")
        require(1 <= self.prefill_tokens <= 2**20, "prefill_tokens", self.prefill_tokens, "in 1 .. 2**20")

    def pages(self, longest: int) -> int:
        """Pages of the pool: each slot can hold a request of `longest` tokens."""
        return self.slots * -(-longest // self.page_tokens)

    def __str__(self) -> str:
        return (
            f"{self.slots} slots, {self.joining} joining, {self.dtype} on {self.threads} "
            f"thread{'s' if self.threads > 1 else ''} of {self.device}, {self.prefill_tokens} prompt tokens a pass"
        )


def candidates(job: ServeJob, work: Workload, cluster: Cluster) -> Iterator[ServePlan]:
    """Every combination worth weighing; those that cannot run are among them, to be refused with a reason."""
    for path, device in cluster.devices().items():
        for dtype in DTYPES if job.dtype == "auto" else (job.dtype,):
            for threads in _threads(job, device):
                for slots in _slots(job):
                    for joining in _joinings(job, slots):
                        yield ServePlan(
                            device=path,
                            dtype=dtype,  # type: ignore[arg-type]
                            threads=threads,
                            slots=slots,
                            joining=joining,  # type: ignore[arg-type]
                            page_tokens=work.longest,
                        )


def _threads(job: ServeJob, device: Device) -> list[int]:
    if job.threads is not None:
        return [job.threads]
    counts = {1, device.units} if device.kind == "cpu" else {1}
    if device.kind == "cpu" and device.units > 4:
        counts.add(device.units // 2)
    return sorted(counts)


def _slots(job: ServeJob) -> list[int]:
    if job.slots is not None:
        return [job.slots]
    count = len(job.prompts)
    return sorted({min(slots, count) for slots in SLOTS} | ({count} if count <= SLOTS[-1] else set()))


def _joinings(job: ServeJob, slots: int) -> tuple[str, ...]:
    if job.joining != "auto":
        return (job.joining,)
    return JOININGS if slots > 1 else ("continuous",)


def memory_bytes(plan: ServePlan, work: Workload) -> float:
    """Bytes of weights, KV pool and workspace."""
    tokens = plan.pages(work.longest) * plan.page_tokens
    return work.spec.weight_bytes(plan.dtype) + tokens * work.spec.kv_bytes_per_token(plan.dtype) + WORKSPACE_BYTES


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
    if job.limits.threads is not None and plan.threads > job.limits.threads:
        return Refusal(
            reason=f"{plan.threads} threads, limits.threads is {job.limits.threads}",
            nearest=f"threads: {job.limits.threads}",
        )
    if plan.dtype not in device.peak_flops:
        able = " or ".join(dtype for dtype in DTYPES if dtype in device.peak_flops)
        return Refusal(reason=f"{device.name} has no {plan.dtype} arithmetic", nearest=f"dtype: {able}")
    return _check_memory(job, plan, work, device)


def _check_memory(job: ServeJob, plan: ServePlan, work: Workload, device: Device) -> Refusal | None:
    needed = memory_bytes(plan, work)
    limit = min(device.memory_bytes, (job.limits.memory_gb or float("inf")) * 1e9)
    if needed <= limit:
        return None
    whose = "limits.memory_gb" if limit < device.memory_bytes else device.name
    a_slot = plan.pages(work.longest) // plan.slots * plan.page_tokens * work.spec.kv_bytes_per_token(plan.dtype)
    fitting = int((limit - (needed - plan.slots * a_slot)) // a_slot)
    nearest = (
        f"slots: {fitting}" if fitting >= 1 else f"{(needed - (plan.slots - 1) * a_slot) / 1e9:.2f} GB for one slot"
    )
    return Refusal(reason=f"needs {needed / 1e9:.2f} GB, {whose} is {limit / 1e9:.2f} GB", nearest=nearest)
