"""Deployments: a model that serves a load on machines one need not have. `domain` is what the planner sees."""

from __future__ import annotations

from stretto.serve.deploy.domain import DeploymentDomain

domain = DeploymentDomain()

__all__ = ["domain"]
