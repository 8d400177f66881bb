"""Predicted against measured seconds of real serving runs on this machine, over slots and contexts.

Each case answers a few more prompts than it has slots, of 100 or 1,500 tokens, with SmolLM2-135M; the
prediction is the product's own re-simulation with the lengths that came out. Beside it stands the null model
that people use without a
simulator: bytes of the weights over the measured bandwidth for each step, plus FLOPs over the measured peak
for the prompts.

Usage: python benchmarks/predict_serving.py [--json] [--quick]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import harness
import stretto
from stretto.core.plan import no_progress
from stretto.hardware.device import Device
from stretto.models.load import Model, load_model
from stretto.serve import domain
from stretto.serve.job import ServeJob
from stretto.serve.plan import ServePlan
from stretto.serve.predict import play
from stretto.serve.run import serve
from stretto.serve.workload import Workload, workload

GOAL_ERROR = 0.15
SLOTS = (1, 2, 4, 7, 12, 16)
CONTEXTS = (100, 1500)
NEW_TOKENS = 32
DTYPE = "bf16"


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
        slots=slots,
        threads=threads,
        joining="continuous",
    )


def null_seconds(work: Workload, plan: ServePlan, device: Device) -> float:
    """Steps times weight bytes over bandwidth, plus prompt FLOPs over peak."""
    steps = -(-len(work.prompts) // plan.slots) * work.limit
    prompt_tokens = sum(map(len, work.prompts))
    flops = 2.0 * work.spec.parameters() * prompt_tokens
    return steps * work.spec.weight_bytes(plan.dtype) / device.bandwidth + flops / device.peak(plan.dtype)


def case(model: Model, context: int, slots: int, threads: int) -> tuple[float, float, float]:
    """Predicted, measured and null seconds of one run."""
    job = job_of(context, slots, threads)
    cluster = domain.prepare(job, stretto.probe(), no_progress)
    work = workload(job)
    plan = next(iter(domain.candidates(job, cluster)))
    device = cluster.device(plan.device)
    served = serve(model, job, plan, work, stretto.Context())
    lengths = [len(answer.tokens) for answer in served.answers]
    predicted = play(plan, work, device, lengths).trace.makespan
    return predicted, served.recorder.trace().makespan, null_seconds(work, plan, device)


def measure(quick: bool) -> Sequence[harness.Row]:
    threads = next(iter(stretto.probe().devices().values())).units
    model = load_model("default", dtype=DTYPE, threads=threads)
    case(model, 100, 2, threads)
    rows = []
    for context in CONTEXTS:
        for slots in (1, 7) if quick else SLOTS:
            predicted, measured, null = case(model, context, slots, threads)
            error = predicted / measured - 1
            rows.append(
                harness.Row(
                    name=f"context {context}, {slots} slots",
                    ours=abs(error),
                    unit="relative error",
                    goal=GOAL_ERROR,
                    at_most=True,
                    note=f"predicted {predicted:.3f} s, measured {measured:.3f} s ({error:+.1%}); "
                    f"null model {null:.3f} s ({null / measured - 1:+.1%})",
                )
            )
    return rows


if __name__ == "__main__":
    sys.exit(harness.main(measure, __doc__))
