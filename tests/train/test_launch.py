"""A rank that fails ends the run at once, with one message that says which, and leaves no process and no half file."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from stretto.train import checkpoint
from stretto.train.job import Optimizer, Shape, TrainJob
from stretto.train.launch import RankFailed, cpus_of, run_ranks
from stretto.train.plan import TrainPlan

SHAPE = Shape(layers=2, hidden=24, heads=2, kv_heads=2, head_dim=12, ffn=32)
PLAN = TrainPlan(devices=("node0/cpu0",) * 2, threads=1, pp=2, layers=(1, 1))


@pytest.fixture
def job(tmp_path: Path) -> TrainJob:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 40)
    return TrainJob(
        shape=SHAPE,
        data=(str(text),),
        tokenizer="bytes",
        sequence=16,
        global_batch=4,
        steps=100_000,
        optimizer=Optimizer(learning_rate=1e-3),
        held_out=0.0,
        checkpoint=str(tmp_path / "checkpoints"),
        save_every=20,
        timeout_s=3.0,
    )


def children() -> list[int]:
    """Processes that this one has started and that still are, in the order of their start."""
    listed = subprocess.run(
        ["ps", "--ppid", str(os.getpid()), "-o", "pid=,stat=,args="], capture_output=True, text=True, check=True
    )
    rows = [line.split(maxsplit=2) for line in listed.stdout.splitlines()]
    return sorted(int(pid) for pid, state, args in rows if "stretto.train.worker" in args and state[0] != "Z")


def broken(job: TrainJob, how: Callable[[int], Any], rank: int) -> tuple[str, float]:
    """What a run says, and the seconds from the fault, done to the process of `rank` at step 10, until it ends."""
    done_at: list[float] = []

    def hear(number: int, message: dict[str, Any]) -> None:
        if message.get("step") == 10 and "loss" in message:
            how(children()[rank])
            done_at.append(time.monotonic())

    with pytest.raises(RankFailed) as raised:
        run_ranks(job, PLAN, hear=hear)
    assert children() == []
    return str(raised.value), time.monotonic() - done_at[0]


def test_a_killed_rank(job: TrainJob) -> None:
    said, seconds = broken(job, lambda pid: os.kill(pid, signal.SIGKILL), rank=1)
    assert said.startswith("rank 1 (stage 1) was killed (signal 9, perhaps for want of memory)")
    assert f"the newest checkpoint in {job.checkpoint}" in said
    assert seconds < 5


def test_a_hung_rank(job: TrainJob) -> None:
    said, seconds = broken(job, lambda pid: os.kill(pid, signal.SIGSTOP), rank=0)
    assert said.startswith("rank 0 (stage 0) fell silent: rank 1: ")
    assert "limit 3 s" in said
    assert seconds < job.timeout_s + 8


def test_a_rank_without_memory(job: TrainJob) -> None:
    large = replace(job, global_batch=512, sequence=512, save_every=None)
    used = resource.RLIMIT_AS

    def starve(pid: int) -> None:
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
        resource.prlimit(pid, used, (pages * os.sysconf("SC_PAGE_SIZE"),) * 2)

    timer: list[threading.Timer] = []

    def hear(number: int, message: dict[str, Any]) -> None:
        if "started" in message and number == 0:
            timer.append(threading.Timer(0.2, lambda: starve(children()[1])))
            timer[0].start()

    plan = replace(PLAN, micro_batch=64)
    Path(large.data[0]).write_text("so long a text that no sequence is short of it. " * 20_000)
    with pytest.raises(RankFailed) as raised:
        run_ranks(large, plan, hear=hear)
    timer[0].cancel()
    assert str(raised.value).startswith("rank 1 (stage 1) failed: RuntimeError at ")
    assert "memory" in str(raised.value)
    assert children() == []


def test_a_rank_that_raises_in_the_middle_of_a_checkpoint(job: TrainJob) -> None:
    def no_more_files(pid: int) -> None:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (100, 100))

    said, seconds = broken(job, no_more_files, rank=1)
    assert said.startswith("rank 1 (stage 1) failed: ")
    assert "too large" in said.lower()
    assert seconds < 10
    assert job.checkpoint is not None
    newest = checkpoint.newest(Path(job.checkpoint))
    if newest is not None:
        checkpoint.Reader(newest)


def test_the_last_checkpoint_is_whole_when_a_rank_is_killed(job: TrainJob) -> None:
    def hear(number: int, message: dict[str, Any]) -> None:
        if message.get("step") == 45 and "loss" in message:
            os.kill(children()[0], signal.SIGKILL)

    with pytest.raises(RankFailed):
        run_ranks(job, PLAN, hear=hear)
    assert job.checkpoint is not None
    newest = checkpoint.newest(Path(job.checkpoint))
    assert newest is not None
    assert checkpoint.Reader(newest).names()
    seen: list[int] = []
    again = replace(job, steps=int(newest.name.removeprefix("step-")) + 2)
    run_ranks(again, PLAN, hear=lambda rank, message: seen.append(message["step"]) if "loss" in message else None)
    assert seen == [again.steps - 2, again.steps - 1]


def test_ranks_end_when_their_parent_is_killed(job: TrainJob) -> None:
    script = f"""
import sys
from stretto.train import wire
from stretto.train.job import TrainJob
from stretto.train.plan import TrainPlan
from stretto.train.launch import run_ranks
job = wire.from_plain(TrainJob, {wire_plain(job)!r})
plan = wire.from_plain(TrainPlan, {wire_plain(PLAN)!r})
run_ranks(job, plan, hear=lambda rank, message: print(message.get("step"), flush=True))
"""
    import sys

    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    for line in parent.stdout:
        if line.strip() == "5":
            break
    ranks = subprocess.run(["pgrep", "-P", str(parent.pid)], capture_output=True, text=True, check=True).stdout.split()
    assert len(ranks) == 2
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 10
    while any(alive(int(rank)) for rank in ranks):
        assert time.monotonic() < deadline, "a rank outlives its parent"
        time.sleep(0.05)


def wire_plain(value: Any) -> dict[str, Any]:
    from stretto.train import wire

    return wire.to_plain(value)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_stop_is_at_the_end_of_a_step_and_saves(job: TrainJob) -> None:
    told: list[dict[str, Any]] = []
    run_ranks(
        job,
        PLAN,
        hear=lambda rank, message: told.append(message),
        stopping=lambda: any(message.get("step", 0) >= 5 for message in told),
    )
    done = max(message["done"] for message in told if "done" in message)
    assert 5 < done < job.steps
    assert job.checkpoint is not None
    newest = checkpoint.newest(Path(job.checkpoint))
    assert newest is not None
    assert newest.name == f"step-{done}"


def test_cpus_are_neighbours_and_nobody_elses() -> None:
    usable = sorted(os.sched_getaffinity(0))
    found = [cpus_of(PLAN, rank) for rank in range(2)]
    assert found == ([[usable[0]], [usable[1]]] if len(usable) >= 2 else [[], []])
    assert cpus_of(replace(PLAN, threads=64), 0) == []


def printing(folder: Path, after_s: float) -> str:
    """A folder for PYTHONPATH, by which every process writes a line to its output after a while."""
    (folder / "sitecustomize.py").write_text(
        "import os, threading\n"
        f"timer = threading.Timer({after_s}, lambda: os.write(1, b'noise\\n'))\n"
        "timer.daemon = True\n"
        "timer.start()\n"
        f"{'timer.join()' if not after_s else ''}\n"
    )
    return str(folder)


def test_what_libraries_print_is_no_message(job: TrainJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", printing(tmp_path, 1.0))
    seen: list[int] = []
    short = replace(job, steps=400, save_every=None)
    run_ranks(short, PLAN, hear=lambda rank, message: seen.append(message["step"]) if "loss" in message else None)
    assert seen == list(range(400))


def test_a_rank_that_says_what_is_no_message_ends_the_run(
    job: TrainJob, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", printing(tmp_path, 0.0))
    with pytest.raises(RankFailed, match=r"rank \d \(stage \d\) failed: it said what is no message"):
        run_ranks(job, PLAN, hear=lambda rank, message: None)
    assert children() == []
