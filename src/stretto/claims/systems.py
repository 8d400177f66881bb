"""The published systems whose techniques stretto takes in, and how much of each is here."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from typing import Literal

from stretto.core.errors import require
from stretto.files import Document, parse_yaml, validate

State = Literal["here", "part", "to come"]

ROOMS = (
    "hardware",
    "kernels",
    "comm",
    "models",
    "train",
    "serve",
    "diffusion",
    "reason",
    "workflow",
    "codegen",
    "hpc",
    "qec",
)


@dataclass(frozen=True, kw_only=True)
class System:
    """A published system.

    Attributes:
        name: what commands call it.
        title: the technique in a few words.
        publication: its title, then venue and year.
        room: where its code lives, or will live.
        what: the technique in one line.
        modules: the modules that carry it, as far as they exist.
        turned_on_by: what a job or plan says to use it; empty for those to come.
    """

    name: str
    title: str
    publication: str
    room: str
    what: str
    modules: tuple[str, ...] = ()
    turned_on_by: str = ""

    def __post_init__(self) -> None:
        require(bool(re.fullmatch(r"[a-z0-9-]+", self.name)), "name", self.name, "lower-case letters, digits, dashes")
        for name in ("title", "publication", "what"):
            text = getattr(self, name)
            require(bool(text.strip()) and "\n" not in text, name, text, "one line")
        require(self.room in ROOMS, "room", self.room, f"one of {', '.join(ROOMS)}")
        for number, module in enumerate(self.modules):
            require(module.startswith("stretto."), f"modules.{number}", module, "a module of stretto")
        require(not self.turned_on_by or bool(self.modules), "turned_on_by", self.turned_on_by, "empty without modules")


def read_systems(document: Document) -> tuple[System, ...]:
    """The systems of a document, a mapping from name to the other fields.

    Raises:
        UserError: for an unknown or missing field or a bad value, with its place.
    """
    if not isinstance(document.data, dict):
        raise document.error((), "the systems are not a mapping", "each system's name, then its fields")
    entries = document.data.items()
    for name, fields in entries:
        if not isinstance(fields, dict):
            raise document.error((name,), "the system is not a mapping", "give its fields")
    return tuple(
        validate(System, document, {"name": name, **fields}, (name,)) for name, fields in document.data.items()
    )


@cache
def systems() -> tuple[System, ...]:
    """All published systems, room by room."""
    text = (files("stretto.claims") / "systems.yaml").read_text(encoding="utf-8")
    return read_systems(parse_yaml(text, "systems.yaml"))


def state(system: System, claimed: Collection[str]) -> State:
    """How much of `system` is here.

    Args:
        claimed: names of the systems that have claims.

    Returns:
        "here" if all of its modules exist and it has a claim, "part" if some module exists, else "to come".
    """
    exist = [_exists(module) for module in system.modules]
    if exist and all(exist) and system.name in claimed:
        return "here"
    return "part" if any(exist) else "to come"


def _exists(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:
        return False
