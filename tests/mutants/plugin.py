"""A pytest plugin that imports one source file with a text in it replaced: `MUTANT` holds [file's end, old, new].

The file on disk stays as it is, and so do its cached bytecode and everything else that is imported.
"""

from __future__ import annotations

import json
import os
from importlib.machinery import SourceFileLoader
from typing import Any

_FILE, _OLD, _NEW = json.loads(os.environ["MUTANT"])
_get_data, _path_stats = SourceFileLoader.get_data, SourceFileLoader.path_stats


def _mutated(self: SourceFileLoader, path: str) -> bytes:
    data = _get_data(self, path)
    if not path.endswith(_FILE):
        return data
    text = data.decode()
    if text.count(_OLD) != 1:
        raise SystemExit(f"the mutant's text occurs {text.count(_OLD)} times in {_FILE}: {_OLD!r}")
    return text.replace(_OLD, _NEW).encode()


def _no_cache(self: SourceFileLoader, path: str) -> Any:
    if path.endswith(_FILE):
        raise OSError("mutants have no bytecode")
    return _path_stats(self, path)


SourceFileLoader.get_data = _mutated  # type: ignore[method-assign]
SourceFileLoader.path_stats = _no_cache  # type: ignore[method-assign]
