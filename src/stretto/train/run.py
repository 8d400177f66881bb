"""Carrying a training plan out: as processes of this machine, or as one of torchrun's ranks."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from stretto.core.plan import Context, Plan, Prediction, Result
from stretto.core.record import Recorder
from stretto.core.trace import Key, Trace
from stretto.models.spec import ModelSpec
from stretto.train import checkpoint
from stretto.train.data import check_sources
from stretto.train.export import check_model, check_place, export
from stretto.train.job import TrainJob
from stretto.train.launch import run_ranks
from stretto.train.plan import TrainPlan
from stretto.train.predict import play
from stretto.train.session import RECORDED_STEPS


@dataclass(kw_only=True)
class Heard:
    """What the ranks told.

    Attributes:
        steps: a row each, as `trainer.StepReport`, with the second `at` which it ended.
        evaluated: (step, loss) on the held-out text.
        spans: by rank, [start, finish, phase, step, micro-batch, stage].
        peaks: most bytes of live tensors in the first two steps, by rank.
    """

    predicted_step_s: float
    ctx: Context
    first: int = 0
    of: int = 0
    started: float = 0.0
    steps: list[dict[str, Any]] = field(default_factory=list)
    evaluated: list[tuple[int, float]] = field(default_factory=list)
    spans: dict[int, list[list[Any]]] = field(default_factory=dict)
    peaks: dict[int, float] = field(default_factory=dict)
    meters: dict[int, list[Mapping[str, Any]]] = field(default_factory=dict)

    def hear(self, rank: int, message: dict[str, Any]) -> None:
        if "started" in message:
            self.started = max(self.started, message["started"])
            self.first, self.of = message["step"], message["of"]
        elif "loss" in message:
            self.steps.append(message)
            predicted = message["tokens"] / self.predicted_step_s
            told = (
                f"loss {message['loss']:.3f}, {message['tokens'] / message['seconds']:.0f} tokens/s "
                f"({predicted:.0f} predicted)"
            )
            self.ctx.progress(f"training: {told}", message["step"] + 1 - self.first, self.of - self.first)
        elif "evaluated" in message:
            self.evaluated.append((message["step"], message["evaluated"]))
        elif "done" in message:
            self.spans[rank] = message["spans"]
            self.peaks[rank] = message["peak_bytes"]
            self.meters[rank] = message["meter"]


def run(plan: Plan[TrainJob, TrainPlan], spec: ModelSpec, forecast: Prediction, ctx: Context) -> Result:
    """Train, and lay what was predicted of the recorded steps beside what was measured.

    Raises:
        UserError: a rank failed; names it, its stages and the cause.
    """
    job, choices = replace(plan.job, seed=plan.job.seed + ctx.seed), plan.choices
    check_sources(job.data)
    if job.export is not None:
        check_place(Path(job.export))
        check_model(job)
    if job.checkpoint is not None:
        checkpoint.check_place(Path(job.checkpoint))
    heard = Heard(predicted_step_s=forecast.metrics["step"].value.value, ctx=ctx)
    run_ranks(job, choices, origin=time.perf_counter(), hear=heard.hear, stopping=ctx.cancelled)
    done = len(heard.steps)
    measured = _trace(heard)
    recorded = max(1, min(done, RECORDED_STEPS))
    predicted = play(job, choices, spec, plan.cluster, steps=recorded, first=heard.first)
    files = {}
    newest = checkpoint.newest(Path(job.checkpoint)) if job.checkpoint is not None else None
    if newest is not None:
        files["checkpoint"] = str(newest)
    finished = heard.first + done >= job.steps
    if job.export is not None and finished and newest is not None:
        export(job, newest, Path(job.export))
        files["model"] = job.export
    return Result(
        plan=plan,
        outputs=tuple(_outputs(heard)),
        said=tuple(("", line) for line in _said(heard)),
        measured=measured,
        predicted=predicted,
        forecast=forecast,
        comparison=predicted.compare(measured),
        interrupted=not finished,
        remarks=tuple(_remarks(heard, forecast)),
        files=files,
    )


def _trace(heard: Heard) -> Trace:
    """The recorded steps of all ranks, from the first one's begin on, without what is not part of a step."""
    recorder = Recorder("measured")
    rows = [(rank, row) for rank, spans in sorted(heard.spans.items()) for row in spans if row[2] not in _ASIDE]
    origin = min((row[0] for _, row in rows), default=0.0)
    aside = sorted({(row[0], row[1]) for row in heard.spans.get(0, []) if row[2] in _ASIDE})
    for rank, (start, finish, phase, step, micro_batch, stage) in rows:
        late = sum(end - begin for begin, end in aside if end <= start and begin >= origin)
        key = Key(phase, step, micro_batch, stage, rank)
        recorder.span(f"rank {rank}", start - origin - late, finish - origin - late, key)
    for row in heard.steps:
        recorder.counter("loss", max(0.0, row["at"] - origin), row["loss"])
        recorder.counter("tokens/s", max(0.0, row["at"] - origin), row["tokens"] / row["seconds"])
    recorder.attributes["curves"] = {
        "training loss": [[row["step"], row["loss"]] for row in heard.steps],
        "held-out loss": [list(pair) for pair in heard.evaluated],
    }
    recorder.attributes["peak_bytes"] = {str(rank): peak for rank, peak in sorted(heard.peaks.items())}
    return recorder.trace()


_ASIDE = ("evaluate", "save")


def _outputs(heard: Heard) -> list[dict[str, Any]]:
    held_out = dict(heard.evaluated)
    return [
        {
            "step": row["step"],
            "loss": row["loss"],
            "held_out_loss": held_out.get(row["step"] + 1),
            "gradient_norm": row["gradient_norm"],
            "learning_rate": row["learning_rate"],
            "tokens": row["tokens"],
            "seconds": row["seconds"],
            "sent_bytes": row["sent_bytes"],
        }
        for row in heard.steps
    ]


def _said(heard: Heard) -> list[str]:
    """The losses as people read them: some steps, and the held-out text's before and after."""
    lines = []
    count = len(heard.steps)
    shown = {0, count - 1, *range(0, count, max(1, count // 8))}
    for place, row in enumerate(heard.steps):
        if place in shown:
            speed = row["tokens"] / row["seconds"]
            lines.append(
                f"step {row['step'] + 1:>5}  loss {row['loss']:.4f}  gradient {row['gradient_norm']:.3f}  "
                f"{speed:.0f} tokens/s"
            )
    if len(heard.evaluated) > 1:
        (first, before), (last, after) = heard.evaluated[0], heard.evaluated[-1]
        lines.append(f"held-out text: loss {before:.4f} at step {first}, {after:.4f} at step {last}")
    return lines


def _remarks(heard: Heard, forecast: Prediction) -> list[str]:
    if not heard.steps:
        return ["there was nothing left to do: the newest checkpoint has all steps"]
    seconds = sorted(row["seconds"] for row in heard.steps)
    median = seconds[len(seconds) // 2]
    predicted = forecast.metrics["step"].value.value
    remarks = [
        f"a step took {median:.3f} s in the median, {predicted:.3f} s were predicted ({predicted / median - 1:+.1%}); "
        f"rank 0 sent {heard.steps[-1]['sent_bytes'] / 1e6:.2f} MB in the last"
    ]
    if heard.first:
        remarks.append(f"went on from step {heard.first}")
    return remarks
