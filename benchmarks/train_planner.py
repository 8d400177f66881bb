"""The planner's pick for the finetune job against what every plan for two processes really takes.

Each plan that can run is trained for some steps, and its median step, after the first two (in which its memory comes to
lie as it stays), and the most bytes of its tensors (counted on the fullest rank of each stage) are laid beside what was
predicted. Plans are trained a few at a time; their pieces are timed between, and a prediction is the mean of the one
just before and the one just after. A machine's pace changes meanwhile, so the pick and those that looked fastest are
trained again in turn, and it is these runs that the pick is judged by. Goals: the pick is within 5 % of the fastest
plan; a step is within 15 % of its prediction; bytes are within 5 % of the counted, and never more than 2 % below. The
null model of a step is the mean of all plans.

Usage: python benchmarks/train_planner.py [--json] [--quick] [--job FILE]
"""

from __future__ import annotations

import statistics
import sys
from argparse import ArgumentParser
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice

import harness
import stretto
from stretto.core.plan import Context, Plan
from stretto.hardware.cluster import Cluster
from stretto.models.spec import ModelSpec
from stretto.train.domain import spec_of
from stretto.train.job import TrainJob
from stretto.train.memory import peak_bytes
from stretto.train.plan import TrainPlan
from stretto.train.predict import predict
from stretto.train.prepare import bench_of, prepare
from stretto.train.run import run

STEPS, WARM = 6, 2
_FEW, _FASTEST, _ROUNDS = 3, 3, 3
_QUICK = 10
"""So many plans are trained with --quick: the best ones, and some of the others."""
GOAL_PICK, GOAL_STEP, GOAL_BYTES, GOAL_BELOW = 1.05, 0.15, 0.05, 0.02


@dataclass(frozen=True)
class Seen:
    plan: TrainPlan
    predicted_s: float
    measured_s: float
    bytes_error: tuple[float, float]

    @property
    def error(self) -> float:
        return self.predicted_s / self.measured_s - 1


def measure(quick: bool) -> list[harness.Row]:
    job = replace(
        stretto.load(harness.options.job), steps=STEPS, held_out=0.0, evaluate_every=None, checkpoint=None, processes=2
    )
    ranking = stretto.plan(job, on=stretto.probe())
    weighed = [each.plan.choices for each in ranking.weighed]
    if quick:
        first = _QUICK // 2
        weighed = weighed[:first] + weighed[first :: max(1, len(weighed) // (_QUICK - first))]
    spec = spec_of(job)
    by_bench = sorted(weighed, key=lambda plan: bench_of(job, spec, plan))
    seen: list[Seen] = []
    for _, same in groupby(by_bench, key=lambda plan: bench_of(job, spec, plan)):
        seen += _seen(job, spec, list(same), ranking.best)
    pick = next(each for each in seen if each.plan == ranking.best.choices)
    fastest = sorted(seen, key=lambda each: each.measured_s)[: 2 if quick else _FASTEST]
    finalists = [pick, *(each for each in fastest if each is not pick)]
    again: dict[int, list[float]] = {}
    for _ in range(1 if quick else _ROUNDS):
        for number, each in enumerate(finalists):
            again.setdefault(number, []).append(_trained(job, spec, each.plan, ranking.best)[0])
    seconds = [statistics.median(each) for each in again.values()]
    return [_pick_row(pick, seconds, len(seen)), *_rows(seen)]


def batched(plans: Iterable[TrainPlan], size: int) -> Iterator[list[TrainPlan]]:
    left = iter(plans)
    while some := list(islice(left, size)):
        yield some


def _seen(
    job: TrainJob, spec: ModelSpec, plans: Sequence[TrainPlan], best: Plan[TrainJob, TrainPlan]
) -> Iterator[Seen]:
    """Train plans of one bench, a few at a time, and time the pieces of all of them before, between and after."""

    def timed() -> Cluster:
        return prepare(job, spec, plans, best.cluster, lambda what, done, total: None, again=True)

    before = timed()
    for few in batched(plans, _FEW):
        trained = [_trained(job, spec, plan, replace(best, cluster=before)) for plan in few]
        after = timed()
        for plan, (seconds, errors) in zip(few, trained, strict=True):
            said = [predict(job, plan, spec, cluster).metrics["step"].value.value for cluster in (before, after)]
            found = Seen(plan, statistics.fmean(said), seconds, (min(errors), max(errors)))
            off = " and ".join(f"{each / seconds - 1:+.1%}" for each in said)
            told = f"{plan}: {seconds:.2f} s, predicted {off} (before and after)"
            print(f"{told}, bytes {min(errors):+.1%} {max(errors):+.1%}", file=sys.stderr, flush=True)
            yield found
        before = after


def _trained(
    job: TrainJob, spec: ModelSpec, plan: TrainPlan, best: Plan[TrainJob, TrainPlan]
) -> tuple[float, list[float]]:
    """Seconds of its median step, and for each stage how far predicted bytes are off."""
    result = run(replace(best, job=job, choices=plan), spec, predict(job, plan, spec, best.cluster), Context())
    seconds = [row["seconds"] for row in result.outputs][WARM:]
    counted = {int(rank): peak for rank, peak in result.measured.attributes["peak_bytes"].items()}
    errors = []
    for stage, predicted in enumerate(peak_bytes(job, plan, spec)):
        most = max(peak for rank, peak in counted.items() if plan.grid.coordinate(rank, "pp") == stage)
        errors.append(predicted / most - 1)
    return statistics.median(seconds), errors


def _pick_row(pick: Seen, seconds: Sequence[float], plans: int) -> harness.Row:
    """`seconds` of the pick and of the others, trained in turn."""
    return harness.Row(
        name=f"the pick over the fastest of {plans} plans",
        ours=seconds[0] / min(seconds),
        unit="x",
        goal=GOAL_PICK,
        at_most=True,
        note=f"{pick.plan}; it and the fastest ones in turn: {', '.join(f'{each:.2f}' for each in seconds)} s",
    )


def _rows(seen: list[Seen]) -> list[harness.Row]:
    worst = max(seen, key=lambda each: abs(each.error))
    errors = [abs(each.error) for each in seen]
    mean = statistics.fmean(each.measured_s for each in seen)
    null = statistics.fmean(abs(mean / each.measured_s - 1) for each in seen)
    low, high = min(each.bytes_error[0] for each in seen), max(each.bytes_error[1] for each in seen)
    measured = sorted(each.measured_s for each in seen)
    return [
        harness.Row(
            name="a step's worst error",
            ours=abs(worst.error),
            unit="of the measured",
            goal=GOAL_STEP,
            at_most=True,
            note=f"{worst.plan}; mean {statistics.fmean(errors):.1%}; null model (the plans' mean) {null:.1%}; "
            f"{sum(e <= GOAL_STEP for e in errors)} within the goal, {measured[0]:.2f} to {measured[-1]:.2f} s",
        ),
        harness.Row(name="bytes above the counted", ours=high, unit="x", goal=GOAL_BYTES, at_most=True),
        harness.Row(name="bytes below the counted", ours=max(0.0, -low), unit="x", goal=GOAL_BELOW, at_most=True),
    ]


def _options(parser: ArgumentParser) -> None:
    parser.add_argument("--job", default="jobs/finetune.yaml", help="the job file")


if __name__ == "__main__":
    sys.exit(harness.main(measure, __doc__, add=_options))
