"""The choices of a training plan, which of them are worth weighing, and why one is impossible."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from heapq import heapify, heapreplace
from typing import Literal

from stretto.comm.grid import RankGrid
from stretto.core.errors import UserError, require
from stretto.core.orders import ORDERS, Order, order_of
from stretto.core.partition import contiguous
from stretto.hardware.cluster import Cluster
from stretto.models.spec import ModelSpec, unet_pairs
from stretto.train.job import TrainJob

AXES = ("pp", "dp", "ep", "cp", "tp")
"""Slowest first: ranks of a tensor axis are neighbours."""
MICRO_BATCHES = (1, 2, 4, 8, 16, 32)
CHUNKS = 2


@dataclass(frozen=True, kw_only=True)
class TrainPlan:
    """How a training job is carried out.

    Attributes:
        devices: of each rank, the path of its device; ranks are numbered pp, dp, ep, cp, tp, the last fastest.
        threads: CPU threads of a rank; None on a GPU.
        pp, dp, ep, cp, tp: ranks of the pipeline, data, expert, sequence and tensor axis; `ep` ranks see different
            data too, and share the experts.
        schedule: the pipeline's order, of `core.orders`.
        chunks: stages a pipeline rank.
        layers: of each stage, in order; they may differ.
        micro_batch: sequences of one pass of one data rank.
        recompute: keep the inputs of layers alone, and compute the rest again in backward.
        attention: how a split sequence attends: "blockwise", "rsa" or "all_to_all".
        cp_layout: which tokens a rank of `cp` holds.
        experts: "llep" evens out the experts' load, "ep" does not.
    """

    devices: tuple[str, ...]
    threads: int | None = None
    pp: int = 1
    dp: int = 1
    ep: int = 1
    cp: int = 1
    tp: int = 1
    schedule: str = "1f1b"
    chunks: int = 1
    layers: tuple[int, ...]
    micro_batch: int = 1
    recompute: bool = False
    attention: Literal["blockwise", "rsa", "all_to_all"] = "blockwise"
    cp_layout: Literal["contiguous", "zigzag"] = "contiguous"
    experts: Literal["llep", "ep"] = "llep"

    def __post_init__(self) -> None:
        for name in (*AXES, "chunks", "micro_batch"):
            require(1 <= getattr(self, name) <= 65536, name, getattr(self, name), "in 1 .. 65536")
        require(self.threads is None or 1 <= self.threads <= 4096, "threads", self.threads, "in 1 .. 4096")
        require(self.schedule in ORDERS, "schedule", self.schedule, f"one of {', '.join(ORDERS)}")
        world = self.grid.world
        require(len(self.devices) == world, "devices", len(self.devices), f"{world}, one a rank")
        stages = self.pp * self.chunks
        require(len(self.layers) == stages, "layers", self.layers, f"{stages} numbers, one a stage")
        require(min(self.layers) >= 1, "layers", self.layers, "at least 1 a stage")

    @property
    def grid(self) -> RankGrid:
        """The ranks on their axes."""
        return RankGrid(axes=tuple((axis, getattr(self, axis)) for axis in AXES))

    @property
    def data_ranks(self) -> int:
        """Ranks that see different sequences."""
        return self.dp * self.ep

    def micro_batches(self, job: TrainJob) -> int:
        """Passes of a data rank in a step."""
        return job.global_batch // (self.data_ranks * self.micro_batch)

    def order(self, job: TrainJob) -> Order:
        """The pipeline's table."""
        order = order_of(self.schedule, self.pp, self.micro_batches(job), self.chunks)
        skips = self._skips(job)
        return replace(order, skips=skips) if skips else order

    def _skips(self, job: TrainJob) -> tuple[tuple[int, int], ...]:
        """Of each of the model's skip connections, the stage that makes its tensor and the one that takes it.

        A stage has the result of the layer just before its first one as its own input.
        """
        if job.shape is None or job.shape.skips == "none":
            return ()
        of_layer = [stage for stage, layers in enumerate(self.layers) for _ in range(layers)]
        pairs = []
        for made, taken in unet_pairs(len(of_layer)):
            last = of_layer[taken]
            pairs.append((last if self.stage_layers(last).start == made + 1 else of_layer[made], last))
        return tuple(pairs)

    def stages_of(self, pipeline_rank: int) -> list[int]:
        """The stages that lie on a rank of the pipeline."""
        return [pipeline_rank + chunk * self.pp for chunk in range(self.chunks)]

    def stage_layers(self, stage: int) -> range:
        """The numbers of the layers of a stage."""
        first = sum(self.layers[:stage])
        return range(first, first + self.layers[stage])

    def __str__(self) -> str:
        degrees = " x ".join(f"{axis} {getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1)
        text = f"{degrees or 'one rank'}, {self.micro_batch} sequence{'s' if self.micro_batch > 1 else ''} a pass"
        if self.pp > 1:
            text += f", {self.schedule} over layers {'+'.join(map(str, self.layers))}"
        if self.cp > 1:
            text += f", {self.attention} attention ({self.cp_layout})"
        if self.ep > 1:
            text += f", experts by {self.experts}"
        if self.recompute:
            text += ", recompute"
        return text + (f", {self.threads} thread{'s' if self.threads > 1 else ''} a rank" if self.threads else "")


def candidates(job: TrainJob, spec: ModelSpec, cluster: Cluster) -> Iterator[TrainPlan]:
    """Every layout worth weighing; those that cannot run are among them, to be refused with a reason.

    Raises:
        UserError: there is none that has the degrees which the job asks for.
    """
    none = True
    for devices, threads in _ranks(job, cluster):
        for degrees in _degrees(job, spec, len(devices)):
            for schedule, chunks in _schedules(job, degrees["pp"]):
                stages = degrees["pp"] * chunks
                if stages > spec.layers:
                    continue
                plan = TrainPlan(
                    devices=devices,
                    threads=threads,
                    **degrees,  # type: ignore[arg-type]
                    schedule=schedule,
                    chunks=chunks,
                    layers=balanced(spec, stages),
                    attention=job.layout.attention or "blockwise",
                    cp_layout=job.layout.cp_layout or _cp_layout(job.sequence, degrees["cp"]),
                    experts=job.layout.experts or "llep",
                )
                none = False
                yield from _passes(job, plan)
    if none:
        raise _no_layout(job, spec, [len(devices) for devices, _ in _ranks(job, cluster)])


def _no_layout(job: TrainJob, spec: ModelSpec, ranks: Sequence[int]) -> UserError:
    """Why no number of ranks has the job's degrees."""
    pinned = {axis: getattr(job.layout, axis) for axis in AXES if getattr(job.layout, axis) is not None}
    needed, stages = math.prod(pinned.values()), (job.layout.pp or 1) * (job.layout.chunks or 1)
    if stages > spec.layers:
        right = f"at most {spec.layers}, one layer each"
        return UserError(f"asks for {stages} stages of {spec.layers} layers", field="layout", right=right)
    said = " x ".join(f"{axis} {size}" for axis, size in pinned.items())
    counts = " or ".join(map(str, ranks))
    right = f"degrees that divide {ranks[-1]}, or `processes: {needed}`"
    return UserError(f"{said} takes {needed} ranks or a multiple, there are {counts}", field="layout", right=right)


def balanced(spec: ModelSpec, stages: int) -> tuple[int, ...]:
    """Layers by stage such that the dearest is as cheap as can be, the head counted by its FLOPs."""
    layer = float(spec.hidden * (spec.qkv_width + spec.q_width) + 3 * spec.hidden * spec.ffn * max(1, spec.top_k))
    costs = [layer] * spec.layers
    costs[-1] += float(spec.vocab * spec.hidden)
    return tuple(contiguous(costs, stages))


def _ranks(job: TrainJob, cluster: Cluster) -> Iterator[tuple[tuple[str, ...], int | None]]:
    """Devices of the ranks, and threads a rank: on CPUs one rank in all or one a core, on GPUs one a device."""
    devices = cluster.devices()
    gpus = [path for path, device in devices.items() if device.kind == "gpu"]
    if gpus:
        count = job.processes or len(gpus)
        yield tuple(gpus[index % len(gpus)] for index in range(count)), None
        return
    cores = sum(device.units for device in devices.values())
    for count in sorted({1, cores}) if job.processes is None else (job.processes,):
        share = dict.fromkeys(devices, 0)
        freest = [(-float(device.units), place, path) for place, (path, device) in enumerate(devices.items())]
        heapify(freest)
        for _ in range(count):
            _, place, path = freest[0]
            share[path] += 1
            heapreplace(freest, (-devices[path].units / (share[path] + 1), place, path))
        threads = min(devices[path].units // ranks for path, ranks in share.items() if ranks)
        yield tuple(path for path, ranks in share.items() for _ in range(ranks)), max(1, threads)


def _cp_layout(sequence: int, cp: int) -> Literal["contiguous", "zigzag"]:
    """Zigzag evens out a causal mask; it takes two pieces a rank."""
    return "zigzag" if cp > 1 and sequence % (2 * cp) == 0 else "contiguous"


def _degrees(job: TrainJob, spec: ModelSpec, world: int) -> Iterator[dict[str, int]]:
    pinned = {axis: getattr(job.layout, axis) for axis in AXES}

    def options(axis: str, left: int) -> list[int]:
        if pinned[axis] is not None:
            return [pinned[axis]] if left % pinned[axis] == 0 else []
        if axis == "ep" and not spec.experts:
            return [1]
        return [n for n in range(1, left + 1) if left % n == 0]

    def rest(axes: tuple[str, ...], left: int) -> Iterator[dict[str, int]]:
        if not axes:
            if left == 1:
                yield {}
            return
        for size in options(axes[0], left):
            for others in rest(axes[1:], left // size):
                yield {axes[0]: size, **others}

    yield from rest(AXES, world)


def _schedules(job: TrainJob, pp: int) -> Iterator[tuple[str, int]]:
    asked, chunks = job.layout.schedule, job.layout.chunks
    if pp == 1:
        yield asked or "1f1b", chunks or 1
        return
    for name in ORDERS if asked is None else (asked,):
        several = name in ("interleaved", "looped")
        yield name, chunks or (CHUNKS if several else 1)


def _passes(job: TrainJob, plan: TrainPlan) -> Iterator[TrainPlan]:
    each = job.global_batch // plan.data_ranks
    sizes = (
        [n for n in MICRO_BATCHES if n <= max(each, 1)] if job.layout.micro_batch is None else [job.layout.micro_batch]
    )
    if job.layout.micro_batch is None:
        sizes = [n for n in sizes if each % n == 0] or [1]
    for micro_batch in sizes:
        for recompute in (False, True) if job.recompute == "auto" else (job.recompute == "always",):
            yield replace(plan, micro_batch=micro_batch, recompute=recompute)
