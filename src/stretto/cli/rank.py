"""`stretto rank JOB|PLAN`: one rank of a training plan, in a process that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

import stretto
from stretto.cli.app import app, console, print_json
from stretto.cli.run import interruptible
from stretto.core.errors import UserError
from stretto.hardware.probe import is_this_machine


@app.command()
def rank(
    what: Path = typer.Argument(metavar="JOB|PLAN", help="A plan file, or a training job, planned for `--on`."),
    on: Path = typer.Option(None, "--on", help="The cluster file of the machines, for a job, which is planned first."),
    as_json: bool = typer.Option(False, "--json", help="Print a line of JSON for each thing that happens."),
) -> None:
    """Be one rank of a training plan: torchrun --nnodes 2 --nproc-per-node 4 ... -m stretto rank plan.yaml."""
    try:
        from stretto.train.joined import join
    except ImportError as problem:
        raise UserError(f"ranks need torch ({problem})", right="pip install 'stretto[models]'") from None
    chosen = stretto.load(what)
    if not isinstance(chosen, stretto.Plan):
        if on is None:
            raise UserError("a job needs the machines it is for", file=str(what), right="--on CLUSTER, or a plan file")
        machines = stretto.load_cluster(on)
        if is_this_machine(machines):
            # Ranks that measured side by side would disturb each other, and choose each its own plan.
            right = f"stretto plan {what} --on {on} --save plan.yaml, and that plan file here"
            raise UserError("is this machine, which is measured before it is planned for", file=str(on), right=right)
        chosen = stretto.plan(chosen, on=machines).best  # every rank finds the same one
    if chosen.kind != "train":
        raise UserError(f"is of kind {chosen.kind}", file=str(what), field="kind", right="train")

    def tell(message: Mapping[str, Any]) -> None:
        if as_json:
            print_json(message, indent=None)
        elif "loss" in message:
            speed = message["tokens"] / message["seconds"]
            console.print(
                f"step {message['step'] + 1}  loss {message['loss']:.4f}  {speed:.0f} tokens/s", highlight=False
            )
        elif "evaluated" in message:
            console.print(f"held-out text: loss {message['evaluated']:.4f} at step {message['step']}", highlight=False)

    with interruptible() as cancelled:
        join(chosen, tell if os.environ.get("RANK", "0") == "0" else lambda message: None, cancelled)
