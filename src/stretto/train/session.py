"""A rank's whole run, from the files to the last checkpoint: the same lines under our launcher and under torchrun."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from stretto.comm.transport import Axis, Transport
from stretto.core.errors import UserError
from stretto.models.load import open_model
from stretto.models.spec import ModelSpec
from stretto.models.weights import Weights
from stretto.train import checkpoint
from stretto.train.data import Bytes, Encoder, samples
from stretto.train.job import TrainJob
from stretto.train.live import LiveBytes
from stretto.train.plan import TrainPlan
from stretto.train.trainer import StepReport, Trainer

RECORDED_STEPS = 50
"""So many steps, from the first on, are kept span by span."""
COUNTED_STEPS = 2
"""In so many steps, the first ones, live bytes are counted: the optimizer's moments are there from the second on."""
_DEFAULT = "default"

Emit = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True, kw_only=True)
class Model:
    """What a job trains: the spec, the files' weights (None: a new one), and how text becomes tokens."""

    spec: ModelSpec
    weights: Weights | None
    encoder: Encoder


def model_of(job: TrainJob) -> Model:
    """The model of a job; raises as `models.load.open_model` does."""
    if job.model is not None:
        files = open_model(job.model)
        if job.sequence > files.spec.max_positions:
            raise UserError(
                f"is {job.sequence}",
                field="sequence",
                right=f"at most the model's {files.spec.max_positions} positions",
            )
        return Model(spec=files.spec, weights=files.weights, encoder=files.tokenizer)
    assert job.shape is not None
    encoder: Encoder = Bytes() if job.tokenizer == "bytes" else open_model(_DEFAULT).tokenizer
    return Model(spec=job.shape.spec(vocab=encoder.size, positions=job.sequence), weights=None, encoder=encoder)


def run_rank(
    job: TrainJob,
    plan: TrainPlan,
    transport: Transport,
    *,
    origin: float,
    emit: Emit,
    stopping: Callable[[], bool] = lambda: False,
) -> int:
    """Train; every rank calls it. Returns how many steps are done.

    Args:
        origin: of the times that are told, on the machine's monotonic clock.
        emit: is given what happened, as plain values: {"step": ...} after each step and {"evaluated": ...} (rank 0),
            {"done": ...} with the rank's spans at the end (every rank).
        stopping: asked on rank 0 between steps; true ends the run there, for all ranks.

    Raises:
        UserError: the text, the model or the checkpoint cannot be had, ranks found different checkpoints, or the
            gradients are no numbers any more.
    """
    if plan.threads is not None:
        torch.set_num_threads(plan.threads)
    model = model_of(job)
    data, held_out = samples(job.data, model.encoder, length=job.sequence, held_out=job.held_out, seed=job.seed)
    trainer = Trainer(job, plan, model.spec, model.weights, data, held_out, transport, origin=origin)
    folder = Path(job.checkpoint) if job.checkpoint is not None else None
    found = checkpoint.newest(folder) if folder is not None else None
    if found is not None:
        checkpoint.load(trainer, found)
    everyone = transport.axis(*(name for name, _ in transport.grid.axes))
    _require_one_step(trainer.step, everyone, folder)
    first, begun, live = trainer.step, time.monotonic(), LiveBytes()
    found_bytes = trainer.moment_bytes
    everyone.barrier()
    emit({"started": trainer.watcher.now(), "step": first, "of": job.steps})
    _evaluate(trainer, emit)
    while trainer.step < job.steps:
        late = job.limits.seconds is not None and time.monotonic() - begun > job.limits.seconds
        stop = torch.tensor([float(transport.rank == 0 and (stopping() or late))])
        if float(everyone.maximum_(stop)):
            break
        counted = trainer.step - first < COUNTED_STEPS
        report = live.around(trainer.train_step) if counted else trainer.train_step()
        _told(trainer, report, emit)
        if report.step + 1 - first == RECORDED_STEPS:
            trainer.watcher.recording = False
        due = folder is not None and job.save_every is not None and trainer.step % job.save_every == 0
        if due and folder is not None:
            saving = trainer.watcher.now()
            checkpoint.save(trainer, folder, keep=job.keep)
            trainer.watcher.mark("save", saving)
        if job.evaluate_every is not None and trainer.step % job.evaluate_every == 0:
            _evaluate(trainer, emit)
    if trainer.step > first and (job.evaluate_every is None or trainer.step % job.evaluate_every):
        _evaluate(trainer, emit)
    if folder is not None and trainer.step > first and (job.save_every is None or trainer.step % job.save_every):
        checkpoint.save(trainer, folder, keep=job.keep)
    emit(
        {
            "done": trainer.step,
            "spans": trainer.watcher.spans(),
            "peak_bytes": live.peak + trainer.weight_bytes + found_bytes,
            "meter": transport.meter.rows(),
        }
    )
    return trainer.step


def _require_one_step(step: int, everyone: Axis, folder: Path | None) -> None:
    """`UserError` unless all ranks go on from the same step."""
    last = int(everyone.maximum_(torch.tensor([float(step)])))
    first = -int(everyone.maximum_(torch.tensor([-float(step)])))
    if first != last:
        raise UserError(
            f"one rank would go on from step {first}, another from step {last}",
            file=str(folder),
            field="checkpoint",
            right="a folder that all machines share",
        )


def _told(trainer: Trainer, report: StepReport, emit: Emit) -> None:
    if trainer.transport.rank == 0:
        emit(asdict(report) | {"at": trainer.watcher.now()})


def _evaluate(trainer: Trainer, emit: Emit) -> None:
    if not len(trainer.held_out):
        return
    begun = trainer.watcher.now()
    loss = trainer.evaluate()
    trainer.watcher.mark("evaluate", begun)
    if trainer.transport.rank == 0:
        emit({"evaluated": loss, "step": trainer.step})
