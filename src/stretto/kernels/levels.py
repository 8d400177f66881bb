"""The sets of instructions that kernels are compiled for, and which of them this process uses.

It is the best one that the machine has, or a lesser one that the environment asks for: `STRETTO_KERNELS=avx512bf16`
makes a machine with AMX compute as one without it does.
"""

from __future__ import annotations

import os

from stretto.core.errors import UserError
from stretto.kernels import _native

LEVELS = ("amx", "avx512bf16", "avx512", "avx2", "plain")
"""The best first."""
VARIABLE = "STRETTO_KERNELS"


def chosen(asked: str, best: str) -> str:
    """The level to use where the environment asks for one (or for none, "") and the machine has `best`.

    Raises:
        UserError: if there is no such level, or not on this machine.

    >>> chosen("", "avx2"), chosen("plain", "avx2")
    ('avx2', 'plain')
    """
    here = LEVELS[LEVELS.index(best) :]
    if not asked:
        return best
    if asked not in here:
        raise UserError(f"{asked!r} is no level of this machine", field=VARIABLE, right=f"one of {', '.join(here)}")
    return asked


BEST_LEVEL = chosen(os.environ.get(VARIABLE, ""), _native.best_level())
