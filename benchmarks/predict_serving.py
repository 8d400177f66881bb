"""Predicted against measured seconds of real serving runs on this machine, over slots and contexts.

Each case answers a few more prompts than it has slots, of 100 or 1,500 tokens, with SmolLM2-135M; the
prediction is the product's own re-simulation with the lengths that came out, at the pace of passes on made-up
tokens just before and after the run. Beside it stands the null model that people use without a simulator: bytes
of the weights over the measured bandwidth for each step, plus FLOPs over the measured peak for the prompts.

Usage: python benchmarks/predict_serving.py [--json] [--quick]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import harness
import stretto
from stretto.core.plan import no_progress
from stretto.core.statistics import Interval
from stretto.hardware.device import Device
from stretto.models.load import Model, load_model
from stretto.serve import domain
from stretto.serve.job import ServeJob
from stretto.serve.plan import ServePlan
from stretto.serve.predict import play
from stretto.serve.run import pace_of, serve
from stretto.serve.workload import Workload, workload

GOAL_ERROR = 0.15
SLOTS = (1, 2, 4, 7, 12, 16)
CONTEXTS = (100, 1500)
NEW_TOKENS = 32
DTYPE = PATH = "bf16"


def job_of(context: int, slots: int, threads: int) -> ServeJob:
    """A job of slots + 2 distinct prompts of about `context` tokens."""
    word = " river"
    prompts = tuple(f"{number}:" + word * (context - 4) for number in range(slots + 2))
    return ServeJob(
        prompts=prompts,
        chat=False,
        max_new_tokens=NEW_TOKENS,
        ignore_eos=True,
        dtype=DTYPE,  # type: ignore[arg-type]
        path=PATH,  # type: ignore[arg-type]
        slots=slots,
        threads=threads,
        joining="continuous",
    )


def null_seconds(work: Workload, plan: ServePlan, device: Device) -> float:
    """Steps times weight bytes over bandwidth, plus prompt FLOPs over peak."""
    steps = -(-len(work.prompts) // plan.slots) * work.limit
    prompt_tokens = sum(map(len, work.prompts))
    flops = 2.0 * work.spec.parameters() * prompt_tokens
    return steps * work.packed_bytes / device.bandwidth + flops / device.peak(plan.dtype)


@dataclass(frozen=True)
class Case:
    """Seconds of one run: as re-simulated, as measured, by the null model, and the forecast's interval."""

    predicted: float
    measured: float
    null: float
    forecast: Interval

    @property
    def held(self) -> bool:
        return self.forecast.low <= self.measured <= self.forecast.high


def case(model: Model, context: int, slots: int, threads: int) -> Case:
    """One job forecast, run, and re-simulated."""
    job = job_of(context, slots, threads)
    cluster = domain.prepare(job, stretto.probe(), no_progress)
    work = workload(job)
    plan = next(iter(domain.candidates(job, cluster)))
    device = cluster.device(plan.device)
    forecast = domain.simulate(job, plan, cluster).metrics["seconds"].value
    before = pace_of(model, plan, work, device)
    served = serve(model, job, plan, work, stretto.Context())
    pace = (before + pace_of(model, plan, work, device)) / 2
    lengths = [len(answer.tokens) for answer in served.answers]
    predicted = play(plan, work, device.at_pace(pace), lengths).trace.makespan
    measured = served.recorder.trace().makespan
    return Case(predicted, measured, null_seconds(work, plan, device), forecast)


def measure(quick: bool) -> Sequence[harness.Row]:
    threads = next(iter(stretto.probe().devices().values())).units
    model = load_model("default", dtype=DTYPE, threads=threads, path=PATH)
    case(model, 100, 2, threads)
    rows, held = [], []
    for context in CONTEXTS:
        for slots in (1, 7) if quick else SLOTS:
            found = case(model, context, slots, threads)
            error, null_error = (each / found.measured - 1 for each in (found.predicted, found.null))
            held.append(found.held)
            rows.append(
                harness.Row(
                    name=f"context {context}, {slots} slots",
                    ours=abs(error),
                    unit="relative error",
                    goal=GOAL_ERROR,
                    at_most=True,
                    note=f"predicted {found.predicted:.3f} s, measured {found.measured:.3f} s ({error:+.1%}); "
                    f"forecast {found.forecast.low:.3f} to {found.forecast.high:.3f} s; "
                    f"null model {found.null:.3f} s ({null_error:+.1%})",
                )
            )
    share = sum(held) / len(held)
    rows.append(harness.Row(name="forecast's interval held", ours=share, unit="of the runs", goal=1.0))
    return rows


if __name__ == "__main__":
    sys.exit(harness.main(measure, __doc__))
