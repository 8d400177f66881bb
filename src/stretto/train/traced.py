"""What one layer, the embedding and the head of a plan's stage hold, found by making and running them without contents.

This package's own stage is built and run on torch's fake tensors, which make every allocation that real ones would, and
the axes' messages are posted nowhere; so sizes need no machine, and no formula can drift from the code. The rank
that is traced is taken to have the experts that get somewhat more than their share of the tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from stretto.comm.transport import Axis, Message
from stretto.models.causal import CausalStage
from stretto.models.causal_layers import Lora, Split
from stretto.models.parallel.experts import MoE
from stretto.models.spec import ModelSpec
from stretto.train.cuts import lora_of
from stretto.train.job import TrainJob
from stretto.train.live import LiveBytes
from stretto.train.plan import TrainPlan

_SKEW = 1.3
"""Tokens of an expert of the busier half over those of the other: 1.13 of the mean; lending evens out 1.3."""
PIECES = ("embed", "layer", "head")


@dataclass(frozen=True, kw_only=True)
class PassBytes:
    """Bytes of one micro-batch in a piece.

    Attributes:
        kept: held from forward until backward, the result included and the input not.
        forward: most at once while it computes forward.
        backward: most at once while it computes backward, `kept` and gradients of the piece's weights included.
    """

    kept: float
    forward: float
    backward: float

    def times(self, width: float) -> PassBytes:
        """All of it so many times."""
        return PassBytes(kept=self.kept * width, forward=self.forward * width, backward=self.backward * width)


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A parameter of a rank.

    Attributes:
        numel: numbers that lie on the rank.
        trained: whether it has a gradient.
        split, partial: as in its `models.causal_layers.Placement`.
    """

    numel: int
    trained: bool
    split: tuple[str, ...]
    partial: tuple[str, ...]


@dataclass(frozen=True)
class _Cut:
    """All that the pieces of a stage depend on."""

    spec: ModelSpec
    sequence: int
    dtype: str
    lora: Lora | None
    tp: int
    cp: int
    ep: int
    attention: str
    layout: str
    micro_batch: int
    recompute: bool
    dropout: float


def pass_bytes(job: TrainJob, plan: TrainPlan, spec: ModelSpec) -> dict[str, PassBytes]:
    """Of each of `PIECES`, on the first (the fullest) rank of its axes."""
    cut = _cut(job, plan, spec)
    # The ends of a stage know nothing of what happens inside a layer: fewer traces.
    dense = replace(cut.spec, experts=0, top_k=0)
    ends = replace(cut, ep=1, attention="blockwise", recompute=False, dropout=0.0, spec=dense)
    width = 2.0 if job.dtype == "fp64" else 1.0  # traced in fp32
    return {piece: _pass_bytes(cut if piece == "layer" else ends, piece).times(width) for piece in PIECES}


def parameters(job: TrainJob, plan: TrainPlan, spec: ModelSpec) -> dict[str, tuple[Parameter, ...]]:
    """Of each of `PIECES`, in the order of the stage; a head that is the embedding's copy has the copy."""
    return _parameters(replace(_cut(job, plan, spec), micro_batch=1, recompute=False, dropout=0.0))


def _cut(job: TrainJob, plan: TrainPlan, spec: ModelSpec) -> _Cut:
    return _Cut(
        replace(spec, layers=1),
        job.sequence,
        job.dtype,
        lora_of(job),
        plan.tp,
        plan.cp,
        plan.ep,
        plan.attention,
        plan.cp_layout,
        plan.micro_batch,
        plan.recompute,
        job.shape.dropout if job.shape else 0.0,
    )


def _stage(cut: _Cut, *, first: bool = True) -> CausalStage:
    split = Split(
        tp=_imagined("tp", cut.tp),
        cp=_imagined("cp", cut.cp),
        ep=_imagined("ep", cut.ep),
        attention=cut.attention,  # type: ignore[arg-type]
        layout=cut.layout,  # type: ignore[arg-type]
    )
    compute = torch.bfloat16 if cut.dtype == "bf16" else None
    return CausalStage(cut.spec, split=split, lora=cut.lora, compute=compute, first=first, dropout=cut.dropout)


@lru_cache(maxsize=512)
def _parameters(cut: _Cut) -> dict[str, tuple[Parameter, ...]]:
    found: dict[str, list[Parameter]] = {piece: [] for piece in PIECES}
    with FakeTensorMode():
        whole, last = _stage(cut), _stage(cut, first=False)
    for stage in (whole, last):
        places = stage.placements()
        for name, parameter in stage.named_parameters():
            piece = "embed" if "embed_tokens" in name else "layer" if ".layers." in name else "head"
            if (stage is whole) == (piece != "head"):
                place, trained = places[name], parameter.requires_grad
                found[piece].append(
                    Parameter(numel=parameter.numel(), trained=trained, split=place.split, partial=place.partial)
                )
    return {piece: tuple(each) for piece, each in found.items()}


@lru_cache(maxsize=2048)
def _pass_bytes(cut: _Cut, piece: str) -> PassBytes:
    with FakeTensorMode(allow_non_fake_inputs=True):  # orders of tokens are made from numbers
        stage = _stage(cut)
        for parameter in stage.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        shape = (cut.micro_batch, cut.sequence // cut.cp)
        call = getattr(_Calls(cut, stage, torch.zeros(shape, dtype=torch.int64)), piece)
        with torch.autocast("cpu", stage.compute, enabled=stage.compute is not None):
            return _bytes_of(call, torch.zeros(*shape, cut.spec.hidden, dtype=stage.dtype))


class _Calls:
    """The pieces of a stage as functions of the rows that come in."""

    def __init__(self, cut: _Cut, stage: CausalStage, tokens: torch.Tensor):
        self.cut, self.stage, self.tokens = cut, stage, tokens
        self.turns = stage._turn(cut.sequence)
        drops = cut.dropout > 0 or (cut.lora is not None and cut.lora.dropout > 0)
        self.keys = torch.zeros_like(tokens) if drops else None

    def embed(self, x: torch.Tensor) -> torch.Tensor:
        table = self.stage.model.embed_tokens
        assert table is not None
        return table.embed(self.tokens)

    def layer(self, x: torch.Tensor) -> torch.Tensor:
        layer = self.stage.model.layers["0"]
        if self.cut.spec.experts:
            moe: Any = layer.mlp.moe  # type: ignore[union-attr]
            moe.count = partial(_routed, moe)
        if self.cut.recompute:
            return checkpoint(layer, x, self.turns, self.keys, use_reentrant=False)  # type: ignore[no-any-return]
        return layer(x, self.turns, self.keys)  # type: ignore[no-any-return]

    def head(self, x: torch.Tensor) -> torch.Tensor:
        assert self.stage.model.norm is not None
        rows = self.stage.model.norm(x).flatten(0, 1)
        return self.stage.head.losses(rows, self.tokens.flatten()).sum()


def _bytes_of(forward: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> PassBytes:
    live = LiveBytes()
    x.requires_grad_()
    y = live.around(lambda: forward(x))
    kept, forward_peak = live.now, live.peak
    live.peak = live.now
    if not y.requires_grad:
        return PassBytes(kept=kept, forward=forward_peak, backward=kept)
    gradient = torch.ones_like(y)
    with live:
        torch.autograd.backward(y, gradient)
    return PassBytes(kept=kept, forward=forward_peak, backward=live.peak + gradient.untyped_storage().nbytes())


def _routed(moe: MoE, copies: torch.Tensor) -> np.ndarray[Any, np.dtype[np.int64]]:
    """What `moe.count` might be: the first place's experts get more than their share, as no router is even."""
    shares = np.ones(moe.experts)
    if moe.axis.size > 1:
        shares[: moe.experts // moe.axis.size] *= _SKEW
    bounds = np.rint(np.cumsum(shares) / shares.sum() * len(copies)).astype(np.int64)
    return np.tile(np.diff(bounds, prepend=0), (moe.axis.size, 1))


class _Silent:
    """A line whose messages go nowhere and never come."""

    def post(
        self, kind: str, axis: Axis, sends: Sequence[Message], receives: Sequence[Message], tag: int
    ) -> Callable[[], None]:
        return lambda: None


def _imagined(name: str, size: int) -> Axis:
    """The first place of an axis of so many ranks."""
    return Axis(name, tuple(range(size)), 0, _Silent())
