"""What the command line changes of a deployment job, and the questions that are more than one search."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from stretto.core.errors import FieldError, UserError
from stretto.core.search import Ranking
from stretto.hardware.cluster import Cluster
from stretto.serve.deploy.job import DeploymentJob, LoadSpec
from stretto.serve.deploy.layouts import divisors


def adjusted(job: Any, *, trace: str | None, objective: str | None) -> Any:
    """The job with another trace or objective; the objective may be changed of any kind of job.

    Raises:
        UserError: if the job has no trace or knows no such objective.
    """
    try:
        if trace is not None:
            if not isinstance(job, DeploymentJob):
                raise UserError("a trace is for jobs of kind deployment", field="trace", right="leave it out")
            job = replace(job, load=LoadSpec(trace=trace))
        if objective is not None:
            known = ("throughput", "latency", "energy", "cost", "slo")
            if objective not in (known if isinstance(job, DeploymentJob) else known[:2]):
                raise UserError(f"there is no objective {objective!r}", field="objective", right=", ".join(known))
            job = replace(job, objective=objective)
    except FieldError as problem:
        raise UserError(str(problem)) from None
    return job


def fewest_devices(
    job: DeploymentJob, cluster: Cluster, plan: Callable[[DeploymentJob], Ranking]
) -> tuple[int, Ranking]:
    """The fewest devices of `cluster` with which a plan keeps the job's promise, and the ranking on those.

    Args:
        plan: ranks the plans of a job on this cluster.

    Raises:
        UserError: if even all devices do not keep it, with the best share that they reach.
    """
    total, reached = len(cluster.devices()), 0.0
    for count in divisors(total):
        try:
            ranking = plan(replace(job, objective="slo", devices=count))
        except UserError:
            continue  # nothing fits on so few
        reached = max(reached, ranking.weighed[0].prediction.metrics["slo"].value.value)
        if reached >= job.slo.share:
            return count, ranking
    raise UserError(
        f"{total} devices serve {reached:.1%} of the requests as promised, {job.slo.share:.1%} are asked for",
        field="slo.share",
        right="more devices, a longer promise or a lighter load",
    )
