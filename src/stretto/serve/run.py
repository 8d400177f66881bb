"""Carrying a serving plan out on this machine, and laying the prediction beside what happened."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stretto.core.clock import RealClock
from stretto.core.eventlog import EventLog
from stretto.core.plan import Context, Plan, Prediction, Result
from stretto.core.record import Recorder
from stretto.core.trace import Key
from stretto.models.calibrate import warm_up
from stretto.models.load import Model, load_model
from stretto.serve.engine import Engine, Handle
from stretto.serve.job import ServeJob
from stretto.serve.local import LocalBackend
from stretto.serve.plan import ServePlan, memory_bytes
from stretto.serve.predict import play, scheduler_config
from stretto.serve.request import Answer, Request
from stretto.serve.scheduler import Scheduler
from stretto.serve.text import AnswerText
from stretto.serve.workload import Workload

EVENT_LOG = "events.jsonl"


@dataclass(frozen=True, kw_only=True)
class Served:
    """What a real run gave."""

    answers: tuple[Answer, ...]
    recorder: Recorder
    log: EventLog
    interrupted: bool


def serve(model: Model, job: ServeJob, plan: ServePlan, work: Workload, ctx: Context) -> Served:
    """Answer the prompts of `job` with a loaded model; ends early, with what is done, when `ctx.cancelled`."""
    return asyncio.run(_serve(model, job, plan, work, ctx))


async def _serve(model: Model, job: ServeJob, plan: ServePlan, work: Workload, ctx: Context) -> Served:
    recorder = Recorder("measured")
    settings = scheduler_config(plan, work)
    log = EventLog(header=dataclasses.asdict(settings))
    clock = RealClock(on_spend=lambda what, start, finish: recorder.span("host", start, finish, Key(what)))
    backend = LocalBackend(model, pages=settings.pages, page_tokens=settings.page_tokens, clock=clock)
    engine = Engine(Scheduler(settings), backend, clock, recorder, log=log)
    running = asyncio.ensure_future(engine.run())
    watching = asyncio.ensure_future(_watch(engine, clock, job, ctx))
    handles = await _submit(engine, clock, model, job, work, ctx)
    engine.close()
    await running
    watching.cancel()
    recorder.memory(plan.device, 0.0, memory_bytes(plan, work))
    answers = tuple(handle.result() for handle in handles)
    interrupted = any(answer.reason == "cancelled" for answer in answers) or len(answers) < len(work.prompts)
    return Served(answers=answers, recorder=recorder, log=log, interrupted=interrupted)


async def _submit(
    engine: Engine, clock: RealClock, model: Model, job: ServeJob, work: Workload, ctx: Context
) -> list[Handle]:
    handles = []
    ends = frozenset() if job.ignore_eos else frozenset(model.tokenizer.eos_ids)
    for i, (prompt, arrival) in enumerate(zip(work.prompts, work.arrivals_s, strict=True)):
        while arrival > clock.now and not ctx.cancelled():
            await clock.sleep(min(0.05, arrival - clock.now))
        if ctx.cancelled():
            break
        sampling = dataclasses.replace(job.sampling, seed=job.sampling.seed + ctx.seed + i)
        request = Request(id=i, prompt=prompt, limit=work.limit, sampling=sampling, stop_tokens=ends, stop=job.stop)
        handles.append(engine.submit(request, AnswerText(model.tokenizer, job.stop)))
    return handles


async def _watch(engine: Engine, clock: RealClock, job: ServeJob, ctx: Context) -> None:
    """Show progress; cancel everything on Ctrl-C or when the job's time is up."""
    count = len(job.prompts)
    while True:
        out_of_time = job.limits.seconds is not None and clock.now > job.limits.seconds
        if ctx.cancelled() or out_of_time:
            engine.cancel_all()
        ctx.progress("answers", engine.finished, count)
        await clock.sleep(0.1)


def run(plan: Plan[ServeJob, ServePlan], work: Workload, forecast: Prediction, ctx: Context) -> Result:
    """Load the model, serve the job, and re-simulate it with the lengths that came out.

    With `ctx.output`, the event log is written there as `events.jsonl`.
    """
    model = load_model(plan.job.model, dtype=plan.choices.dtype, threads=plan.choices.threads)
    warm_up(model)
    served = serve(model, plan.job, plan.choices, work, ctx)
    measured = served.recorder.trace()
    device = plan.cluster.device(plan.choices.device)
    lengths = [max(1, len(answer.tokens)) for answer in served.answers]
    predicted = play(plan.choices, work, device, lengths).trace
    files = {}
    if ctx.output is not None:
        path = ctx.output / EVENT_LOG
        served.log.save(path)
        files["events"] = str(path)
    return Result(
        plan=plan,
        outputs=tuple(_outputs(plan.job, served.answers)),
        measured=measured,
        predicted=predicted,
        forecast=forecast,
        comparison=predicted.compare(measured),
        interrupted=served.interrupted,
        files=files,
    )


def _outputs(job: ServeJob, answers: Sequence[Answer]) -> list[dict[str, Any]]:
    return [
        {
            "prompt": job.prompts[answer.id],
            "text": answer.text,
            "reason": answer.reason,
            "tokens": len(answer.tokens),
            "first_token_s": None if answer.first_token_s is None else answer.first_token_s - answer.arrived_s,
            "latency_s": answer.latency_s,
        }
        for answer in answers
    ]
