"""The packed product as an operator of torch: traced, compiled, refused where it must be."""

from __future__ import annotations

import pytest
import torch

from stretto.core.errors import UserError
from stretto.kernels.ops import packed_bytes, packed_matmul
from stretto.kernels.packed import PATHS, PackedMatrix, pack

OP = torch.ops.stretto.packed_matmul


def matrix(columns: int, length: int, group: int = 32, bits: int = 4, minimum: bool = False) -> PackedMatrix:
    generator = torch.Generator().manual_seed(columns + length)
    inner = -(-length // group) * group
    values = torch.randint(0, 1 << bits, (columns, inner), generator=generator, dtype=torch.int64).to(torch.uint8)
    scales = (torch.rand(columns, inner // group, generator=generator) * 0.1).half()
    minima = torch.randn(columns, inner // group, generator=generator).half() if minimum else None
    return pack(values, scales, minima, bits=bits, length=length)


def arguments(x: torch.Tensor, w: PackedMatrix, path: str = "exact") -> tuple[object, ...]:
    return (x, w.data, w.columns, w.length, w.group, w.bits, w.minimum, path)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [(100,), (0, 100), (3, 100), (2, 3, 100), (2, 0, 100)])
def test_any_leading_dimensions(path: str, shape: tuple[int, ...]) -> None:
    w = matrix(70, 100)
    x = torch.randn(shape)
    found = packed_matmul(x, w, path=path)  # type: ignore[arg-type]
    assert found.shape == (*shape[:-1], 70)
    assert found.dtype == torch.float32
    wanted = w.multiply(x.reshape(-1, 100), path=path)  # type: ignore[arg-type]
    assert torch.equal(found.reshape(-1, 70), wanted)


def test_strides_do_not_matter() -> None:
    w = matrix(32, 64)
    x = torch.randn(64, 5).T
    assert torch.equal(packed_matmul(x, w), packed_matmul(x.contiguous(), w))
    wide = torch.randn(5, 128)[:, ::2]
    assert torch.equal(packed_matmul(wide, w), packed_matmul(wide.contiguous(), w))
    apart = torch.zeros(2 * w.data.numel(), dtype=torch.uint8)[::2].copy_(w.data)
    spread = PackedMatrix(apart, w.columns, w.length, w.group, w.bits, w.minimum)
    assert torch.equal(packed_matmul(x, spread), packed_matmul(x, w))


@pytest.mark.parametrize("path", PATHS)
def test_bf16_is_widened_and_the_result_rounded_once(path: str) -> None:
    w = matrix(32, 64)
    x = torch.randn(4, 64).bfloat16()
    found = packed_matmul(x, w, path=path)  # type: ignore[arg-type]
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, w.multiply(x.float(), path=path).bfloat16())  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "minimum"), [(4, False), (4, True), (8, False)])
def test_torch_accepts_the_operator(dtype: torch.dtype, bits: int, minimum: bool) -> None:
    w = matrix(20, 50, bits=bits, minimum=minimum)
    for shape in ((3, 50), (2, 0, 50), (50,)):
        torch.library.opcheck(OP, arguments(torch.randn(shape, dtype=dtype), w))
    wants = torch.randn(3, 50, dtype=dtype, requires_grad=True)  # the check left out asks for the gradient
    torch.library.opcheck(
        OP, arguments(wants, w), test_utils=("test_schema", "test_autograd_registration", "test_faketensor")
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_whole(dynamic: bool) -> None:
    w = matrix(48, 64)

    @torch.compile(fullgraph=True, dynamic=dynamic, backend="aot_eager")
    def layer(x: torch.Tensor) -> torch.Tensor:
        return torch.relu(packed_matmul(x * 2, w)) + 1

    with torch.inference_mode():
        for rows in (1, 3, 8):
            x = torch.randn(rows, 64)
            assert torch.equal(layer(x), torch.relu(w.multiply(x * 2)) + 1)


def test_under_inference_mode() -> None:
    w = matrix(16, 32)
    x = torch.randn(2, 32)
    with torch.inference_mode():
        found = packed_matmul(x + 0, w)
        assert found.is_inference()
    assert torch.equal(found, w.multiply(x))


def test_a_gradient_is_refused_when_it_is_asked_for() -> None:
    w = matrix(16, 32)
    x = torch.randn(2, 32, requires_grad=True)
    out = packed_matmul(x, w)
    with pytest.raises(UserError, match=r"packed_matmul has no gradient; run it under torch.inference_mode"):
        out.sum().backward()


WRONG = {
    "another length": ((torch.randn(2, 31),), {}, r"x is \(2, 31\); it must be \[\.\.\., 32\]"),
    "no dimension": ((torch.tensor(1.0),), {}, r"x is \(\); it must be \[\.\.\., 32\]"),
    "another type": ((torch.randn(2, 32).double(),), {}, "x is torch.float64; it must be torch.float32"),
    "too few bytes": ((), {1: torch.zeros(100, dtype=torch.uint8)}, r"data is \(100,\); it must be \[288\]"),
    "bytes of another type": ((), {1: torch.zeros(288)}, "data is torch.float32; it must be torch.uint8"),
    "bytes in two dimensions": ((), {1: torch.zeros(2, 144, dtype=torch.uint8)}, r"data is \(2, 144\)"),
    "more columns than bytes": ((), {2: 17}, r"data is \(288,\); it must be \[576\]"),
    "no columns": ((), {2: 0}, "columns is 0; it must be at least 1"),
    "no length": ((), {3: 0}, "length is 0; it must be at least 1"),
    "no group": ((), {4: 0}, "group is 0; it must be a multiple of 32"),
    "a group of 48": ((), {4: 48}, "group is 48; it must be a multiple of 32"),
    "3 bits": ((), {5: 3}, "bits is 3; it must be 4, 8 or 16"),
    "a minimum with 8 bits": ((), {5: 8, 6: True}, "minimum is True; it must be False"),
    "an unknown path": ((), {7: "slow"}, "path is 'slow'; it must be one of exact, bf16, fast"),
}


@pytest.mark.parametrize("case", WRONG)
def test_mistakes_are_told_by_name_before_anything_is_read(case: str) -> None:
    first, changes, told = WRONG[case]
    given = list(arguments(torch.randn(2, 32), matrix(16, 32)))
    given[: len(first)] = first
    for index, value in changes.items():  # type: ignore[attr-defined]
        given[index] = value
    with pytest.raises(ValueError, match=told):
        OP(*given)
    with torch.device("meta"), pytest.raises(ValueError, match=told):
        OP(*[each.to("meta") if isinstance(each, torch.Tensor) else each for each in given])


@pytest.mark.parametrize(("bits", "minimum"), [(4, False), (4, True), (8, False)])
@pytest.mark.parametrize(("columns", "length", "group"), [(1, 1, 32), (16, 32, 32), (70, 100, 32), (33, 300, 128)])
def test_bytes_of_a_matrix(columns: int, length: int, group: int, bits: int, minimum: bool) -> None:
    w = matrix(columns, length, group, bits, minimum)
    panels, groups = -(-columns // 16), -(-length // group)
    wanted = panels * 16 * groups * (group * bits // 8 + 2 + 2 * minimum)
    assert packed_bytes(columns, length, group, bits, minimum) == wanted == w.data.numel()
