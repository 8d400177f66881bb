"""Linear layers whose weights stay in 4 or 8 bits, and their exchange for those of a model.

A layer holds the packed bytes and nothing else of its weight. How weights are rounded is a function that can be
passed in; the one here takes the nearest of evenly spaced values (RTN). After MARLIN (Frantar et al., 2024), without
its limits: any number of inputs and outputs (padded inside), a bias, groups of any multiple of 32.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import nn

from stretto.core.errors import require
from stretto.kernels.ops import packed_matmul
from stretto.kernels.packed import PATHS, PackedMatrix, Path, pack, packed_bytes

Quantized = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
"""What `kernels.packed.pack` takes: values uint8 [columns, inner], scales and minima fp16 [columns, groups] or None."""

Quantizer = Callable[[torch.Tensor, int, int], Quantized]
"""(weight fp32 [columns, length], group, bits) to values over `length` rounded up to whole groups."""

_LARGEST_SCALE = torch.finfo(torch.float16).max


def round_to_nearest(weight: torch.Tensor, group: int, bits: int) -> Quantized:
    """Each weight becomes the nearest multiple of its group's scale: 2/15 of the largest magnitude (1/127 with 8 bits).

    Raises:
        ValueError: if a weight is not finite, or so large that no fp16 scale reaches it.
    """
    columns, length = weight.shape
    middle, top, steps = (8, 15, 7.5) if bits == 4 else (128, 255, 127.0)
    padded = nn.functional.pad(weight, (0, -length % group)).view(columns, -1, group)
    most = padded.abs().amax(-1)
    largest = float(most.max())
    require(largest / steps <= _LARGEST_SCALE, "weight", largest, f"finite and at most {steps * _LARGEST_SCALE:g}")
    scales = (most / steps).half()
    step = scales.float()[..., None]
    # A scale that is zero stands for a group of zeros (or of numbers below all of fp16).
    values = torch.where(step > 0, padded / step, 0.0).round_().add_(middle).clamp_(0, top)
    return values.to(torch.uint8).view(columns, -1), scales, None


class QuantLinear(nn.Module):
    """x @ weight.T + bias with a packed weight, in x's type; inference only.

    Its state is its tensors alone: the bytes, the bias, and a few numbers that say how the bytes are laid out, which
    must be equal when a state is loaded. Make it with `from_linear`, or empty, to load a state into.

    Attributes:
        data: uint8, the packed weight.
        bias: in the type it was given in, or None.
        path: how activations enter the product; see `kernels.packed`.
    """

    data: torch.Tensor
    bias: torch.Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: torch.Tensor | None = None,
        group: int = 128,
        bits: int = 4,
        minimum: bool = False,
        path: Path = "exact",
    ) -> None:
        super().__init__()
        require(path in PATHS, "path", path, f"one of {', '.join(PATHS)}")
        group = _whole_group(group, in_features)
        self.in_features = in_features
        self.out_features = out_features
        self.group = group
        self.bits = bits
        self.minimum = minimum
        self.path = path
        size = packed_bytes(out_features, in_features, group, bits, minimum)
        self.register_buffer("data", torch.zeros(size, dtype=torch.uint8))
        self.register_buffer("bias", bias)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Linear,
        *,
        group: int = 128,
        bits: Literal[4, 8] = 4,
        method: Literal["rtn"] | Quantizer = "rtn",
        path: Path = "exact",
    ) -> QuantLinear:
        """The quantised twin of a layer, which is not changed.

        Args:
            group: inputs that share a scale: a multiple of 32, or -1 for all of them.
            method: "rtn", or a function that quantises.
        """
        require(bits in (4, 8), "bits", bits, "4 or 8")
        require(method == "rtn" or callable(method), "method", method, "rtn or a function")
        quantize = round_to_nearest if method == "rtn" else method
        whole = _whole_group(group, linear.in_features)
        with torch.no_grad():
            values, scales, minima = quantize(linear.weight.detach().float().cpu(), whole, bits)
        matrix = pack(values, scales, minima, bits=bits, length=linear.in_features)
        return cls.from_packed(matrix, bias=linear.bias, path=path)

    @classmethod
    def from_packed(
        cls, matrix: PackedMatrix, *, bias: torch.Tensor | None = None, path: Path = "exact"
    ) -> QuantLinear:
        """A layer with a packed matrix for its weight; its bytes are copied. Not if it is sorted or on a grid."""
        require(matrix.plain, "matrix", "sorted or on a grid", "one as it was packed")
        layer = cls(
            matrix.length,
            matrix.columns,
            bias=None if bias is None else bias.detach().clone(),
            group=matrix.group,
            bits=matrix.bits,
            minimum=matrix.minimum,
            path=path,
        )
        layer.data.copy_(matrix.data)
        return layer

    @property
    def matrix(self) -> PackedMatrix:
        """The weight; it shares this layer's bytes."""
        return PackedMatrix(self.data, self.out_features, self.in_features, self.group, self.bits, self.minimum)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x fp32 or bf16 [..., in_features] to [..., out_features]."""
        out = packed_matmul(x, self.matrix, path=self.path)
        return out if self.bias is None else out + self.bias.to(out.dtype)

    def dequantize(self) -> torch.Tensor:
        """The weight as it counts, fp32 [out_features, in_features]."""
        return self.matrix.dequantize()

    def get_extra_state(self) -> torch.Tensor:
        """How the bytes are laid out: columns, inputs, group, bits, whether there are minima."""
        return torch.tensor([self.out_features, self.in_features, self.group, self.bits, self.minimum])

    def set_extra_state(self, state: torch.Tensor) -> None:
        """Refuse bytes that are laid out in another way; many ways have equally many bytes."""
        mine = self.get_extra_state().tolist()
        require(state.tolist() == mine, "layout", state.tolist(), f"{mine} (columns, inputs, group, bits, minimum)")

    def extra_repr(self) -> str:
        minimum = ", minimum=True" if self.minimum else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"group={self.group}, bits={self.bits}{minimum}, path={self.path!r}"
        )


def replace_linear(
    module: nn.Module,
    *,
    keep: Container[str] = (),
    group: int = 128,
    bits: Literal[4, 8] = 4,
    method: Literal["rtn"] | Quantizer = "rtn",
    path: Path = "exact",
) -> list[str]:
    """Put a `QuantLinear` in place of each `nn.Linear` inside `module`; each plain weight is freed before the next.

    A layer that occurs several times is replaced by one. Subclasses of `nn.Linear` are left alone, since their owners
    tend to read their weights.

    Args:
        keep: names of layers to leave as they are, as `named_modules` has them.

    Returns:
        the names of the layers replaced.
    """
    require(type(module) is not nn.Linear, "module", "a Linear itself", "what holds it; or use QuantLinear.from_linear")
    made: WeakKeyDictionary[nn.Module, QuantLinear] = WeakKeyDictionary()
    replaced = []
    owners = [(name, owner) for name, owner in module.named_modules() if type(owner) is not nn.Linear]
    for owner_name, owner in owners:
        for child_name in list(owner._modules):
            child = owner._modules[child_name]
            name = f"{owner_name}.{child_name}" if owner_name else child_name
            if type(child) is not nn.Linear or name in keep:
                continue
            if child not in made:
                made[child] = QuantLinear.from_linear(child, group=group, bits=bits, method=method, path=path)
            setattr(owner, child_name, made[child])
            replaced.append(name)
    return replaced


def _whole_group(group: int, length: int) -> int:
    require(group == -1 or (group >= 32 and group % 32 == 0), "group", group, "a multiple of 32, or -1")
    return -(-length // 32) * 32 if group == -1 else group
