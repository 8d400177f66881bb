"""The front door: `stretto probe | plan | simulate | run`, one file a command."""

from __future__ import annotations

import sys

from stretto.core.errors import UserError


def main() -> None:
    """Run the command line; a user's mistake is one line on stderr and exit code 2."""
    from stretto.cli.app import app

    try:
        app()
    except UserError as mistake:
        sys.stderr.write(f"stretto: {mistake}\n")
        raise SystemExit(2) from None
