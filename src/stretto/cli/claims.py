"""`stretto claims [SYSTEM]`: the figures that publications state, computed here and laid beside them."""

from __future__ import annotations

import dataclasses
from itertools import groupby
from operator import attrgetter

import typer
from rich.markup import escape
from rich.table import Table

from stretto.claims import registry
from stretto.claims.registry import Row, run_claims
from stretto.claims.systems import systems
from stretto.cli.app import app, console, print_json, progress_bar
from stretto.core.errors import UserError


@app.command()
def claims(
    system: str | None = typer.Argument(None, help="A published system; all of them if left out."),
    quick: bool = typer.Option(False, "--quick", help="Smaller instances, where a claim has them."),
    as_json: bool = typer.Option(False, "--json", help="Print the rows as JSON."),
) -> None:
    """Compute the claims of SYSTEM anew; exit code 1 if one that is judged does not hold."""
    _check_known(system)
    with progress_bar(quiet=as_json) as progress:
        rows = run_claims(system, quick=quick, progress=progress)
    if as_json:
        print_json([dataclasses.asdict(row) for row in rows])
    elif rows:
        for name, group in groupby(rows, key=attrgetter("system")):
            _show(name, list(group))
    else:
        console.print(f"{system or 'stretto'} has no claims yet")
    if any(row.holds is False for row in rows):
        raise typer.Exit(1)


def _check_known(system: str | None) -> None:
    listed = [each.name for each in systems()]
    if system is None or system in listed:
        return
    known = sorted({*listed, *(claim.system for claim in registry.claims())})
    if system not in known:
        raise UserError(
            f"there is no system {system!r}", field="SYSTEM", right=f"it must be one of: {', '.join(known)}"
        )


def _show(system: str, rows: list[Row]) -> None:
    table = Table(title=f"claims of {escape(system)}", title_justify="left")
    for heading in ("claim", "kind", "published", "ours", "null", "verdict", "seconds"):
        table.add_column(heading, justify="left" if heading in ("claim", "kind", "verdict") else "right")
    for row in rows:
        figures = (_figure(value, row.unit) for value in (row.published, row.ours, row.null))
        table.add_row(*map(escape, (row.name, row.kind, *figures, row.verdict, f"{row.seconds:.2f}")))
    console.print(table)
    for row in rows:
        note = f" ({row.note})" if row.note else ""
        console.print(f"[bold]{escape(row.name)}[/bold]: {escape(row.says + note)}", highlight=False)
    _explain("setting", {row.name: row.setting for row in rows})
    sources = {row.name: "; ".join(f"{what} from {source}" for what, source in row.constants.items()) for row in rows}
    _explain("constants", sources)
    _explain("fitted on", {row.name: row.fitted_on or "" for row in rows})


def _explain(what: str, texts: dict[str, str]) -> None:
    """Each text once, with the claims it belongs to."""
    names: dict[str, list[str]] = {}
    for name, text in texts.items():
        names.setdefault(text, []).append(name)
    for text, of in names.items():
        if text:
            whose = "" if len(of) == len(texts) else f" of {', '.join(of)}"
            console.print(f"[dim]{what}{escape(whose)}:[/dim] {escape(text)}", highlight=False)


def _figure(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, bool) else f"{value:.4g} {unit}".rstrip()
