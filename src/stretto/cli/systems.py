"""`stretto systems`: the published systems, and how much of each is here."""

from __future__ import annotations

import dataclasses

import typer
from rich.markup import escape
from rich.table import Table

from stretto.claims.registry import claims
from stretto.claims.systems import ROOMS, State, System, state
from stretto.claims.systems import systems as all_systems
from stretto.cli.app import app, console, print_json
from stretto.core.errors import UserError


@app.command()
def systems(
    room: str | None = typer.Option(None, "--room", help="Only the systems of this room."),
    as_json: bool = typer.Option(False, "--json", help="Print the list as JSON."),
) -> None:
    """List the published systems: where each lives, whether it is here, what turns it on."""
    if room is not None and room not in ROOMS:
        raise UserError(f"there is no room {room!r}", field="--room", right=f"it must be one of: {', '.join(ROOMS)}")
    claimed = {claim.system for claim in claims()}
    chosen = [(system, state(system, claimed)) for system in all_systems() if room in (None, system.room)]
    if as_json:
        print_json([{**dataclasses.asdict(system), "state": how} for system, how in chosen])
    else:
        _show(chosen)


def _show(chosen: list[tuple[System, State]]) -> None:
    table = Table()
    for heading in ("system", "publication", "room", "state", "turned on by"):
        table.add_column(heading, no_wrap=heading in ("system", "room", "state"))
    for system, how in chosen:
        table.add_row(*map(escape, (system.name, system.publication, system.room, how, system.turned_on_by)))
    console.print(table)
    states = [how for _, how in chosen]
    console.print(f"{states.count('here')} here, {states.count('part')} in part, {states.count('to come')} to come")
