"""Joining policies: which waiting requests enter the running batch, and when. One file a policy, one line here."""

from __future__ import annotations

from stretto.serve.joining.base import Joining, Waiting
from stretto.serve.joining.continuous import Continuous
from stretto.serve.joining.dynamic import Dynamic
from stretto.serve.joining.shortest import Shortest
from stretto.serve.joining.static import Static

JOININGS: dict[str, type[Joining]] = {
    "continuous": Continuous,
    "dynamic": Dynamic,
    "shortest": Shortest,
    "static": Static,
}

__all__ = ["JOININGS", "Joining", "Waiting"]
