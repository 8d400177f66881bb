"""`stretto quantize MODEL --out FOLDER`: the model in 4 or 8 bits, as a folder that we and others load."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import typer
from rich.markup import escape

from stretto.cli.app import app, console, print_json, progress_bar
from stretto.cli.format import quantity
from stretto.core.errors import FieldError, UserError
from stretto.models.load import prepare_environment

_GROUPS = {"32": 32, "64": 64, "128": 128, "column": -1}


@app.command()
def quantize(
    model: str = typer.Argument(..., help="A name, a path (.gguf or a folder) or a Hugging Face id."),
    out: Path = typer.Option(..., "--out", help="The folder to make."),
    method: str = typer.Option("gptq", "--method", help="rtn, clip or gptq."),
    bits: int = typer.Option(4, "--bits", help="4 or 8."),
    group: str = typer.Option("64", "--group", help="Neighbours that share a scale: 32, 64, 128 or column."),
    text: Path | None = typer.Option(None, "--text", help="Plain text to calibrate on; gptq needs one."),
    sparse: str | None = typer.Option(None, "--sparse", help="2:4 keeps two of each four weights."),
    asymmetric: bool = typer.Option(False, "--asymmetric", help="A zero point for each group."),
    act_order: bool = typer.Option(False, "--act-order", help="gptq: columns with the largest inputs first."),
    head: str = typer.Option("8", "--head", help="Embedding and head: 8 bits, or keep as they are."),
    windows: int = typer.Option(32, "--windows", help="Stretches of 512 tokens taken from the text."),
    threads: int | None = typer.Option(None, "--threads", min=1, help="CPU threads; all if left out."),
    as_json: bool = typer.Option(False, "--json", help="Print the report as JSON."),
) -> None:
    """Quantise MODEL layer by layer and write it in compressed-tensors' pack-quantized form."""
    prepare_environment()
    try:
        from stretto.models.quantize.layerwise import Recipe
        from stretto.models.quantize.run import Calibration, quantise_to
    except ImportError:
        raise UserError(
            "quantising needs torch, which is not installed", right="pip install 'stretto[models]'"
        ) from None
    from stretto.models.quantize.grid import Grid

    if group not in _GROUPS:
        raise UserError(f"is {group!r}", field="group", right=f"one of {', '.join(_GROUPS)}")
    try:
        grid = Grid(bits=bits, group=_GROUPS[group], symmetric=not asymmetric)
        chosen: dict[str, Any] = {"method": method, "sparse": sparse, "head": head}
        recipe = Recipe(grid=grid, act_order=act_order, **chosen)
        calibration = None if text is None else Calibration(file=text, windows=windows)
        with progress_bar(quiet=as_json) as progress:
            report = quantise_to(out, model, recipe, calibration, threads=threads, progress=progress)
    except FieldError as error:
        raise UserError(str(error)) from None
    if as_json:
        print_json(dataclasses.asdict(report))
        return
    made = ", ".join(f"{count} by {how}" for how, count in report.matrices.items())
    size, plain = quantity(report.matrix_bytes, "B"), quantity(report.plain_bytes, "B")
    console.print(f"{escape(str(report.folder))}: {size} of matrices ({plain} in bf16): {made}", highlight=False)
