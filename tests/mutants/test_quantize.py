"""Mutants of quantisers, checkpoints and mixed activations, all killed by their tests."""

from __future__ import annotations

import pytest

from tests.mutants.test_mutants import Mutant, assert_green, assert_killed

pytestmark = pytest.mark.slow

TESTS = [
    *(f"tests/models/test_quantize{part}.py" for part in ("", "_mixed", "_model")),
    "tests/kernels/test_tiles.py",
]
MUTANTS = [
    Mutant(
        "values are found by scales that are not the stored ones",
        "quantize/grid.py",
        "_half(high * (2 * shrink / self.top))",
        "high * (2 * shrink / self.top)",
    ),
    Mutant(
        "a group of zeros divides by zero",
        "quantize/grid.py",
        "steps = torch.where(scales.scale > 0, scales.scale, torch.inf)[..., None]",
        "steps = scales.scale[..., None]",
    ),
    Mutant(
        "a minimum is no fp16 number",
        "quantize/grid.py",
        "part.mul_(128).round_().div_(128)",
        "part.mul_(2048).round_().div_(2048)",
    ),
    Mutant("a minimum has the wrong sign", "models/quantized.py", "* -self.zeros.float()", "* self.zeros.float()"),
    Mutant(
        "no block makes up for the ones before it",
        "quantize/gptq.py",
        "work[last:] -= upper",
        "work[last:] -= 0 * upper",
    ),
    Mutant("what is lost is not weighed", "quantize/gptq.py", "(work[j] - meant).div_(upper[j, j])", "work[j] - meant"),
    Mutant("the Hessian is not damped", "quantize/gptq.py", "+ damping * mean", "+ 0 * damping * mean"),
    Mutant(
        "the two least are kept",
        "quantize/gptq.py",
        "fours.sort(dim=-1, descending=True, stable=True)",
        "fours.sort(dim=-1, descending=False, stable=True)",
    ),
    Mutant(
        "pruned weights are chosen by size alone",
        "quantize/gptq.py",
        "(work / diagonal[:, None]).square()",
        "(work / diagonal.mean()).square()",
    ),
    Mutant(
        "nibbles change places",
        "models/quantized.py",
        "padded[:, 0::2] | (padded[:, 1::2] << 4)",
        "padded[:, 1::2] | (padded[:, 0::2] << 4)",
    ),
    Mutant(
        "later layers are calibrated on the model as it was",
        "quantize/layerwise.py",
        "stream.advance(with_quantised(weights, found), index)",
        "stream.advance(weights, index)",
    ),
    Mutant(
        "inputs are gathered before the norm's weights",
        "quantize/layerwise.py",
        "inputs = x if fold is None else x * fold",
        "inputs = x",
    ),
    Mutant(
        "rows of queries and keys are written as GGUF has them",
        "quantize/checkpoint.py",
        "stored(name, matrix.rows(_halves(name, spec, weights, len(matrix.values))))",
        "stored(name, matrix)",
    ),
    Mutant(
        "packed rows of queries and keys keep their halves",
        "models/fused.py",
        "order = self._adjacent(torch.arange(columns))",
        "order = torch.arange(columns)",
    ),
    Mutant(
        "4 bits reach one step too far",
        "quantize/mixed.py",
        "torch.where(plan.bits == 8, 127.0, 7.0)",
        "torch.where(plan.bits == 8, 127.0, 8.0)",
    ),
    Mutant("all blocks share the first scale", "quantize/mixed.py", "weight.scales[:, block]", "weight.scales[:, 0]"),
    Mutant(
        "8 bits go where they save least",
        "quantize/mixed_model.py",
        "places.sort(key=lambda place: -place[0])",
        "places.sort(key=lambda place: place[0])",
    ),
    Mutant("a thief leaves what it took", "kernels/tiles.py", "richest.last = cut", "richest.last = richest.last"),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.wrong.replace(" ", "-") for mutant in MUTANTS])
def test_quantisers(mutant: Mutant) -> None:
    assert_killed(TESTS, mutant)


def test_the_tests_pass_without_a_mutant() -> None:
    assert_green(TESTS)
