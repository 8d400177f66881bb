"""One rank's part of a training run: its stages, its share of every batch, its part of every checkpoint.

All that differs between layouts is in the plan; a step is the same lines for all of them: walk the pipeline's table,
add up gradients over the ranks, clip, step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from stretto.comm.transport import Transport
from stretto.core.errors import UserError
from stretto.core.orders import Action
from stretto.core.record import Recorder
from stretto.core.trace import Key
from stretto.models.causal import CausalStage
from stretto.models.causal_layers import IGNORED
from stretto.models.causal_weights import initialise, load_weights
from stretto.models.dropout import token_keys
from stretto.models.parallel.layout import positions, split_sequence
from stretto.models.spec import ModelSpec
from stretto.models.weights import Weights
from stretto.train import optimize
from stretto.train.cuts import lora_of, split_of
from stretto.train.data import Samples
from stretto.train.job import TrainJob
from stretto.train.pipeline import Passage, Pipeline
from stretto.train.plan import TrainPlan


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What a step was.

    Attributes:
        step: its number, from 0.
        loss: mean over all of the batch's tokens, before the step.
        gradient_norm: before clipping.
        learning_rate: of the step.
        tokens: of the whole batch.
        seconds: from the step's begin to its end on this rank.
        sent_bytes: by this rank.
    """

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float
    tokens: int
    seconds: float
    sent_bytes: int


@dataclass(kw_only=True)
class Watcher:
    """Writes the spans of a rank's actions into a record, in seconds since `origin` of the machine's own clock."""

    recorder: Recorder
    rank: int
    origin: float
    step: int = 0
    recording: bool = True
    begun: float = field(default=0.0, init=False)

    def now(self) -> float:
        return time.perf_counter() - self.origin

    def begin(self, action: Action) -> None:
        self.begun = self.now()

    def end(self, action: Action) -> None:
        self._span(self.begun, Key(action.kind, self.step, action.micro_batch, action.stage, self.rank))

    def mark(self, phase: str, begun: float) -> None:
        """A span of something else, from `begun` to now."""
        self._span(begun, Key(phase, self.step, rank=self.rank))

    def _span(self, begun: float, key: Key) -> None:
        if self.recording:
            self.recorder.span(f"rank {self.rank}", begun, self.now(), key)

    def spans(self) -> list[list[Any]]:
        """[start, finish, phase, step, micro-batch, stage] of each, as plain values."""
        return [[span.start, span.finish, *span.key[:4]] for span in self.recorder.trace()]


class Trainer:
    """A rank of a run.

    Args:
        spec: the model; `weights` fill it, or the job's seed where they are None.
        data, held_out: sequences to train on and to evaluate on.
        transport: the way to the other ranks, on the plan's grid.
        origin: of the times in the record, on the machine's monotonic clock.
    """

    def __init__(
        self,
        job: TrainJob,
        plan: TrainPlan,
        spec: ModelSpec,
        weights: Weights | None,
        data: Samples,
        held_out: Samples,
        transport: Transport,
        *,
        origin: float = 0.0,
    ):
        self.job, self.plan, self.spec = job, plan, spec
        self.data, self.held_out, self.transport = data, held_out, transport
        self.hooks: list[optimize.StepHook] = []
        self.watcher = Watcher(recorder=Recorder("measured"), rank=transport.rank, origin=origin)
        self.order = plan.order(job)
        self.stages = self._stages(weights)
        self.pipeline = Pipeline(
            self.order, self.stages, transport.axis("pp"), transport.axis("tp"), recompute=plan.recompute
        )
        self.trained = optimize.Trained(self.stages.values(), transport)
        self.optimizer = optimize.build(job.optimizer, self.trained)
        self.step = 0
        self._data_axis = transport.axis("dp", "ep")
        self._cp = transport.axis("cp")

    def _stages(self, weights: Weights | None) -> dict[int, CausalStage]:
        job, plan = self.job, self.plan
        split, lora = split_of(plan, self.transport), lora_of(job)
        found = {}
        for number in range(self.order.stages):
            if self.order.rank_of(number) == self.transport.axis("pp").rank:
                found[number] = CausalStage(
                    self.spec,
                    plan.stage_layers(number),
                    first=number == 0,
                    last=number == self.order.stages - 1,
                    split=split,
                    lora=lora,
                    dtype=torch.float64 if job.dtype == "fp64" else torch.float32,
                    compute=torch.bfloat16 if job.dtype == "bf16" else None,
                    dropout=job.shape.dropout if job.shape else 0.0,
                )
        for stage in found.values():
            if weights is None:
                initialise(stage, seed=job.seed)
            else:
                load_weights(stage, weights)
        return found

    @property
    def weight_bytes(self) -> int:
        """Of all parameters that lie here, a shared one once."""
        return sum(parameter.nbytes for stage in self.stages.values() for parameter in stage.parameters())

    @property
    def moment_bytes(self) -> int:
        """Of the optimizer's state that lies here."""
        return sum(value.nbytes for state in self.optimizer.state.values() for value in state.values())

    def train_step(self) -> StepReport:
        """One step of the optimizer over one global batch.

        Raises:
            UserError: the gradients are no numbers any more; the weights are as they were.
        """
        watcher, sent = self.watcher, self.transport.meter.bytes
        watcher.step = self.step
        begun = watcher.now()
        numbers = self.data.batch(self.step, self.job.global_batch)
        tokens = len(numbers) * self.job.sequence
        loss = self.pipeline.step(self._passage(self.data, numbers, 1.0 / tokens, training=True), watcher)

        summing = watcher.now()
        self.trained.sum_gradients()
        watcher.mark("sum gradients", summing)
        stepping = watcher.now()
        norm = self._clip()
        if not math.isfinite(norm):
            raise UserError(
                f"the gradient of step {self.step} is {norm}: training has diverged",
                field="optimizer.learning_rate",
                right="a smaller one, or a smaller optimizer.clip_norm",
            )
        rate = optimize.learning_rate(self.job.optimizer, self.step, self.job.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        for hook in self.hooks:
            hook.before(self.step, self.trained.parameters)
        if self.trained.parameters:
            self.optimizer.step()
        for hook in self.hooks:
            hook.after(self.step, self.trained.parameters)
        self.trained.clear()
        watcher.mark("optimizer", stepping)

        mean = self._everywhere(loss) / tokens
        report = StepReport(
            step=self.step,
            loss=mean,
            gradient_norm=norm,
            learning_rate=rate,
            tokens=tokens,
            seconds=watcher.now() - begun,
            sent_bytes=self.transport.meter.bytes - sent,
        )
        self.step += 1
        return report

    def evaluate(self) -> float:
        """Mean loss over the held-out sequences, in batches of which the last is filled up with some that count not."""
        count = len(self.held_out)
        share = self.plan.data_ranks * self.plan.micro_batch * self.order.micro_batches
        total = 0.0
        for first in range(0, count, share):
            numbers = [number % count for number in range(first, first + share)]
            passage = self._passage(self.held_out, numbers, 1.0, counted=min(share, count - first))
            total += self._everywhere(self.pipeline.evaluate(passage))
        return total / (count * self.job.sequence)

    def _clip(self) -> float:
        norm = self.trained.norm()
        limit = self.job.optimizer.clip_norm
        if limit is not None and norm > limit:
            self.trained.scale(limit / norm)
        return norm

    def _everywhere(self, loss: torch.Tensor) -> float:
        """A sum of losses over all ranks that have different tokens or another end of the model."""
        return float(self.transport.axis("pp", "dp", "ep", "cp").all_reduce_(loss.view(1)))

    def _passage(
        self,
        source: Samples,
        numbers: Sequence[int],
        scale: float,
        *,
        counted: int | None = None,
        training: bool = False,
    ) -> Passage:
        """This rank's share of some sequences, in micro-batches; those from `counted` on count for nothing."""
        place, size = self._data_axis.rank, self._data_axis.size
        each = len(numbers) // size
        mine = numbers[place * each : (place + 1) * each]
        tokens, targets = (torch.from_numpy(part) for part in source.at(mine))
        if counted is not None:
            left = max(0, counted - place * each)
            targets[left:] = IGNORED
        layout = self.plan.cp_layout
        tokens, targets = (split_sequence(part, self._cp, 1, layout) for part in (tokens, targets))
        size_of_pass = self.plan.micro_batch
        keys: Sequence[torch.Tensor] = ()
        if training and self.job.drops:
            where = positions(self.job.sequence, self._cp, layout)
            keys = token_keys(self.job.seed, self.step, mine, where).split(size_of_pass)
        return Passage(
            tokens=tokens.split(size_of_pass),
            targets=targets.split(size_of_pass),
            length=self.job.sequence,
            scale=scale,
            keys=keys,
        )
