"""Training: one trainer in which the degrees of parallelism and the schedule are fields of a plan."""

from __future__ import annotations

from stretto.train.domain import TrainDomain

domain = TrainDomain()

__all__ = ["domain"]
