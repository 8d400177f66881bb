"""Matrices kept in 4, 8 or 16 bits, and products with them, on the CPU.

A weight of 4 or 8 bits is d * q + m: a scale d (and where there is one, a minimum m) for each output column and each
group of inner elements, in fp16, as GGUF's blocks have them; one of 16 bits is a bf16 number. The layout in memory is
described in `native/kernels/packed.hpp`. The aim is that of MARLIN (Frantar et al., 2024): one stream of packed
weights that is unpacked once for all rows, so that speed is bounded by memory as long as possible.

Activations enter a product in one of three ways: "exact" as whole numbers of 24 bits with a scale for each row and
group (three products of bytes, with errors as fp32 has them), "bf16" as whole numbers of 12 bits (two products of
bytes, with a fifth of the error of rounding to bf16), "fast" as whole numbers of 8 bits. A row's sums run in one order,
whatever the number of rows, columns and threads, and inside a group they are exact, so that all levels give the same
bits. Weights of 16 bits meet activations in three bf16 parts (by AVX2 in fp32), or rounded to one, on each level in
an order of its own.

On one grid (`PackedMatrix.on_grid`, for "bf16") weights are whole numbers over a whole column and activations, in 16
bits, over a whole row: sums are exact from end to end, all levels give the same bits, and nothing has to be scaled
between the products of tiles.

In mixed precision (FMPQ of COMET, Liu et al., ASPLOS 2025) inner elements are sorted so that outliers share few
groups; on the fast path those groups keep 8 bits and the others 4.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from stretto.core.errors import require
from stretto.kernels import _native
from stretto.kernels.levels import BEST_LEVEL

if TYPE_CHECKING:
    import torch

Path = Literal["exact", "bf16", "fast"]
PATHS: tuple[Path, ...] = ("exact", "bf16", "fast")
PACKED_LEVELS = ("amx", "avx512bf16", "avx2", "plain")
"""Levels with products of their own; "avx512" has those of "avx2"."""
PANEL = 16
_NUMBERS_GROUP = 32
"""To which rows of bf16 weights are padded."""


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix [columns, length] in panels; `data` is all there is of it.

    Attributes:
        data: uint8, aligned to 64 bytes.
        columns, length: its shape; inner elements are padded to whole groups with zeros.
        group: inner elements that share a scale; a multiple of 32.
        bits: 4, 8 or 16.
        minimum: whether groups have a minimum; else 4-bit values have 8 subtracted and 8-bit ones 128.
        order: int32 [inner], which element of a row meets each inner element, -1 for none; None: as they come.
        steps: uint8 [groups], how many steps to either side of zero the fast path keeps of each group: 127 for 8 bits,
            7 for 4; None: 127 everywhere.
        units: fp32 [whole panels], one grid for each column, whose numbers are whole; None: scales in fp16.
    """

    data: torch.Tensor
    columns: int
    length: int
    group: int
    bits: int
    minimum: bool
    order: torch.Tensor | None = None
    steps: torch.Tensor | None = None
    units: torch.Tensor | None = None

    @property
    def inner(self) -> int:
        return len(self.order) if self.order is not None else -(-self.length // self.group) * self.group

    @property
    def plain(self) -> bool:
        """Whether it is as it was packed, so that its bytes and shape say everything."""
        return self.order is None and self.units is None

    @property
    def native(self) -> _native.Packed:
        """What native calls take; it does not keep `data`, `order` and `steps` alive."""
        more = (0 if each is None else each.data_ptr() for each in (self.order, self.steps, self.units))
        found = _native.Packed(
            self.data.data_ptr(), self.columns, self.inner, self.group, self.bits, self.minimum, *more
        )
        given = self.data.numel() * self.data.element_size()
        lanes = -(-self.columns // PANEL) * PANEL
        right = self.units is None or tuple(self.units.shape) == (lanes,)
        require(
            right, "units", None if self.units is None else tuple(self.units.shape), f"one for each of {lanes} lanes"
        )
        require(given == found.bytes, "data", tuple(self.data.shape), f"the {found.bytes} bytes of such a matrix")
        return found

    def mixed(self, order: torch.Tensor, steps: torch.Tensor, length: int) -> PackedMatrix:
        """This matrix, whose inner elements were sorted so before packing, for rows of `length` in their own order.

        Args:
            order: [inner], each a place in the row, or -1.
            steps: [groups], 1 to 127 each.
            length: of the rows that come.
        """
        groups = self.inner // self.group
        require(tuple(order.shape) == (self.inner,), "order", tuple(order.shape), f"one place for each of {self.inner}")
        require(int(order.min()) >= -1 and int(order.max()) < length, "order", order, f"places from -1 to {length - 1}")
        require(tuple(steps.shape) == (groups,), "steps", tuple(steps.shape), f"one for each of {groups} groups")
        require(int(steps.min()) >= 1 and int(steps.max()) <= 127, "steps", steps, "from 1 to 127")
        return replace(self, order=order.int().contiguous(), steps=steps.byte().contiguous(), length=length)

    def on_grid(self) -> PackedMatrix:
        """This matrix, of 4 bits, with one grid of whole numbers a column, for path bf16.

        Scales and minima are rounded to that grid: a weight moves by at most 4.5 of its steps, of which the column's
        largest has 2,000 (rows of 8,192 elements) to 32,767 (of 516 and fewer).
        """
        import torch

        require(self.bits == 4, "bits", self.bits, "4")
        require(self.plain, "matrix", "sorted or on a grid", "one as it was packed")
        made = _empty(self.columns, self.length, self.group, self.bits, self.minimum)
        made.data.copy_(self.data)
        units = torch.empty(-(-self.columns // PANEL) * PANEL)
        _native.put_on_grid(made.native, units.data_ptr())
        return replace(made, units=units)

    def multiply(
        self, x: torch.Tensor, *, path: Path = "exact", threads: int = 1, level: str = BEST_LEVEL
    ) -> torch.Tensor:
        """x [rows, length], contiguous fp32, times the matrix: fp32 [rows, columns]."""
        require(x.ndim == 2 and x.shape[1] == self.length, "x", tuple(x.shape), f"[rows, {self.length}]")
        right = x.is_contiguous() and str(x.dtype) == "torch.float32" and x.device.type == "cpu"
        require(right, "x", x.dtype, "contiguous fp32 on the CPU")
        require(threads >= 1, "threads", threads, "at least 1")
        require(path in PATHS, "path", path, f"one of {', '.join(PATHS)}")
        require(self.units is None or path == "bf16", "path", path, "bf16 for a matrix on a grid")
        out = x.new_empty(len(x), self.columns)
        if len(x):
            _native.packed_multiply(
                level, path, threads, self.native, x.data_ptr(), len(x), self.length, out.data_ptr()
            )
        return out

    def unpack(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """What was packed: values uint8 [columns, inner], scales and minima fp16 [columns, groups].

        For weights of 4 or 8 bits. On a grid scales and minima are int16, and minima those of q = 8.
        """
        import torch

        require(self.bits != 16, "bits", self.bits, "4 or 8")
        kind = torch.float16 if self.units is None else torch.int16
        panels = -(-self.columns // PANEL)
        groups = self.inner // self.group
        numbers = PANEL * 2 * (2 if self.minimum else 1)
        whole = self.data.view(panels, groups, -1)
        halves = whole[:, :, :numbers].contiguous().view(kind).view(panels, groups, -1, PANEL)
        found = halves.permute(2, 0, 3, 1).reshape(-1, panels * PANEL, groups)[:, : self.columns]
        values = whole[:, :, numbers:].reshape(panels, groups, -1, PANEL, 4)
        if self.bits == 4:
            values = torch.stack([values & 15, values >> 4], dim=3)
        else:
            values = values[:, :, :, None]
        values = values.permute(0, 4, 1, 2, 3, 5).reshape(panels * PANEL, self.inner)[: self.columns]
        return values, found[0], found[1] if self.minimum else None

    def dequantize(self) -> torch.Tensor:
        """The matrix in fp32, [columns, length], its elements in the order of the rows that it meets."""
        whole = self._numbers() if self.bits == 16 else self._scaled()
        if self.order is None:
            return whole[:, : self.length]
        given = self.order >= 0
        found = whole.new_zeros(self.columns, self.length)
        found[:, self.order[given].long()] = whole[:, given]
        return found

    def _numbers(self) -> torch.Tensor:
        import torch

        panels = -(-self.columns // PANEL)
        numbers = self.data.view(torch.bfloat16).view(panels, self.inner // 4, 2, PANEL, 2)
        return numbers.permute(0, 3, 1, 4, 2).reshape(panels * PANEL, self.inner)[: self.columns].float()

    def _scaled(self) -> torch.Tensor:
        values, scales, minima = self.unpack()
        grouped = values.view(self.columns, -1, self.group).float()
        scale = scales.float()[..., None]
        if self.units is not None:
            whole = (grouped - 8) * scale + (0 if minima is None else minima.float()[..., None])
            whole *= self.units[: self.columns, None, None]
        elif minima is not None:
            whole = grouped * scale + minima.float()[..., None]
        else:
            whole = (grouped - (8 if self.bits == 4 else 128)) * scale
        return whole.view(self.columns, -1)


def packed_bytes(columns: int, length: int, group: int, bits: int, minimum: bool) -> int:
    """What a packed matrix takes: bits/8 a weight and 2 or 4 bytes a group, of whole panels and whole groups."""
    inner = -(-length // group) * group
    return _native.Packed(0, columns, inner, group, bits, minimum, 0, 0, 0).bytes


def pack(
    values: torch.Tensor,
    scales: torch.Tensor,
    minima: torch.Tensor | None = None,
    *,
    bits: int,
    length: int | None = None,
) -> PackedMatrix:
    """Pack quantised values.

    Args:
        values: uint8 [columns, inner]; 8-bit ones have 128 added, 4-bit ones without minima 8.
        scales: fp16 [columns, groups]; inner / groups is the group, a multiple of 32.
        minima: fp16, as scales; for 4 bits alone.
        length: inner elements that are real, all if None.
    """
    import torch

    columns, inner = values.shape
    require(values.dtype == torch.uint8, "values", values.dtype, "torch.uint8")
    for name, part in (("scales", scales), ("minima", minima)):
        if part is not None:
            require(part.dtype == torch.float16, name, part.dtype, "torch.float16")
            right = f"[{columns}, groups], as many as scales"
            require(part.shape == (columns, scales.shape[1]), name, tuple(part.shape), right)
    require(scales.shape[1] >= 1, "scales", tuple(scales.shape), "[columns, groups], at least one group")
    group = inner // scales.shape[1]
    require(bits in (4, 8), "bits", bits, "4 or 8")
    require(bits == 8 or not values.numel() or int(values.max()) < 16, "values", "16 or more", "from 0 to 15")
    require(
        group % 32 == 0 and group * scales.shape[1] == inner, "scales", tuple(scales.shape), "groups of 32, 64, ..."
    )
    require(minima is None or bits == 4, "minima", "given", "for 4 bits alone")
    real = inner if length is None else length
    require(0 < real <= inner and inner - real < group, "length", length, f"at most {inner}, less than a group below")
    packed = _empty(columns, real, group, bits, minima is not None)
    # Copies, where there are any, must outlive the call.
    whole = [part if part is None else part.contiguous() for part in (values, scales, minima)]
    _native.pack(packed.native, *(0 if part is None else part.data_ptr() for part in whole))
    return packed


def pack_numbers(values: torch.Tensor) -> PackedMatrix:
    """Pack a bf16 matrix [columns, length] as it is."""
    import torch

    require(values.dtype == torch.bfloat16, "values", values.dtype, "bf16")
    columns, length = values.shape
    packed = _empty(columns, length, _NUMBERS_GROUP, 16, False)
    padded = torch.nn.functional.pad(values, (0, packed.inner - length)).contiguous()
    _native.pack_numbers(packed.native, padded.data_ptr())
    return packed


def pack_gguf(blocks: memoryview, shape: tuple[int, int], name: str) -> PackedMatrix:
    """A tensor of format "Q4_0", "Q4_1" or "Q8_0" as its blocks lie in the file, kept as it is to the last bit."""
    import torch

    bits = {"Q4_0": 4, "Q4_1": 4, "Q8_0": 8}[name]
    packed = _empty(*shape, 32, bits, name == "Q4_1")
    _native.pack_gguf(packed.native, torch.frombuffer(blocks, dtype=torch.uint8).data_ptr())
    return packed


def concatenate(parts: list[PackedMatrix]) -> PackedMatrix:
    """The columns of several matrices of one kind, one after another; all but the last must have whole panels."""
    import torch

    first = parts[0]
    require(all(p.plain for p in parts), "parts", "sorted or on a grid", "as they were packed")
    kinds = {(p.length, p.group, p.bits, p.minimum) for p in parts}
    require(len(kinds) == 1, "parts", kinds, "of one length, group and number of bits")
    require(all(p.columns % PANEL == 0 for p in parts[:-1]), "columns", [p.columns for p in parts], "whole panels")
    columns = sum(p.columns for p in parts)
    whole = _empty(columns, first.length, first.group, first.bits, first.minimum)
    torch.cat([p.data for p in parts], out=whole.data)
    return whole


def _empty(columns: int, length: int, group: int, bits: int, minimum: bool) -> PackedMatrix:
    import torch

    size = packed_bytes(columns, length, group, bits, minimum)
    room = torch.empty(size + 64, dtype=torch.uint8)
    start = -room.data_ptr() % 64
    return PackedMatrix(room[start : start + size], columns, length, group, bits, minimum)
