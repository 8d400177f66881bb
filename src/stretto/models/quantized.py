"""Tensors that stay packed, as files hold them, and how they become numbers: GGUF's blocks, groups of few bits.

A GGUF block is 32 neighbours in a row with a shared scale d (and in Q4_1 a shared minimum m), both fp16:
Q8_0 holds d, int8 q[32] for d*q; Q4_0 holds d, 4-bit q[32] for d*(q-8); Q4_1 holds d, m, 4-bit q[32] for
d*q+m. The 16 bytes of 4-bit values hold the first half of the block in their low and the second half in
their high nibbles.

Groups (`Quantised`) are what compressed-tensors' `pack-quantized` checkpoints hold, and what `models/quantize` makes:
s * (q - z) with a scale s and, unless the grid is symmetric, a whole zero point z for each row and group of neighbours.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stretto.core.errors import require

if TYPE_CHECKING:
    import torch

_WEIGHTS = 32


@dataclass(frozen=True, slots=True)
class Format:
    """How a tensor lies in a file: `block` neighbours of a row in `block_bytes` bytes."""

    name: str
    block: int
    block_bytes: int
    unpack: Callable[[torch.Tensor], torch.Tensor]
    """uint8 [blocks, block_bytes] to fp32 [blocks, block], or a plain type's values as they are."""


class PackedTensor(ABC):
    """A tensor as its file holds it; nothing is copied until it is asked for.

    Attributes:
        shape: row-major.
    """

    shape: tuple[int, ...]

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes as stored."""

    @abstractmethod
    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The numbers as a new tensor of `shape`; fp32 unless `dtype` says otherwise."""

    @abstractmethod
    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """fp32 rows `index` of a two-dimensional tensor, unpacking only those: [len(index), columns]."""


@dataclass(frozen=True)
class BlockTensor(PackedTensor):
    """A tensor of a GGUF file.

    Attributes:
        shape: row-major; the last dimension is a multiple of the format's block.
        blocks: the bytes, mapped from the file.
    """

    format: Format
    shape: tuple[int, ...]
    blocks: memoryview

    @property
    def nbytes(self) -> int:
        return len(self.blocks)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        import torch

        packed = torch.frombuffer(self.blocks, dtype=torch.uint8).view(-1, self.format.block_bytes)
        values = self.format.unpack(packed).view(self.shape)
        return values.to(
            dtype or torch.float32,
            copy=values.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr(),
        )

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        import torch

        packed = torch.frombuffer(self.blocks, dtype=torch.uint8).view(self.shape[0], -1)
        chosen = packed[index].view(-1, self.format.block_bytes)
        return self.format.unpack(chosen).view(len(index), *self.shape[1:]).float()


@dataclass(frozen=True)
class Quantised:
    """A matrix [rows, length] in 4 or 8 bits.

    Attributes:
        values: uint8 [rows, inner], inner being `length` rounded up to whole groups; what was added is zero.
        scales: [rows, groups]; fp16 from our quantisers, files of others may hold other types.
        zeros: uint8 as scales, or None for a symmetric grid, whose zero is 2 ** (bits - 1).
        bits, length: as above.
        kept: bool as values, where a matrix was pruned: the others are exactly zero.
        method: what made it; a quantiser that fell back names what it fell back to.
    """

    values: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor | None
    bits: int
    length: int
    kept: torch.Tensor | None = None
    method: str = ""

    def __post_init__(self) -> None:
        rows, inner = self.values.shape
        require(self.bits in (4, 8), "bits", self.bits, "4 or 8")
        whole = self.scales.ndim == 2 and len(self.scales) == rows and inner % max(self.scales.shape[1], 1) == 0
        require(whole, "scales", tuple(self.scales.shape), f"[{rows}, groups], whole groups of {inner} values")
        require(0 < self.length <= inner, "length", self.length, f"from 1 to {inner}")

    @property
    def group(self) -> int:
        return self.values.shape[1] // self.scales.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of the values of [rows, length], the scales and the zero points, packed."""
        rows = len(self.values)
        zeros = 0 if self.zeros is None else self.zeros.numel() * self.bits // 8
        return rows * self.length * self.bits // 8 + self.scales.numel() * self.scales.itemsize + zeros

    @property
    def minima(self) -> torch.Tensor | None:
        """What an asymmetric matrix's values of 0 stand for, in fp16: exact for grids of `quantize.grid`."""
        import torch

        if self.zeros is None:
            return None
        return (self.scales.float() * -self.zeros.float()).to(torch.float16)

    def dequantize(self) -> torch.Tensor:
        """fp32 [rows, length]."""
        zero = 1 << (self.bits - 1) if self.zeros is None else self.zeros[..., None].float()
        grouped = self.values.view(*self.scales.shape, self.group).float().sub_(zero)
        return grouped.mul_(self.scales.float()[..., None]).view(self.values.shape)[:, : self.length].contiguous()

    def rows(self, order: torch.Tensor) -> Quantised:
        """The rows `order` alone, in that order."""
        return Quantised(
            self.values[order],
            self.scales[order],
            None if self.zeros is None else self.zeros[order],
            self.bits,
            self.length,
            None if self.kept is None else self.kept[order],
            self.method,
        )


@dataclass(frozen=True)
class GroupedTensor(PackedTensor):
    """A matrix of a `pack-quantized` checkpoint; its parts are read when asked for.

    Attributes:
        group: neighbours that share a scale; the whole row where there is one group.
        stored_bytes: of the values, scales and zero points in the file.
        words: int32 [rows, words]; 32 / bits values each, the first in the lowest bits.
        scales: [rows, groups].
        zeros: int32 [words, groups], packed along the rows; None for a symmetric grid.
    """

    shape: tuple[int, ...]
    bits: int
    group: int
    stored_bytes: int
    words: Callable[[], torch.Tensor]
    scales: Callable[[], torch.Tensor]
    zeros: Callable[[], torch.Tensor] | None

    @property
    def nbytes(self) -> int:
        return self.stored_bytes

    def quantised(self, index: torch.Tensor | None = None) -> Quantised:
        """The whole matrix, or its rows `index`."""
        import torch

        words, scales = self.words(), self.scales()
        zeros = None if self.zeros is None else unpack_words(self.zeros().T.contiguous(), self.bits).T[: self.shape[0]]
        if index is not None:
            words, scales = words[index], scales[index]
            zeros = None if zeros is None else zeros[index]
        values = unpack_words(words.contiguous(), self.bits)[:, : self.shape[1]]
        spare = scales.shape[1] * self.group - self.shape[1]
        if spare:
            zero = torch.full_like(scales, 1 << (self.bits - 1)) if zeros is None else zeros
            last = zero[:, -1:].to(torch.uint8).expand(-1, spare)
            values = torch.cat([values, last], dim=1)
        contiguous = None if zeros is None else zeros.contiguous()
        return Quantised(values.contiguous(), scales, contiguous, self.bits, self.shape[1])

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        values = self.quantised().dequantize()
        return values if dtype is None else values.to(dtype)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        return self.quantised(index).dequantize()


def pack_words(values: torch.Tensor, bits: int) -> torch.Tensor:
    """uint8 [rows, n] as int32 [rows, words], the first value of each word in its lowest bits; zeros behind."""
    import torch

    spare = -values.shape[1] % (32 // bits)
    padded = torch.nn.functional.pad(values, (0, spare))
    pairs = padded if bits == 8 else padded[:, 0::2] | (padded[:, 1::2] << 4)
    return pairs.reshape(-1).view(torch.int32).view(len(values), -1)


def unpack_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `pack_words`, with what lies behind: uint8 [rows, words * 32 / bits]."""
    import torch

    pairs = words.view(torch.uint8)
    if bits == 8:
        return pairs
    return torch.stack([pairs & 15, pairs >> 4], dim=-1).view(len(pairs), -1)


def _half(packed: torch.Tensor, start: int) -> torch.Tensor:
    """The fp16 at byte `start` of each block as fp32 [blocks, 1]."""
    import torch

    return packed[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: torch.Tensor, start: int) -> torch.Tensor:
    """The 4-bit values from byte `start` on as fp32 [blocks, 32]."""
    import torch

    pairs = packed[:, start:]
    values = torch.empty(len(packed), _WEIGHTS)
    values[:, : _WEIGHTS // 2] = pairs & 15
    values[:, _WEIGHTS // 2 :] = pairs >> 4
    return values


def _unpack_q4_0(packed: torch.Tensor) -> torch.Tensor:
    return _nibbles(packed, 2).sub_(8).mul_(_half(packed, 0))


def _unpack_q4_1(packed: torch.Tensor) -> torch.Tensor:
    return _nibbles(packed, 4).mul_(_half(packed, 0)).add_(_half(packed, 2))


def _unpack_q8_0(packed: torch.Tensor) -> torch.Tensor:
    import torch

    return packed[:, 2:].view(torch.int8) * _half(packed, 0)


def _plain(dtype: str) -> Callable[[torch.Tensor], torch.Tensor]:
    def unpack(packed: torch.Tensor) -> torch.Tensor:
        import torch

        return packed.view(getattr(torch, dtype))

    return unpack


FORMATS: Mapping[int, Format] = {
    0: Format("F32", 1, 4, _plain("float32")),
    1: Format("F16", 1, 2, _plain("float16")),
    2: Format("Q4_0", _WEIGHTS, 18, _unpack_q4_0),
    3: Format("Q4_1", _WEIGHTS, 20, _unpack_q4_1),
    8: Format("Q8_0", _WEIGHTS, 34, _unpack_q8_0),
    30: Format("BF16", 1, 2, _plain("bfloat16")),
}
"""The formats that are read, by GGML's type number."""
