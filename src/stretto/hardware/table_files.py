"""Files of tables that were measured on this machine, by their names."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from stretto.core.errors import UserError
from stretto.hardware.table import Table


def read_tables(file: Path, *, fresh_s: float | None = None) -> dict[str, Table] | None:
    """What `write_tables` wrote; None if there is nothing, or nothing that can be read.

    Args:
        fresh_s: what was written longer ago counts as nothing; None takes any age.
    """
    try:
        if fresh_s is not None and time.time() - file.stat().st_mtime > fresh_s:
            return None
        plain = json.loads(file.read_text(encoding="utf-8"))
        return {name: Table.from_dict(table) for name, table in plain.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_tables(file: Path, tables: Mapping[str, Table]) -> None:
    """Write `tables` as `keep` does."""
    keep(file, json.dumps({name: table.to_dict() for name, table in tables.items()}))


def keep(file: Path, text: str) -> None:
    """Write what was measured, whole or not at all; several processes may write one file.

    Raises:
        UserError: the folder or the file cannot be written.
    """
    temporary = file.with_suffix(f".{os.getpid()}.part")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(file)
    except OSError as problem:
        with suppress(OSError):
            temporary.unlink()
        right = "set XDG_CACHE_HOME to a folder that may be written"
        raise UserError(f"the measurement cannot be kept: {problem.strerror}", file=str(file), right=right) from None
