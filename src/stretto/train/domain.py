"""The training domain: its job and plan types, and the planner's questions answered by this room's modules."""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

from stretto.core.errors import UserError
from stretto.core.plan import Context, Plan, Prediction, Progress, Refusal, Result
from stretto.hardware.cluster import Cluster
from stretto.models.spec import ModelSpec
from stretto.train import plan as choices
from stretto.train.job import TrainJob
from stretto.train.plan import TrainPlan

_BEYOND_PEAK = 1.5
"""How far an optimistic bound goes beyond measured peaks."""


@lru_cache(maxsize=16)
def spec_of(job: TrainJob) -> ModelSpec:
    """The spec of a job's model.

    Raises:
        UserError: the model cannot be had, or torch is missing.
    """
    try:
        from stretto.train.session import model_of
    except ImportError as problem:
        raise UserError(
            f"training jobs need torch, also to be planned ({problem})", right="pip install 'stretto[models]'"
        ) from None
    return model_of(job).spec


class TrainDomain:
    """See `stretto.core.plan.Domain`."""

    name = "train"
    job_type: type = TrainJob
    plan_type: type = TrainPlan

    def candidates(self, job: TrainJob, cluster: Cluster) -> Iterable[TrainPlan]:
        return choices.candidates(job, spec_of(job), cluster)

    def check(self, job: TrainJob, plan: TrainPlan, cluster: Cluster) -> Refusal | None:
        from stretto.train.check import check  # with torch, which the planner alone does without

        return check(job, plan, spec_of(job), cluster)

    def objective(self, job: TrainJob) -> str:
        return "throughput"

    def higher_is_better(self, job: TrainJob) -> bool:
        return True

    def bound(self, job: TrainJob, plan: TrainPlan, cluster: Cluster) -> float:
        """Tokens a second if all devices did nothing but the products, at their peak."""
        spec = spec_of(job)
        counted = spec.parameters() - (0 if spec.tied_embeddings else spec.vocab * spec.hidden)
        passes = 3.0 if job.adapters is None else 2.0
        peaks = sum(max(cluster.device(path).peak_flops.values(), default=0.0) for path in set(plan.devices))
        active = counted * (spec.top_k / spec.experts if spec.experts else 1.0)
        return peaks * _BEYOND_PEAK / (2.0 * passes * active)

    def simulate(self, job: TrainJob, plan: TrainPlan, cluster: Cluster) -> Prediction:
        from stretto.train.predict import predict

        return predict(job, plan, spec_of(job), cluster)

    def prepare(self, job: TrainJob, cluster: Cluster, progress: Progress) -> Cluster:
        from stretto.train.data import check_sources

        check_sources(job.data)
        spec = spec_of(job)  # first: it says where torch is missing
        from stretto.train.prepare import prepare

        able = (plan for plan in self.candidates(job, cluster) if self.check(job, plan, cluster) is None)
        return prepare(job, spec, able, cluster, progress)

    def run(self, plan: Plan[TrainJob, TrainPlan], ctx: Context) -> Result:
        from stretto.train.run import run

        forecast = self.simulate(plan.job, plan.choices, plan.cluster)
        return run(plan, spec_of(plan.job), forecast, ctx)
