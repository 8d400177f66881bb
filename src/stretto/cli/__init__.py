"""The front door: `stretto probe | plan | simulate | run | rank | serve | quantize | claims | systems`, one file a
command (`batch` is with `serve`).
"""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING, Any

from stretto.core.errors import UserError

if TYPE_CHECKING:
    import typer


def application() -> typer.Typer:
    """The typer application with all of its commands; each file adds its own when it is imported."""
    from stretto.cli import claims, plan, probe, quantize, rank, run, serve, simulate, systems  # noqa: F401
    from stretto.cli.app import app

    return app


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and exit code 2, Ctrl-C is exit code 130."""
    signal.signal(signal.SIGINT, _interrupted)
    try:
        application()()
    except UserError as mistake:
        sys.stderr.write(f"stretto: {mistake}\n")
        raise SystemExit(2) from None


def _interrupted(signum: int, frame: Any) -> None:
    sys.stderr.write("stretto: interrupted\n")
    raise SystemExit(128 + signum)
