"""Seconds of a plan's pieces on this machine, with as many ranks at work as the plan has.

A piece is the embedding, one layer or the head, forward or backward, for some numbers of sequences a pass; a message
between stages; a sum of gradients; the optimizer. Ranks measure the same piece at the same time, as they will compute
it, with the collectives that are inside it. The job's text is never touched: tokens are made up.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import cycle
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from stretto.comm.transport import Axis, Transport
from stretto.hardware.probe import memory_bytes_here
from stretto.models.causal import CausalStage
from stretto.models.causal_weights import initialise
from stretto.train import optimize
from stretto.train.cuts import lora_of, split_of
from stretto.train.job import TrainJob
from stretto.train.plan import TrainPlan
from stretto.train.session import model_of

ROUNDS = 7
"""Their mean counts, without the fastest and the slowest: a step is the sum of many pieces, slow ones among them."""
_SUM_NUMELS = (1_000, 8_000_000)
_LAYERS = 4
"""So many layers take turns."""
_STEP_ROUNDS = 3
_STEP_TENSORS = 5
"""Copies of a weight while the optimizer steps: itself, its gradient, two moments, one for a while."""
_MOST_MEMORY = 0.25
"""At most such a part of the machine's memory is filled, by all ranks together, for one piece."""
_MOST_BETWEEN = 512_000_000
"""At most so many bytes are read before a piece is timed: see `_Bench._leave`."""

Points = dict[str, list[tuple[float, float]]]
"""Of each piece, (sequences a pass, bytes or numbers; seconds)."""


def measure_rank(job: TrainJob, plan: TrainPlan, transport: Transport, micro_batches: Sequence[int]) -> Points:
    """What this rank sees; every rank calls it."""
    torch.set_num_threads(plan.threads or 1)
    return _Bench(job, plan, transport).points(micro_batches)


class _Bench:
    def __init__(self, job: TrainJob, plan: TrainPlan, transport: Transport):
        self.job, self.plan, self.transport, self.split = job, plan, transport, split_of(plan, transport)
        self.stage = self._stage()
        self.numel = model_of(job).spec.parameters() / (plan.tp * plan.ep)  # that a rank of the whole model holds
        self.between = torch.zeros(int(min(_MOST_BETWEEN, 2 * self.numel * self.stage.dtype.itemsize)) // 4)
        self.everyone = transport.axis(*(name for name, _ in plan.grid.axes))
        self.found: Points = {}

    def _stage(self) -> CausalStage:
        """Some layers between the embedding and the head, cut as the plan has it."""
        lora = lora_of(self.job)
        stage = CausalStage(
            replace(model_of(self.job).spec, layers=_LAYERS),
            split=self.split,
            lora=None if lora is None else replace(lora, dropout=0.0),
            dtype=torch.float64 if self.job.dtype == "fp64" else torch.float32,
            compute=torch.bfloat16 if self.job.dtype == "bf16" else None,
        )
        initialise(stage, seed=0)
        return stage

    def points(self, micro_batches: Sequence[int]) -> Points:
        for micro_batch in micro_batches:
            self._passes(micro_batch)
        self._sums()
        self._steps()
        return self.found

    def _passes(self, micro_batch: int) -> None:
        """Forward and backward of embedding, layer and head, and of a layer that computes its forward pass again."""
        stage, length = self.stage, self.job.sequence
        shape = (micro_batch, length // self.plan.cp)
        tokens = torch.randint(0, stage.spec.vocab, shape, generator=torch.Generator().manual_seed(0))
        table, layers, norm = stage.model.embed_tokens, cycle(stage.model.layers.values()), stage.model.norm
        assert table is not None
        assert norm is not None
        turns = stage._turn(length)
        inner = torch.randn(*shape, stage.spec.hidden, dtype=stage.dtype)

        def embed() -> torch.Tensor:
            return table.embed(tokens)

        def through() -> torch.Tensor:
            return next(layers)(inner.detach().requires_grad_(), turns)  # type: ignore[no-any-return]

        def again() -> torch.Tensor:
            return checkpoint(next(layers), inner.detach().requires_grad_(), turns, use_reentrant=False)  # type: ignore[no-any-return]

        def head() -> torch.Tensor:
            rows = norm(inner.detach().requires_grad_()).flatten(0, 1)
            return stage.head.losses(rows, tokens.flatten()).sum()

        for name, forward in (("embed", embed), ("layer", through), ("again", again), ("head", head)):
            self._piece(name, micro_batch, forward, inner)
        self._time("message", float(inner.nbytes // self.plan.tp), lambda: self._message(inner))

    def _piece(self, name: str, micro_batch: int, forward: Callable[[], torch.Tensor], inner: torch.Tensor) -> None:
        trained = any(parameter.requires_grad for parameter in self.stage.parameters())
        forwards, backwards = [], []
        for _ in range(ROUNDS + 1):
            self._leave()
            inner.sum()  # what the layer before has just made
            self.everyone.barrier()
            begun = time.perf_counter()
            y = self._computed(forward)
            forwards.append(time.perf_counter() - begun)
            if not (y.requires_grad and trained):
                backwards.append(1e-9)
                continue
            self._leave()
            gradient = torch.ones_like(y)
            self.everyone.barrier()
            begun = time.perf_counter()
            torch.autograd.backward(y, gradient)
            backwards.append(time.perf_counter() - begun)
            del y, gradient  # as in a run, where a pass finds the memory of the one before it
        for way, seconds in (("forward", forwards), ("backward", backwards)):
            self.found.setdefault(f"{name}-{way}", []).append((micro_batch, _typical(seconds[1:])))

    def _leave(self) -> None:
        """Read as much as a run reads, weights and gradients of all layers, before it comes back to the same layer: so
        that weights and what a pass has kept are in no cache, as they will be.
        """
        self.between.sum()

    def _computed(self, forward: Callable[[], torch.Tensor]) -> torch.Tensor:
        with torch.autocast("cpu", self.stage.compute, enabled=self.stage.compute is not None):
            return forward()

    def _message(self, inner: torch.Tensor) -> None:
        size = self.everyone.size
        if size > 1:
            place = self.everyone.rank
            part = inner.flatten()[: inner.numel() // self.plan.tp]
            self.everyone.exchange([part], to=(place + 1) % size, source=(place - 1) % size).wait()

    def _sums(self) -> None:
        """Adding up gradients over the data ranks, as `optimize` does."""
        axis: Axis = self.transport.axis(*optimize.DATA_AXES)
        for numel in _SUM_NUMELS:
            gradient = torch.zeros(numel, dtype=self.stage.dtype)

            def add(gradient: torch.Tensor = gradient) -> None:
                flat = axis.all_reduce_(torch.cat([gradient]))
                gradient.copy_(flat)

            self._time("sum", float(numel), add if axis.size > 1 else lambda: None)

    def _steps(self) -> None:
        """The norm, clipping and the optimizer over what a rank of this stage trains, and over about as much as one of
        the whole model does, of which each number takes longer.
        """
        self._step([self.stage], ROUNDS)
        copies = self._copies()
        if copies:
            self._step([self.stage, *(self._stage() for _ in range(copies))], _STEP_ROUNDS)

    def _copies(self) -> int:
        """How many stages more there must be, and can be, for that: the same on every rank."""
        if self.job.adapters:
            return 0
        most = _MOST_MEMORY * memory_bytes_here() / (self.plan.grid.world * _STEP_TENSORS * self.stage.dtype.itemsize)
        stage = self.stage.spec.parameters() / (self.plan.tp * self.plan.ep)
        return max(0, round(min(self.numel, most) / stage) - 1)

    def _step(self, stages: Sequence[CausalStage], rounds: int) -> None:
        trained = optimize.Trained(stages, self.transport)
        numel = sum(parameter.numel() for parameter in trained.parameters)
        if not numel:
            return
        optimizer = optimize.build(self.job.optimizer, trained)

        def step() -> None:
            for parameter in trained.parameters:
                if parameter.grad is None:
                    parameter.grad = torch.full_like(parameter, 1e-3)
            trained.norm()
            trained.scale(0.5)
            optimizer.step()

        self._time("optimizer", float(numel), step, rounds)

    def _time(self, piece: str, at: float, call: Callable[[], Any], rounds: int = ROUNDS) -> None:
        """What some rounds take, all ranks beginning together; the first round warms up."""
        seconds = []
        for _ in range(rounds + 1):
            self._leave()
            self.everyone.barrier()
            begun = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - begun)
        self.found.setdefault(piece, []).append((at, max(1e-9, _typical(seconds[1:]))))


def _typical(seconds: Sequence[float]) -> float:
    return statistics.fmean(sorted(seconds)[1:-1])
