"""Carrying a serving plan out on this machine, and laying the prediction beside what happened."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from stretto.core.clock import RealClock
from stretto.core.eventlog import EventLog
from stretto.core.plan import Context, Plan, Prediction, Result
from stretto.core.record import Recorder
from stretto.core.trace import Key
from stretto.hardware.device import Device
from stretto.models.calibrate import TOLERANCE, is_calibrated, pace, warm_up
from stretto.models.load import Model, load_model
from stretto.models.passes import PassShape
from stretto.serve.backend import Backend
from stretto.serve.engine import Handle
from stretto.serve.instances import Instances
from stretto.serve.job import ServeJob
from stretto.serve.lane_engine import engine_of
from stretto.serve.local import LocalBackend
from stretto.serve.local_lanes import LaneBackend
from stretto.serve.plan import ServePlan, memory_bytes
from stretto.serve.predict import lanes, play, scheduler_config
from stretto.serve.remote import RemoteBackend
from stretto.serve.request import Answer, Request
from stretto.serve.text import AnswerText
from stretto.serve.workload import Workload

EVENT_LOG = "events"


@dataclass(frozen=True, kw_only=True)
class Served:
    """What a real run gave."""

    answers: tuple[Answer, ...]
    recorder: Recorder
    logs: tuple[EventLog, ...]
    interrupted: bool


def serve(model: Model, job: ServeJob, plan: ServePlan, work: Workload, ctx: Context) -> Served:
    """Answer the prompts of `job` with a loaded model; ends early, with what is done, when `ctx.cancelled`."""
    return asyncio.run(_serve(model, job, plan, work, ctx))


async def _serve(model: Model, job: ServeJob, plan: ServePlan, work: Workload, ctx: Context) -> Served:
    async with AsyncExitStack() as stack:
        clock = RealClock()
        backends = await _backends(model, job, plan, work, clock, stack)
        clock.restart()
        return await _serve_on(backends, clock, model, job, plan, work, ctx)


async def _backends(
    model: Model, job: ServeJob, plan: ServePlan, work: Workload, clock: RealClock, stack: AsyncExitStack
) -> list[Backend]:
    """One backend an instance: this process's model, in one lane or two, or a worker process each, which `stack`
    closes.
    """
    pages = plan.pages(work.longest)
    if plan.prefill == "lanes":
        size = {"pages": pages, "page_tokens": plan.page_tokens, "threads": plan.threads}
        backend = LaneBackend(model, clock=clock, **size)
        stack.callback(backend.close)
        return [backend]
    if plan.instances == 1:
        return [LocalBackend(model, pages=pages, page_tokens=plan.page_tokens, clock=clock)]
    starting = [
        RemoteBackend.start(
            job.model,
            dtype=plan.dtype,
            path=plan.path,
            threads=plan.threads,
            pages=pages,
            page_tokens=plan.page_tokens,
            clock=clock,
        )
        for _ in range(plan.instances)
    ]
    started = await asyncio.gather(*starting, return_exceptions=True)
    for each in started:
        if isinstance(each, RemoteBackend):
            stack.push_async_callback(each.close)
    for each in started:
        if isinstance(each, BaseException):
            raise each
    return [each for each in started if isinstance(each, RemoteBackend)]


async def _serve_on(
    backends: Sequence[Backend],
    clock: RealClock,
    model: Model,
    job: ServeJob,
    plan: ServePlan,
    work: Workload,
    ctx: Context,
) -> Served:
    recorder = Recorder("measured")
    settings = scheduler_config(plan, work)
    logs = [EventLog(header=dataclasses.asdict(settings)) for _ in range(plan.instances)]
    clock.on_spend = lambda what, start, finish: recorder.span("host", start, finish, Key(what))
    engines = [
        engine_of(settings, backend, clock, recorder, log=log, lane=lane)
        for backend, log, lane in zip(backends, logs, lanes(plan), strict=True)
    ]
    engine = Instances(engines)
    running = asyncio.ensure_future(engine.run())
    watching = asyncio.ensure_future(_watch(engine, clock, job, ctx))
    handles = await _submit(engine, clock, model, job, work, ctx)
    engine.close()
    await running
    watching.cancel()
    recorder.memory(plan.device, 0.0, memory_bytes(plan, work))
    answers = tuple(handle.result() for handle in handles)
    interrupted = any(answer.reason == "cancelled" for answer in answers) or len(answers) < len(work.prompts)
    return Served(answers=answers, recorder=recorder, logs=tuple(logs), interrupted=interrupted)


async def _submit(
    engine: Instances, clock: RealClock, model: Model, job: ServeJob, work: Workload, ctx: Context
) -> list[Handle]:
    handles = []
    ends = frozenset() if job.ignore_eos else frozenset(model.tokenizer.eos_ids)
    for i, (prompt, arrival) in enumerate(zip(work.prompts, work.arrivals_s, strict=True)):
        while arrival > clock.now and not _is_over(clock, job, ctx):
            await clock.sleep(min(0.05, arrival - clock.now))
        if _is_over(clock, job, ctx):
            break
        sampling = dataclasses.replace(job.sampling, seed=job.sampling.seed + ctx.seed + i)
        request = Request(id=i, prompt=prompt, limit=work.limit, sampling=sampling, stop_tokens=ends, stop=job.stop)
        handles.append(engine.submit(request, AnswerText(model.tokenizer, job.stop)))
    return handles


async def _watch(engine: Instances, clock: RealClock, job: ServeJob, ctx: Context) -> None:
    """Show progress; cancel everything on Ctrl-C or when the job's time is up."""
    count = len(job.prompts)
    while True:
        if _is_over(clock, job, ctx):
            engine.cancel_all()
        ctx.progress("answers", engine.finished, count)
        await clock.sleep(0.1)


def _is_over(clock: RealClock, job: ServeJob, ctx: Context) -> bool:
    return ctx.cancelled() or (job.limits.seconds is not None and clock.now > job.limits.seconds)


def run(plan: Plan[ServeJob, ServePlan], work: Workload, forecast: Prediction, ctx: Context) -> Result:
    """Load the model, serve the job, and re-simulate it with the lengths that came out.

    Straight before and straight after the run, some passes on made-up tokens tell the machine's pace, and the
    re-simulation plays at the mean of the two. With `ctx.output`, the event log is written there as `events.jsonl`.
    """
    model = load_model(plan.job.model, dtype=plan.choices.dtype, threads=plan.choices.threads, path=plan.choices.path)
    warm_up(model)
    device = plan.cluster.device(plan.choices.device)
    before = pace_of(model, plan.choices, work, device)
    served = serve(model, plan.job, plan.choices, work, ctx)
    after = before if served.interrupted else pace_of(model, plan.choices, work, device)
    measured = served.recorder.trace()
    lengths = [max(1, len(answer.tokens)) for answer in served.answers]
    predicted = play(plan.choices, work, device.at_pace((before + after) / 2), lengths).trace
    files = {}
    if ctx.output is not None:
        for number, log in enumerate(served.logs):
            name = EVENT_LOG if plan.choices.instances == 1 else f"{EVENT_LOG}-{number}"
            path = ctx.output / f"{name}.jsonl"
            log.save(path)
            files[name] = str(path)
    return Result(
        plan=plan,
        outputs=tuple(_outputs(plan.job, served.answers)),
        said=tuple(
            (plan.job.prompts[answer.id], f"{answer.text.strip()} ({answer.reason})") for answer in served.answers
        ),
        measured=measured,
        predicted=predicted,
        forecast=forecast,
        comparison=predicted.compare(measured),
        interrupted=served.interrupted,
        remarks=_remarks(before, after),
        files=files,
    )


def pace_of(model: Model, plan: ServePlan, work: Workload, device: Device) -> float:
    """How many times as long as the device's tables say the plan's own passes take now; 1 without tables.

    Some tenths of a second; the passes run on made-up tokens, never on the job's.
    """
    if not is_calibrated(device.measured, work.spec, plan.dtype, plan.threads, plan.path):
        return 1.0
    count, slots = len(work.prompts), min(plan.slots, len(work.prompts))
    prompt = round(sum(map(len, work.prompts)) / count)
    decode = PassShape(new_tokens=(1,) * slots, cached=(prompt + work.limit // 2,) * slots)
    prefill = PassShape(new_tokens=(max(2, min(prompt, plan.prefill_tokens)),), cached=(0,))
    passes = ((decode, work.limit * count / slots), (prefill, count * max(1.0, prompt / plan.prefill_tokens)))
    return pace(model, device.measured, threads=plan.threads, passes=passes)


def _remarks(before: float, after: float) -> tuple[str, ...]:
    remarks = [
        f"passes tried just before and just after the run took {before:.2f} and {after:.2f} times what the tables "
        f"say; the prediction plays at {(before + after) / 2:.2f}"
    ]
    if abs(after / before - 1.0) > TOLERANCE:
        remarks.append("this machine's pace changed while the job ran, which no forecast can know")
    return tuple(remarks)


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
