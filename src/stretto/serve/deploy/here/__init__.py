"""Deployments on this machine: the product's own engine, copies and tensor ranks as worker processes, a core each."""

from __future__ import annotations

from stretto.serve.deploy.here.measured import MeasuredCosts, Points
from stretto.serve.deploy.here.running import Here, started

__all__ = ["Here", "MeasuredCosts", "Points", "started"]
