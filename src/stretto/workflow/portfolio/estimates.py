"""What a workflow is, and what is known of its nodes: rollouts that were observed, or moments."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Literal

from stretto.core.errors import FieldError, require
from stretto.workflow.portfolio.laws import Law, Moments

MAX_NODES = 64
MAX_MODELS = 16

CostMode = Literal["cost", "tokens", "money", "latency"]


@dataclass(frozen=True, kw_only=True)
class Workflow:
    """A graph of nodes; a node may start when all of its parents have succeeded.

    Attributes:
        nodes: distinct names, 1 to 64 of them.
        edges: pairs (parent, child).

    >>> Workflow(nodes=("read", "write"), edges=(("read", "write"),)).parents("write")
    ('read',)

    Raises:
        ValueError: naming the node that is unknown, doubled or on a cycle.
    """

    nodes: tuple[str, ...]
    edges: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        require(1 <= len(self.nodes) <= MAX_NODES, "nodes", f"{len(self.nodes)} names", f"1 to {MAX_NODES} names")
        for at, node in enumerate(self.nodes):
            require(bool(node), f"nodes.{at}", node, "a name")
            require(node not in self.nodes[:at], f"nodes.{at}", node, "named once")
        for at, edge in enumerate(self.edges):
            for node in edge:
                require(node in self.index, f"edges.{at}", edge, f"a pair of nodes of the workflow; {node!r} is none")
        cycle = self._cycle()
        require(not cycle, "edges", " -> ".join(cycle), "free of cycles")

    @cached_property
    def index(self) -> Mapping[str, int]:
        """The number of each node, from 0."""
        return MappingProxyType({node: at for at, node in enumerate(self.nodes)})

    @cached_property
    def parent_masks(self) -> tuple[int, ...]:
        """For each node, the bits of its parents."""
        masks = [0] * len(self.nodes)
        for parent, child in self.edges:
            masks[self.index[child]] |= 1 << self.index[parent]
        return tuple(masks)

    @cached_property
    def _parents(self) -> dict[str, tuple[str, ...]]:
        return {
            node: tuple(other for at, other in enumerate(self.nodes) if mask >> at & 1)
            for node, mask in zip(self.nodes, self.parent_masks, strict=True)
        }

    def parents(self, node: str) -> tuple[str, ...]:
        """The parents of a node, in the order of the nodes."""
        return self._parents[node]

    def ready(self, done: Collection[str], running: Collection[str]) -> tuple[str, ...]:
        """The nodes that may start, in the order of the nodes: parents done, neither done nor running."""
        return tuple(
            node
            for node, parents in self._parents.items()
            if node not in done and node not in running and all(parent in done for parent in parents)
        )

    @cached_property
    def order(self) -> tuple[str, ...]:
        """The nodes, parents first."""
        left, order = list(self.nodes), list[str]()
        while left:
            free = [node for node in left if not set(self.parents(node)) & set(left)]
            order += free
            left = [node for node in left if node not in free]
        return tuple(order)

    def _cycle(self) -> list[str]:
        """A cycle, its first node again at its end; empty if there is none."""
        left = set(self.nodes)
        while free := {node for node in left if not set(self.parents(node)) & left}:
            left -= free
        if not left:
            return []
        path = [min(left, key=self.index.__getitem__)]
        while path.count(path[-1]) < 2:
            path.append(next(parent for parent in self.parents(path[-1]) if parent in left))
        return path[path.index(path[-1]) :][::-1]


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """One sample of a node on a model, as it was observed.

    Attributes:
        latency_s: seconds from launch to return.
        success: whether the check passed.
        tokens: output tokens.
        cost: in a unit of one's own, for cost mode "cost".
    """

    node: str
    model: str
    latency_s: float
    success: bool
    tokens: int = 0
    cost: float = 0.0

    def __post_init__(self) -> None:
        where = f"{self.node} on {self.model}: "
        for name in ("latency_s", "tokens", "cost"):
            value = getattr(self, name)
            require(0 <= value < math.inf, where + name, value, "a finite number >= 0")


@dataclass(frozen=True, kw_only=True)
class Estimates:
    """For each node, the laws of the models that may try it.

    Attributes:
        laws: node, then model, then its law.

    Raises:
        ValueError: naming the node without a model, or the number of models that is too large.
    """

    laws: Mapping[str, Mapping[str, Law]]

    def __post_init__(self) -> None:
        require(bool(self.laws), "laws", {}, "given for at least one node")
        for node, models in self.laws.items():
            require(bool(models), f"laws.{node}", {}, "given for at least one model")
        require(len(self.models) <= MAX_MODELS, "laws", f"{len(self.models)} models", f"at most {MAX_MODELS} models")

    @cached_property
    def models(self) -> tuple[str, ...]:
        """All models, in the order in which nodes first name them. A node's first one in it is its default."""
        return tuple(dict.fromkeys(model for models in self.laws.values() for model in models))

    def law(self, node: str, model: str) -> Law:
        """The law of a node on a model, or on the node's default where it has none of that name."""
        laws = self.laws[node]
        return laws[model] if model in laws else next(laws[other] for other in self.models if other in laws)

    @classmethod
    def from_rollouts(
        cls,
        rows: Iterable[Rollout],
        *,
        cost: CostMode = "cost",
        prices: Mapping[str, float] | None = None,
        bounds: Mapping[str, float] | None = None,
    ) -> Estimates:
        """Laws whose rows are observed samples.

        Args:
            rows: samples, at least one for each node and model.
            cost: what is paid for: "cost", the rows' own; "tokens"; "money", tokens at `prices`; or "latency".
            prices: of a million output tokens, by model; for "money".
            bounds: the most a sample may cost, by model; without one, the dearest sample of the node on the model.

        Raises:
            ValueError: if a price is missing, or a sample costs more than its bound; node and model are named.
        """
        found: dict[tuple[str, str], list[tuple[float, float, float]]] = defaultdict(list)
        for row in rows:
            found[row.node, row.model].append((row.latency_s, float(row.success), _cost(row, cost, prices or {})))
        laws: dict[str, dict[str, Law]] = {}
        for (node, model), samples in found.items():
            latency, success, costs = zip(*sorted(samples), strict=True)
            bound = (bounds or {}).get(model, max(costs))
            with _naming(node, model):
                laws.setdefault(node, {})[model] = Law(latency_s=latency, success=success, cost=costs, bound=bound)
        return cls(laws=laws)

    @classmethod
    def from_moments(cls, moments: Mapping[str, Mapping[str, Moments]]) -> Estimates:
        """Laws known by their moments: node, then model, then moments."""
        return cls(laws={node: {m: found.law() for m, found in models.items()} for node, models in moments.items()})


def _cost(row: Rollout, mode: CostMode, prices: Mapping[str, float]) -> float:
    if mode == "money":
        right = f"given for {row.model}, which {row.node} was tried on"
        require(row.model in prices, "prices", tuple(prices), right)
        return row.tokens * prices[row.model] / 1e6
    if mode == "tokens":
        return float(row.tokens)
    require(mode in ("cost", "latency"), "cost", mode, "one of cost, tokens, money, latency")
    return row.latency_s if mode == "latency" else row.cost


@contextmanager
def _naming(node: str, model: str) -> Iterator[None]:
    """Puts node and model in front of the field of a `FieldError`."""
    try:
        yield
    except FieldError as problem:
        raise FieldError(f"{node} on {model}: {problem.field}", problem.value, problem.right) from None
