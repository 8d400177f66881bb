"""What a plan would take: its pipeline's own table laid out as a schedule, with sums and steps, and simulated."""

from __future__ import annotations

from dataclasses import dataclass

from stretto.core.order_schedule import lay_out
from stretto.core.plan import Metric, Prediction
from stretto.core.schedule import Schedule
from stretto.core.simulate import simulate
from stretto.core.statistics import Interval
from stretto.core.trace import Key, Trace
from stretto.hardware.cluster import Cluster
from stretto.models.spec import ModelSpec
from stretto.train.costs import StepCosts
from stretto.train.job import TrainJob
from stretto.train.memory import peak_bytes
from stretto.train.plan import TrainPlan

FEW_STEPS = 2
_ALL_RANKS = 16
"""With more ranks than this one column of the data axes stands for all, as they are alike."""


def schedule_of(
    job: TrainJob, plan: TrainPlan, spec: ModelSpec, cluster: Cluster, *, steps: int, first: int = 0
) -> Schedule:
    """Some steps of every rank, or of one column of a large grid."""
    order = plan.order(job)
    costs = StepCosts(job, plan, spec, cluster, order)
    schedule = Schedule()
    columns = plan.grid.groups("pp") if plan.grid.world <= _ALL_RANKS else (plan.grid.group(0, "pp"),)
    lanes = {rank: schedule.lane(f"rank {rank}") for column in columns for rank in column}
    spaces = {rank: schedule.space(f"activations of rank {rank}") for rank in lanes}
    ready: list[int] = []
    for step in range(first, first + steps):
        last: list[int] = []
        for column in columns:
            lay_out(
                order,
                costs,
                schedule=schedule,
                lanes=[lanes[rank] for rank in column],
                spaces=[spaces[rank] for rank in column],
                step=step,
                after=ready,
                ranks=column,
            )
        passes = [schedule.program(lanes[rank])[-1] for rank in lanes]
        summed = []
        for column in columns:
            for place, rank in enumerate(column):
                key = Key("sum gradients", step, rank=rank)
                summed.append(schedule.add([lanes[rank]], seconds=costs.sum_s(place), after=passes, key=key))
        for column in columns:
            for place, rank in enumerate(column):
                key = Key("optimizer", step, rank=rank)
                last.append(schedule.add([lanes[rank]], seconds=costs.optimizer_s(place), after=summed, key=key))
        ready = last
    return schedule


def play(job: TrainJob, plan: TrainPlan, spec: ModelSpec, cluster: Cluster, *, steps: int, first: int = 0) -> Trace:
    """The simulated run of some steps."""
    return simulate(schedule_of(job, plan, spec, cluster, steps=steps, first=first).timed())


@dataclass(frozen=True, kw_only=True)
class Split:
    """What a step is made of, in one sentence."""

    phases: dict[str, float]
    bubble: float

    def __str__(self) -> str:
        total = sum(self.phases.values()) or 1.0
        largest = sorted(self.phases.items(), key=lambda item: -item[1])[:3]
        parts = ", ".join(f"{name} {seconds / total:.0%}" for name, seconds in largest)
        idle = f"; ranks idle {self.bubble:.0%} of a step" if self.bubble > 0.005 else ""
        return f"critical path: {parts}{idle}"


def predict(job: TrainJob, plan: TrainPlan, spec: ModelSpec, cluster: Cluster) -> Prediction:
    """Seconds of a step and of the job, tokens a second, and bytes of the fullest rank."""
    trace = play(job, plan, spec, cluster, steps=FEW_STEPS)
    costs = StepCosts(job, plan, spec, cluster, plan.order(job))
    step_s = trace.makespan / FEW_STEPS
    wide = 1 + costs.spread
    step = Interval(value=step_s, low=step_s / wide, high=step_s * wide)
    tokens = job.global_batch * job.sequence
    idle = [share for lane, share in trace.bubble.items() if lane.startswith("rank") and " to " not in lane]
    how = "measured pieces" if costs.measured else "the cost model, not measured on this machine"
    return Prediction(
        metrics={
            "throughput": Metric(value=step.reciprocal(tokens), unit="tokens/s", higher_is_better=True),
            "step": Metric(value=step, unit="s"),
            "seconds": Metric(value=step.scaled(job.steps), unit="s"),
            "memory": Metric(value=Interval.exact(max(peak_bytes(job, plan, spec))), unit="bytes"),
        },
        bottleneck=str(Split(phases=trace.critical_seconds, bubble=max(idle, default=0.0))),
        assumed=f"{job.steps} steps of {tokens} tokens; seconds from {how}",
        phases={phase: seconds / FEW_STEPS for phase, seconds in trace.critical_seconds.items()},
        trace=trace,
    )
