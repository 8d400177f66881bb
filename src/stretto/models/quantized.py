"""GGUF's tensor formats, plain and in blocks, and how packed bytes become numbers.

A block is 32 neighbours in a row with a shared scale d (and in Q4_1 a shared minimum m), both fp16:
Q8_0 holds d, int8 q[32] for d*q; Q4_0 holds d, 4-bit q[32] for d*(q-8); Q4_1 holds d, m, 4-bit q[32] for
d*q+m. The 16 bytes of 4-bit values hold the first half of the block in their low and the second half in
their high nibbles.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

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


@dataclass(frozen=True, slots=True)
class PackedTensor:
    """A tensor as its file holds it; nothing is copied until `dequantize`.

    Attributes:
        shape: row-major; the last dimension is a multiple of the format's block.
        blocks: the bytes, mapped from the file.
    """

    format: Format
    shape: tuple[int, ...]
    blocks: memoryview

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        return len(self.blocks)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The numbers as a new tensor of `shape`; fp32 unless `dtype` says otherwise."""
        import torch

        packed = torch.frombuffer(self.blocks, dtype=torch.uint8).view(-1, self.format.block_bytes)
        values = self.format.unpack(packed).view(self.shape)
        return values.to(
            dtype or torch.float32,
            copy=values.untyped_storage().data_ptr() == packed.untyped_storage().data_ptr(),
        )

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """fp32 rows `index` of a two-dimensional tensor, unpacking only those: [len(index), columns]."""
        import torch

        packed = torch.frombuffer(self.blocks, dtype=torch.uint8).view(self.shape[0], -1)
        chosen = packed[index].view(-1, self.format.block_bytes)
        return self.format.unpack(chosen).view(len(index), *self.shape[1:]).float()


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
