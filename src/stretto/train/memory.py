"""Most bytes of tensors that a rank holds at once: its walk through a step, with what each piece holds (`traced`).

Weights and the optimizer's moments are always there. Activations come with each forward and go with its backward, as
the pipeline's order has it, and tensors of skip connections with the forward that takes them; gradients come with a
stage's first backward. Then gradients are summed over the ranks
bucket by bucket, and the optimizer makes its copies.
"""

from __future__ import annotations

from collections.abc import Iterator

from stretto.core.orders import KINDS, Action, Message, Order
from stretto.models.spec import ModelSpec
from stretto.train.job import TrainJob
from stretto.train.optimize import DATA_AXES, cut, in_buckets
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
    pieces, order = pass_bytes(job, plan, spec), plan.order(job)
    skips = sum(message.skip is not None for message in _arriving(order, Action("forward", 0, stage)))
    return sum(pieces[name].kept for name in _pieces(plan, stage)) + skips * boundary_bytes(job, plan, spec)


def trained_numel(job: TrainJob, plan: TrainPlan, spec: ModelSpec, pipeline_rank: int) -> float:
    """Numbers that a rank trains."""
    return float(sum(each.numel for each in _of_rank(job, plan, spec, pipeline_rank) if each.trained))


def boundary_bytes(job: TrainJob, plan: TrainPlan, spec: ModelSpec) -> float:
    """Of a tensor that goes from stage to stage."""
    return number_bytes(job) * plan.micro_batch * (job.sequence // plan.cp) * spec.hidden


Numels = dict[tuple[str, ...], list[int]]
"""Numbers of parameters by the axes over which their gradients are summed."""


def summed_numels(job: TrainJob, plan: TrainPlan, spec: ModelSpec, pipeline_rank: int) -> Numels:
    """Of a rank, where there is more than one to sum over."""
    groups: Numels = {}
    for each in _of_rank(job, plan, spec, pipeline_rank):
        axes = (*(axis for axis in DATA_AXES if axis not in each.split), *each.partial)
        if each.trained and plan.grid.size(*axes) > 1:
            groups.setdefault(axes, []).append(each.numel)
    return groups


def number_bytes(job: TrainJob) -> float:
    """Of a weight, and of what goes between ranks."""
    return 8.0 if job.dtype == "fp64" else 4.0


def _arriving(order: Order, action: Action) -> list[Message]:
    """What comes from other ranks for an action."""
    return [message for message in order.inputs(action) if order.crosses(message)]


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
        self.width = number_bytes(job)
        self.pieces = pass_bytes(job, plan, spec)
        self.mine = _of_rank(job, plan, spec, rank)
        self.grads_of = {
            name: self.width * sum(each.numel for each in found if each.trained)
            for name, found in parameters(job, plan, spec).items()
        }
        if plan.pp * plan.chunks == 1 and spec.tied_embeddings:
            self.grads_of["embed"] = 0.0  # the head's backward has made them
        self.boundary = boundary_bytes(job, plan, spec)
        # The next inputs of each way are asked for ahead.
        asked = [max(len(_arriving(order, Action(kind, 0, stage))) for stage in plan.stages_of(rank)) for kind in KINDS]
        self.asked = sum(asked) * self.boundary
        self.held = self.grads = self.sent = self.most = 0.0
        self.begun: set[int] = set()
        # Skip connections inside a stage, by the layer that takes: from its backward on until that of the layer that
        # made the tensor lies a gradient.
        self.inside = {
            taken: made
            for made, taken in spec.skip_pairs
            if any({made, taken} <= set(plan.stage_layers(stage)) for stage in plan.stages_of(rank))
        }

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
        self.held += self._came(action)
        for name in _pieces(self.plan, action.stage):
            self._see(self.pieces[name].forward)
            self.held += self.pieces[name].kept

    def _backward(self, action: Action) -> None:
        crosses, out = self.order.crosses, self.order.outputs(action)
        skips = [message for message in self.order.inputs(action) if message.skip is not None]
        lines = {self.spec.skip_pairs[each.skip][1]: each for each in out if each.skip is not None}
        # Gradients on their way to other ranks are held until the step ends. Those of skip connections that came, or
        # lie here since the backward of a later stage of this rank, are held until this backward is done.
        self.sent += sum(crosses(each) for each in out if each.skip is None) * self.boundary
        self.held += sum(map(crosses, skips)) * self.boundary
        layers = iter(reversed(self.plan.stage_layers(action.stage)))
        for name in reversed(list(_pieces(self.plan, action.stage))):
            layer = next(layers) if name == "layer" else -1
            if layer in self.inside.values():
                self.held -= self.boundary
            self.held -= self.pieces[name].kept
            self._see(self.pieces[name].backward)
            if layer in lines and crosses(lines[layer]):
                self.sent += self.boundary
            elif layer in lines or layer in self.inside:
                self.held += self.boundary
            if action.stage not in self.begun:
                self.grads += self.grads_of[name]
        self.begun.add(action.stage)
        self.held -= len(skips) * self.boundary
        self.held -= self._came(action._replace(kind="forward"))

    def _came(self, action: Action) -> float:
        """Bytes that a forward takes from other stages; skip connections from this rank lie here anyway."""
        skips = sum(message.skip is not None for message in _arriving(self.order, action))
        return ((action.stage > 0) + skips) * self.boundary

    def _see(self, more: float) -> None:
        self.most = max(self.most, self.held + self.grads + self.sent + self.asked + more)

    def _summing(self) -> float:
        """Bytes of the largest bucket's copies while gradients are summed."""
        groups = summed_numels(self.job, self.plan, self.spec, self.rank).values()
        pieces = [[piece for numel in numels for piece in cut(numel)] for numels in groups]
        buckets = [sum(bucket) for numels in pieces for bucket in in_buckets(numels, lambda numel: numel)]
        tied = self.spec.tied_embeddings and self.plan.pp > 1 and self.rank in (0, self.plan.pp - 1)
        parts = cut(round(self.grads_of["embed"] / self.width)) if tied else []
        table = self.width * max(parts, default=0)  # what comes from the other end
        return max(table, _SUM_COPIES * self.width * max(buckets, default=0))
