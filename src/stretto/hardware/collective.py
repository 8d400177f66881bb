"""Seconds of collectives and messages over one link: the alpha-beta model of each algorithm, or a measured
table.

A collective over n ranks sends rounds of messages; each round costs a latency (alpha) and its bytes at the
link's bandwidth (beta). A ring takes n - 1 rounds (2 (n - 1) for all_reduce) and moves the fewest bytes; a
tree takes about log2 n and moves more. The cheaper is taken, as NCCL does (Thakur et al., 2005, for both).
Latencies and reached shares of a link's bandwidth are fitted a link kind and stand in `fitted.yaml`. `bytes`
is always the whole message: what each rank holds after an all_gather or a broadcast, before a reduce_scatter,
in an all_reduce, and sends in all in an all_to_all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import yaml

from stretto.core.errors import require
from stretto.hardware.cost import Estimate
from stretto.hardware.link import KINDS, Link
from stretto.hardware.table import Table

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send_recv", "broadcast")


@dataclass(frozen=True, kw_only=True)
class LinkConstants:
    """What a data sheet does not say of a kind of link.

    Attributes:
        start_s: what any collective takes before its first round.
        latency_s: of one round, where the link states none.
        share: reached share of the bandwidth.
        spread: relative uncertainty.
        source: where these are from.
    """

    start_s: float
    latency_s: float
    share: float
    spread: float
    source: str

    def __post_init__(self) -> None:
        require(0 < self.share <= 1, "share", self.share, "in (0, 1]")
        require(self.start_s >= 0 and self.latency_s >= 0, "latency_s", self.latency_s, "not negative")


@cache
def fitted(kind: str) -> LinkConstants:
    """The product's constants for a kind of link."""
    text = (files("stretto.hardware") / "fitted.yaml").read_text(encoding="utf-8")
    known = yaml.safe_load(text)["links"]
    require(kind in known, "kind", kind, f"one of {', '.join(KINDS)}")
    return LinkConstants(**known[kind])


def effective_bandwidth(link: Link) -> float:
    """Bytes/s that messages reach through one port."""
    return link.bandwidth * fitted(link.kind).share


def estimate(collective: str, bytes_: float, ranks: int, link: Link, *, table: Table | None = None) -> Estimate:
    """Seconds of one collective.

    Args:
        collective: one of `COLLECTIVES`.
        bytes_: the whole message, see above.
        ranks: how many devices take part; 2 for send_recv.
        link: what joins neighbours; for ranks on several nodes the slowest on the way.
        table: measured seconds over (bytes, ranks), used in place of the model.

    Raises:
        ValueError: for an unknown collective, negative bytes or too few ranks, naming the field.
    """
    require(collective in COLLECTIVES, "collective", collective, f"one of {', '.join(COLLECTIVES)}")
    require(0 <= bytes_ < math.inf, "bytes", bytes_, "not negative")
    require(ranks >= 1, "ranks", ranks, "at least 1")
    if table is not None:
        return Estimate(*table.at(bytes_, ranks))
    if ranks == 1:
        return Estimate(0.0, 0.0, 0.0, "modelled")
    constants = fitted(link.kind)
    seconds = modelled(collective, bytes_, ranks, link, constants)
    return Estimate(seconds, seconds / (1 + constants.spread), seconds * (1 + constants.spread), "modelled")


def modelled(collective: str, bytes_: float, ranks: int, link: Link, constants: LinkConstants) -> float:
    """Seconds by the cheapest algorithm, with constants given."""
    latency = constants.latency_s if link.latency_s is None else link.latency_s
    beta = bytes_ / (link.bandwidth * constants.share)
    return constants.start_s + min(
        rounds * latency + volume * beta for rounds, volume in algorithms(collective, ranks).values()
    )


def algorithms(collective: str, ranks: int) -> Mapping[str, tuple[float, float]]:
    """Of each algorithm: its rounds, and what share of the message passes each rank's port in one direction.

    >>> algorithms("all_reduce", 4)
    {'ring': (6, 1.5), 'tree': (4, 2.0)}
    """
    depth = math.ceil(math.log2(ranks))
    part = (ranks - 1) / ranks
    if collective == "all_reduce":
        return {"ring": (2 * (ranks - 1), 2 * part), "tree": (2 * depth, 2.0)}
    if collective in ("all_gather", "reduce_scatter"):
        return {"ring": (ranks - 1, part), "doubling": (depth, part)}
    if collective == "all_to_all":
        return {"pairwise": (ranks - 1, part), "direct": (1, part)}
    if collective == "broadcast":
        return {"pipelined": (ranks - 1, 1.0), "tree": (depth, float(depth))}
    return {"direct": (1, 1.0)}


def port_share(collective: str, ranks: int) -> float:
    """The least share of the message that passes each rank's port one way: what shared links are charged."""
    return min(volume for _, volume in algorithms(collective, ranks).values()) if ranks > 1 else 0.0
