"""Jobs and plans as plain JSON values on their way to rank processes; a line of JSON a message, and no pickle."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from typing import Any, TypeVar, cast

T = TypeVar("T")


def to_plain(value: Any) -> dict[str, Any]:
    """A frozen dataclass as plain values."""
    return dataclasses.asdict(value)


def from_plain(kind: type[T], plain: Mapping[str, Any]) -> T:
    """The dataclass `kind` from what `to_plain` made of it, its own checks included."""
    hints = typing.get_type_hints(kind)
    return kind(**{name: _value(hints[name], value) for name, value in plain.items()})


def _value(hint: Any, value: Any) -> Any:
    if isinstance(hint, types.UnionType) and value is not None:
        hint = next((part for part in typing.get_args(hint) if dataclasses.is_dataclass(part)), hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        return from_plain(cast(type, hint), value)
    return tuple(value) if isinstance(value, list) else value


def line(message: Mapping[str, Any]) -> bytes:
    """A message."""
    return json.dumps(message).encode() + b"\n"
