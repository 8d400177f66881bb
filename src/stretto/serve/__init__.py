"""Serving: prompts answered by a language model under iteration-level batching. `domain` is what the planner sees."""

from __future__ import annotations

from stretto.serve.domain import ServeDomain

domain = ServeDomain()

__all__ = ["domain"]
