"""Bytes of a rank: weights, gradients, moments, and the activations that its pipeline order keeps.

What a layer keeps until its backward is found by running this package's own layer on tensors without contents
(torch's fake tensors), which make every allocation that real ones would; sizes need no machine. With experts, every
expert is taken to get its mean share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from stretto.core.orders import Order
from stretto.models.parallel.tensor import share
from stretto.models.spec import ModelSpec
from stretto.train.job import TrainJob
from stretto.train.plan import TrainPlan

_MOMENTS = {"adamw": 2, "sgd": 0}
_STEP_COPIES = {"adamw": 1, "sgd": 0}
"""Tensors as large as all trained weights that a step of the optimizer makes for a while (foreach)."""


@dataclass(frozen=True, kw_only=True)
class PassBytes:
    """Bytes of one micro-batch in a piece.

    Attributes:
        kept: held from forward until backward, the result included.
        forward, backward: most at once beyond what is kept before, while it computes.
    """

    kept: float
    forward: float
    backward: float


def peak_bytes(job: TrainJob, plan: TrainPlan, spec: ModelSpec) -> list[float]:
    """Most bytes of tensors at once, by pipeline rank; of an uneven tensor axis the fullest rank."""
    order = plan.order(job)
    return [_rank_bytes(job, plan, spec, order, rank) for rank in range(plan.pp)]


def held_bytes(job: TrainJob, plan: TrainPlan, spec: ModelSpec, stage: int) -> float:
    """Bytes that a forward of a stage keeps until its backward."""
    pieces = _pieces(job, plan, spec)
    return sum(pieces[name].kept * count for name, count in _counts(plan, stage).items())


def trained_numel(job: TrainJob, plan: TrainPlan, spec: ModelSpec, pipeline_rank: int) -> float:
    """Numbers that a rank trains."""
    return sum(_numel(job, plan, spec, stage, trained=True) for stage in _stages(plan, pipeline_rank))


def weight_numel(job: TrainJob, plan: TrainPlan, spec: ModelSpec, pipeline_rank: int) -> float:
    """Numbers that a rank holds as weights."""
    return sum(_numel(job, plan, spec, stage, trained=False) for stage in _stages(plan, pipeline_rank))


def _rank_bytes(job: TrainJob, plan: TrainPlan, spec: ModelSpec, order: Order, rank: int) -> float:
    width = 8.0 if job.dtype == "fp64" else 4.0
    trained = trained_numel(job, plan, spec, rank) * width
    still = weight_numel(job, plan, spec, rank) * width + trained * _MOMENTS[job.optimizer.name]
    pieces = _pieces(job, plan, spec)
    held = most = 0.0
    # Gradients appear in the first backward of a stage; from then on all of that stage's are there.
    grads: set[int] = set()
    for action in order.programs[rank]:
        counts = _counts(plan, action.stage)
        kept = held_bytes(job, plan, spec, action.stage)
        now = held + sum(_numel(job, plan, spec, stage, trained=True) for stage in grads) * width
        if action.kind == "forward":
            most = max(most, now + kept + max(pieces[name].forward - pieces[name].kept for name in counts))
            held += kept
        else:
            grads.add(action.stage)
            fresh = sum(_numel(job, plan, spec, stage, trained=True) for stage in grads) * width
            most = max(most, held + fresh + max(pieces[name].backward - pieces[name].kept for name in counts))
            held -= kept
    stepping = trained * (1 + _STEP_COPIES[job.optimizer.name])
    return still + max(most, stepping)


def _stages(plan: TrainPlan, rank: int) -> list[int]:
    return [rank + chunk * plan.pp for chunk in range(plan.chunks)]


def _counts(plan: TrainPlan, stage: int) -> dict[str, int]:
    """How many of each piece a stage has."""
    found = {"layer": plan.layers[stage]}
    if stage == 0:
        found["embed"] = 1
    if stage == plan.pp * plan.chunks - 1:
        found["head"] = 1
    return found


def _numel(job: TrainJob, plan: TrainPlan, spec: ModelSpec, stage: int, *, trained: bool) -> float:
    groups = len(share(spec.kv_heads, 0, plan.tp))
    ffn = len(share(spec.ffn, 0, plan.tp))
    q, kv = groups * (spec.heads // spec.kv_heads) * spec.head_dim, groups * spec.head_dim
    hidden, experts = spec.hidden, spec.experts // plan.ep
    matrices = {"q_proj": (q, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden), "o_proj": (hidden, q)}
    if not spec.experts:
        matrices |= {"gate_proj": (ffn, hidden), "up_proj": (ffn, hidden), "down_proj": (hidden, ffn)}
    adapters = job.adapters
    ranks = adapters.rank if adapters else 0
    lora = sum(ranks * (a + b) for name, (a, b) in matrices.items() if adapters and name in adapters.targets)
    if trained and adapters:
        return float(plan.layers[stage] * lora)
    layer = sum(a * b for a, b in matrices.values()) + lora + 2 * hidden
    layer += 3 * experts * ffn * hidden + spec.experts * hidden
    layer += (q + 2 * kv if spec.qkv_bias else 0) + (2 * spec.head_dim if spec.qk_norm else 0)
    last = plan.pp * plan.chunks - 1
    table = len(share(spec.vocab, 0, plan.tp)) * hidden
    ends = (table if stage == 0 else 0) + (hidden if stage == last else 0)
    if stage == last and (last > 0 or not spec.tied_embeddings):
        ends += table
    return float(plan.layers[stage] * layer + ends)


def _pieces(job: TrainJob, plan: TrainPlan, spec: ModelSpec) -> dict[str, PassBytes]:
    cut = (plan.tp, plan.cp, plan.ep, plan.attention, plan.cp_layout, plan.micro_batch, plan.recompute)
    return _traced(
        replace(spec, layers=1),
        job.sequence,
        job.dtype,
        job.adapters.rank if job.adapters else 0,
        job.adapters.targets if job.adapters else (),
        *cut,
    )


@lru_cache(maxsize=512)
def _traced(
    spec: ModelSpec,
    sequence: int,
    dtype: str,
    lora_rank: int,
    targets: tuple[str, ...],
    tp: int,
    cp: int,
    ep: int,
    attention: str,
    layout: str,
    micro_batch: int,
    recompute: bool,
) -> dict[str, PassBytes]:
    """Bytes of the pieces of a stage that is cut so."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.checkpoint import checkpoint

    from stretto.models.causal import CausalStage, Lora, Split

    if spec.experts:  # fake tensors cannot be routed: a dense MLP as wide as what a token meets is as large
        spec = replace(spec, ffn=spec.ffn * spec.top_k, experts=0, top_k=0)
    split = Split(tp=_imagined("tp", tp), cp=_imagined("cp", cp), attention=attention, layout=layout)  # type: ignore[arg-type]
    lora = Lora(rank=lora_rank, alpha=1.0, targets=targets) if lora_rank else None
    width = 2.0 if dtype == "fp64" else 1.0  # traced in fp32, of which fp64 is twice
    with FakeTensorMode():
        stage = CausalStage(spec, split=split, lora=lora, compute=torch.bfloat16 if dtype == "bf16" else None)
        for parameter in stage.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        table, layer, norm = stage.model.embed_tokens, stage.model.layers["0"], stage.model.norm
        assert table is not None
        assert norm is not None
        tokens = torch.zeros(micro_batch, sequence // cp, dtype=torch.int64)
        turns = stage._turn(sequence)
        x = torch.zeros(micro_batch, sequence // cp, spec.hidden).requires_grad_()

        def through() -> torch.Tensor:
            found: torch.Tensor = checkpoint(layer, x, turns, use_reentrant=False) if recompute else layer(x, turns)
            return found

        def head() -> torch.Tensor:
            return stage.head.losses(norm(x).flatten(0, 1), tokens.flatten()).sum()

        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bf16"):
            return {
                "embed": _bytes_of(lambda: table.embed(tokens), width),
                "layer": _bytes_of(through, width),
                "head": _bytes_of(head, width),
            }


def _bytes_of(forward: Any, width: float) -> PassBytes:
    import torch

    from stretto.train.live import LiveBytes

    live = LiveBytes()
    y = live.around(forward)
    kept, forward_peak = live.now, live.peak
    live.peak = live.now
    backward = float(kept)
    if y.requires_grad:
        gradient = torch.ones_like(y)
        with live:
            torch.autograd.backward(y, gradient)
        backward = float(live.peak + gradient.untyped_storage().nbytes())
    return PassBytes(kept=kept * width, forward=forward_peak * width, backward=backward * width)


def _imagined(name: str, size: int) -> Any:
    """The first place of an axis of so many ranks, whose calls return what has the right shape and move nothing."""
    import torch

    from stretto.comm.transport import Axis, Pending, done

    class Imagined(Axis):
        def __init__(self) -> None:
            super().__init__(name, tuple(range(size)), 0, None)

        def all_reduce_(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor

        def maximum_(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor

        def exchange(self, tensors: Sequence[torch.Tensor], *, to: int, source: int) -> Pending[list[torch.Tensor]]:
            return done([torch.empty_like(tensor) for tensor in tensors])

        def all_to_all(self, tensor: torch.Tensor, send: Sequence[int], receive: Sequence[int]) -> torch.Tensor:
            return tensor.new_empty(sum(receive), *tensor.shape[1:])

        def apart(self, name: str) -> Axis:
            return self

    return Imagined()
