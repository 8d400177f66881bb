"""The typer application and what all commands share: the console, progress, JSON out."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from stretto import __version__
from stretto.core.plan import Progress as ProgressCallback
from stretto.core.plan import no_progress

app = typer.Typer(
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    help="Describe the work and the machines; stretto finds the fastest way to run it in parallel, "
    "shows what will happen before it runs, runs it, and shows what did happen.",
)

console = Console()
"""Where people read. Commands with --json print to stdout through `print_json` and nothing else there."""


def _version(wanted: bool) -> None:
    if wanted:
        console.print(f"stretto {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def common(
    version: bool = typer.Option(False, "--version", callback=_version, is_eager=True, help="Print the version."),
) -> None:
    """Options before any command."""


def say(text: str, *, soft_wrap: bool = False) -> None:
    """Text for people as it stands: whatever brackets are in it are no markup."""
    console.print(text, markup=False, highlight=False, soft_wrap=soft_wrap)


def print_json(value: Any, *, indent: int | None = 2) -> None:
    """One JSON document on stdout; without `indent` on one line."""
    sys.stdout.write(json.dumps(value, indent=indent, allow_nan=False, default=_plain) + "\n")
    sys.stdout.flush()


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"no JSON form for {type(value).__name__}")


class _Count(ProgressColumn):
    """How many of how many are done; nothing where neither is known."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.completed:.0f}/{task.total:.0f}" if task.total else "")


@contextmanager
def progress_bar(*, quiet: bool) -> Iterator[ProgressCallback]:
    """A progress callback drawn on stderr; with `quiet`, or where stderr is no terminal, nothing is drawn."""
    if quiet or not sys.stderr.isatty():
        yield no_progress
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        _Count(),
    )
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, TaskID] = {}

        def show(what: str, done: float, total: float) -> None:
            name = what.partition(":")[0]
            if name not in tasks:
                tasks[name] = bar.add_task(what, total=total or None)
            bar.update(tasks[name], description=what, completed=done, total=total or None)

        yield show
