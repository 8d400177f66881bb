"""What the command line changes of a deployment job, and the questions that are more than one search."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args, get_type_hints

from stretto.core.errors import FieldError, UserError
from stretto.core.search import NothingRuns, Ranking
from stretto.hardware.cluster import Cluster
from stretto.serve.deploy.here.choices import cores_of, is_here
from stretto.serve.deploy.job import DeploymentJob, LoadSpec
from stretto.serve.deploy.tree import machine_of


def adjusted(job: Any, *, trace: str | None, objective: str | None) -> Any:
    """The job with another trace or objective; the objective may be changed of any job that has one.

    Raises:
        UserError: if the job has no trace or knows no such objective.
    """
    try:
        if trace is not None:
            if not isinstance(job, DeploymentJob):
                raise UserError("a trace is for jobs of kind deployment", field="trace", right="leave it out")
            job = replace(job, load=LoadSpec(trace=trace))
        if objective is not None:
            if not hasattr(job, "objective"):
                raise UserError(f"a {job.kind} job has one objective", field="objective", right="leave it out")
            known = get_args(get_type_hints(type(job))["objective"])
            if objective not in known:
                raise UserError(f"there is no objective {objective!r}", field="objective", right=", ".join(known))
            job = replace(job, objective=objective)
    except FieldError as problem:
        raise UserError(str(problem)) from None
    return job


def fewest_devices(
    job: DeploymentJob, cluster: Cluster, plan: Callable[[DeploymentJob], Ranking]
) -> tuple[int, Ranking]:
    """The fewest devices of `cluster` with which a plan keeps the job's promise, and the ranking on those: of this
    machine the fewest cores, of many nodes a part of one or as many of each.

    Args:
        plan: ranks the plans of a job on this cluster.

    Raises:
        UserError: if even all devices do not keep it, with the best share that they reach.
    """
    promised = adjusted(job, trace=None, objective="slo")
    counts = [count for count in range(1, _devices(job, cluster) + 1) if _is_had(job, cluster, count)]
    reached, nothing = None, None
    for count in counts:
        try:
            ranking = plan(replace(promised, devices=count))
        except NothingRuns as problem:
            nothing = problem
            continue
        reached = max(reached or 0.0, ranking.weighed[0].prediction.metrics["slo"].value.value)
        if reached >= job.slo.share:
            return count, ranking
    if reached is None and nothing is not None:
        raise nothing
    raise UserError(
        f"{counts[-1]} devices serve {reached or 0:.1%} of the requests as promised, {job.slo.share:.1%} are asked for",
        field="slo.share",
        right="more devices, a longer promise or a lighter load",
    )


def _devices(job: DeploymentJob, cluster: Cluster) -> int:
    """What there is to choose from: cores here, devices elsewhere."""
    return cores_of(replace(job, devices=None), cluster) if is_here(job, cluster) else len(cluster.devices())


def _is_had(job: DeploymentJob, cluster: Cluster, count: int) -> bool:
    """Whether a deployment can have so many devices of the cluster."""
    if is_here(job, cluster):
        return True
    try:
        machine_of(cluster, count)
    except UserError:
        return False
    return True
