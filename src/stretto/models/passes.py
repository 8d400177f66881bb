"""The operations of one forward pass over a ragged batch, on which planner, simulator and calibration agree.

Names are the sections the runtime's timer marks, so a measured pass and a listed pass match by name. Bytes
count each operand once, as if nothing stayed in a cache between operations; FLOPs count a multiply-add as
two and attention as causal (a query sees itself and what is before it).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from stretto.core.errors import require
from stretto.hardware.operation import Operation

if TYPE_CHECKING:
    from stretto.models.spec import ModelSpec


@dataclass(frozen=True, kw_only=True, slots=True)
class PassShape:
    """The lengths of one pass.

    Attributes:
        new_tokens: rows each sequence adds, at least 1.
        cached: tokens each sequence already has in the KV cache.
        logits_rows: rows whose logits are wanted; None for the last row of each sequence.
    """

    new_tokens: tuple[int, ...]
    cached: tuple[int, ...]
    logits_rows: int | None = None

    def __post_init__(self) -> None:
        require(len(self.new_tokens) == len(self.cached), "cached", self.cached, f"{len(self.new_tokens)} long")
        require(
            all(new >= 1 for new in self.new_tokens),
            "new_tokens",
            self.new_tokens,
            "at least 1 for each sequence",
        )
        require(all(cached >= 0 for cached in self.cached), "cached", self.cached, "not negative")
        rows = self.logits_rows
        require(rows is None or 0 <= rows <= self.rows, "logits_rows", rows, f"None or from 0 to {self.rows} rows")

    @property
    def rows(self) -> int:
        """Token rows of the pass."""
        return sum(self.new_tokens)

    @property
    def head_rows(self) -> int:
        """Rows that go through the output projection."""
        return len(self.new_tokens) if self.logits_rows is None else self.logits_rows


@dataclass(frozen=True, slots=True)
class _Lister:
    """Builds the operations of one pass; widths are those of the largest tensor-parallel share."""

    spec: ModelSpec
    dtype: str
    activation_bytes: float
    kv_bytes: float
    weight_bytes: float
    kv_heads: int
    tp: int

    @property
    def heads(self) -> int:
        return self.kv_heads * (self.spec.heads // self.spec.kv_heads)

    def matmul(self, name: str, rows: int, k: int, n: int, count: int, matrices: int = 1) -> Operation:
        """Rows by a matrix [k, n], or dealt out to so many `matrices` of this shape."""
        moved = matrices * k * n * self.weight_bytes + rows * (k + n) * self.activation_bytes
        return Operation(
            name=name,
            kind="matmul",
            dtype=self.dtype,
            flops=2.0 * rows * k * n,
            bytes=moved,
            shape=(rows, k, n),
            signature=f"matmul/{self.dtype}/k{k}/n{n}",
            at=(float(rows),),
            count=count,
        )

    def rowwise(
        self,
        name: str,
        kind: str,
        what: str,
        rows: int,
        width: int,
        *,
        flops: float,
        moves: float,
        count: int,
    ) -> Operation:
        """An operation over [rows, width] with `flops` and `moves` (elements read and written) an element."""
        elements = rows * width
        return Operation(
            name=name,
            kind=kind,
            dtype=self.dtype,
            flops=flops * elements,
            bytes=moves * elements * self.activation_bytes,
            shape=(elements,),
            signature=f"{what.partition('/')[0]}/{self.dtype}/{what.partition('/')[2]}",
            at=(float(rows),),
            count=count,
        )

    def attention(self, phase: str, queries: int, context: int, pairs: int, at: tuple[float, ...]) -> Operation:
        """One call over `queries` rows that read `context` cached tokens in `pairs` query-key pairs."""
        dim, heads = self.spec.head_dim, self.heads
        moved = 2 * queries * heads * dim * self.activation_bytes + 2 * context * self.kv_heads * dim * self.kv_bytes
        return Operation(
            name=f"attention_{phase}",
            kind="attention",
            dtype=self.dtype,
            flops=4.0 * heads * dim * pairs,
            bytes=moved,
            shape=(queries, heads, self.kv_heads, dim, pairs),
            signature=f"attention-{phase}/{self.dtype}/h{heads}/kv{self.kv_heads}/d{dim}",
            at=at,
            count=self.spec.layers,
        )

    def attentions(self, batch: PassShape) -> Iterator[Operation]:
        """The decode rows as one call, then each prompt sequence as its own, as the runtime does."""
        lengths = list(zip(batch.new_tokens, batch.cached, strict=True))
        contexts = [cached + 1 for new, cached in lengths if new == 1]
        if contexts:
            total = sum(contexts)
            yield self.attention("decode", len(contexts), total, total, (float(len(contexts)), total / len(contexts)))
        for new, cached in lengths:
            if new > 1:
                pairs = new * cached + new * (new + 1) // 2
                yield self.attention("prefill", new, cached + new, pairs, (float(new), (cached + new) / new))

    def layer(self, batch: PassShape) -> Iterator[Operation]:
        spec, rows, count = self.spec, batch.rows, self.spec.layers
        heads, kv, dim = self.heads, self.kv_heads, spec.head_dim
        ffn = -(-spec.ffn // self.tp)
        shape = f"h{heads}/kv{kv}/d{dim}"
        hidden = f"hidden{spec.hidden}"

        yield self.rowwise("norm_attention", "norm", f"norm/{hidden}", rows, spec.hidden, flops=4, moves=2, count=count)
        yield self.matmul("qkv", rows, spec.hidden, (heads + 2 * kv) * dim, count)
        turned = (heads + kv) * dim
        if spec.qk_norm:
            yield self.rowwise("norm_qk", "norm", f"norm-qk/{shape}", rows, turned, flops=4, moves=2, count=count)
        yield self.rowwise("rope", "elementwise", f"rope/{shape}", rows, turned, flops=3, moves=2, count=count)
        yield self.rowwise(
            "kv_write", "elementwise", f"kv-write/{shape}", rows, 2 * kv * dim, flops=0, moves=2, count=count
        )
        yield from self.attentions(batch)
        yield self.matmul("out", rows, heads * dim, spec.hidden, count)
        yield self.rowwise(
            "add_attention", "elementwise", f"add/{hidden}", rows, spec.hidden, flops=1, moves=3, count=count
        )

        yield self.rowwise("norm_mlp", "norm", f"norm/{hidden}", rows, spec.hidden, flops=4, moves=2, count=count)
        routed = rows * max(1, spec.top_k)
        matrices = min(spec.experts, routed) or 1
        if spec.experts:
            yield self.matmul("router", rows, spec.hidden, spec.experts, count)
        yield self.matmul("gate_up", routed, spec.hidden, 2 * ffn, count, matrices)
        yield self.rowwise(
            "activation", "elementwise", f"activation/ffn{ffn}", routed, ffn, flops=5, moves=3, count=count
        )
        yield self.matmul("down", routed, ffn, spec.hidden, count, matrices)
        yield self.rowwise("add_mlp", "elementwise", f"add/{hidden}", rows, spec.hidden, flops=1, moves=3, count=count)

    def whole(self, batch: PassShape) -> Iterator[Operation]:
        spec, hidden = self.spec, f"hidden{self.spec.hidden}"
        yield self.rowwise("embed", "gather", f"embed/{hidden}", batch.rows, spec.hidden, flops=0, moves=2, count=1)
        yield from self.layer(batch)
        if batch.head_rows:
            rows = batch.head_rows
            yield self.rowwise("norm_final", "norm", f"norm/{hidden}", rows, spec.hidden, flops=4, moves=2, count=1)
            yield self.matmul("lm_head", rows, spec.hidden, -(-spec.vocab // self.tp), 1)


def arithmetic(dtype: str, path: str = "torch") -> str:
    """The type that products are counted in, of a plan with this KV type and path."""
    if dtype != "int4":
        return dtype
    return "fp32" if path == "exact" else "bf16"


def pass_operations(spec: ModelSpec, batch: PassShape, *, dtype: str, path: str = "torch") -> tuple[Operation, ...]:
    """What a pass is made of on a path of `serve.plan.ServePlan`, as the runtime times it.

    "torch" has every operation of the model. The others are one native call: its products (with all that lies between
    them), its attention, its head. Their weights are counted as in Q4_1, the head's as in Q8_0.
    """
    if path == "torch":
        return spec.operations(batch, dtype=dtype)
    whole = spec.operations(batch, dtype=arithmetic(dtype, path), kv_dtype=dtype, weight_dtype="q4_1")
    name = (
        f"{path}/hidden{spec.hidden}/ffn{spec.ffn}/h{spec.heads}/kv{spec.kv_heads}/d{spec.head_dim}/layers{spec.layers}"
    )
    products = [op for op in whole if op.kind == "matmul" and op.name != "lm_head"]
    flops = sum(op.flops * op.count for op in products)
    found = [
        Operation(
            name="products",
            kind="matmul",
            dtype=arithmetic(dtype, path),
            flops=flops,
            bytes=sum(op.bytes * op.count for op in products),
            shape=(batch.rows, spec.hidden, round(flops / (2 * batch.rows * spec.hidden))),
            signature=f"fused-products/{name}",
            at=(float(batch.rows),),
        )
    ]
    for op in whole:
        if op.name.startswith("attention_"):
            kv = "/kv-int4" if dtype == "int4" else ""
            found.append(replace(op, signature=f"fused-{op.signature}{kv}"))
        elif op.name == "lm_head":
            head = replace(op, name="head", signature=f"fused-head/{path}/hidden{spec.hidden}/vocab{spec.vocab}")
            found.append(replace(head, bytes=op.bytes * (34 / 20)))
    return tuple(found)


def operations_of(
    spec: ModelSpec,
    batch: PassShape,
    *,
    dtype: str,
    activation_bytes: float,
    kv_bytes: float,
    weight_bytes: float,
    tp: int,
) -> tuple[Operation, ...]:
    """See `ModelSpec.operations`."""
    lister = _Lister(
        spec=spec,
        dtype=dtype,
        activation_bytes=activation_bytes,
        kv_bytes=kv_bytes,
        weight_bytes=weight_bytes,
        kv_heads=-(-spec.kv_heads // tp),
        tp=tp,
    )
    return tuple(lister.whole(batch))
