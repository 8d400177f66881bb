"""From gradients to new weights on one rank of many: sums over the ranks, the norm that counts each weight once, steps.

Sums are taken in rank order (`comm`), so the same layout gives the same bits. A tensor that is cut is counted by each
rank that holds a part, one that is whole by the first rank of those axes alone, a tied copy by its original.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

import torch

from stretto.comm.transport import Axis, Transport
from stretto.models.causal import CausalStage
from stretto.models.causal_layers import Placement
from stretto.train.job import Optimizer

DATA_AXES = ("dp", "ep", "cp")
"""The axes whose ranks see different tokens."""
_BUCKET_NUMEL = 8_000_000
"""Numbers that are summed at once: larger room would be asked of the system, page by page, for every sum."""
_NORM_NUMEL = 1_000_000
"""So many gradients at a time are widened for the norm."""
_LEAST_SHARE = 0.1


T = TypeVar("T")


class StepHook(Protocol):
    """Is called around each step of the optimizer, on every rank, in the order of the trainer's list."""

    def before(self, step: int, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Gradients are summed and clipped; weights are still the old ones."""

    def after(self, step: int, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Weights are the new ones."""

    def flush(self) -> None:
        """The run ends or a checkpoint is taken: what was put off must be done now."""


class Trained:
    """The parameters of a rank's stages that are trained, and where their whole tensors lie."""

    def __init__(self, stages: Iterable[CausalStage], transport: Transport):
        self.transport = transport
        self.stages = list(stages)
        self.names: list[str] = []
        self.parameters: list[torch.nn.Parameter] = []
        self.places: list[Placement] = []
        for stage in self.stages:
            places = stage.placements()
            for name, parameter in stage.named_parameters():
                if parameter.requires_grad:
                    self.names.append(name)
                    self.parameters.append(parameter)
                    self.places.append(places[name])

    def sum_gradients(self) -> None:
        """Add up what the ranks found, tied copies first."""
        self._sum_tied()
        groups: dict[tuple[str, ...], list[torch.Tensor]] = {}
        for parameter, place in zip(self.parameters, self.places, strict=True):
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            axes = (*(axis for axis in DATA_AXES if axis not in place.split), *place.partial)
            groups.setdefault(axes, []).append(parameter.grad)
        for axes in sorted(groups):
            axis = self.transport.axis(*axes)
            if axis.size > 1:
                parts = [part for gradient in groups[axes] for part in gradient.view(-1).split(_BUCKET_NUMEL)]
                for bucket in in_buckets(parts, torch.Tensor.numel):
                    _sum_bucket(bucket, axis)

    def _sum_tied(self) -> None:
        """Gradients of the embedding and of the head that is its copy, on the first and on the last rank."""
        pp = self.transport.axis("pp")
        for stage in self.stages:
            table = stage.tied_pair
            if table is None or not table.requires_grad:
                continue
            assert table.grad is not None
            if pp.size == 1:
                continue
            other = pp.size - 1 if stage.first else 0
            for part in table.grad.view(-1).split(_BUCKET_NUMEL):
                (theirs,) = pp.exchange([part], to=other, source=other).wait()
                part += theirs  # of two, any order gives the same bits

    def norm(self) -> float:
        """The length of the whole gradient, the same on every rank."""
        total = torch.zeros(1, dtype=torch.float64)
        for name, parameter, place in zip(self.names, self.parameters, self.places, strict=True):
            if self._counts(name, parameter, place, ("tp", "ep")):
                assert parameter.grad is not None
                for part in parameter.grad.view(-1).split(_NORM_NUMEL):
                    total += part.double().square().sum()
        return math.sqrt(float(self.transport.axis("pp", "ep", "tp").all_reduce_(total)))

    def writes(self, name: str, parameter: torch.nn.Parameter, place: Placement) -> bool:
        """Whether this rank is the first that holds this part."""
        return self._counts(name, parameter, place, ("dp", "ep", "cp", "tp"))

    def _counts(self, name: str, parameter: torch.nn.Parameter, place: Placement, axes: Sequence[str]) -> bool:
        grid, rank = self.transport.grid, self.transport.rank
        if any(grid.coordinate(rank, axis) for axis in axes if axis not in place.split):
            return False
        return name != "lm_head.weight" or all(stage.tied_pair is not parameter for stage in self.stages)

    def scale(self, factor: float) -> None:
        """Multiply every gradient."""
        for parameter in self.parameters:
            assert parameter.grad is not None
            parameter.grad.mul_(factor)

    def clear(self) -> None:
        """Forget the gradients."""
        for parameter in self.parameters:
            parameter.grad = None


def cut(numel: int) -> list[int]:
    """The lengths in which a gradient of so many numbers is summed."""
    whole, rest = divmod(numel, _BUCKET_NUMEL)
    return [_BUCKET_NUMEL] * whole + [rest] * (rest > 0)


def in_buckets(items: Iterable[T], numel: Callable[[T], int]) -> Iterator[list[T]]:
    """Neighbours together up to a size, so that small ones share a message."""
    bucket: list[T] = []
    for item in items:
        if bucket and sum(map(numel, bucket)) + numel(item) > _BUCKET_NUMEL:
            yield bucket
            bucket = []
        bucket.append(item)
    if bucket:
        yield bucket


def _sum_bucket(bucket: Sequence[torch.Tensor], axis: Axis) -> None:
    flat = axis.all_reduce_(torch.cat(list(bucket)))
    for gradient, part in zip(bucket, flat.split([gradient.numel() for gradient in bucket]), strict=True):
        gradient.copy_(part)


def build(settings: Optimizer, trained: Trained) -> torch.optim.Optimizer:
    """torch's optimizer for these parameters; those that are no matrices do not decay."""
    if not trained.parameters:
        empty = [torch.nn.Parameter(torch.zeros(1))]
        return torch.optim.SGD(empty, lr=settings.learning_rate)
    matrices = [p for p, place in zip(trained.parameters, trained.places, strict=True) if len(place.shape) > 1]
    others = [p for p, place in zip(trained.parameters, trained.places, strict=True) if len(place.shape) == 1]
    groups = [
        {"params": matrices, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if settings.name == "sgd":
        return torch.optim.SGD(groups, lr=settings.learning_rate)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=settings.betas, eps=settings.eps, foreach=True)


def learning_rate(settings: Optimizer, step: int, steps: int) -> float:
    """Of a step, from 0, of `steps`."""
    if step < settings.warmup_steps:
        return settings.learning_rate * (step + 1) / settings.warmup_steps
    if settings.decay == "constant" or steps <= settings.warmup_steps:
        return settings.learning_rate
    done = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
    falling = 1 - done if settings.decay == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return settings.learning_rate * (_LEAST_SHARE + (1 - _LEAST_SHARE) * falling)
