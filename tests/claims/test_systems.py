"""The list of published systems: complete, true to the code that is there, and refused where it is malformed."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from stretto.claims import registry
from stretto.claims.systems import ROOMS, System, read_systems, state, systems
from stretto.core.errors import UserError
from stretto.files import parse_yaml

CARDS = [
    "apex",
    "c4",
    "comet",
    "copus",
    "datastates",
    "distzo2",
    "dllm-serve",
    "dualparal",
    "ets",
    "flash-attention-4",
    "flexllm",
    "flexsp",
    "flover",
    "frontier",
    "gpipe",
    "gpu-cores",
    "gradient-coding",
    "hipkittens",
    "holmes",
    "hpc-paradigms",
    "kinetics",
    "lightningrl",
    "llep",
    "llmcompiler",
    "low-bandwidth",
    "marlin",
    "mcpp",
    "megatron",
    "mirror-sd",
    "modern-cpp",
    "mos",
    "mpirigen",
    "mupa",
    "nanoflow",
    "neupims",
    "nexus",
    "parallelbench",
    "pararnn",
    "parevo",
    "parscale",
    "pcpp",
    "predecoder",
    "ring-attention",
    "roundpipe",
    "scale",
    "smash",
    "stable-rps",
    "tangram",
    "tawa",
    "tempi",
    "tpi-llm",
    "zorse",
]

ENTRY = """\
flover:
  title: temporal fusion
  publication: Flover, HiPC 2023
  room: serve
  what: one decode stream
"""


def test_the_list_has_the_52_systems() -> None:
    assert len(CARDS) == 52
    assert sorted(system.name for system in systems()) == CARDS


def test_every_module_that_is_named_exists() -> None:
    named = [module for system in systems() for module in system.modules]
    assert "stretto.serve.joining.continuous" in named
    assert [module for module in named if find_spec(module) is None] == []


def test_titles_are_told_once_and_rooms_stand_together() -> None:
    assert len({system.title for system in systems()}) == len({system.publication for system in systems()}) == 52
    rooms = [ROOMS.index(system.room) for system in systems()]
    assert rooms == sorted(rooms)
    assert set(rooms) == set(range(len(ROOMS)))


def test_every_claim_belongs_to_a_listed_system() -> None:
    assert {claim.system for claim in registry.claims()} <= set(CARDS)


def a_system(*modules: str) -> System:
    return System(name="a", title="a", publication="a", room="serve", what="a", modules=modules)


THERE, ALSO_THERE = "stretto.core.plan", "stretto.serve.joining"
MISSING, NO_PARENT = "stretto.core.no_such_module", "stretto.attic.module"


@pytest.mark.parametrize(
    ("modules", "claimed", "expected"),
    [
        ((THERE, ALSO_THERE), {"a"}, "here"),
        ((THERE, ALSO_THERE), {"b"}, "part"),
        ((THERE, MISSING), {"a"}, "part"),
        ((NO_PARENT, THERE), {"a"}, "part"),
        ((MISSING, NO_PARENT), {"a"}, "to come"),
        ((), {"a"}, "to come"),
    ],
)
def test_the_state_follows_from_modules_and_claims(modules: tuple[str, ...], claimed: set[str], expected: str) -> None:
    assert state(a_system(*modules), claimed) == expected


def test_an_entry_is_read() -> None:
    (system,) = read_systems(parse_yaml(ENTRY, "systems.yaml"))
    assert (system.name, system.room, system.modules, system.turned_on_by) == ("flover", "serve", (), "")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (ENTRY + "  state: here\n", ["systems.yaml:6", "flover.state", "no such field"]),
        (ENTRY.replace("  room: serve\n", ""), ["flover.room", "missing"]),
        (ENTRY.replace("room: serve", "room: attic"), ["systems.yaml:4", "flover.room", "'attic'", "kernels"]),
        (ENTRY.replace("flover", "Flover", 1), ["name", "'Flover'"]),
        (ENTRY.replace("what: one decode stream", "what: ''"), ["systems.yaml:5", "flover.what"]),
        (ENTRY + "  modules: [torch.nn]\n", ["flover.modules.0", "'torch.nn'"]),
        (ENTRY + "  modules: stretto.serve\n", ["flover.modules"]),
        (ENTRY + "  turned_on_by: a wish\n", ["flover.turned_on_by", "empty without modules"]),
        (ENTRY + ENTRY, ["flover", "twice"]),
        ("flover: here\n", ["flover", "not a mapping"]),
        ("- flover\n", ["not a mapping"]),
    ],
)
def test_a_malformed_list_is_one_clear_line(text: str, words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        read_systems(parse_yaml(text, "systems.yaml"))
    assert [word for word in words if word not in str(caught.value)] == []
