"""One rank's walk through a pipeline order: receive, compute, send, as the table says.

The table is the one that was simulated. Inputs of the next forward and of the next backward are asked for ahead, and
results are sent while the rank goes on, so that messages travel beside the computing. Tensors of skip connections go
straight to the stage that takes them, and their gradients straight back. With tensor parallelism the
ranks of a stage hold the same boundary tensor: each sends a part of it to its like in the next stage, where the parts
are gathered (Narayanan et al., 2021).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from stretto.comm.transport import Axis, Pending
from stretto.core.orders import KINDS, Action, Message, Order
from stretto.models.causal import CausalStage
from stretto.models.parallel.tensor import boundary_numel, gather_boundary, scatter_boundary


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
            total += self._evaluated(passage, micro_batch)
        return total

    def _evaluated(self, passage: Passage, micro_batch: int) -> torch.Tensor:
        """The loss of one micro-batch, 0 where the last stage does not lie."""
        loss = torch.zeros((), dtype=torch.float64)
        here: dict[Message, torch.Tensor] = {}
        going = []
        for stage in sorted(self.stages):
            action = Action("forward", micro_batch, stage)
            came = {}
            for message in self.order.inputs(action):
                away = self.order.crosses(message)
                came[message.skip] = self.whole(self.ask(message, passage), passage) if away else here.pop(message)
            y, skips = self.forward(action, came, passage)
            if stage == self.order.stages - 1:
                loss = y.double()
            for message in self.order.outputs(action):
                result = y if message.skip is None else skips[message.skip]
                if self.order.crosses(message):
                    going.append(self.send(message, result))
                else:
                    here[message] = result
        for pending in going:
            pending.wait()
        return loss

    def forward(
        self, action: Action, came: Mapping[int | None, torch.Tensor], passage: Passage
    ) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
        """The result of a stage, and the tensors of skip connections that it has for others, by number.

        Args:
            came: what other stages made, by skip connection; under None the result of the stage before.
        """
        micro_batch = action.micro_batch
        skips = {skip: tensor for skip, tensor in came.items() if skip is not None}
        y = self.stages[action.stage](
            came.get(None, passage.tokens[micro_batch]),
            passage.targets[micro_batch] if action.stage == self.order.stages - 1 else None,
            length=passage.length,
            recompute=self.recompute and torch.is_grad_enabled(),
            keys=passage.keys[micro_batch] if passage.keys else None,
            skips=skips,
        )
        return y, skips

    def ask(self, message: Message, passage: Passage) -> Pending[torch.Tensor]:
        """Post the receive of this rank's part of a message."""
        like = self._like(passage)
        source = self.order.rank_of(message.source.stage)
        part = like.new_empty(1).expand(boundary_numel(like.numel(), self.tp))
        return self.pp.receive(part, source, number=self.number(message))

    def send(self, message: Message, result: torch.Tensor) -> Pending[torch.Tensor]:
        """Send this rank's part of a message, all of which it has."""
        target = self.order.rank_of(message.target.stage)
        return self.pp.send(scatter_boundary(result, self.tp), target, number=self.number(message))

    def whole(self, pending: Pending[torch.Tensor], passage: Passage) -> torch.Tensor:
        """The tensor of which each rank of `tp` receives a part."""
        return gather_boundary(pending.wait(), self.tp, self._like(passage).shape)

    def _like(self, passage: Passage) -> torch.Tensor:
        """A tensor, of no memory, of the shape and type of what goes from stage to stage."""
        model = next(iter(self.stages.values()))
        return torch.empty(1, dtype=model.dtype).expand(*passage.tokens[0].shape, model.spec.hidden)

    def number(self, message: Message) -> int:
        """What tells a message from all others of a step."""
        kind, micro_batch, stage = message.target
        line = 0 if message.skip is None else 1 + message.skip
        number = (micro_batch * self.order.stages + stage) * 2 + KINDS.index(kind)
        return number * (1 + len(self.order.skips)) + line


@dataclass(frozen=True, kw_only=True)
class _Held:
    """What a forward leaves for its backward: what came in and what went out, by skip connection (None: the result)."""

    came: Mapping[int | None, torch.Tensor]
    made: Mapping[int | None, torch.Tensor]


class _Step:
    def __init__(self, pipeline: Pipeline, passage: Passage, watch: Watch):
        self.pipeline, self.passage, self.watch = pipeline, passage, watch
        self.order, self.pp = pipeline.order, pipeline.pp
        self.coming: dict[Message, Pending[torch.Tensor]] = {}
        self.here: dict[Message, torch.Tensor] = {}
        self.going: dict[Message, Pending[torch.Tensor]] = {}
        self.held: dict[tuple[int, int], _Held] = {}
        self.total = torch.zeros((), dtype=torch.float64)

    def run(self) -> torch.Tensor:
        program = self.order.programs[self.pp.rank]
        ahead = {kind: iter([a for a in program if a.kind == kind]) for kind in KINDS}
        for kind in KINDS:
            self._ask(next(ahead[kind], None))
        for action in program:
            came = self._inputs(action)
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

    def _ask(self, action: Action | None) -> None:
        """Post the receives of what `action` will need from other ranks."""
        if action is not None:
            for message in filter(self.order.crosses, self.order.inputs(action)):
                self.coming[message] = self.pipeline.ask(message, self.passage)

    def _inputs(self, action: Action) -> dict[int | None, torch.Tensor]:
        """What other stages made for `action`, by skip connection."""
        found = {}
        for message in self.order.inputs(action):
            away = message in self.coming
            found[message.skip] = (
                self.pipeline.whole(self.coming.pop(message), self.passage) if away else self.here.pop(message)
            )
        return found

    def _forward(self, action: Action, came: Mapping[int | None, torch.Tensor]) -> None:
        for tensor in came.values():
            tensor.requires_grad_()
        y, skips = self.pipeline.forward(action, came, self.passage)
        if action.stage == self.order.stages - 1:
            self.total += y.detach().double()
            y = y * self.passage.scale
        made: dict[int | None, torch.Tensor] = {None: y}
        for message in self.order.outputs(action):
            if message.skip is not None:
                made[message.skip] = skips[message.skip]
            self._pass_on(message, made[message.skip].detach())
        self.held[action.micro_batch, action.stage] = _Held(came=came, made=made)

    def _backward(self, action: Action, came: Mapping[int | None, torch.Tensor]) -> None:
        held = self.held.pop((action.micro_batch, action.stage))
        torch.autograd.backward(list(held.made.values()), [came.get(skip) for skip in held.made])
        # The gradients that came are the receipts for what went forward.
        for message in self.order.outputs(action._replace(kind="forward")):
            if message in self.going:
                self.going.pop(message).wait()
        for message in self.order.outputs(action):
            gradient = held.came[message.skip].grad
            assert gradient is not None
            self._pass_on(message, gradient)

    def _pass_on(self, message: Message, result: torch.Tensor) -> None:
        """Give a result to the action that takes it, here or on another rank."""
        if self.order.crosses(message):
            self.going[message] = self.pipeline.send(message, result)
        else:
            self.here[message] = result
