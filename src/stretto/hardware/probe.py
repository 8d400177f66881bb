"""Measuring this machine, in about five seconds, with loops of its own (`native/probe`).

Waits a while for quiet, then takes the best of several rounds of each loop, on one thread and on all: reads
over a range of footprints (from which the caches' bandwidths come), copies, the tile of a matrix product in
fp32, bf16 and int8, a thread's wake-up, and messages between processes. The best round is the one that others
disturbed least. The answer is a cluster of one node with one device; it is kept in the user's cache folder
under the identity of this machine.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from stretto.core.errors import UserError
from stretto.hardware import _native
from stretto.hardware.cluster import Cluster, Devices, Node
from stretto.hardware.device import Cache, Device
from stretto.hardware.table import Table
from stretto.hardware.table_files import keep

Progress = Callable[[str, float, float], None]

KIB, MIB = 2**10, 2**20
FOOTPRINTS = tuple(16 * KIB * 2**i for i in range(15))
"""Bytes that are read over and over: 16 KiB to 256 MiB."""

_QUIET_SHARE, _QUIET_WAIT_S = 0.05, 0.8
_ROUND_S, _ROUNDS, _PEAK_ATTEMPTS = 0.01, 5, 3
_LOOPS_S = 4.0
_TILE_ROWS, _TILE_COLUMNS, _TILE_INNER = 6, 32, 256
_AMX_SIDE, _AMX_INNER = 32, 512
_MESSAGES = (64, 4 * KIB, 64 * KIB, MIB, 8 * MIB)
_MESSAGE_LIMIT_S = 0.3
_SCHEMA = 2


def probe(*, again: bool = False, progress: Progress | None = None) -> Cluster:
    """This machine, measured once and then read from the cache.

    Args:
        again: measure anew, whatever the cache holds.
        progress: told (what, done, total) as the measurement goes on.
    """
    file = _cache_file()
    cached = None if again else _read(file)
    if cached is not None:
        return cached
    cluster = _measure(progress or (lambda what, done, total: None))
    keep(file, yaml.safe_dump(cluster.to_dict(), sort_keys=False))
    return cluster


def is_this_machine(cluster: Cluster) -> bool:
    """Whether `cluster` is what `probe` says of this machine, with or without tables added to it."""
    devices = list(cluster.devices().values())
    return len(devices) == 1 and devices[0].citations.get("machine") == machine_identity()


def cache_folder() -> Path:
    """Where measurements of this machine are kept; made if need be.

    Raises:
        UserError: if it cannot be made.
    """
    root = os.environ.get("XDG_CACHE_HOME")
    folder = (Path(root) if root else Path.home() / ".cache") / "stretto"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as problem:
        right = "set XDG_CACHE_HOME to a folder that may be written"
        raise UserError(f"the cache folder cannot be made: {problem}", file=str(folder), right=right) from None
    return folder


@functools.cache
def machine_identity() -> str:
    """A short hash of what the machine says of itself: processor, features, usable cores, memory."""
    told = [
        platform.machine(),
        _cpu_field("model name"),
        _cpu_field("flags"),
        str(cores_here()),
        str(memory_bytes_here()),
    ]
    return hashlib.sha256("\n".join([str(_SCHEMA), _native.best_level(), *told]).encode()).hexdigest()[:16]


# --- the cache


def _cache_file() -> Path:
    return cache_folder() / f"machine-{machine_identity()}.yaml"


def _read(file: Path) -> Cluster | None:
    """None if there is nothing there, or nothing that makes sense."""
    try:
        cluster = _from_dict(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return cluster if is_this_machine(cluster) else None


def _from_dict(plain: Mapping[str, Any]) -> Cluster:
    (node,) = plain["nodes"]
    (held,) = node["devices"]
    fields = dict(held["device"])
    for name in ("efficiency", "measured"):
        fields[name] = {key: Table.from_dict(table) for key, table in fields.get(name, {}).items()}
    fields["caches"] = tuple(Cache(**cache) for cache in fields.get("caches", ()))
    return _cluster(plain["name"], Device(**fields))


def _cluster(name: str, device: Device) -> Cluster:
    return Cluster(name=name, nodes=(Node(name="node0", devices=(Devices(device=device),)),))


# --- the measurement


def _measure(progress: Progress) -> Cluster:
    cores, level = cores_here(), _native.best_level()
    teams = sorted({1, (cores + 1) // 2, cores})
    steps: Iterator[int] = iter(range(1, 100))
    total = 3 + 2 * len(teams) + _PEAK_ATTEMPTS

    def step(what: str) -> None:
        progress(what, next(steps), total)

    _wait_for_quiet(cores)
    fastest = _Fastest(_LOOPS_S)
    step("quiet")
    reads: dict[int, dict[int, float]] = {}
    copies: dict[int, float] = {}
    for team in teams:
        reads[team] = _read_bandwidths(fastest, level, team)
        step(f"reads on {team} threads")
        copies[team] = _copy_bandwidth(fastest, level, team)
        step(f"copies on {team} threads")
    peaks: dict[tuple[str, int], float] = {}
    for attempt in range(_PEAK_ATTEMPTS):
        for dtype, team in itertools.product(_TILES, teams):
            peaks[dtype, team] = max(_peak(fastest, dtype, level, team), peaks.get((dtype, team), 0.0))
        step(f"arithmetic, round {attempt + 1}")
    wake = min(_native.wake(500) for _ in range(3))
    step("wake-up of a thread")
    messages = _message_seconds()
    step("messages between processes")

    memory = {team: reads[team][FOOTPRINTS[-1]] for team in teams}
    device = Device(
        name=_cpu_field("model name") or platform.processor() or platform.machine(),
        kind="cpu",
        vendor=_cpu_field("vendor_id"),
        memory_bytes=float(memory_bytes_here()),
        bandwidth=_rounded(max(memory.values())),
        peak_flops={dtype: _rounded(max(peaks[dtype, team] for team in teams)) for dtype in _TILES},
        units=cores,
        caches=_caches(reads[cores], cores),
        efficiency={
            "bandwidth@threads": _shares(memory),
            "compute@threads": _shares({team: peaks["fp32", team] for team in teams}),
        },
        measured=_tables(reads, copies, wake, messages),
        citations={
            "machine": machine_identity(),
            "figures": f"stretto probe, {level} loops, {time.strftime('%Y-%m-%d')}",
        },
    )
    return _cluster(platform.node() or "this machine", device)


def _wait_for_quiet(cores: int) -> None:
    """Wait, a bounded time, until threads that spin on all cores are hardly ever interrupted."""
    deadline = time.monotonic() + _QUIET_WAIT_S
    with ThreadPoolExecutor(cores) as team:
        while max(team.map(_native.stolen_share, [0.03] * cores)) > _QUIET_SHARE and time.monotonic() < deadline:
            time.sleep(0.05)


class _Fastest:
    """Times loops: the fastest of a few rounds, or of one where the time for it all is over."""

    def __init__(self, limit_s: float) -> None:
        self._deadline = time.monotonic() + limit_s

    def __call__(self, run: Callable[[int], float]) -> float:
        """Seconds of one repeat, where `run(repeats)` returns seconds."""
        repeats, seconds = 1, run(1)
        while seconds < _ROUND_S:
            # A first round is slow with cold caches and new threads, so the number of repeats is approached
            # from below.
            repeats = min(repeats * 8, max(repeats + 1, round(repeats * 1.1 * _ROUND_S / max(seconds, 1e-9))))
            seconds = run(repeats)
        for _ in range(_ROUNDS - 1):
            if time.monotonic() > self._deadline:
                break
            seconds = min(seconds, run(repeats))
        return seconds / repeats


def _read_bandwidths(fastest: _Fastest, level: str, threads: int) -> dict[int, float]:
    """Bytes/s by footprint over all threads together."""
    words = _aligned(FOOTPRINTS[-1]).view(np.uint64)
    found = {}
    for footprint in FOOTPRINTS:
        found[footprint] = footprint / fastest(
            functools.partial(_read_seconds, level, words[: footprint // 8], threads)
        )
    return found


def _read_seconds(level: str, words: NDArray[np.uint64], threads: int, repeats: int) -> float:
    return _native.read(level, words, repeats, threads)[0]


def _copy_bandwidth(fastest: _Fastest, level: str, threads: int) -> float:
    """Bytes/s copied (each counts once) from and to memory that no cache holds."""
    words = _aligned(128 * MIB).view(np.uint64)
    source, target = words[: len(words) // 2], words[len(words) // 2 :]
    return source.nbytes / fastest(lambda n: _native.copy(level, source, target, n, threads))


_TILES: Mapping[str, tuple[Any, Any, Any, Any]] = {
    "fp32": (_native.tile_fp32, np.float32, np.float32, np.float32),
    "bf16": (_native.tile_bf16, np.uint16, np.uint16, np.float32),
    "int8": (_native.tile_int8, np.uint8, np.int8, np.int32),
}


def _peak(fastest: _Fastest, dtype: str, level: str, threads: int) -> float:
    """Operations/s of tiles whose operands stay in the first two caches; the faster of vectors and AMX."""
    peak = _vector_peak(fastest, dtype, level, threads)
    if dtype in _AMX_TILES and _native.has_amx():
        peak = max(peak, _amx_peak(fastest, dtype, threads))
    return peak


def _vector_peak(fastest: _Fastest, dtype: str, level: str, threads: int) -> float:
    kernel, type_a, type_b, type_c = _TILES[dtype]
    a = np.zeros((_TILE_INNER, _TILE_ROWS), type_a)
    size = threads * _TILE_INNER * _TILE_COLUMNS
    b = _aligned(size * np.dtype(type_b).itemsize).view(type_b)
    b[:] = 0
    c = np.zeros((threads, _TILE_ROWS, _TILE_COLUMNS), type_c)
    work = 2.0 * threads * _TILE_INNER * _TILE_ROWS * _TILE_COLUMNS
    return float(work / fastest(lambda n: kernel(level, a, b, c, n, threads)))


_AMX_TILES: Mapping[str, tuple[Any, Any, Any, Any]] = {
    "bf16": (_native.amx_bf16, np.uint16, np.uint16, np.float32),
    "int8": (_native.amx_int8, np.uint8, np.int8, np.int32),
}


def _amx_peak(fastest: _Fastest, dtype: str, threads: int) -> float:
    kernel, type_a, type_b, type_c = _AMX_TILES[dtype]
    size = _AMX_INNER * _AMX_SIDE
    a = _aligned(size * np.dtype(type_a).itemsize).view(type_a)
    b = _aligned(threads * size * np.dtype(type_b).itemsize).view(type_b)
    a[:], b[:] = 0, 0
    c = np.zeros((threads, _AMX_SIDE, _AMX_SIDE), type_c)
    return float(2.0 * threads * size * _AMX_SIDE / fastest(lambda n: kernel(a, b, c, n, threads)))


def _message_seconds() -> dict[int, float]:
    """Seconds of one message between processes by its bytes; those over the time limit are left out."""
    found = {}
    for size in _MESSAGES:
        try:
            rounds = max(3, min(500, 8 * MIB // size))
            found[size] = min(_native.shared_message(size, rounds, _MESSAGE_LIMIT_S) for _ in range(2))
        except RuntimeError:
            break
    return found


def _tables(
    reads: Mapping[int, Mapping[int, float]],
    copies: Mapping[int, float],
    wake: float,
    messages: Mapping[int, float],
) -> dict[str, Table]:
    """What was measured, in seconds: reads and copies by bytes and threads, a wake-up, a message by bytes."""
    tables = {
        f"read@{team}": Table.line("bytes", [(size, _rounded(size / rate)) for size, rate in rates.items()], spread=0.2)
        for team, rates in reads.items()
    }
    tables |= {
        f"copy@{team}": Table.line("bytes", [(64 * MIB, _rounded(64 * MIB / rate))], spread=0.2)
        for team, rate in copies.items()
    }
    tables["wake"] = Table.line("threads", [(1, _rounded(wake))], beyond="constant", spread=0.5)
    if messages:
        pairs = [(size, _rounded(seconds)) for size, seconds in messages.items()]
        tables["process-message"] = Table.line("bytes", pairs, spread=0.5)
    return tables


def _shares(by_threads: Mapping[int, float]) -> Table:
    best = max(by_threads.values())
    pairs = [(threads, min(1.0, _rounded(value / best))) for threads, value in by_threads.items()]
    return Table.line("threads", pairs, beyond="constant", spread=0.1)


def _caches(rates: Mapping[int, float], cores: int) -> tuple[Cache, ...]:
    """The data caches that the system tells of, over all cores, and the bandwidth at half of each."""
    found: dict[int, int] = {}
    for index in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        try:
            if (index / "type").read_text().strip() == "Instruction":
                continue
            size = int((index / "size").read_text().strip().removesuffix("K")) * KIB
            shared_by = _count_cpus((index / "shared_cpu_list").read_text())
            found[int((index / "level").read_text())] = size * max(1, cores // shared_by)
        except (OSError, ValueError):
            continue
    caches = []
    for size in sorted(found.values()):
        inside = max((footprint for footprint in rates if footprint <= size / 2), default=FOOTPRINTS[0])
        caches.append(Cache(bytes=float(size), bandwidth=_rounded(rates[inside])))
    return tuple(caches)


def _aligned(size: int) -> NDArray[np.uint8]:
    """`size` bytes that begin at a cache line; each page is touched."""
    held = np.ones(size + 64, np.uint8)
    first = -held.ctypes.data % 64
    return held[first : first + size]


# --- what the system says


def cores_here() -> int:
    """Cores that this process may run on, or the whole ones that its control group gives it time for."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(allowed, int(_cpu_quota())))


def _cpu_quota() -> float:
    """Seconds of CPU a second that the control group of this process allows; no limit: more than there can be."""
    first = "/sys/fs/cgroup/cpu/cpu.cfs_"
    texts = _text("/sys/fs/cgroup/cpu.max").split() or [
        _text(f"{first}{name}_us").strip() for name in ("quota", "period")
    ]
    if len(texts) == 2 and all(text.isdigit() for text in texts) and int(texts[1]):
        return int(texts[0]) / int(texts[1])
    return float(1 << 30)


def memory_bytes_here() -> int:
    """Memory of the machine, or of the control group that holds this process where that is less."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = _text(limit).strip()
        if text.isdigit():
            return min(physical, int(text))
    return physical


def _cpu_field(name: str) -> str:
    lines = (line.partition(":") for line in _text("/proc/cpuinfo").splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == name), "")


def _count_cpus(listed: str) -> int:
    """How many a list such as "0-3,8" names."""
    spans = (span.partition("-") for span in listed.strip().split(","))
    return sum(int(last or first) - int(first) + 1 for first, _, last in spans)


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def _rounded(value: float) -> float:
    """Four digits: what such a measurement is worth, and what a file should show."""
    return float(f"{value:.4g}")
