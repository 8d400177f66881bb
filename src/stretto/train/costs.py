"""Seconds and bytes of the pieces of a training step: measured where this machine was asked, modelled elsewhere.

A measured table is filed under what a piece depends on: the model's shape, the sequence, the type, how the piece is cut
and how many ranks work beside it. On machines that were not measured, a forward pass is the model's operations by
`hardware.cost`, a backward pass twice that, messages and sums are those of `hardware.lower`. There the slowest device
of a pipeline place counts, and ranks on one CPU share it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from stretto.core.orders import Action, Message, Order
from stretto.hardware import cost
from stretto.hardware.cluster import Cluster
from stretto.hardware.device import Device
from stretto.hardware.lower import Collective, Transfer, Work, of_work
from stretto.hardware.table import Table
from stretto.models.passes import PassShape
from stretto.models.spec import ModelSpec
from stretto.train import memory
from stretto.train.job import TrainJob
from stretto.train.plan import TrainPlan

_OPTIMIZER_NUMBERS = {"adamw": 7, "sgd": 3}
"""Numbers that a step moves a weight: weight, gradient and moments read, all but the gradient written."""
_BACKWARD = 2.0
"""Over forward: each product has one for its input's gradient and one for its weight's, which frozen weights lack."""
_SPREAD = 0.3
"""Of a step that was modelled: what the kernel model's own interval does not say (backward as so much)."""
SPREAD_MEASURED = 0.15


def signature(job: TrainJob, plan: TrainPlan, spec: ModelSpec, piece: str) -> str:
    """What the table of a piece is filed under."""
    shape = f"h{spec.hidden}/q{spec.heads}/kv{spec.kv_heads}/d{spec.head_dim}/f{spec.ffn}/v{spec.vocab}"
    experts = f"/e{spec.experts}k{spec.top_k}/ep{plan.ep}-{plan.experts}" if spec.experts else ""
    lora = f"/lora{job.adapters.rank}-{'.'.join(job.adapters.targets)}" if job.adapters else ""
    cut = f"tp{plan.tp}" + (f"/cp{plan.cp}-{plan.attention}-{plan.cp_layout}" if plan.cp > 1 else "")
    beside = f"of{plan.grid.world}@{plan.threads}"
    return f"train-{piece}/{job.dtype}/{shape}{experts}{lora}/L{job.sequence}/{cut}/{beside}"


def tables(
    job: TrainJob, plan: TrainPlan, spec: ModelSpec, found: Sequence[Mapping[str, Sequence[Sequence[float]]]]
) -> dict[str, Table]:
    """Tables from what the ranks measured (`measure.Points`): the slowest of them counts."""
    made = {}
    for piece in found[0]:
        rows = zip(*(one[piece] for one in found), strict=True)
        points = {float(row[0][0]): max(float(point[1]) for point in row) for row in rows}
        axis = {"sum": "numbers", "optimizer": "numbers", "message": "bytes"}.get(piece, "sequences")
        made[signature(job, plan, spec, piece)] = Table.line(
            axis, sorted(points.items()), spread=SPREAD_MEASURED, source="measured on this machine"
        )
    return made


def modelled_dtype(job: TrainJob, device: Device) -> str:
    """The type whose peak a pass is modelled by: fp32 for fp64 too, and where a CPU has no peak of the job's type."""
    own = job.dtype in device.peak_flops or device.kind == "gpu"
    return job.dtype if own and job.dtype != "fp64" else "fp32"


def _wider(job: TrainJob, device: Device) -> float:
    """How many times as long as modelled a pass takes: numbers of fp64 are twice as wide, and arithmetic slower."""
    if job.dtype != "fp64":
        return 1.0
    return max(2.0, device.peak("fp32") / device.peak_flops.get("fp64", math.inf))


@dataclass(frozen=True)
class StepCosts:
    """What `core.order_schedule.lay_out` asks of a plan, in seconds."""

    job: TrainJob
    plan: TrainPlan
    spec: ModelSpec
    cluster: Cluster
    order: Order
    _known: dict[tuple[str, str, int], float] = field(default_factory=dict, init=False, compare=False, repr=False)

    @property
    def measured(self) -> bool:
        """Whether the pieces were measured on the plan's machine."""
        return self._table("layer-forward") is not None

    @property
    def spread(self) -> float:
        """Relative uncertainty of a step."""
        return SPREAD_MEASURED if self.measured else _SPREAD

    def compute(self, action: Action) -> float:
        return self._once("compute", action)

    def message(self, message: Message) -> float:
        source, target = message.source, message.target
        key = (f"message to {target.stage}", source.kind, source.stage)
        if key not in self._known:
            self._known[key] = self._message(source.stage, target.stage)
        return self._known[key]

    def held(self, action: Action) -> float:
        return self._once("held", action)

    def _once(self, what: str, action: Action) -> float:
        """All micro-batches cost a stage the same."""
        key = (what, action.kind, action.stage)
        if key not in self._known:
            self._known[key] = getattr(self, f"_{what}")(action)
        return self._known[key]

    def _compute(self, action: Action) -> float:
        stage, forward = action.stage, action.kind == "forward"
        place = self.order.rank_of(stage)
        again = self.plan.recompute and not forward
        seconds = self.plan.layers[stage] * (self._again_s(place) if again else self._pass_s("layer", forward, place))
        if stage == 0:
            seconds += self._pass_s("embed", forward, place)
        if stage == self.order.stages - 1:
            seconds += self._pass_s("head", forward, place)
        return seconds

    def _message(self, *stages: int) -> float:
        bytes_ = memory.boundary_bytes(self.job, self.plan, self.spec) / self.plan.tp
        table = self._table("message")
        if table is not None:
            return table.at(bytes_).value
        source, other = (self.device(self.order.rank_of(stage)) for stage in stages)
        return self._seconds(Transfer(source=source, target=other, bytes=bytes_)) if source != other else 0.0

    def _held(self, action: Action) -> float:
        return memory.held_bytes(self.job, self.plan, self.spec, action.stage)

    def sum_s(self, pipeline_rank: int) -> float:
        """Adding up the gradients of a rank, those of experts over the ranks that have the same ones."""
        summed = memory.summed_numels(self.job, self.plan, self.spec, pipeline_rank)
        tied = self.spec.tied_embeddings and self.plan.pp > 1 and pipeline_rank in (0, self.plan.pp - 1)
        table_numel = self.spec.vocab * self.spec.hidden / self.plan.tp if tied and self.job.adapters is None else 0.0
        width, table = memory.number_bytes(self.job), self._table("sum")
        if table is not None:
            message = self._table("message")
            swap = message.at(max(1.0, table_numel * width)).value if message is not None and table_numel else 0.0
            return sum(table.at(float(sum(numels))).value for numels in summed.values()) + swap
        seconds = 0.0
        for axes, numels in summed.items():
            devices = self._distinct(self.plan.grid.group(self.rank_at(pipeline_rank), *axes))
            seconds += self._seconds(Collective(kind="all_reduce", devices=devices, bytes=sum(numels) * width))
        if table_numel:
            ends = (self.device(0), self.device(self.plan.pp - 1))
            if ends[0] != ends[1]:
                seconds += self._seconds(Transfer(source=ends[0], target=ends[1], bytes=table_numel * width))
        return seconds

    def optimizer_s(self, pipeline_rank: int) -> float:
        """The optimizer's step over a rank's weights."""
        numel = self.trained_numel(pipeline_rank)
        table = self._table("optimizer")
        if table is not None:
            return table.at(max(1.0, numel)).value
        bytes_ = numel * _OPTIMIZER_NUMBERS[self.job.optimizer.name] * memory.number_bytes(self.job)
        return max(bytes_ * ranks / device.bandwidth for device, ranks in self._workers(pipeline_rank))

    def trained_numel(self, pipeline_rank: int) -> float:
        """Numbers that a rank trains; of an uneven tensor axis the largest share."""
        return memory.trained_numel(self.job, self.plan, self.spec, pipeline_rank)

    def rank_at(self, pipeline_rank: int) -> int:
        """The first rank of a pipeline place."""
        return self.plan.grid.rank(pp=pipeline_rank)

    def device(self, pipeline_rank: int) -> str:
        return self.plan.devices[self.rank_at(pipeline_rank)]

    def _workers(self, pipeline_rank: int) -> list[tuple[Device, int]]:
        """The different devices of a pipeline place, each with the most ranks that share one; GPUs are not shared."""
        ranks = len(self.plan.devices) // self.plan.pp
        paths = set(self.plan.devices[pipeline_rank * ranks : (pipeline_rank + 1) * ranks])
        crowds: dict[Device, int] = {}
        for path, crowd in Counter(self.plan.devices).items():
            if path in paths:
                device = self.cluster.device(path)
                crowds[device] = max(crowds.get(device, 1), crowd)
        return list(crowds.items())

    def _table(self, piece: str) -> Table | None:
        device = self.cluster.device(self.plan.devices[0])
        return device.measured.get(signature(self.job, self.plan, self.spec, piece))

    def _seconds(self, work: Work) -> float:
        return of_work(work, self.cluster).estimate.seconds

    def _pass_s(self, piece: str, forward: bool, place: int) -> float:
        table = self._table(f"{piece}-{'forward' if forward else 'backward'}")
        if table is not None:
            return table.at(self.plan.micro_batch).value
        times = _BACKWARD if not forward and self.job.adapters is None else 1.0
        inside_s = self._inside_s(place, forward) if piece == "layer" else 0.0
        return self._modelled_s(piece, place) * times + inside_s

    def _again_s(self, place: int) -> float:
        """A layer's forward pass once more, and its backward pass, which finds in the caches what that has made."""
        if self._table("again-backward") is not None:
            return self._pass_s("again", False, place)
        return self._pass_s("layer", True, place) + self._pass_s("layer", False, place)

    def _modelled_s(self, piece: str, place: int) -> float:
        """A forward pass of a piece by the model's operations, on the slowest device of its pipeline place."""
        rows = self.job.sequence // self.plan.cp
        shape = PassShape(
            new_tokens=(rows,) * self.plan.micro_batch,
            cached=((self.plan.cp - 1) * rows // 2,) * self.plan.micro_batch,
            logits_rows=rows * self.plan.micro_batch,
        )
        ends = {"embed": ("embed",), "head": ("norm_final", "lm_head")}

        def seconds(device: Device, ranks: int) -> float:
            dtype = modelled_dtype(self.job, device)
            listed = replace(self.spec, layers=1).operations(shape, dtype=dtype, tp=self.plan.tp)
            chosen = [
                op
                for op in listed
                if (op.name in ends[piece] if piece in ends else all(op.name not in names for names in ends.values()))
            ]
            threads = None if self.plan.threads is None else min(device.units, ranks * self.plan.threads)
            return ranks * _wider(self.job, device) * cost.total(chosen, device, threads=threads).seconds

        return max(seconds(device, ranks) for device, ranks in self._workers(place))

    def _inside_s(self, place: int, forward: bool) -> float:
        """Collectives of a layer's pass: two sums over `tp`, two exchanges over `ep`, and keys and values once around
        `cp`; backward their gradients go around too.
        """
        seconds, grid, first = 0.0, self.plan.grid, self.rank_at(place)
        boundary = memory.boundary_bytes(self.job, self.plan, self.spec)
        if self.plan.tp > 1:
            devices = self._distinct(grid.group(first, "tp"))
            seconds += 2 * self._seconds(Collective(kind="all_reduce", devices=devices, bytes=boundary))
        if self.plan.cp > 1:
            devices = self._distinct(grid.group(first, "cp"))
            rows = self.plan.micro_batch * self.job.sequence
            width = 2 * self.spec.kv_width / self.plan.tp * memory.number_bytes(self.job)
            times = 1 if forward else 2
            seconds += times * self._seconds(Collective(kind="all_gather", devices=devices, bytes=rows * width))
        if self.plan.ep > 1:
            devices = self._distinct(grid.group(first, "ep"))
            bytes_ = boundary * self.spec.top_k
            seconds += 2 * self._seconds(Collective(kind="all_to_all", devices=devices, bytes=bytes_))
        return seconds

    def _distinct(self, ranks: Sequence[int]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.plan.devices[rank] for rank in ranks))
