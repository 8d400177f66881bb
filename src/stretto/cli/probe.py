"""`stretto probe`: measure this machine."""

from __future__ import annotations

from pathlib import Path

import typer
from rich.table import Table

import stretto
from stretto.cli.app import app, console, print_json, progress_bar
from stretto.cli.format import quantity
from stretto.files import check_place, cluster_text, write_text
from stretto.hardware.cluster import Cluster


@app.command()
def probe(
    again: bool = typer.Option(False, "--again", help="Measure anew, whatever the cache holds."),
    as_json: bool = typer.Option(False, "--json", help="Print the cluster as JSON."),
    save: Path | None = typer.Option(None, "--save", help="Write the cluster file here."),
) -> None:
    """Measure this machine's devices and links; the answer is cached."""
    if save is not None:
        check_place(save)
    with progress_bar(quiet=as_json) as progress:
        cluster = stretto.probe(again=again, progress=progress)
    if save is not None:
        write_text(save, cluster_text(cluster))
    if as_json:
        print_json(cluster.to_dict())
    else:
        _show(cluster)


def _show(cluster: Cluster) -> None:
    for path, device in cluster.devices().items():
        table = Table(title=f"{path}: {device.name}", title_justify="left", show_header=False)
        table.add_row("memory", quantity(device.memory_bytes, "B"))
        table.add_row("cores", str(device.units))
        table.add_row("memory bandwidth", quantity(device.bandwidth, "B/s"))
        for dtype, peak in device.peak_flops.items():
            table.add_row(f"{dtype} peak", quantity(peak, "FLOP/s"))
        console.print(table)
