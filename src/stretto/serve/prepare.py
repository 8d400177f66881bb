"""What serving must have measured on this machine before it can plan: the model's operations and the engine's
host work.

Measured once for each type, number of threads and model, kept in the user's cache folder, and checked again by
a few passes when it has grown old: a shared machine is not as fast every day, and a stale table would make
every prediction wrong alike.
"""

from __future__ import annotations

import time
from hashlib import sha256
from pathlib import Path

from stretto.core.plan import Progress
from stretto.hardware.cluster import Cluster
from stretto.hardware.probe import cache_folder, is_this_machine
from stretto.hardware.table import Table
from stretto.hardware.table_files import read_tables, write_tables
from stretto.kernels.levels import BEST_LEVEL
from stretto.models import calibrate as model_calibration
from stretto.models.load import Model, load_model
from stretto.serve import calibrate as host_calibration
from stretto.serve import plan as choices
from stretto.serve.job import ServeJob
from stretto.serve.workload import Workload

FRESH_S = 60.0
"""Tables younger than this are believed; older ones are checked against a few passes first."""

_FORMAT = 4  # of what tables mean: older ones are not read

Tables = dict[str, Table]


def prepare(job: ServeJob, work: Workload, cluster: Cluster, progress: Progress) -> Cluster:
    """The cluster with tables for every type and number of threads that the job's candidates use.

    Other machines than this one are returned as they are: their predictions rest on the cost model alone.
    """
    if not is_this_machine(cluster):
        return cluster
    able = [c for c in choices.candidates(job, work, cluster) if choices.check(job, c, work, cluster) is None]
    models: dict[tuple[str, str], Model] = {}
    for device, dtype, path, threads in sorted({(c.device, c.dtype, c.path, c.threads) for c in able}):
        tables = _tables(job, work, cluster, dtype, path, threads, models, progress)
        cluster = cluster.with_measured(device, tables)
    return cluster


def _tables(
    job: ServeJob,
    work: Workload,
    cluster: Cluster,
    dtype: str,
    path: str,
    threads: int,
    models: dict[tuple[str, str], Model],
    progress: Progress,
) -> Tables:
    """Tables of one type and number of threads, from the cache if they still hold."""
    file = _file(job, work, cluster, dtype if path == "torch" else f"{dtype}-{path}", threads)
    cached = read_tables(file)
    if cached is not None and time.time() - file.stat().st_mtime < FRESH_S:
        return cached
    if (dtype, path) not in models:
        models[dtype, path] = load_model(job.model, dtype=dtype, threads=threads, path=path)
    model = models[dtype, path]
    if cached is not None and _holds(model, cached, threads):
        file.touch()
        return cached
    tables = model_calibration.calibrate(model, threads=threads, progress=progress)
    tables |= host_calibration.calibrate(model.spec, model.tokenizer, job.sampling, threads=threads, path=path)
    write_tables(file, tables)
    return tables


def _holds(model: Model, tables: Tables, threads: int) -> bool:
    return abs(model_calibration.pace(model, tables, threads=threads) - 1.0) < model_calibration.TOLERANCE


def _file(job: ServeJob, work: Workload, cluster: Cluster, dtype: str, threads: int) -> Path:
    """Filed under what the model is, too: its name may mean another one tomorrow."""
    draw = "greedy" if job.sampling.greedy else f"top{job.sampling.top_k}"
    model = f"{job.model}-{sha256(f'{work.spec} {work.packed_bytes}'.encode()).hexdigest()[:16]}"
    name = "".join(c if c.isalnum() or c in "-_." else "_" for c in f"{model}-{dtype}-{threads}-{draw}-{BEST_LEVEL}")
    return cache_folder() / f"serve-{_FORMAT}-{cluster.fingerprint()}" / f"{name[-120:]}.json"
