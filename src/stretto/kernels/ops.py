"""Products with packed matrices as an operator of torch: what `torch.compile` can trace and modules can call.

`torch.ops.stretto.packed_matmul` is the product of `kernels.packed` on tensors and plain numbers alone, in fp32 or
bf16 (the kernels take fp32; bf16 is widened before and rounded after). It has no gradient: weights in 4 bits are for
inference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from stretto.core.errors import UserError, require
from stretto.kernels.packed import PATHS, PackedMatrix, packed_bytes

if TYPE_CHECKING:
    from stretto.kernels.packed import Path

_TYPES = (torch.float32, torch.bfloat16)

_library = torch.library.Library("stretto", "FRAGMENT")
_library.define(
    "packed_matmul(Tensor x, Tensor data, int columns, int length, int group, int bits, bool minimum, str path)"
    " -> Tensor"
)


def packed_matmul(x: torch.Tensor, matrix: PackedMatrix, *, path: Path = "exact") -> torch.Tensor:
    """x [..., length] times a packed matrix: [..., columns], in x's type, on as many threads as torch uses.

    Args:
        x: fp32 or bf16, any leading dimensions, none of them too; no rows give no rows.
        path: how activations enter the product; see `kernels.packed`.

    Raises:
        ValueError: naming the argument that is wrong.
        UserError: when a gradient is asked for.
    """
    require(matrix.plain, "matrix", "sorted or on a grid", "one as it was packed")
    found: torch.Tensor = torch.ops.stretto.packed_matmul(
        x, matrix.data, matrix.columns, matrix.length, matrix.group, matrix.bits, matrix.minimum, path
    )
    return found


def _check(
    x: torch.Tensor, data: torch.Tensor, columns: int, length: int, group: int, bits: int, minimum: bool, path: str
) -> None:
    """Everything that the native call, which sees addresses alone, relies on."""
    require(columns >= 1, "columns", columns, "at least 1")
    require(length >= 1, "length", length, "at least 1")
    require(group >= 32 and group % 32 == 0, "group", group, "a multiple of 32")
    require(bits in (4, 8, 16), "bits", bits, "4, 8 or 16")
    require(not minimum or bits == 4, "minimum", minimum, "False where bits is not 4")
    require(path in PATHS, "path", path, f"one of {', '.join(PATHS)}")
    require(x.ndim >= 1 and x.shape[-1] == length, "x", tuple(x.shape), f"[..., {length}]")
    require(x.dtype in _TYPES, "x", x.dtype, "torch.float32 or torch.bfloat16")
    size = packed_bytes(columns, length, group, bits, minimum)
    require(data.dtype == torch.uint8, "data", data.dtype, "torch.uint8")
    require(
        data.ndim == 1 and data.shape[0] == size, "data", tuple(data.shape), f"[{size}], the bytes of such a matrix"
    )


def _compute(
    x: torch.Tensor, data: torch.Tensor, columns: int, length: int, group: int, bits: int, minimum: bool, path: str
) -> torch.Tensor:
    _check(x, data, columns, length, group, bits, minimum, path)
    matrix = PackedMatrix(data.contiguous(), columns, length, group, bits, minimum)
    rows = x.reshape(-1, length).float().contiguous()
    out = matrix.multiply(rows, path=path, threads=torch.get_num_threads())  # type: ignore[arg-type]
    return out.to(x.dtype).view(*x.shape[:-1], columns)


def _shape(
    x: torch.Tensor, data: torch.Tensor, columns: int, length: int, group: int, bits: int, minimum: bool, path: str
) -> torch.Tensor:
    _check(x, data, columns, length, group, bits, minimum, path)
    return x.new_empty(*x.shape[:-1], columns)


def _no_gradient(context: Any, gradient: torch.Tensor) -> Any:
    raise UserError(
        "stretto::packed_matmul has no gradient",
        right="run it under torch.inference_mode(), or call dequantize() and train with plain weights",
    )


_library.impl("packed_matmul", _compute, "CPU")
torch.library.register_fake("stretto::packed_matmul", _shape, lib=_library)
torch.library.register_autograd("stretto::packed_matmul", _no_gradient, lib=_library)
