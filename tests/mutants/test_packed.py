"""Mutants of the packed products: layout, rounding, operator, layers, stripes, roofline (MARLIN)."""

from __future__ import annotations

import pytest

from tests.mutants.test_mutants import Mutant, assert_green, assert_killed

pytestmark = pytest.mark.slow

TESTS = {
    "kernels/packed.py": ("packed", "packed_grid", "quant_linear"),
    "kernels/linear.py": ("quant_linear",),
    "kernels/ops.py": ("ops",),
    "kernels/stripes.py": ("stripes",),
    "kernels/roofline.py": ("roofline",),
    "kernels/triton/layout.py": ("triton",),
}
"""By the mutant's file, the modules under tests/kernels that must notice it."""

# The machine code and the interpreter's numbers come from other processes, which no mutant reaches.
LEFT_OUT = ["-k", "not machine_code and not interpreter"]

MUTANTS = [
    Mutant(
        "the halves of a byte are swapped in unpacking",
        "kernels/packed.py",
        "[values & 15, values >> 4]",
        "[values >> 4, values & 15]",
    ),
    Mutant(
        "four neighbours come in another order",
        "kernels/packed.py",
        "values.permute(0, 4, 1, 2, 3, 5)",
        "values.permute(0, 4, 1, 3, 2, 5)",
    ),
    Mutant(
        "each group has its neighbour's scale",
        "kernels/packed.py",
        "scale = scales.float()[..., None]",
        "scale = scales.float().roll(1, 1)[..., None]",
    ),
    Mutant(
        "the minimum is left out",
        "kernels/packed.py",
        "whole = grouped * scale + minima.float()[..., None]",
        "whole = grouped * scale",
    ),
    Mutant(
        "the padding is kept in place of the first elements",
        "kernels/packed.py",
        "return whole[:, : self.length]",
        "return whole[:, -self.length :]",
    ),
    Mutant(
        "the middle of a grid is that of 8 bits",
        "kernels/packed.py",
        "whole = (grouped - 8) * scale + (0 if",
        "whole = (grouped - 7) * scale + (0 if",
    ),
    Mutant(
        "a grid's minima are left out",
        "kernels/packed.py",
        "(0 if minima is None else minima.float()[..., None])",
        "0",
    ),
    Mutant(
        "a column has its neighbour's unit",
        "kernels/packed.py",
        "whole *= self.units[: self.columns, None, None]",
        "whole *= self.units[: self.columns, None, None].roll(1, 0)",
    ),
    Mutant(
        "a grid is put over the matrix it was made of",
        "kernels/packed.py",
        "_native.put_on_grid(made.native, units.data_ptr())",
        "_native.put_on_grid(self.native, units.data_ptr())",
    ),
    Mutant(
        "a matrix on a grid takes any path",
        "kernels/packed.py",
        'require(self.units is None or path == "bf16"',
        "require(True",
    ),
    Mutant("scales are an eighth of the largest weight", "kernels/linear.py", "(8, 15, 7.5)", "(8, 15, 8.0)"),
    Mutant("weights are cut, not rounded", "kernels/linear.py", ".round_().add_(middle)", ".floor_().add_(middle)"),
    Mutant(
        "weights are padded in front",
        "kernels/linear.py",
        "nn.functional.pad(weight, (0, -length % group))",
        "nn.functional.pad(weight, (-length % group, 0))",
    ),
    Mutant(
        "the bias is forgotten",
        "kernels/linear.py",
        "return out if self.bias is None else out + self.bias.to(out.dtype)",
        "return out",
    ),
    Mutant(
        "any layout of the bytes is believed",
        "kernels/linear.py",
        "require(state.tolist() == mine,",
        "require(len(state) == len(mine),",
    ),
    Mutant(
        "a subclass of Linear is replaced",
        "kernels/linear.py",
        "if type(child) is not nn.Linear or name in keep:",
        "if not isinstance(child, nn.Linear) or name in keep:",
    ),
    Mutant(
        "the plain weight is kept alive",
        "kernels/linear.py",
        "return cls.from_packed(matrix, bias=linear.bias, path=path)",
        "made = cls.from_packed(matrix, bias=linear.bias, path=path)\n"
        "        made.__dict__['plain'] = linear.weight\n        return made",
    ),
    Mutant("the result stays fp32", "kernels/ops.py", "out.to(x.dtype).view", "out.view"),
    Mutant(
        "a gradient of nothing is given",
        "kernels/ops.py",
        "    raise UserError(",
        "    return None\n    raise UserError(",
    ),
    Mutant(
        "a stripe ends one tile early",
        "kernels/stripes.py",
        "min((worker + 1) * self.length, self.tiles))",
        "min((worker + 1) * self.length - 1, self.tiles))",
    ),
    Mutant(
        "stripes begin inside groups",
        "kernels/stripes.py",
        "return -(-share // self.group_tiles) * self.group_tiles",
        "return share",
    ),
    Mutant(
        "parts are added top first",
        "kernels/stripes.py",
        "for worker in range(bottom, top - 1, -1)",
        "for worker in range(top, bottom + 1)",
    ),
    Mutant("counters stay as a failure leaves them", "kernels/stripes.py", "counters[:] = 0", "pass"),
    Mutant("a part takes the place of the sum", "kernels/stripes.py", "own + sums[piece.slice] if", "own if"),
    Mutant("a launch takes too many rows", "kernels/stripes.py", "MAX_PARALLEL))", "MAX_PARALLEL + 1))"),
    Mutant("minima have no bytes", "kernels/roofline.py", "(2 if minimum else 1)", "1"),
    Mutant("24 bits cost one product", "kernels/roofline.py", 'device.peak("int8") / 3', 'device.peak("int8")'),
    Mutant("the knee is at half its rows", "kernels/roofline.py", "weight_bytes / (2 *", "weight_bytes / (4 *"),
    Mutant(
        "the halves of a GPU tile's byte are swapped",
        "kernels/triton/layout.py",
        "(tiles[0] | tiles[1] << 4)",
        "(tiles[1] | tiles[0] << 4)",
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.wrong.replace(" ", "-") for mutant in MUTANTS])
def test_packed_products(mutant: Mutant) -> None:
    assert_killed(asked_of(mutant.file), mutant)


def test_the_tests_pass_without_a_mutant() -> None:
    assert_green(asked_of(*TESTS))


def asked_of(*files: str) -> list[str]:
    names = dict.fromkeys(name for file in files for name in TESTS[file])
    return [*(f"tests/kernels/test_{name}.py" for name in names), *LEFT_OUT]
