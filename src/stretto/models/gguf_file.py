"""Reads a GGUF file: metadata into plain values, tensors as packed bytes that stay mapped from the file.

Every length the file states is checked against the bytes that are left before anything is allocated or
sliced, so a truncated or hostile file ends in a `UserError` after work proportional to its true size. (The
`gguf` package's reader checks little and takes two seconds for the vocabulary alone.) Layout:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stretto.core.errors import UserError
from stretto.models.quantized import FORMATS, BlockTensor

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_DEFAULT_ALIGNMENT = 32
_MAX_DIMS = 4
_STRING, _ARRAY = 8, 9
_SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
# The fewest bytes an entry can take, which bounds every stated count by the size of the file.
_SMALLEST_FIELD, _SMALLEST_TENSOR, _SMALLEST_STRING = 8 + 4 + 1, 8 + 4 + 8 + 4 + 8, 8


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """An open GGUF file; the mapping lives as long as any tensor of it.

    Attributes:
        metadata: key to number, string, bool or list of those.
        tensors: name to packed tensor, shapes in row-major order (rows, columns).
    """

    path: Path
    metadata: Mapping[str, Any]
    tensors: Mapping[str, BlockTensor]


def read_gguf(path: str | os.PathLike[str]) -> GGUFFile:
    """Open `path`; raises `UserError` naming the file and what is wrong with it."""
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 24:
                raise UserError(f"has {size} bytes, too few for a GGUF file", file=str(path), right="download it again")
            # A private copy-on-write mapping: torch wants writable memory, and the file stays as it is.
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except OSError as error:
        raise UserError(
            f"cannot be opened: {error.strerror or error}",
            file=str(path),
            right="give the path of a readable .gguf file",
        ) from None
    return _Reader(data, str(path)).read(path)


@dataclass(slots=True)
class _Reader:
    data: mmap.mmap
    file: str
    at: int = 0
    names: set[str] = field(default_factory=set)

    def read(self, path: Path) -> GGUFFile:
        if self.data[:4] != _MAGIC:
            shown = bytes(self.data[:4])
            raise self.wrong(f"starts with {shown!r}, not {_MAGIC!r}", "give a GGUF file or a safetensors folder")
        self.at = 4
        version = self.scalar("<I")
        if version not in _VERSIONS:
            what = "big-endian" if version & 0xFFFF == 0 else f"version {version}"
            raise self.wrong(f"is GGUF of {what}", f"little-endian version {' or '.join(map(str, _VERSIONS))} is read")
        tensor_count, field_count = self.scalar("<Q"), self.scalar("<Q")
        self.fits(field_count, _SMALLEST_FIELD, "metadata fields")
        metadata = dict(self.field() for _ in range(field_count))
        self.fits(tensor_count, _SMALLEST_TENSOR, "tensors")
        entries = [self.tensor_entry() for _ in range(tensor_count)]

        alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or not 1 <= alignment <= 2**20 or alignment & (alignment - 1):
            raise self.wrong(f"states an alignment of {alignment!r}", "a power of two up to 2**20")
        start = -(-self.at // alignment) * alignment
        tensors = {name: self.tensor(name, shape, kind, start + offset) for name, shape, kind, offset in entries}
        return GGUFFile(path, metadata, tensors)

    def wrong(self, problem: str, right: str = "the file is damaged; download it again") -> UserError:
        return UserError(problem, file=self.file, right=right)

    def fits(self, count: int, smallest: int, what: str) -> None:
        left = len(self.data) - self.at
        if count * smallest > left:
            raise self.wrong(f"states {count} {what} at byte {self.at}, but only {left} bytes are left")

    def take(self, size: int) -> bytes:
        self.fits(size, 1, "bytes")
        start, self.at = self.at, self.at + size
        return self.data[start : self.at]

    def scalar(self, layout: str) -> Any:
        (value,) = struct.unpack(layout, self.take(struct.calcsize(layout)))
        return value

    def string(self) -> str:
        (size,) = struct.unpack("<Q", self.take(8))
        try:
            return self.take(size).decode("utf-8")
        except UnicodeDecodeError:
            raise self.wrong(f"holds a string that is not UTF-8 before byte {self.at}") from None

    def name(self) -> str:
        name = self.string()
        if name in self.names:
            raise self.wrong(f"names {name[:80]!r} twice")
        self.names.add(name)
        return name

    def field(self) -> tuple[str, Any]:
        return self.name(), self.value(self.scalar("<I"))

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.string()
        if kind == _ARRAY:
            return self.array(self.scalar("<I"), self.scalar("<Q"))
        if kind not in _SCALARS:
            raise self.wrong(f"holds a metadata value of unknown type {kind} before byte {self.at}")
        return self.scalar(_SCALARS[kind])

    def array(self, kind: int, count: int) -> list[Any]:
        if kind == _STRING:
            self.fits(count, _SMALLEST_STRING, "strings")
            return [self.string() for _ in range(count)]
        if kind not in _SCALARS:
            raise self.wrong(f"holds an array of unknown or nested type {kind} before byte {self.at}")
        layout = _SCALARS[kind]
        self.fits(count, struct.calcsize(layout), "array elements")
        return list(struct.unpack(f"<{count}{layout[1]}", self.take(count * struct.calcsize(layout))))

    def tensor_entry(self) -> tuple[str, tuple[int, ...], int, int]:
        name, dims = self.name(), self.scalar("<I")
        if not 1 <= dims <= _MAX_DIMS:
            raise self.wrong(f"gives tensor {name[:80]!r} {dims} dimensions", f"from 1 to {_MAX_DIMS}")
        # GGUF lists the fastest-moving dimension first.
        shape = tuple(reversed([self.scalar("<Q") for _ in range(dims)]))
        return name, shape, self.scalar("<I"), self.scalar("<Q")

    def tensor(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> BlockTensor:
        form = FORMATS.get(kind)
        if form is None:
            known = ", ".join(form.name for form in FORMATS.values())
            raise self.wrong(f"tensor {name!r} has block format {kind}, which is not read", f"use one of {known}")
        if math.prod(shape) == 0 or shape[-1] % form.block:
            raise self.wrong(f"tensor {name!r} of shape {shape} is not whole {form.name} blocks of {form.block}")
        size = math.prod(shape) // form.block * form.block_bytes
        if start + size > len(self.data):
            raise self.wrong(f"tensor {name!r} ends at byte {start + size}, but the file has {len(self.data)}")
        return BlockTensor(form, shape, memoryview(self.data)[start : start + size])
