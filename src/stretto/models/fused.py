"""The decoder in one native call a pass, over weights that stay packed.

What `transformer.py` does in torch, operation by operation, this does in `native/kernels/decoder.cpp`: the same
interface, the same paged KV cache, for models of the Llama family whose matrices lie in 4 or 8 bits, or in bf16. A
row's results depend on that row alone, to the last bit, whoever shares the pass, however its prompt was cut and
however many threads there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from stretto.core.errors import UserError
from stretto.kernels import _native
from stretto.kernels.levels import BEST_LEVEL
from stretto.kernels.packed import PackedMatrix, Path, concatenate, pack, pack_gguf, pack_numbers
from stretto.models.kv_cache import KVCache, require_cache_of
from stretto.models.kv_packed import Cache, PackedKVCache
from stretto.models.packable import packing, why_not_fused
from stretto.models.quantized import BlockTensor, GroupedTensor, PackedTensor
from stretto.models.rope import rope_frequencies
from stretto.models.segment import Segment, check_segments
from stretto.models.spec import ModelSpec
from stretto.models.weights import ROPE_DIVISORS, StoredTensor, Weights, query_key_order

if TYPE_CHECKING:
    from collections.abc import Callable

    Ints = np.ndarray[Any, np.dtype[np.int64]]

KV = Literal["plain", "int4"]

_MOST_ROWS = 256
"""Rows that go through the layers together: of more, what lies between the products leaves the caches."""


class FusedDecoder:
    """A model ready to run; made by `build_fused`, used through `forward` as a `Transformer` is.

    Attributes:
        dtype: the type of the KV cache, and in 4 bits of its open pages.
        kv: "plain", or "int4" for a cache in 4 bits.
        path: how activations enter products; see `kernels.packed`.
        seconds: of the last pass, by the names of `passes.pass_operations`.
    """

    def __init__(
        self, spec: ModelSpec, parts: _Parts, *, path: Path, dtype: torch.dtype, threads: int, kv: KV = "plain"
    ) -> None:
        self.spec = spec
        self.kv = kv
        self.path = path
        self.dtype = dtype
        self.threads = threads
        self.seconds: dict[str, float] = {}
        self._parts = parts  # native calls hold addresses into these
        self._decoder = parts.decoder(crew=0)
        self._own_threads: int | None = None

    def beside(self, threads: int, *, crew: int) -> FusedDecoder:
        """The same weights for passes of another caller's thread, which may run while this one's do.

        Args:
            threads: of its passes, the caller's own included.
            crew: 0 or 1; passes of one crew take turns, and share their helping threads.
        """
        other = copy(self)
        other.seconds = {}
        other.threads = other._own_threads = threads
        other._decoder = self._parts.decoder(crew=crew)
        return other

    def new_cache(self, *, pages: int, page_tokens: int) -> Cache:
        """An empty cache of this model's type; in 4 bits its pages hold 64 tokens, whatever is asked for."""
        if self.kv == "int4":
            return PackedKVCache(self.spec, pages=pages, dtype=self.dtype)
        return KVCache(self.spec, pages=pages, page_tokens=page_tokens, dtype=self.dtype)

    @torch.inference_mode()
    def forward(
        self,
        tokens: torch.Tensor,
        segments: Sequence[Segment],
        cache: Cache,
        timer: Callable[[str], None] | None = None,
        *,
        level: str = BEST_LEVEL,
    ) -> torch.Tensor:
        """See `Transformer.forward`; `timer` is told of "plan" and of "pass"."""
        layout = self._lay_out(tokens.numpy(), segments, cache)
        logits = torch.empty(len(layout.wanted), self.spec.vocab)
        if timer:
            timer("plan")
        self._run(layout, cache, level=level, logits=logits.data_ptr())
        if timer:
            timer("pass")
        return logits

    def pick(self, tokens: Sequence[int], segments: Sequence[Segment], cache: Cache) -> list[int]:
        """The most likely next token of each row whose logits would be wanted: what `forward(...).argmax(1)` gives."""
        layout = self._lay_out(np.asarray(tokens, np.int64), segments, cache)
        picks = np.empty(len(layout.wanted), np.int64)
        self._run(layout, cache, level=BEST_LEVEL, picks=picks.ctypes.data)
        found: list[int] = picks.tolist()
        return found

    def _lay_out(self, tokens: Ints, segments: Sequence[Segment], cache: Cache) -> _Layout:
        check_segments(segments, cache)
        require_cache_of(cache, self.spec, self.dtype)
        layout = _lay_out(tokens, segments, cache)
        if len(tokens) != len(layout.lengths):
            raise ValueError(f"tokens has {len(tokens)} rows; the segments have {len(layout.lengths)}")
        if tokens.min() < 0 or tokens.max() >= self.spec.vocab:
            raise ValueError(f"tokens must be from 0 to {self.spec.vocab - 1}, the model's vocabulary")
        return layout

    def _run(self, layout: _Layout, cache: Cache, *, level: str, logits: int = 0, picks: int = 0) -> None:
        """Block by block of the rows; logits or picks go to these addresses, one wanted row after another."""
        seconds, done = [0.0, 0.0, 0.0], 0
        for block in layout.blocks():
            to_logits = logits and logits + done * self.spec.vocab * 4
            spent = self._run_block(block, cache, level, to_logits, picks and picks + done * 8)
            seconds = [a + b for a, b in zip(seconds, spent, strict=True)]
            done += len(block.wanted)
        alone = "attention_prefill" if layout.prompt else "attention_decode"
        self.seconds = dict(zip(("products", alone, "head"), seconds, strict=True))

    def _run_block(
        self, layout: _Layout, cache: Cache, level: str, logits: int, picks: int
    ) -> tuple[float, float, float]:
        turns = self._parts.turns(int(layout.lengths.max()))  # kept until the pass is over
        return self._decoder.forward(
            level,
            self.path,
            self._own_threads or torch.get_num_threads(),
            layout.tokens.ctypes.data,
            len(layout.tokens),
            turns.data_ptr(),
            layout.lengths.ctypes.data,
            layout.tables.ctypes.data,
            layout.tables.shape[1],
            cache.addresses,
            cache.page_tokens,
            cache.dtype == torch.bfloat16,
            cache.open_addresses if isinstance(cache, PackedKVCache) else [],
            0 if layout.open_tables is None else layout.open_tables.ctypes.data,
            layout.wanted.ctypes.data,
            len(layout.wanted),
            logits,
            picks,
        )


@dataclass(frozen=True, slots=True)
class _Layout:
    """A pass, row by row: token, context length and block table; the rows whose logits are wanted; open pages."""

    tokens: Ints
    lengths: Ints
    tables: Ints
    wanted: Ints
    prompt: bool
    open_tables: Ints | None

    def blocks(self) -> Iterator[_Layout]:
        """The same rows in passes of at most `_MOST_ROWS`."""
        if len(self.tokens) <= _MOST_ROWS:
            yield self
            return
        for first in range(0, len(self.tokens), _MOST_ROWS):
            some = slice(first, first + _MOST_ROWS)
            begin, end = np.searchsorted(self.wanted, (some.start, some.stop))
            yield replace(
                self,
                tokens=self.tokens[some],
                lengths=self.lengths[some],
                tables=self.tables[some],
                wanted=self.wanted[begin:end] - first,
                open_tables=None if self.open_tables is None else self.open_tables[some],
            )


def _lay_out(tokens: Ints, segments: Sequence[Segment], cache: Cache) -> _Layout:
    page_tokens = cache.page_tokens
    width = max(-(-segment.context // page_tokens) for segment in segments)
    rows = sum(segment.new_tokens for segment in segments)
    lengths, tables = np.empty(rows, np.int64), np.zeros((rows, width), np.int64)
    wanted: list[int] = []
    for segment in segments:
        first, last = segment.first_row, segment.first_row + segment.new_tokens
        pages = -(-segment.context // page_tokens)
        lengths[first:last] = np.arange(segment.cached + 1, segment.context + 1)
        tables[first:last, :pages] = segment.pages[:pages]
        wanted.extend(range(last - segment.logit_rows, last))
    return _Layout(
        tokens=np.ascontiguousarray(tokens, np.int64),
        lengths=lengths,
        tables=tables,
        wanted=np.asarray(wanted, np.int64),
        prompt=segments[0].new_tokens > 1,
        open_tables=cache.open_tables(segments, width) if isinstance(cache, PackedKVCache) else None,
    )


class _Parts:
    """The packed matrices, the norms and the embedding of a model."""

    def __init__(self, spec: ModelSpec, weights: Weights, path: Path) -> None:
        self.spec = spec
        self.weights = weights
        self._on_grid = path == "bf16"
        self.layers = [self._layer(index) for index in range(spec.layers)]
        name = "model.embed_tokens.weight"
        self.head = self._matrix(name if spec.tied_embeddings else "lm_head.weight", spec.vocab, spec.hidden)
        self.norm = weights.tensor("model.norm.weight", (spec.hidden,))
        if spec.tied_embeddings:
            self.table: PackedMatrix | None = self.head
        elif packing(weights.sources.get(name)) is not None:
            self.table = self._matrix(name, spec.vocab, spec.hidden)
        else:
            self.table = None
        self.rows = weights.tensor(name, (spec.vocab, spec.hidden)) if self.table is None else None
        divisors = weights.tensor(ROPE_DIVISORS, (spec.head_dim // 2,)) if ROPE_DIVISORS in weights else None
        self._frequencies = rope_frequencies(spec, divisors)
        self._turns = torch.empty(0, spec.head_dim // 2, dtype=torch.complex64)

    def turns(self, positions: int) -> torch.Tensor:
        """What queries and keys are turned by, for at least so many positions: complex [positions, head_dim / 2]."""
        turns = self._turns  # which a pass beside this one may replace
        if len(turns) < positions:
            every = torch.arange(max(positions, 2 * len(turns), 512)).float()
            turns = self._turns = torch.polar(torch.tensor(1.0), every[:, None] * self._frequencies)
        return turns

    def decoder(self, *, crew: int) -> _native.Decoder:
        spec = self.spec
        decoder = _native.Decoder(
            spec.hidden, spec.heads, spec.kv_heads, spec.head_dim, spec.ffn, spec.vocab, spec.norm_eps, crew
        )
        for (qkv, out, gate_up, down), vectors in self.layers:
            attention, mlp, bias, qk_norm = (0 if each is None else each.data_ptr() for each in vectors)
            decoder.add_layer(qkv.native, out.native, gate_up.native, down.native, attention, mlp, bias, qk_norm)
        table = None if self.table is None else self.table.native
        decoder.set_embedding(table, 0 if self.rows is None else self.rows.data_ptr())
        decoder.set_head(self.head.native, self.norm.data_ptr())
        return decoder

    def _layer(self, index: int) -> tuple[tuple[PackedMatrix, ...], tuple[torch.Tensor | None, ...]]:
        spec, at = self.spec, f"model.layers.{index}."
        widths = {"q": spec.q_width, "k": spec.kv_width, "v": spec.kv_width}
        qkv = [self._matrix(f"{at}self_attn.{n}_proj.weight", width, spec.hidden) for n, width in widths.items()]
        gates = [self._matrix(f"{at}mlp.{n}_proj.weight", spec.ffn, spec.hidden) for n in ("gate", "up")]
        matrices = tuple(
            each.on_grid() if self._on_grid and each.bits == 4 else each
            for each in (
                concatenate(qkv),
                self._matrix(at + "self_attn.o_proj.weight", spec.hidden, spec.q_width),
                concatenate(gates),
                self._matrix(at + "mlp.down_proj.weight", spec.hidden, spec.ffn),
            )
        )
        bias = qk_norm = None
        if spec.qkv_bias:
            parts = {n: self.weights.tensor(f"{at}self_attn.{n}_proj.bias", (w,)) for n, w in widths.items()}
            bias = torch.cat([part if n == "v" else self._adjacent(part) for n, part in parts.items()])
        if spec.qk_norm:
            norms = [self.weights.tensor(f"{at}self_attn.{n}_norm.weight", (spec.head_dim,)) for n in "qk"]
            qk_norm = torch.cat([self._adjacent(norm) for norm in norms])
        attention = self.weights.tensor(at + "input_layernorm.weight", (spec.hidden,))
        mlp = self.weights.tensor(at + "post_attention_layernorm.weight", (spec.hidden,))
        return matrices, (attention, mlp, bias, qk_norm)

    def _matrix(self, name: str, columns: int, inner: int) -> PackedMatrix:
        source = self.weights.sources.get(name)
        if not isinstance(source, (PackedTensor, StoredTensor)):
            self.weights.tensor(name, (columns, inner))  # says what is wrong with it
            raise UserError(f"tensor {name} cannot stay packed", file=self.weights.file, right="path: torch")
        if tuple(source.shape) != (columns, inner):
            shape = tuple(source.shape)
            raise UserError(
                f"tensor {name} has shape {shape}", file=self.weights.file, right=f"expected {(columns, inner)}"
            )
        order = None
        if self.weights.rotary != "adjacent" and (".q_proj." in name or ".k_proj." in name):
            order = self._adjacent(torch.arange(columns))
        if packing(source) == "BF16":
            values = source() if isinstance(source, StoredTensor) else source.dequantize(torch.bfloat16)
            return pack_numbers(values if order is None else values[order])
        if isinstance(source, GroupedTensor):
            return self._grouped(name, source, order)
        assert isinstance(source, BlockTensor)
        blocks = source.blocks
        if order is not None:
            rows = torch.frombuffer(blocks, dtype=torch.uint8).view(columns, -1)[order]
            blocks = memoryview(rows.numpy().tobytes())
        return pack_gguf(blocks, (columns, inner), source.format.name)

    def _grouped(self, name: str, source: GroupedTensor, order: torch.Tensor | None) -> PackedMatrix:
        """As the file has it, but for scales and minima that are no fp16 numbers: those are rounded."""
        matrix = source.quantised(order)
        scales, minima = matrix.scales.to(torch.float16), matrix.minima
        if not (torch.isfinite(scales).all() and (minima is None or torch.isfinite(minima).all())):
            raise UserError(
                f"tensor {name} has scales that fp16 cannot hold", file=self.weights.file, right="use torch"
            )
        return pack(matrix.values, scales, minima, bits=matrix.bits, length=matrix.length)

    def _adjacent(self, rows: torch.Tensor) -> torch.Tensor:
        return query_key_order(rows, self.spec.head_dim, have=self.weights.rotary, want="adjacent")


def build_fused(
    spec: ModelSpec, weights: Weights, *, path: Path, dtype: torch.dtype, threads: int, kv: KV = "plain"
) -> FusedDecoder:
    """Pack the weights; `UserError` says why if this model cannot run so."""
    reason = why_not_fused(spec, weights)
    if reason is not None:
        raise UserError(f"cannot run by the fused decoder: {reason}", file=weights.file, right="leave out the path")
    torch.set_num_threads(threads)
    return FusedDecoder(spec, _Parts(spec, weights, path), path=path, dtype=dtype, threads=threads, kv=kv)
