"""What a deployment on this machine must have measured before it can be planned: passes of each layout.

Kept in the user's cache folder under the machine, the model, the layout and where passes are timed. Starting workers
takes as long as timing passes, so what is old is measured anew rather than checked; a run tries its pace itself.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from stretto.core.plan import Progress
from stretto.hardware.cluster import Cluster
from stretto.hardware.probe import cache_folder
from stretto.hardware.table import Table
from stretto.hardware.table_files import read_tables, write_tables
from stretto.kernels.levels import BEST_LEVEL
from stretto.serve.deploy.here import choices
from stretto.serve.deploy.here.measured import MeasuredCosts
from stretto.serve.deploy.here.running import started
from stretto.serve.deploy.job import DeploymentJob
from stretto.serve.deploy.plan import DeploymentPlan

FRESH_S = 600.0
"""Measurements younger than this are believed."""
_FORMAT = 3  # of what is measured: older files are not read


def prepare(job: DeploymentJob, cluster: Cluster, progress: Progress) -> Cluster:
    """The cluster with tables of every layout that the job's candidates have and that can run."""
    (path,) = cluster.devices()
    able = [plan for plan in choices.candidates(job, cluster) if choices.check(job, plan, cluster) is None]
    layouts = {plan.layout: plan for plan in able}
    for number, (layout, plan) in enumerate(layouts.items()):
        progress(f"timing passes: {layout}", number, len(layouts))
        name = choices.table_name(job, layout, plan.slots)
        cluster = cluster.with_measured(path, _tables(job, plan, cluster, name))
    progress("timing passes", len(layouts), len(layouts))
    return cluster


def _tables(job: DeploymentJob, plan: DeploymentPlan, cluster: Cluster, name: str) -> dict[str, Table]:
    file = _file(job, plan, cluster, name)
    cached = read_tables(file, fresh_s=FRESH_S)
    if cached is not None:
        return cached
    tables = asyncio.run(_measure(job, plan, cluster)).to_tables(name)
    write_tables(file, tables)
    return tables


async def _measure(job: DeploymentJob, plan: DeploymentPlan, cluster: Cluster) -> MeasuredCosts:
    config, points = choices.scheduler_config(job, plan, cluster), choices.points_of(job, plan, cluster)
    path = choices.path_of(job.model, plan.devices)
    async with started(job.model, plan.layout, config, dtype=choices.dtype_of(cluster), path=path) as here:
        return await here.measure(points)


def _file(job: DeploymentJob, plan: DeploymentPlan, cluster: Cluster, name: str) -> Path:
    plain = "".join(
        c if c.isalnum() or c in "-_." else "_" for c in f"{name}-{choices.points_of(job, plan, cluster)}-{BEST_LEVEL}"
    )
    return cache_folder() / f"deployment-{_FORMAT}-{cluster.fingerprint()}" / f"{plain[-160:]}.json"
