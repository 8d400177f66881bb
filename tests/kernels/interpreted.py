"""The GPU twins in Triton's interpreter; run by test_triton.py in a process of its own, as a script.

Prints a JSON list of [case, figure] pairs: a few cases, or with --all many. The interpreter keeps bf16 as 16-bit whole
numbers, would subtract and multiply those, and cuts fp32 down to them, so it is mended first.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from stretto.kernels.packed import PackedMatrix, pack
from stretto.kernels.stripes import Stripes
from stretto.kernels.triton import striped, w4a8, w4a16
from stretto.kernels.triton.layout import repack


def mend() -> None:
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    dot, binary, cast = builder.create_dot, builder.binary_op, builder.cast_impl

    def widened(of: Any) -> Any:
        if of.dtype.scalar != tl.bfloat16:
            return of
        return handle((of.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def narrowed(of: Any) -> Any:
        return handle(torch.from_numpy(of.data).bfloat16().view(torch.uint16).numpy(), tl.bfloat16)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, widened(a), widened(b), *rest)

    def binary_op(self: Any, a: Any, b: Any, op: Any) -> Any:
        found = binary(self, widened(a), widened(b), op)
        return narrowed(found) if a.dtype.scalar == tl.bfloat16 else found

    def cast_impl(self: Any, source: Any, to: Any) -> Any:
        if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            return narrowed(source)
        return cast(self, source, to)

    builder.create_dot, builder.binary_op, builder.cast_impl = create_dot, binary_op, cast_impl


def matrix(columns: int, length: int, group: int, minimum: bool) -> PackedMatrix:
    generator = torch.Generator().manual_seed(columns + length + group)
    inner = -(-length // group) * group
    values = torch.randint(0, 16, (columns, inner), generator=generator).to(torch.uint8)
    scales = (torch.rand(columns, inner // group, generator=generator) * 0.1).half()
    minima = torch.randn(columns, inner // group, generator=generator).half() if minimum else None
    return pack(values, scales, minima, bits=4, length=length)


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    if not torch.isfinite(found).all():
        return float("inf")
    return float((found.double() - wanted).abs().mean() / wanted.abs().mean())


FEW = [
    # columns, length, group, minimum, rows, workers
    (130, 256, 64, False, 17, 3),
    (130, 256, 64, True, 1, 1),
    (70, 200, 128, True, 33, 2),
    (256, 512, 512, False, 2, 5),
    (129, 512, 512, True, 70, 4),
    (140, 192, 32, False, 16, 4),
    (100, 384, 192, True, 3, 2),
    (129, 512, 256, False, 5, 3),
]
MANY = [
    (*shape, minimum, rows, workers)
    for shape in ((130, 256, 64), (70, 200, 128), (256, 512, 512), (140, 192, 32), (100, 384, 192), (129, 512, 256))
    for minimum in (False, True)
    for rows, workers in ((1, 3), (2, 64), (17, 1), (33, 5), (70, 4), (152, 7))
]


def cases(asked: Any) -> Any:
    for columns, length, group, minimum, rows, workers in asked:
        plain = matrix(columns, length, group, minimum)
        tiled, whole = repack(plain), plain.dequantize().double()
        x = torch.randn(rows, length, generator=torch.Generator().manual_seed(rows))
        where = f"{rows} x {length} x {columns}, group {group}, minimum {minimum}, {workers} workers"
        for dtype in (torch.bfloat16, torch.float16):
            own = x.to(dtype)
            how = tiled if dtype == torch.bfloat16 else repack(plain, fragments=True)
            found = w4a16.matmul(own, how, workers=workers)
            assert found.dtype == dtype
            yield f"{dtype}, {where}", error(found, own.double() @ whole.T)
        if group >= 64:
            found = w4a8.matmul(x, tiled, workers=workers)
            yield f"int8, {where}", error(found, plain.multiply(x, path="fast").double())


def specials() -> Any:
    plain = matrix(130, 256, 64, True)
    tiled = repack(plain)
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(1))
    clean = [w4a16.matmul(x.half(), tiled, workers=3), w4a8.matmul(x, tiled, workers=3)]
    for wrong in (float("nan"), float("inf")):
        spoilt = x.clone()
        spoilt[2, 100] = wrong
        for before, after in zip(
            clean, (w4a16.matmul(spoilt.half(), tiled, workers=3), w4a8.matmul(spoilt, tiled, workers=3)), strict=True
        ):
            yield f"{wrong} stays in its row", float(torch.isfinite(after[2]).any())
            yield f"{wrong} leaves the other rows", float(not torch.equal(before[[0, 1, 3, 4]], after[[0, 1, 3, 4]]))
    for kind in (w4a16, w4a8):
        assert kind.matmul(x[:0].half(), tiled, workers=3).shape == (0, 130)
    zero = torch.zeros(2, 256)
    zero[1] = 1e-39
    yield "zeros, and numbers below all scales", float(w4a8.matmul(zero, tiled, workers=2).abs().max())
    same = [w4a16.matmul(x.half(), tiled, workers=4) for _ in range(2)]
    yield "two runs", float(not torch.equal(*same))


def order() -> Any:
    """The second launch adds a slice's parts as `Stripes.parts` says, one after another, in fp32."""
    stripes = Stripes(inner_tiles=5, slices=4, workers=7)
    how = striped.Striped(stripes=stripes, tile_rows=16, rows=16, column_tiles=4)
    partials = (
        torch.randn(7, 2, 128, 16, generator=torch.Generator().manual_seed(0))
        * 10.0 ** torch.arange(7)[:, None, None, None]
    )
    out = torch.full((16, 512), float("nan"))
    striped.finish(how, partials, out)
    for slice_ in range(4):
        parts = stripes.parts(slice_)
        found = out[:, slice_ * 128 : (slice_ + 1) * 128]
        if len(parts) == 1:
            yield "a slice that is whole is left alone", float(not found.isnan().all())
            continue
        total = torch.zeros(128, 16)
        for part in parts:
            total = partials[part.worker, int(part.first == 0)] + total
        yield "parts are added bottom first", float(not torch.equal(found, total.T))


if __name__ == "__main__":
    torch.set_num_threads(1)
    mend()
    json.dump([*cases(MANY if "--all" in sys.argv else FEW), *specials(), *order()], sys.stdout)
