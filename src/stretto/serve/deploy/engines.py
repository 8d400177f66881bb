"""What a serving engine takes beside its kernels, by name and version, and its defaults.

A step costs the host a fixed time and a time for each running sequence, during which the devices wait. Steps with
prompts are launched kernel by kernel ("eager"), so they take at least a launch time a layer; steps that only decode are
replayed as graphs. Its kernels are its own, so one factor says how they stand to the kernel model. The constants are
few, physical and one set an engine version; each says where it is from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

from stretto.core.errors import FieldError, require

POLICIES = ("whole", "chunked", "static")
HERE = "stretto"
"""The product's own engine, which has no constants: what it takes is measured on this machine."""
DEFAULT = "vllm-0.6"
"""The engine of a job that names none and runs on other machines."""


@dataclass(frozen=True, kw_only=True)
class FittedOn:
    """What was measured when constants were fitted; figures of anything else are marked.

    Attributes:
        devices: types; weights: number types.
        ranks: the fewest and the most tensor-parallel ranks.
        sequences: the most that ran at once, on average.
    """

    devices: tuple[str, ...]
    weights: tuple[str, ...]
    ranks: tuple[int, int]
    sequences: int


@dataclass(frozen=True, kw_only=True)
class EngineConstants:
    """One version of an engine.

    Attributes:
        host_step_s: seconds of the host a step: scheduling, input tensors, sampling, replies.
        host_sequence_s: more of them for each sequence of the step.
        eager_layer_s: seconds that launching one layer of a step with prompts takes.
        kernel_pace: how many times as long its kernels take as the kernel model says; 1 where nothing is known.
        spread: relative uncertainty of these four.
        policy: how prompts join, unless the plan says otherwise.
        prefill_tokens: most prompt tokens a step under that policy.
        slots: most sequences at once.
        memory_share: share of a device's memory that the engine takes.
        page_tokens: positions of a KV page.
        workspace_bytes: of each device, for activations and the runtime.
        fitted_on: what was measured.
        source: where the constants are from.
    """

    name: str
    host_step_s: float
    host_sequence_s: float
    eager_layer_s: float
    kernel_pace: float
    spread: float
    policy: str
    prefill_tokens: int
    slots: int
    memory_share: float
    page_tokens: int
    workspace_bytes: float
    fitted_on: FittedOn
    source: str

    def __post_init__(self) -> None:
        for field in ("host_step_s", "host_sequence_s", "eager_layer_s", "spread"):
            require(0 <= getattr(self, field) < 10, field, getattr(self, field), "seconds from 0 to 10")
        require(0.2 <= self.kernel_pace <= 5, "kernel_pace", self.kernel_pace, "from 0.2 to 5")
        require(self.policy in POLICIES, "policy", self.policy, f"one of {', '.join(POLICIES)}")
        require(0 < self.memory_share <= 1, "memory_share", self.memory_share, "in (0, 1]")
        require(bool(self.source), "source", self.source, "where the constants are from")


@cache
def engines() -> Mapping[str, EngineConstants]:
    """All engines by name and version."""
    text = (files("stretto.serve.deploy") / "engines.yaml").read_text(encoding="utf-8")
    return {name: _constants(name, fields) for name, fields in yaml.safe_load(text)["engines"].items()}


def _constants(name: str, fields: Mapping[str, Any]) -> EngineConstants:
    listed: Mapping[str, Any] = fields["fitted_on"]
    fitted: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in listed.items()}
    return EngineConstants(name=name, **{**fields, "fitted_on": FittedOn(**fitted)})


def engine(name: str) -> EngineConstants:
    """The engine of that name; a `FieldError` lists the known ones."""
    known = engines()
    if name not in known:
        raise FieldError("engine", name, f"one of {', '.join(sorted(known))}, or {HERE} on this machine")
    return known[name]
