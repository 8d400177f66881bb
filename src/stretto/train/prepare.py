"""What training must have measured on this machine before it can plan: a plan's pieces, for every cut and way to run.

Measured once for a model, a sequence and a way to cut it, with made-up tokens, and kept in the user's cache folder.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from hashlib import sha256

from stretto.core.plan import Progress
from stretto.hardware.cluster import Cluster
from stretto.hardware.probe import cache_folder, is_this_machine
from stretto.hardware.table import Table
from stretto.hardware.table_files import read_tables, write_tables
from stretto.models.spec import ModelSpec
from stretto.train.costs import signature, tables
from stretto.train.job import TrainJob
from stretto.train.launch import run_ranks
from stretto.train.plan import TrainPlan

FRESH_S = 900.0
"""Tables older than this are measured anew."""
_FORMAT = 7
_LARGEST_ROWS = 2048
"""No pass of more tokens than this is timed; larger ones are read beyond the table."""


def prepare(
    job: TrainJob,
    spec: ModelSpec,
    plans: Iterable[TrainPlan],
    cluster: Cluster,
    progress: Progress,
    *,
    again: bool = False,
) -> Cluster:
    """The cluster with tables for the pieces of all `plans`; other machines than this one are returned as they are.

    Args:
        again: measure anew, whatever the cache holds.
    """
    if not is_this_machine(cluster):
        return cluster
    wanted: dict[str, tuple[TrainPlan, set[int]]] = {}
    for plan in plans:
        bench, key = _bench(plan), bench_of(job, spec, plan)
        wanted.setdefault(key, (bench, set()))[1].add(plan.micro_batch)
    for number, (plan, sizes) in enumerate(wanted.values()):
        progress("timing pieces of the model", number, len(wanted))
        made = _tables(job, spec, plan, _timed(job, plan, sizes), cluster, again)
        cluster = cluster.with_measured(plan.devices[0], made)
    progress("timing pieces of the model", len(wanted), len(wanted))
    return cluster


def bench_of(job: TrainJob, spec: ModelSpec, plan: TrainPlan) -> str:
    """Plans of which this is the same are predicted from the same tables."""
    return signature(job, _bench(plan), spec, "")


def _bench(plan: TrainPlan) -> TrainPlan:
    """The plan whose ranks time the pieces of `plan`: as many ranks and the same cuts, the rest as data ranks."""
    world = plan.grid.world
    return replace(
        plan,
        pp=1,
        dp=world // (plan.tp * plan.cp * plan.ep),
        schedule="1f1b",
        chunks=1,
        layers=(1,),
        micro_batch=1,
        recompute=False,
    )


def _timed(job: TrainJob, plan: TrainPlan, sizes: set[int]) -> list[int]:
    """The numbers of sequences that are tried: the least, the most that is not too large, and one between."""
    rows = job.sequence // plan.cp
    able = sorted(size for size in sizes if size * rows <= _LARGEST_ROWS) or [min(sizes)]
    return sorted({able[0], able[len(able) // 2], able[-1]})


def _tables(
    job: TrainJob, spec: ModelSpec, plan: TrainPlan, sizes: list[int], cluster: Cluster, again: bool
) -> dict[str, Table]:
    name = sha256(f"{signature(job, plan, spec, '')} {sizes} {job.optimizer.name}".encode()).hexdigest()[:24]
    file = cache_folder() / f"train-{_FORMAT}-{cluster.fingerprint()}" / f"{name}.json"
    cached = None if again else read_tables(file, fresh_s=FRESH_S)
    if cached is not None:
        return cached
    found: dict[int, dict[str, list[list[float]]]] = {}

    def hear(rank: int, message: dict[str, dict[str, list[list[float]]]]) -> None:
        if "measured" in message:
            found[rank] = message["measured"]

    run_ranks(job, plan, task="measure", hear=hear, micro_batches=sizes)
    made = tables(job, plan, spec, [found[rank] for rank in sorted(found)])
    write_tables(file, made)
    return made
