"""One rank's walk through a pipeline order: receive, compute, send, as the table says.

The table is the one that was simulated. Inputs of the next forward and of the next backward are asked for ahead, and
results are sent while the rank goes on, so that messages travel beside the computing. With tensor parallelism the
ranks of a stage hold the same boundary tensor: each sends a part of it to its like in the next stage, where the parts
are gathered (Narayanan et al., 2021).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from stretto.comm.transport import Axis, Pending
from stretto.core.orders import KINDS, Action, Order
from stretto.models.causal import CausalStage
from stretto.models.parallel.tensor import boundary_numel, scatter_boundary


class Watch(Protocol):
    """Is told when a rank computes."""

    def begin(self, action: Action) -> None:
        """`action` has all it needs."""

    def end(self, action: Action) -> None:
        """It is done."""


@dataclass(frozen=True, kw_only=True)
class Passage:
    """What goes through a pipeline in one step.

    Attributes:
        tokens, targets: of each micro-batch, int64 [B, L] of this rank's part of the sequences.
        length: of the whole sequences.
        scale: of every loss, so that gradients add up to those of the mean over all tokens of the step.
        keys: of each micro-batch's tokens, by which numbers are dropped (`models.dropout`); empty: none are.
    """

    tokens: Sequence[torch.Tensor]
    targets: Sequence[torch.Tensor]
    length: int
    scale: float
    keys: Sequence[torch.Tensor] = ()


class Pipeline:
    """The stages of one rank, and its ways to the ranks before and after it.

    Args:
        order: of the step; its ranks are the places of `pp`.
        stages: those that lie here, by number.
        tp: the ranks that hold the same boundary tensors.
        recompute: keep the inputs of layers alone until backward.
    """

    def __init__(self, order: Order, stages: Mapping[int, CausalStage], pp: Axis, tp: Axis, *, recompute: bool):
        self.order, self.stages, self.recompute = order, stages, recompute
        self.pp, self.tp = pp, tp
        self._passed = torch.empty(0)

    def step(self, passage: Passage, watch: Watch) -> torch.Tensor:
        """Forward and backward of all micro-batches; gradients are added to the parameters'.

        Returns:
            The sum of the losses that arose here, 0 where the last stage does not lie.
        """
        return _Step(self, passage, watch).run()

    @torch.no_grad()
    def evaluate(self, passage: Passage) -> torch.Tensor:
        """The sum of the losses that arise here, without gradients."""
        total = torch.zeros((), dtype=torch.float64)
        for micro_batch in range(len(passage.tokens)):
            for stage in range(self.order.stages):
                if self.order.rank_of(stage) == self.pp.rank:
                    total += self._evaluated(passage, micro_batch, stage)
        return total

    def _evaluated(self, passage: Passage, micro_batch: int, stage: int) -> torch.Tensor:
        """One stage of one micro-batch; its loss, 0 of all but the last."""
        action = Action("forward", micro_batch, stage)
        x = passage.tokens[micro_batch]
        if stage:
            source = self.order.rank_of(stage - 1)
            like = self.boundary_like(passage, micro_batch, stage)
            x = (
                self._passed
                if source == self.pp.rank
                else self.whole(self.pp.receive(self.part_like(like), source, number=self.number(action)).wait(), like)
            )
        y = self.forward(action, x, passage)
        target = self.order.receiver(action)
        if target is None:
            return y.double()
        self._passed = y
        if self.order.rank_of(target) != self.pp.rank:
            number = self.number(Action("forward", micro_batch, target))
            self.pp.send(scatter_boundary(y, self.tp), self.order.rank_of(target), number=number).wait()
        return torch.zeros((), dtype=torch.float64)

    def forward(self, action: Action, x: torch.Tensor, passage: Passage) -> torch.Tensor:
        """The result of a stage."""
        targets = passage.targets[action.micro_batch] if action.stage == self.order.stages - 1 else None
        return self.stages[action.stage](  # type: ignore[no-any-return]
            x,
            targets,
            length=passage.length,
            recompute=self.recompute and torch.is_grad_enabled(),
            keys=passage.keys[action.micro_batch] if passage.keys else None,
        )

    def boundary_like(self, passage: Passage, micro_batch: int, stage: int) -> torch.Tensor:
        """A tensor, of no memory, of the shape and type of what enters `stage`."""
        model = next(iter(self.stages.values()))
        shape = (*passage.tokens[micro_batch].shape, model.spec.hidden)
        return torch.empty(1, dtype=model.dtype).expand(shape)

    def part_like(self, like: torch.Tensor) -> torch.Tensor:
        """The part of it that this rank sends and receives."""
        return like.new_empty(1).expand(boundary_numel(like.numel(), self.tp))

    def whole(self, part: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The boundary tensor of which each rank of `tp` received a part."""
        if self.tp.size == 1:
            return part.view(like.shape)
        sizes = [len(part)] * self.tp.size
        if like.numel() % self.tp.size:
            each, over = divmod(like.numel(), self.tp.size)
            sizes = [each + (place < over) for place in range(self.tp.size)]
        return self.tp.all_gather(part, sizes=sizes).view(like.shape)

    def number(self, action: Action) -> int:
        """What tells the message that `action` waits for from all others of a step."""
        kind, micro_batch, stage = action
        return (micro_batch * self.order.stages + stage) * 2 + KINDS.index(kind)


class _Step:
    def __init__(self, pipeline: Pipeline, passage: Passage, watch: Watch):
        self.pipeline, self.passage, self.watch = pipeline, passage, watch
        self.order, self.pp = pipeline.order, pipeline.pp
        self.coming: dict[Action, Pending[torch.Tensor]] = {}
        self.here: dict[Action, torch.Tensor] = {}
        self.going: dict[Action, Pending[torch.Tensor]] = {}
        self.held: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}
        self.total = torch.zeros((), dtype=torch.float64)

    def run(self) -> torch.Tensor:
        program = self.order.programs[self.pp.rank]
        ahead = {kind: iter([a for a in program if a.kind == kind]) for kind in KINDS}
        for kind in KINDS:
            self._ask(next(ahead[kind], None))
        for action in program:
            came = self._input(action)
            self._ask(next(ahead[action.kind], None))
            self.watch.begin(action)
            if action.kind == "forward":
                self._forward(action, came)
            else:
                self._backward(action, came)
            self.watch.end(action)
        for pending in self.going.values():
            pending.wait()
        return self.total

    def _source(self, action: Action) -> int | None:
        """The stage whose result `action` waits for."""
        stage = action.stage - (1 if action.kind == "forward" else -1)
        return stage if 0 <= stage < self.order.stages else None

    def _ask(self, action: Action | None) -> None:
        """Post the receive of what `action` will need from another rank."""
        if action is None:
            return
        source = self._source(action)
        if source is not None and self.order.rank_of(source) != self.pp.rank:
            like = self.pipeline.boundary_like(self.passage, action.micro_batch, action.stage)
            part = self.pipeline.part_like(like)
            place = self.order.rank_of(source)
            self.coming[action] = self.pp.receive(part, place, number=self.pipeline.number(action))

    def _input(self, action: Action) -> torch.Tensor | None:
        if action in self.coming:
            like = self.pipeline.boundary_like(self.passage, action.micro_batch, action.stage)
            return self.pipeline.whole(self.coming.pop(action).wait(), like)
        return self.here.pop(action, None)

    def _forward(self, action: Action, came: torch.Tensor | None) -> None:
        micro_batch, stage = action.micro_batch, action.stage
        x = self.passage.tokens[micro_batch] if came is None else came.requires_grad_()
        y = self.pipeline.forward(action, x, self.passage)
        if stage == self.order.stages - 1:
            self.total += y.detach().double()
            y = y * self.passage.scale
        else:
            self._pass_on(action, y.detach(), stage + 1)
        self.held[micro_batch, stage] = (x, y)

    def _backward(self, action: Action, came: torch.Tensor | None) -> None:
        micro_batch, stage = action.micro_batch, action.stage
        x, y = self.held.pop((micro_batch, stage))
        torch.autograd.backward(y, came)
        # The gradient that came is the receipt for what went forward.
        sent = self.going.pop(Action("forward", micro_batch, stage), None)
        if sent is not None:
            sent.wait()
        if stage:
            assert x.grad is not None
            self._pass_on(action, x.grad, stage - 1)

    def _pass_on(self, action: Action, result: torch.Tensor, stage: int) -> None:
        """Give the result to the next action of this micro-batch, here or on another rank."""
        following = Action(action.kind, action.micro_batch, stage)
        place = self.order.rank_of(stage)
        if place == self.pp.rank:
            self.here[following] = result
            return
        part = scatter_boundary(result, self.pipeline.tp)
        self.going[action] = self.pp.send(part, place, number=self.pipeline.number(following))
