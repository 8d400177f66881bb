"""Finds the quantised matrices among the tensors of a `pack-quantized` checkpoint and checks that their parts fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stretto.core.errors import UserError
from stretto.models.quantized import GroupedTensor, PackedTensor

if TYPE_CHECKING:
    import torch

    Read = Callable[[], torch.Tensor]

_PACKED, _SCALE, _SHAPE, _ZEROS, _ORDER = "_packed", "_scale", "_shape", "_zero_point", "_g_idx"
_BITS = (4, 8)
_MOST_ELEMENTS = 2**40


@dataclass(frozen=True)
class _Scheme:
    """One of the config's groups: how some matrices are quantised. `group` None: the whole row."""

    bits: int
    group: int | None
    symmetric: bool


def grouped(plain: Mapping[str, Read], quantisation: Any, file: str) -> dict[str, PackedTensor | Read]:
    """Tensors by name, with `x.weight` in place of the parts of each quantised matrix.

    Raises:
        UserError: a part is missing, has another type or shape than its matrix asks for, or the scheme is not read.
    """
    schemes = _schemes(quantisation, f"{file}/config.json")
    found: dict[str, PackedTensor | Read] = {}
    for name, read in plain.items():
        stem, mark, _ = name.rpartition(".weight_")
        if not mark:
            found[name] = read
        elif name.endswith(_PACKED):
            found[f"{stem}.weight"] = _matrix(f"{stem}.weight", plain, schemes, file)
    return found


def _schemes(quantisation: Mapping[str, Any], file: str) -> list[_Scheme]:
    groups = quantisation.get("config_groups")
    if not isinstance(groups, dict) or not groups:
        raise UserError(
            "is missing", file=file, field="quantization_config.config_groups", right="how matrices are quantised"
        )
    return [_scheme(group, f"quantization_config.config_groups.{name}", file) for name, group in groups.items()]


def _scheme(group: Any, field: str, file: str) -> _Scheme:
    def wrong(what: str, value: object, right: str) -> UserError:
        return UserError(f"is {str(value)[:60]!r}", file=file, field=f"{field}.{what}", right=f"it must be {right}")

    weights = group.get("weights") if isinstance(group, dict) else None
    if not isinstance(weights, dict):
        raise wrong("weights", weights, "a mapping")
    if group.get("input_activations"):
        raise wrong("input_activations", group["input_activations"], "absent: only weights are kept quantised")
    bits, size, strategy = weights.get("num_bits"), weights.get("group_size"), weights.get("strategy")
    if bits not in _BITS or weights.get("type", "int") != "int":
        raise wrong("weights.num_bits", bits, "4 or 8, of type int")
    if strategy == "group":
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise wrong("weights.group_size", size, "a positive whole number")
    elif strategy != "channel":
        raise wrong("weights.strategy", strategy, "group or channel")
    return _Scheme(bits, size if strategy == "group" else None, bool(weights.get("symmetric", True)))


def _matrix(name: str, plain: Mapping[str, Read], schemes: list[_Scheme], file: str) -> GroupedTensor:
    def wrong(problem: str, right: str = "the file is damaged; download it again") -> UserError:
        return UserError(f"tensor {name} {problem}", file=file, right=right)

    if name + _ORDER in plain:
        raise wrong("has groups in an order of their own (weight_g_idx)", "use a checkpoint without activation order")
    for part in (_SCALE, _SHAPE):
        if name + part not in plain:
            raise wrong(f"has no {name.rpartition('.')[2]}{part}")
    stated = plain[name + _SHAPE]()
    if stated.numel() != 2 or stated.is_floating_point() or int(stated.min()) < 1:
        raise wrong(f"states a shape of {stated.flatten().tolist()[:4]}")
    rows, length = (int(count) for count in stated.flatten())
    if rows * length > _MOST_ELEMENTS:
        raise wrong(f"states a shape of {(rows, length)}")

    words, scales = plain[name + _PACKED](), plain[name + _SCALE]()
    if str(words.dtype) != "torch.int32" or not scales.is_floating_point() or scales.ndim > 2:
        raise wrong(f"has words of {words.dtype} and scales of {scales.dtype}", "int32 and floating-point numbers")
    if scales.ndim != 2 or len(scales) != rows:
        raise wrong(f"has scales of shape {tuple(scales.shape)}", f"expected [{rows}, groups]")
    groups = scales.shape[1]

    def fits(scheme: _Scheme) -> bool:
        words_of_row, size = -(-length * scheme.bits // 32), scheme.group or length
        return tuple(words.shape) == (rows, words_of_row) and groups == -(-length // size)

    fitting = [scheme for scheme in schemes if fits(scheme)]
    if fitting:
        asymmetric = name + _ZEROS in plain
        chosen = next((scheme for scheme in fitting if scheme.symmetric != asymmetric), fitting[0])
        return _checked(name, plain, chosen, (rows, length), wrong)
    raise wrong(
        f"has words of shape {tuple(words.shape)} and {groups} groups, which no scheme of the config explains",
        "the file does not fit its configuration",
    )


def _checked(
    name: str,
    plain: Mapping[str, Read],
    scheme: _Scheme,
    shape: tuple[int, int],
    wrong: Callable[[str], UserError],
) -> GroupedTensor:
    rows, length = shape
    scales = plain[name + _SCALE]
    parts = [plain[name + _PACKED], scales]
    zeros = None
    if not scheme.symmetric:
        zeros = plain.get(name + _ZEROS)
        if zeros is None:
            raise wrong("has no weight_zero_point, though its scheme is not symmetric")
        packed = zeros()
        expected = (-(-rows * scheme.bits // 32), scales().shape[1])
        if str(packed.dtype) != "torch.int32" or tuple(packed.shape) != expected:
            raise wrong(f"has zero points of {packed.dtype} and shape {tuple(packed.shape)}; int32 {expected} expected")
        parts.append(zeros)
    row = -(-length // 32) * 32
    group = min(scheme.group or row, row)
    size = sum(part().nbytes for part in parts)
    return GroupedTensor(shape, scheme.bits, group, size, plain[name + _PACKED], scales, zeros)
