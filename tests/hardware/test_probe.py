"""The probe: its loops compute what numpy computes, at every level; its answer is plausible and cached."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import pytest

from stretto import files
from stretto.hardware import _native, probe
from stretto.hardware.cluster import Cluster

LEVELS = ("plain", "avx2", "avx512")
AVAILABLE = LEVELS[: LEVELS.index(_native.best_level()) + 1]
THREADS = (1, 3)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("level", AVAILABLE)
@pytest.mark.parametrize("count", [0, 1, 7, 33, 1000])
def test_read_sums_every_word_once(level: str, threads: int, count: int) -> None:
    words = np.random.default_rng(1).integers(0, 2**64, count, dtype=np.uint64, endpoint=False)
    seconds, total = _native.read(level, words, 3, threads)
    assert total == 3 * sum(words.tolist()) % 2**64
    assert seconds > 0


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("level", AVAILABLE)
@pytest.mark.parametrize("count", [0, 1, 7, 33, 1000])
def test_copy_copies_every_word(level: str, threads: int, count: int) -> None:
    words = np.random.default_rng(2).integers(0, 2**63, count, dtype=np.uint64)
    target = np.zeros_like(words)
    assert _native.copy(level, words, target, 2, threads) > 0
    np.testing.assert_array_equal(target, words)


def _operands(group: int, threads: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Small whole numbers, exact in every type: A [inner, 6], B [threads, inner, 32], A^T B a thread."""
    random = np.random.default_rng(group)
    a, b = random.integers(0, 8, (24, 6)), random.integers(-8, 8, (threads, 24, 32))
    return a, b, np.einsum("kr,tkc->trc", a, b)


def _side_by_side(values: np.ndarray, group: int) -> np.ndarray:
    """[..., inner, n] as [..., inner / group, n, group]."""
    *outer, inner, n = values.shape
    return np.ascontiguousarray(np.moveaxis(values.reshape(*outer, inner // group, group, n), -2, -1))


def _bf16(values: np.ndarray) -> np.ndarray:
    return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("level", AVAILABLE)
def test_tiles_are_products_of_matrices(level: str, threads: int) -> None:
    a, b, expected = _operands(1, threads)
    c = np.zeros(expected.shape, np.float32)
    _native.tile_fp32(level, a.astype(np.float32), b.astype(np.float32), c, 3, threads)
    np.testing.assert_array_equal(c, 3 * expected)

    a, b, expected = _operands(2, threads)
    c = np.zeros(expected.shape, np.float32)
    _native.tile_bf16(level, _bf16(_side_by_side(a, 2)), _bf16(_side_by_side(b, 2)), c, 3, threads)
    np.testing.assert_array_equal(c, 3 * expected)

    a, b, expected = _operands(4, threads)
    sums = np.zeros(expected.shape, np.int32)
    left, right = _side_by_side(a, 4).astype(np.uint8), _side_by_side(b, 4).astype(np.int8)
    _native.tile_int8(level, left, right, sums, 3, threads)
    np.testing.assert_array_equal(sums, 3 * expected)


@pytest.mark.skipif(not _native.has_amx(), reason="this machine has no AMX")
@pytest.mark.parametrize("threads", THREADS)
def test_amx_tiles_are_products_of_matrices(threads: int) -> None:
    random = np.random.default_rng(0)
    a, b = random.integers(0, 8, (32, 128)), random.integers(-8, 8, (threads, 128, 32))
    expected = a @ b
    sums = np.zeros(expected.shape, np.int32)
    _native.amx_int8(a.astype(np.uint8), _side_by_side(b, 4).astype(np.int8), sums, 3, threads)
    np.testing.assert_array_equal(sums, 3 * expected)
    c = np.zeros(expected.shape, np.float32)
    _native.amx_bf16(_bf16(a), _bf16(_side_by_side(b, 2)), c, 3, threads)
    np.testing.assert_array_equal(c, 3 * expected)
    with pytest.raises(ValueError, match="must hold"):
        _native.amx_int8(np.zeros((32, 32), np.uint8), np.zeros((32, 32), np.int8), sums[:1], 1, 1)


def test_mistaken_sizes_and_levels_are_refused() -> None:
    a, b, c = np.zeros((8, 6), np.float32), np.zeros((8, 32), np.float32), np.zeros((6, 32), np.float32)
    with pytest.raises(ValueError, match="level is sse9"):
        _native.tile_fp32("sse9", a, b, c, 1, 1)
    with pytest.raises(ValueError, match="must hold"):
        _native.tile_fp32("plain", a, b, c, 1, 2)
    with pytest.raises(ValueError, match="threads must be"):
        _native.read("plain", np.zeros(8, np.uint64), 1, 0)
    with pytest.raises(ValueError, match="one size"):
        _native.copy("plain", np.zeros(8, np.uint64), np.zeros(9, np.uint64), 1, 1)


def test_threads_and_processes_hear_from_each_other() -> None:
    assert 1e-8 < _native.wake(50) < 0.05
    assert 1e-8 < _native.shared_message(4096, 20, 5.0) < 0.1
    with pytest.raises(RuntimeError, match="time limit"):
        _native.shared_message(2**24, 10**6, 0.05)
    assert 0 <= _native.stolen_share(0.01) <= 1


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A probe of a fraction of a second, with a cache folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(probe, "FOOTPRINTS", (2**14, 2**17, 2**20, 2**23))
    monkeypatch.setattr(probe, "_ROUND_S", 0.0005)
    monkeypatch.setattr(probe, "_QUIET_WAIT_S", 0.0)
    return tmp_path


def _device(cluster: Cluster) -> probe.Device:
    return cluster.device("node0/cpu0")


def test_the_answer_is_plausible(quick: Path) -> None:
    told: list[tuple[str, float, float]] = []
    cluster = probe.probe(progress=lambda *step: told.append(step))
    device = _device(cluster)
    assert set(device.peak_flops) == {"fp32", "bf16", "int8"}
    assert all(1e8 < peak < 1e15 for peak in device.peak_flops.values())
    assert 1e8 < device.bandwidth < 1e13
    assert device.memory_bytes > 1e8
    assert device.measured["read@1"].at(2**14).value > 0
    assert [done for _, done, _ in told] == list(range(1, len(told) + 1))
    assert told[-1][1] == told[-1][2]
    assert probe.is_this_machine(cluster)
    assert probe.is_this_machine(cluster.with_measured("node0/cpu0", dict(device.measured)))
    assert not probe.is_this_machine(files.load_cluster(Path(__file__).parents[2] / "clusters" / "8xa100.yaml"))


def test_the_answer_is_kept_and_a_broken_one_replaced(quick: Path) -> None:
    first = probe.probe()
    (file,) = (quick / "stretto").glob("machine-*.yaml")
    assert probe.probe() == first
    assert files.load_cluster(file) == first
    elsewhere = file.read_text().replace(probe.machine_identity(), "another machine")
    for broken in (elsewhere, "", "][", "name: x\nnodes: []\n", file.read_text().replace("kind: cpu", "kind: abacus")):
        file.write_text(broken)
        assert probe.is_this_machine(probe.probe())
        assert probe.is_this_machine(files.load_cluster(file))
    told: list[str] = []
    again = probe.probe(again=True, progress=lambda what, done, total: told.append(what))
    assert told
    assert files.load_cluster(file) == again


def test_a_cache_folder_that_cannot_be_made_is_a_mistake_of_the_user(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(Exception, match="XDG_CACHE_HOME"):
        probe.cache_folder()


@pytest.mark.slow
def test_a_whole_probe_takes_seconds(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    start = time.monotonic()
    device = _device(probe.probe(again=True))
    assert time.monotonic() - start < 10
    assert device.bandwidth > 1e9


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({}, 6),
        ({"cpu.max": "max 100000\n"}, 6),
        ({"cpu.max": "250000 100000\n"}, 2),
        ({"cpu.max": "50000 100000\n"}, 1),
        ({"cpu.max": "900000 100000\n"}, 6),
        ({"cpu.max": "nonsense\n"}, 6),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 6),
        ({"cpu/cpu.cfs_quota_us": "300000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 3),
    ],
)
def test_cores_are_those_that_a_container_is_given_time_for(
    files: dict[str, str], cores: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.setattr(probe, "_text", lambda path: files.get(path.removeprefix("/sys/fs/cgroup/"), ""))
    assert probe.cores_here() == cores
