"""Predicted against measured serving on this machine near and beyond saturation, over plans of two cores.

SmolLM2-135M on the product's own engine: one core (TP=1), two tensor ranks (TP=2), two copies (DP=2), at 0.5, 0.9 and
1.2 of what each can serve, with so few KV pages that requests are put back. The prediction is the engine's scheduler on
virtual time with passes that were timed just before and after each load, at the pace of a trial of other such
requests, all at once. Beside it stands a closed form on the same passes, which knows no queue: a prompt's seconds to
the first token, and the step of Little's batch.

Beyond saturation a queue grows by the difference of two paces: at 1.2, passes that are 3 % slower than they were timed
make waits a fifth longer, and much longer as long as the queue is one that chance has built; so loads beyond saturation
are long ones (`BEYOND`). Notes tell the error at the load's own pace as well, by which its passes took longer than
was predicted: what is left of an error then is not the machine's.

Usage: python benchmarks/predict_saturation.py [--json] [--quick] [--rates RATE ...]
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

import harness
from harness import Row
from stretto.core.record import Recorder
from stretto.serve.deploy.costs import Lane
from stretto.serve.deploy.here import Here, MeasuredCosts, started
from stretto.serve.deploy.here.measured import PAUSE_S
from stretto.serve.deploy.layout import Layout
from stretto.serve.deploy.load import Load
from stretto.serve.deploy.report import Latencies
from stretto.serve.deploy.simulate import Served, serve
from stretto.serve.scheduler_config import SchedulerConfig

MODEL = "smollm2-135m-instruct"
PLANS = {"TP=1": Layout(), "TP=2": Layout(devices=2), "DP=2": Layout(replicas=2)}
CONFIG = SchedulerConfig(
    joining="continuous",
    slots=12,
    pages=80,
    page_tokens=16,
    prefill_tokens=512,
    prefill="whole",
)
RATES = (0.5, 0.9, 1.2)
COUNT, BEYOND = 120, 480
"""Requests of a load, and of one beyond saturation: after n of them its queue is n / 6 long, give or take sqrt(n)."""
TIMED, TRIAL = 2, 20
"""Between two loads: so many times passes are timed, and requests of a trial, whose passes come as a load's do."""
FIRST_GOAL, TOKEN_GOAL, SPEED_GOAL = 0.20, 0.08, 0.15


def requests(count: int, rate: float | None, seed: int = 3) -> Load:
    """Prompts of about 100 and answers of about 30 tokens, as a Poisson stream of this rate, or all at once."""
    draw = np.random.default_rng(seed)
    gaps = draw.exponential(1.0, count)
    arrivals = np.zeros(count) if rate is None else (np.cumsum(gaps) - gaps[0]) / rate
    return Load(arrivals, draw.integers(30, 180, count), draw.integers(10, 60, count))


def capacity(costs: MeasuredCosts) -> float:
    """Requests a second that the plan serves when it never lacks any."""
    load = requests(200, None)
    return len(load) / serve(load, costs, CONFIG).makespan_s


def closed_form(costs: MeasuredCosts, load: Load) -> tuple[float, float]:
    """Seconds to the first token and per token, at the batch of Little's law."""
    prompt, output = float(load.prompt.mean()), float(load.output.mean())
    rate = len(load) / max(float(load.arrival_s[-1]), 1e-9) / costs.layout.replicas
    first = costs.stage([Lane(rows=round(prompt), tokens=1, sequences=1, eager=True, pause_s=PAUSE_S)]).total
    rows, token = 1.0, 0.0
    for _ in range(30):
        held = min(CONFIG.slots, max(1, round(rows)))
        cached = round(held * (prompt + output / 2))
        token = costs.stage([Lane(rows=held, tokens=held, sequences=held, decoders=held, cached=cached)]).total
        rows = rate * output * token
    return first, token


@dataclass(frozen=True)
class Run:
    """A load as it was served, seconds of all its passes, and passes as they were timed just before and just after."""

    rate: float | None
    load: Load
    real: Served
    busy_s: float
    costs: MeasuredCosts

    @cached_property
    def said(self) -> Served:
        return serve(self.load, self.costs, CONFIG)

    @cached_property
    def pace(self) -> float:
        """How many times as long as predicted its passes took together."""
        return self.busy_s / self.said.parts.total

    @cached_property
    def said_at_pace(self) -> Served:
        """What is predicted by one who knows that."""
        return serve(self.load, self.costs.at_pace(self.pace), CONFIG)


async def timed(here: Here) -> MeasuredCosts:
    first, *others = [await here.measure() for _ in range(TIMED)]
    costs = first.mean(*others)
    return costs.at_pace(await here.pace(costs, requests(TRIAL, None, seed=4)))


async def run_plan(layout: Layout, rates: Sequence[float], count: int, beyond: int) -> list[Run]:
    """A load at each of `rates`, in parts of what the plan can serve, and one all at once; for real."""
    found = []
    async with started(MODEL, layout, CONFIG) as here:
        before = await timed(here)
        most = capacity(before)
        for rate in (*rates, None):
            load = requests(beyond if rate and rate > 1 else count, None if rate is None else rate * most)
            recorder = Recorder("measured")
            _, real = await here.serve(load, recorder=recorder)
            after = await timed(here)
            busy_s = sum(recorder.trace().busy.values())
            found.append(Run(rate, load, real, busy_s, before.mean(after)))
            before = after
    return found


def compare(name: str, runs: Sequence[Run]) -> list[Row]:
    table = []
    for run in runs:
        load, real, said = run.load, run.real, run.said
        measured, predicted, at_pace = (Latencies.of(load, served) for served in (real, said, run.said_at_pace))
        null_first, null_token = closed_form(run.costs, load)
        where = f"{name} at {run.rate:g} of saturation"
        for q in (50, 95):
            there = float(np.quantile(measured.first, q / 100))
            ours, known = (abs(float(np.quantile(each.first, q / 100)) / there - 1) for each in (predicted, at_pace))
            note = f"measured {there * 1e3:.0f} ms; at its own pace ({run.pace:.3f}) {known:.1%}"
            note += f"; closed form {abs(null_first / there - 1):.0%}"
            table.append(
                Row(
                    name=f"{where}: first token p{q}", ours=ours, unit="error", goal=FIRST_GOAL, at_most=True, note=note
                )
            )
        there = float(np.nanmean(measured.token))
        note = f"measured {there * 1e3:.1f} ms, {real.preempted} put back, {said.preempted} predicted"
        note += f"; closed form {abs(null_token / there - 1):.0%}"
        ours = abs(float(np.nanmean(predicted.token)) / there - 1)
        table.append(Row(name=f"{where}: per token", ours=ours, unit="error", goal=TOKEN_GOAL, at_most=True, note=note))
    return table


def ranking(makespans: dict[str, tuple[float, float]]) -> list[Row]:
    """(measured, predicted) seconds of the same requests by plan: the order and the speed-ups over one core."""
    measured, predicted = ({name: pair[k] for name, pair in makespans.items()} for k in (0, 1))
    wrong = float(sorted(measured, key=measured.__getitem__) != sorted(predicted, key=predicted.__getitem__))
    note = ", ".join(f"{name} {a:.2f} s measured {b:.2f} s predicted" for name, (a, b) in makespans.items())
    rows = [Row(name="plans in another order", ours=wrong, unit="", goal=0, at_most=True, note=note)]
    base = makespans["TP=1"]
    for name, (a, b) in makespans.items():
        if name != "TP=1":
            error = abs((base[1] / b) / (base[0] / a) - 1)
            rows.append(Row(name=f"speed-up of {name}", ours=error, unit="error", goal=SPEED_GOAL, at_most=True))
    return rows


def measure(quick: bool) -> list[Row]:
    rates = harness.options.rates or ((0.9,) if quick else RATES)
    count, beyond = (16, 16) if quick else (COUNT, BEYOND)
    table, makespans = [], {}
    for name, layout in PLANS.items():
        *runs, at_once = asyncio.run(run_plan(layout, rates, count, beyond))
        table += compare(name, runs)
        makespans[name] = (at_once.real.makespan_s, at_once.said.makespan_s)
    return table + ranking(makespans)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rates", type=float, nargs="+", help="parts of what a plan can serve; 0.5, 0.9 and 1.2")


if __name__ == "__main__":
    sys.exit(harness.main(measure, __doc__ or "", add=add_options))
