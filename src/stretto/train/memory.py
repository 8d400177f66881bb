"""Most bytes of tensors that a rank holds at once: its walk through a step, with what each piece holds (`traced`).

Weights and the optimizer's moments are always there. Activations come with each forward and go with its backward, as
the pipeline's order has it; gradients come with a stage's first backward. Then gradients are summed over the ranks
bucket by bucket, and the optimizer makes its copies.
"""

from __future__ import annotations

from collections.abc import Iterator

from stretto.core.orders import Action, Order
from stretto.models.spec import ModelSpec
from stretto.train.job import TrainJob
from stretto.train.optimize import DATA_AXES, in_buckets
from stretto.train.plan import TrainPlan
from stretto.train.traced import Parameter, parameters, pass_bytes

_MOMENTS = {"adamw": 2, "sgd": 0}
_STEP_COPIES = {"adamw": 1, "sgd": 0}
"""Tensors as large as all trained weights that a step of the optimizer makes for a while (foreach)."""
_SUM_COPIES = 3
"""Of a bucket while it is summed: joined, received, and the sum."""


def peak_bytes(job: TrainJob, plan: TrainPlan, spec: ModelSpec) -> list[float]:
    """By pipeline rank; of an uneven tensor axis the fullest rank."""
    order = plan.order(job)
    return [_Walk(job, plan, spec, order, rank).peak() for rank in range(plan.pp)]


def held_bytes(job: TrainJob, plan: TrainPlan, spec: ModelSpec, stage: int) -> float:
    """Bytes that a forward of a stage keeps until its backward."""
    pieces = pass_bytes(job, plan, spec)
    return sum(pieces[name].kept for name in _pieces(plan, stage))


def trained_numel(job: TrainJob, plan: TrainPlan, spec: ModelSpec, pipeline_rank: int) -> float:
    """Numbers that a rank trains."""
    return float(sum(each.numel for each in _of_rank(job, plan, spec, pipeline_rank) if each.trained))


def _pieces(plan: TrainPlan, stage: int) -> Iterator[str]:
    """Of a stage, in the order of a forward pass."""
    if stage == 0:
        yield "embed"
    yield from ["layer"] * plan.layers[stage]
    if stage == plan.pp * plan.chunks - 1:
        yield "head"


def _of_rank(job: TrainJob, plan: TrainPlan, spec: ModelSpec, rank: int) -> list[Parameter]:
    """The parameters of a rank's stages, in the order of the stages, one that two pieces share once."""
    pieces = parameters(job, plan, spec)
    found: list[Parameter] = []
    for stage in plan.stages_of(rank):
        for name in _pieces(plan, stage):
            whole = pieces[name]
            shared = name == "head" and plan.pp == 1 and spec.tied_embeddings
            found += whole[:-1] if shared else whole  # the norm, and the embedding's own table
    return found


class _Walk:
    """One rank's step, action by action."""

    def __init__(self, job: TrainJob, plan: TrainPlan, spec: ModelSpec, order: Order, rank: int):
        self.job, self.plan, self.spec, self.order, self.rank = job, plan, spec, order, rank
        self.width = 8.0 if job.dtype == "fp64" else 4.0
        self.pieces = pass_bytes(job, plan, spec)
        self.mine = _of_rank(job, plan, spec, rank)
        self.grads_of = {
            name: self.width * sum(each.numel for each in found if each.trained)
            for name, found in parameters(job, plan, spec).items()
        }
        if plan.pp * plan.chunks == 1 and spec.tied_embeddings:
            self.grads_of["embed"] = 0.0  # the head's backward has made them
        self.boundary = self.width * plan.micro_batch * (job.sequence // plan.cp) * spec.hidden
        chunks = plan.chunks
        # The next input of each way is asked for ahead.
        receives = (rank > 0 or chunks > 1) + (rank < plan.pp - 1 or chunks > 1) if plan.pp > 1 else 0
        self.asked = receives * self.boundary
        self.held = self.grads = self.sent = self.most = 0.0
        self.begun: set[int] = set()

    def peak(self) -> float:
        for action in self.order.programs[self.rank]:
            if action.kind == "forward":
                self._forward(action)
            else:
                self._backward(action)
        optimizer = self.job.optimizer.name
        weights = self.width * sum(each.numel for each in self.mine)
        trained = self.width * sum(each.numel for each in self.mine if each.trained)
        self.most = max(self.most, trained + self._summing(), trained * (1 + _STEP_COPIES[optimizer]))
        return weights + trained * _MOMENTS[optimizer] + self.most

    def _forward(self, action: Action) -> None:
        if action.stage:
            self.held += self.boundary  # what came in
        for name in _pieces(self.plan, action.stage):
            self._see(self.pieces[name].forward)
            self.held += self.pieces[name].kept

    def _backward(self, action: Action) -> None:
        if action.stage:
            self.sent += self.boundary  # a gradient on its way, until the step ends
        for name in reversed(list(_pieces(self.plan, action.stage))):
            self.held -= self.pieces[name].kept
            self._see(self.pieces[name].backward)
            if action.stage not in self.begun:
                self.grads += self.grads_of[name]
        self.begun.add(action.stage)
        if action.stage:
            self.held -= self.boundary

    def _see(self, more: float) -> None:
        self.most = max(self.most, self.held + self.grads + self.sent + self.asked + more)

    def _summing(self) -> float:
        """Bytes of the largest bucket's copies while gradients are summed."""
        groups: dict[tuple[str, ...], list[int]] = {}
        for each in self.mine:
            axes = (*(axis for axis in DATA_AXES if axis not in each.split), *each.partial)
            if each.trained and self.plan.grid.size(*axes) > 1:
                groups.setdefault(axes, []).append(each.numel)
        buckets = [sum(bucket) for numels in groups.values() for bucket in in_buckets(numels, lambda numel: numel)]
        tied = self.spec.tied_embeddings and self.plan.pp > 1 and self.rank in (0, self.plan.pp - 1)
        table = self.grads_of["embed"] if tied else 0.0  # what comes from the other end
        return max(table, _SUM_COPIES * self.width * max(buckets, default=0))
