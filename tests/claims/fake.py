"""A module of claims that exists for one test only."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import stretto.claims
from stretto.claims import registry

HEAD = "from stretto.claims.registry import Figure, claim\n"


@contextmanager
def fake_claims(folder: Path, source: str) -> Iterator[None]:
    """Put a module with `source` beside those of `stretto.claims`, and set the real claims aside."""
    registry.claims()
    (folder / "fake_claims.py").write_text(HEAD + source, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(registry, "_declared", {})
        patch.setattr(stretto.claims, "__path__", [*stretto.claims.__path__, str(folder)])
        try:
            yield
        finally:
            sys.modules.pop("stretto.claims.fake_claims", None)
            vars(stretto.claims).pop("fake_claims", None)
