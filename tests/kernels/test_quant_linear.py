"""Quantised layers: what MARLIN's publication says must hold, on every level of instructions this machine has."""

from __future__ import annotations

import gc
import io
import weakref

import numpy as np
import pytest
import torch
from torch import nn

from stretto.kernels.levels import BEST_LEVEL, LEVELS
from stretto.kernels.linear import Quantized, QuantLinear, replace_linear, round_to_nearest
from stretto.kernels.packed import PACKED_LEVELS, PATHS, PackedMatrix, pack

AVAILABLE = [level for level in PACKED_LEVELS if level in LEVELS[LEVELS.index(BEST_LEVEL) :]]
ROWS = (1, 2, 3, 4, 8, 12, 16, 24, 32, 48, 64, 118, 128, 152, 768, 1024)
BOUND = {"exact": 1e-5, "bf16": 3e-3, "fast": 1e-2}


def linear(inputs: int, outputs: int, bias: bool = True, seed: int = 0) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=bias)
    generator = torch.Generator().manual_seed(seed)
    nn.init.normal_(layer.weight, generator=generator)
    if bias:
        nn.init.normal_(layer.bias, generator=generator)
    return layer


def activations(rows: int, inner: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, inner, generator=torch.Generator().manual_seed(seed))


# --- numbers


@pytest.mark.parametrize("level", AVAILABLE)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("group", [32, 128, -1])
def test_error_against_fp64_at_all_numbers_of_rows(level: str, path: str, group: int) -> None:
    layer = QuantLinear.from_linear(linear(256, 80, bias=False), group=group)
    x = activations(max(ROWS), 256)
    wanted = x.double() @ layer.dequantize().double().T
    for rows in ROWS:
        found = layer.matrix.multiply(x[:rows], path=path, level=level)  # type: ignore[arg-type]
        error = (found - wanted[:rows]).abs().mean() / wanted[:rows].abs().mean()
        assert error < BOUND[path], (rows, float(error))


@pytest.mark.parametrize("level", AVAILABLE)
@pytest.mark.parametrize("group", [32, 64, 256])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 13])
def test_the_fast_path_is_a_whole_number_product_to_the_last_bit(level: str, group: int, rows: int) -> None:
    """With a scale of 1 and one group nothing but the last two roundings is not exact."""
    generator = torch.Generator().manual_seed(rows)
    values = torch.randint(0, 16, (48, group), generator=generator, dtype=torch.int64).to(torch.uint8)
    weights = pack(values, torch.ones(48, 1).half(), bits=4)
    x = activations(rows, group) * 3
    found = weights.multiply(x, path="fast", level=level).numpy()
    most = x.abs().amax(1, keepdim=True).numpy()
    scale, inverse = most / np.float32(127), np.float32(127) / most
    whole = np.rint(x.numpy() * inverse).astype(np.int64)
    sums = whole @ values.numpy().astype(np.int64).T
    product = sums.astype(np.float32) * scale
    minimum = np.float32(-8) * (scale * whole.sum(1, keepdims=True).astype(np.float32))
    assert np.array_equal(found, product + minimum)


@pytest.mark.parametrize("level", AVAILABLE)
def test_the_fast_path_over_many_groups(level: str) -> None:
    layer = QuantLinear.from_linear(linear(512, 64, bias=False), group=64)
    values, scales, _ = layer.matrix.unpack()
    x = activations(37, 512).view(37, 8, 64)
    step = x.abs().amax(-1, keepdim=True) / 127
    whole = (x * (127 / x.abs().amax(-1, keepdim=True))).round().long()
    sums = torch.einsum("rgk,cgk->rcg", whole, values.view(64, 8, 64).long() - 8)
    wanted = (sums.double() * scales.double() * step.double().transpose(1, 2)).sum(-1)
    found = layer.matrix.multiply(x.reshape(37, 512), path="fast", level=level)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=1e-3)
    exact = layer.matrix.multiply(x.reshape(37, 512), level=level)
    # Half a step of each activation, times the weights of its group.
    weights = layer.dequantize().view(64, 8, 64).abs().sum(-1)
    bound = (step[..., 0] / 2) @ weights.T
    assert ((found - exact).abs() <= bound * 1.001 + 1e-3).all()


@pytest.mark.parametrize("level", AVAILABLE)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_value_in_every_place(level: str, path: str, bits: int) -> None:
    """Column c of the product with the unit vector of element k is the value there and nothing else."""
    top = 1 << bits
    columns, inner = 48, 64
    places = torch.arange(columns)[:, None] * 5 + torch.arange(inner) * 3
    x = torch.eye(inner)
    seen = torch.zeros(columns, inner, dtype=torch.int64)
    for turn in range(0, top, 1 if bits == 4 else 51):
        values = ((places + turn) % top).to(torch.uint8)
        weights = pack(values, torch.ones(columns, 2).half(), bits=bits)
        found = weights.multiply(x, path=path, level=level)  # type: ignore[arg-type]
        wanted = values.T.float() - top // 2
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
        seen |= 1 << (values.long() & 15)
    if bits == 4:
        assert (seen == 0xFFFF).all()


def test_one_group_a_column_is_a_group_of_all_inputs() -> None:
    one, all_ = (QuantLinear.from_linear(linear(256, 40), group=group) for group in (-1, 256))
    assert torch.equal(one.data, all_.data)
    assert one.group == all_.group == 256
    odd = QuantLinear.from_linear(linear(100, 40), group=-1)
    assert odd.group == 128
    assert odd.matrix.unpack()[1].shape == (40, 1)


@pytest.mark.parametrize("level", AVAILABLE)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("bits", [4, 8])
def test_columns_of_zeros_give_zeros(level: str, path: str, bits: int) -> None:
    plain = linear(128, 20, bias=False)
    with torch.no_grad():
        plain.weight[3] = 0
        plain.weight[7, :64] = 0
        plain.weight[9] = 1e-30  # below all of fp16
    layer = QuantLinear.from_linear(plain, group=64, bits=bits)  # type: ignore[arg-type]
    out = layer.matrix.multiply(activations(5, 128), path=path, level=level)  # type: ignore[arg-type]
    assert torch.equal(out[:, [3, 9]], torch.zeros(5, 2))
    assert torch.equal(layer.dequantize()[7, :64], torch.zeros(64))
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("level", AVAILABLE)
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("group", [32, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_what_is_not_finite_stays_in_its_row(level: str, path: str, group: int, bits: int) -> None:
    layer = QuantLinear.from_linear(linear(256, 33, bias=False), group=group, bits=bits)  # type: ignore[arg-type]
    x = activations(19, 256)
    clean = layer.matrix.multiply(x, path=path, level=level)  # type: ignore[arg-type]
    for row, wrong in ((0, float("nan")), (8, float("inf")), (18, float("-inf"))):
        spoilt = x.clone()
        spoilt[row, 255 - row] = wrong
        found = layer.matrix.multiply(spoilt, path=path, level=level)  # type: ignore[arg-type]
        assert not torch.isfinite(found[row]).any()
        keep = [i for i in range(19) if i != row]
        assert torch.equal(found[keep], clean[keep])


# --- rounding


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_rounding_is_to_the_nearest_and_keeps_the_largest(bits: int, group: int) -> None:
    weight = linear(256, 30, bias=False).weight.detach()
    values, scales, minima = round_to_nearest(weight, group, bits)
    assert minima is None
    middle, steps = (8, 7.5) if bits == 4 else (128, 127)
    grouped = weight.view(30, -1, group)
    torch.testing.assert_close(scales, (grouped.abs().amax(-1) / steps).half())
    step = scales.float()[..., None]
    found = (values.view(30, -1, group).float() - middle) * step
    # At most half a step, but for the one value above the top of the range: 7.5 steps is 7 or 8, and 8 is not there.
    assert ((found - grouped).abs() <= step * 0.505).all()
    assert values.min() >= (0 if bits == 4 else 1)


def test_weights_without_a_scale_are_refused() -> None:
    for wrong in (float("nan"), float("inf"), 1e6):
        plain = linear(64, 4)
        with torch.no_grad():
            plain.weight[1, 2] = wrong
        with pytest.raises(ValueError, match=r"weight is .*; it must be finite and at most 491280"):
            QuantLinear.from_linear(plain)


def test_another_quantiser_can_be_passed_in() -> None:
    def with_minima(weight: torch.Tensor, group: int, bits: int) -> Quantized:
        grouped = nn.functional.pad(weight, (0, -weight.shape[1] % group)).view(len(weight), -1, group)
        low = grouped.amin(-1).half()
        scales = ((grouped.amax(-1) - low.float()) / 15).half()
        values = ((grouped - low.float()[..., None]) / scales.float()[..., None]).round().clamp(0, 15)
        return values.to(torch.uint8).view(len(weight), -1), scales, low

    plain = linear(100, 30)
    layer = QuantLinear.from_linear(plain, group=32, method=with_minima)
    assert layer.minimum
    error = (layer.dequantize() - plain.weight).abs().max()
    assert error < (QuantLinear.from_linear(plain, group=32).dequantize() - plain.weight).abs().max()
    assert torch.equal(layer(activations(3, 100)), layer.matrix.multiply(activations(3, 100)) + plain.bias)


# --- the layer


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (576, 192), (100, 7), (33, 129), (576, 1536)])
@pytest.mark.parametrize("group", [32, 64, 128, -1])
def test_any_number_of_inputs_and_outputs(inputs: int, outputs: int, group: int, bias: bool) -> None:
    plain = linear(inputs, outputs, bias=bias)
    layer = QuantLinear.from_linear(plain, group=group)
    weight = layer.dequantize()
    assert weight.shape == plain.weight.shape
    x = activations(6, inputs).view(2, 3, inputs)
    with torch.inference_mode():
        bias_of = None if plain.bias is None else plain.bias.double()
        wanted = nn.functional.linear(x.double(), weight.double(), bias_of)
        torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-5, atol=1e-4)
        rounded = layer(x.bfloat16())
    assert rounded.dtype == torch.bfloat16
    torch.testing.assert_close(rounded.double(), wanted, rtol=3e-2, atol=3e-2 * float(wanted.abs().max()))
    assert layer(x[:0]).shape == (0, 3, outputs)


@pytest.mark.parametrize(("bits", "group"), [(4, 128), (4, 32), (8, 64)])
def test_bytes_held_are_those_of_the_packed_weight_alone(bits: int, group: int) -> None:
    plain = linear(512, 96, bias=False)
    weight = weakref.ref(plain.weight)
    layer = QuantLinear.from_linear(plain, group=group, bits=bits)  # type: ignore[arg-type]
    layer(activations(3, 512))
    layer.dequantize()
    del plain
    gc.collect()
    assert weight() is None
    wanted = 512 * 96 * bits // 8 + 2 * 96 * 512 // group
    held = {id(t.untyped_storage()): t.untyped_storage().nbytes() for t in _tensors_of(layer)}
    assert sum(held.values()) == wanted == layer.data.numel()
    assert [name for name, _ in layer.named_buffers()] == ["data"]
    assert not list(layer.parameters())


def _tensors_of(layer: nn.Module) -> list[torch.Tensor]:
    """All tensors that can be reached from the layer's own attributes, buffers among them."""
    found, queue, seen = [], [vars(layer)], set()
    while queue:
        item = queue.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            found.append(item)
        elif isinstance(item, dict):
            queue.extend(item.values())
        elif isinstance(item, (list, tuple, set)):
            queue.extend(item)
        elif isinstance(item, PackedMatrix):
            queue.append(vars(item))
    return found


@pytest.mark.parametrize("bias", [False, True])
def test_a_state_comes_back_to_the_last_bit_without_pickled_code(bias: bool) -> None:
    layer = QuantLinear.from_linear(linear(100, 40, bias=bias), group=32)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    again = QuantLinear(100, 40, bias=torch.empty(40) if bias else None, group=32)
    again.load_state_dict(state)
    assert torch.equal(again.data, layer.data)
    x = activations(4, 100)
    assert torch.equal(again(x), layer(x))


def test_a_state_that_is_laid_out_otherwise_is_refused() -> None:
    """Groups of 64 with a minimum have as many bytes as groups of 32 without one."""
    state = QuantLinear.from_linear(linear(128, 32, bias=False), group=32).state_dict()
    other = QuantLinear(128, 32, group=64, minimum=True)
    assert other.data.shape == state["data"].shape
    with pytest.raises(ValueError, match=r"layout is \[32, 128, 32, 4, 0\]; it must be \[32, 128, 64, 4, 1\]"):
        other.load_state_dict(state)
    with pytest.raises(ValueError, match=r"it must be \[48, 128, 32, 4, 0\]"):
        QuantLinear(128, 48, group=32).load_state_dict(state)
    with pytest.raises(RuntimeError, match="size mismatch for data"):
        QuantLinear(128, 32, group=32).load_state_dict({**state, "data": state["data"][:-1]})
    del state["_extra_state"]
    with pytest.raises(RuntimeError, match="_extra_state"):
        QuantLinear(128, 32, group=32).load_state_dict(state)


def test_other_types_and_copies() -> None:
    layer = QuantLinear.from_linear(linear(64, 20), group=32).to(torch.bfloat16)
    assert layer.data.dtype == torch.uint8
    assert layer.bias is not None
    assert layer.bias.dtype == torch.bfloat16
    x = activations(2, 64)
    assert layer(x).dtype == torch.float32
    assert "in_features=64, out_features=20, bias=True, group=32, bits=4, path='exact'" in repr(layer)


def test_compiled_whole() -> None:
    model = nn.Sequential(linear(64, 48), nn.GELU(), linear(48, 10))
    replace_linear(model, group=32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.inference_mode():
        x = activations(5, 64)
        torch.testing.assert_close(compiled(x), model(x))


# --- a model's layers


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(64, 64)
        self.tied = self.first
        self.rest = nn.ModuleList([nn.Linear(64, 32, bias=False), nn.Linear(32, 64)])
        self.special = nn.modules.linear.NonDynamicallyQuantizableLinear(64, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.tied(self.first(x))
        for layer in self.rest:
            x = layer(x)
        return self.special(x)


def test_layers_of_a_model_are_exchanged() -> None:
    model = nn.Sequential(Block(), nn.Linear(64, 16))
    x = activations(3, 64)
    with torch.no_grad():
        before = model(x)
    weights = [weakref.ref(model[0].first.weight), weakref.ref(model[0].rest[0].weight)]
    kept = model[1]
    names = replace_linear(model, keep={"1", "0.rest.1"}, group=32, bits=8, path="fast")
    assert names == ["0.first", "0.tied", "0.rest.0"]
    assert model[1] is kept
    assert type(model[0].rest[1]) is nn.Linear
    assert isinstance(model[0].special, nn.modules.linear.NonDynamicallyQuantizableLinear)
    assert model[0].first is model[0].tied
    assert model[0].first.path == "fast"
    gc.collect()
    assert [weight() for weight in weights] == [None, None]
    after = model(x)
    assert (after - before).abs().mean() < 0.02 * before.abs().mean()
    assert replace_linear(model, keep={"1", "0.rest.1"}) == []


def test_mistakes_are_told() -> None:
    plain = linear(64, 8)
    with pytest.raises(ValueError, match=r"use QuantLinear\.from_linear"):
        replace_linear(plain)
    for group in (0, 16, 48, -2):
        with pytest.raises(ValueError, match=f"group is {group}; it must be a multiple of 32, or -1"):
            QuantLinear.from_linear(plain, group=group)
    with pytest.raises(ValueError, match="bits is 3"):
        QuantLinear.from_linear(plain, bits=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="method is 'gptq'; it must be rtn or a function"):
        QuantLinear.from_linear(plain, method="gptq")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="path is 'slow'"):
        QuantLinear.from_linear(plain, path="slow")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"x is \(2, 63\)"):
        QuantLinear.from_linear(plain)(torch.randn(2, 63))
