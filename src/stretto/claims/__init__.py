"""The proof room: the published systems whose techniques are here, and their figures computed anew.

`systems.yaml` lists the systems; each further module declares the claims of one idea with `registry.claim`.
"""

from __future__ import annotations

from stretto.claims.registry import Figure, claim

__all__ = ["Figure", "claim"]
