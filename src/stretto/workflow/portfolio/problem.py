"""A workflow with its estimates and the rules of paying, in the numbers that rollouts read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

from stretto.core.errors import require
from stretto.workflow.portfolio.estimates import Estimates, Workflow
from stretto.workflow.portfolio.laws import Law

MAX_SAMPLES = 1024
"""Samples of one node that may be launched at once."""
MAX_LAUNCHES = 10_000
"""Launches after which a run is given up: its samples fail, and take neither money nor time."""
MONEY_SLACK = 1e-12
"""Share of the money at the start by which simulated launches may exceed it: what floating-point sums may be off."""


@dataclass(frozen=True, kw_only=True)
class Rules:
    """How samples are paid for and when a batch, all samples of one launch of a node, ends.

    Attributes:
        charge: "reserved": a launch takes the most that its samples may cost, and each return gives back the rest;
            "realised": a launch takes what its samples are going to cost, which only a simulator can know (the
            publication's own accounting).
        ends: "batch": when all samples have returned; "first": at the first success, and the others are cancelled.
        refund: the share of a cancelled sample's unused price that comes back, 0 .. 1; a sample is used as far as
            its time.
    """

    charge: Literal["reserved", "realised"] = "reserved"
    ends: Literal["batch", "first"] = "batch"
    refund: float = 0.0

    def __post_init__(self) -> None:
        require(self.charge in ("reserved", "realised"), "charge", self.charge, "reserved or realised")
        require(self.ends in ("batch", "first"), "ends", self.ends, "batch or first")
        require(0 <= self.refund <= 1, "refund", self.refund, "in 0 .. 1")


@dataclass(frozen=True, kw_only=True)
class Problem:
    """What a planner must know before a run.

    Raises:
        ValueError: if the estimates name a node that the workflow does not have, or the other way round.
    """

    workflow: Workflow
    estimates: Estimates
    rules: Rules = field(default_factory=Rules)

    def __post_init__(self) -> None:
        laws = self.estimates.laws
        for node in self.workflow.nodes:
            require(node in laws, f"estimates.{node}", None, "given: the node has no model")
        for node in laws:
            require(node in self.workflow.index, f"estimates.{node}", node, "a node of the workflow")

    @cached_property
    def laws(self) -> tuple[Law | None, ...]:
        """Of each node and model, at node * number of models + model; None where the node lacks the model."""
        known = self.estimates
        return tuple(known.laws[node].get(model) for node in self.workflow.nodes for model in known.models)

    @cached_property
    def model_index(self) -> dict[str, int]:
        return {model: at for at, model in enumerate(self.estimates.models)}

    @cached_property
    def cheapest_first(self) -> tuple[tuple[int, ...], ...]:
        """For each node, the numbers of its models, by mean cost, then by success rate, then as they are named."""
        return tuple(tuple(model for _, _, model in sorted(self._dearness(node))) for node in self.workflow.nodes)

    def _dearness(self, node: str) -> list[tuple[float, float, int]]:
        laws = self.estimates.laws[node].items()
        return [(law.mean_cost, -law.success_rate, self.model_index[model]) for model, law in laws]

    def law_index(self, node: int, model: int) -> int:
        """Where the law of a node on a model stands in `laws`: on its first model where it lacks this one."""
        models = len(self.estimates.models)
        at = node * models + model
        if self.laws[at] is not None:
            return at
        return next(at for at in range(node * models, (node + 1) * models) if self.laws[at] is not None)


@dataclass(frozen=True, kw_only=True, order=True)
class Launch:
    """So many samples of a node on a model, started together."""

    node: str
    model: str
    count: int

    def __post_init__(self) -> None:
        require(1 <= self.count <= MAX_SAMPLES, f"{self.node}: count", self.count, f"in 1 .. {MAX_SAMPLES}")


Action = tuple[Launch, ...]
"""What to launch now: at most one launch a ready node."""


def check_levels(levels: Sequence[int]) -> None:
    """Raise ValueError unless `levels` are ascending positive sample counts."""
    right = f"ascending whole numbers in 1 .. {MAX_SAMPLES}"
    sound = bool(levels) and list(levels) == sorted(set(levels)) and levels[0] >= 1 and levels[-1] <= MAX_SAMPLES
    require(sound, "levels", tuple(levels), right)
