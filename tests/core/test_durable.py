"""The durable log: torn tails, damage, one writer, and runs that are killed at any instant and go on."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import pytest

from stretto.core.clock import RealClock, VirtualClock, simulate_async
from stretto.core.durable import DurableLog
from stretto.core.errors import UserError
from stretto.core.graph import Failure, Graph, Paid, PaidError, Terms
from tests.core import victim


def open_log(path: Path, of: str = "job") -> DurableLog:
    return DurableLog(path / "log", of=of, beat_s=None)


def run_graph(path: Path, calls: list[str], *, budget: float | None = 10.0, kill_after: int | None = None) -> Any:
    """a -> b -> c, each a unit of money: outcomes and what was spent; after `kill_after` calls the run is cancelled."""

    async def main(clock: VirtualClock) -> tuple[list[Any], float]:
        with open_log(path) as log:
            graph = Graph(clock, log=log, budget=budget)

            def call(name: str) -> Any:
                async def run(*values: Any) -> Any:
                    calls.append(name)
                    if kill_after is not None and len(calls) > kill_after:
                        graph.cancel()
                    await clock.sleep(1.0)
                    return Paid({"name": name, "before": [value["name"] for value in values]}, 1.0)

                return run

            last: list[int] = []
            for name in "abc":
                last = [graph.add(call(name), after=last, terms=Terms(bound=2.0), key=name)]
            graph.close()
            return await graph.run(), graph.spent

    return simulate_async(main)


def test_finished_nodes_are_not_run_again(tmp_path: Path) -> None:
    first: list[str] = []
    outcomes, spent = run_graph(tmp_path, first)
    again: list[str] = []
    assert run_graph(tmp_path, again) == (outcomes, spent)
    assert (first, again, spent) == (["a", "b", "c"], [], 3.0)


def test_an_attempt_in_flight_costs_its_bound_and_is_made_again(tmp_path: Path) -> None:
    calls: list[str] = []
    outcomes, spent = run_graph(tmp_path, calls, kill_after=1)
    assert [isinstance(outcome, Failure) for outcome in outcomes] == [False, True, True]
    assert spent == 3.0, "a cost 1, and b was cut off with 2 reserved"
    outcomes, spent = run_graph(tmp_path, calls)
    assert calls == ["a", "b", "b", "c"]
    assert [outcome["name"] for outcome in outcomes] == ["a", "b", "c"]
    assert spent == 5.0, "3 before, and 1 each for b and c"


def test_what_earlier_runs_spent_counts_against_the_budget(tmp_path: Path) -> None:
    calls: list[str] = []
    run_graph(tmp_path, calls, kill_after=1)
    outcomes, spent = run_graph(tmp_path, calls, budget=5.0)
    assert [getattr(outcome, "why", None) for outcome in outcomes] == [None, None, "no budget"]
    assert spent == 4.0


def test_failures_are_finished_too_and_lost_attempts_are_counted(tmp_path: Path) -> None:
    async def main(clock: VirtualClock) -> tuple[list[Any], float, int]:
        calls = 0

        async def fails() -> None:
            nonlocal calls
            calls += 1
            raise PaidError("no", 0.5)

        with open_log(tmp_path) as log:
            graph = Graph(clock, log=log)
            graph.add(fails, terms=Terms(bound=1.0, attempts=2))
            graph.close()
            return await graph.run(), graph.spent, calls

    (failure,), spent, calls = simulate_async(main)
    assert (spent, calls) == (1.0, 2)
    assert simulate_async(main) == ([failure], 1.0, 0)


def test_nodes_that_add_nodes_run_again_and_their_nodes_do_not(tmp_path: Path) -> None:
    ran: list[str] = []

    async def main(clock: VirtualClock) -> list[Any]:
        with open_log(tmp_path) as log:
            graph = Graph(clock, log=log)

            def part(name: str) -> Any:
                async def call() -> str:
                    ran.append(name)
                    return name

                return call

            async def plan() -> None:
                ran.append("plan")
                for name in "xy":
                    graph.add(part(name), key=name)
                graph.close()

            graph.add(plan, terms=Terms(durable=False), key="plan")
            return (await graph.run())[1:]

    assert simulate_async(main) == simulate_async(main) == ["x", "y"]
    assert ran == ["plan", "x", "y", "plan"]


def test_a_value_is_the_same_before_and_after(tmp_path: Path) -> None:
    """Tuples come out as lists in the first run already; what JSON cannot hold is a failure that says so."""

    async def main(clock: VirtualClock) -> list[Any]:
        async def pair() -> Any:
            return ("a\nb", {1: "\udc80é"})

        async def odd() -> Any:
            return {1, 2}

        with open_log(tmp_path) as log:
            graph = Graph(clock, log=log)
            graph.add(pair)
            graph.add(odd)
            graph.close()
            return await graph.run()

    first = simulate_async(main)
    assert first == simulate_async(main)
    assert first[0] == ["a\nb", {"1": "\udc80é"}]
    assert "not JSON serializable" in first[1].message


def test_a_torn_tail_is_cut_off_wherever_it_is_torn(tmp_path: Path) -> None:
    run_graph(tmp_path, [])
    whole = (tmp_path / "log").read_bytes()
    ends = [at + 1 for at, byte in enumerate(whole) if byte == 10]
    for cut in range(len(whole)):
        (tmp_path / "log").write_bytes(whole[:cut])
        with open_log(tmp_path) as log:
            sound = max((end for end in ends if end <= cut), default=0)
            assert log.finished.keys() == {"a", "b", "c"}.intersection(_finished(whole[:sound]))
        assert (tmp_path / "log").read_bytes()[:sound] == whole[:sound]


def _finished(data: bytes) -> list[str]:
    records = [json.loads(line[9:]) for line in data.splitlines()]
    return [record[1] for record in records if record[0] == "end"]


def test_a_tail_of_rubbish_is_cut_off(tmp_path: Path) -> None:
    run_graph(tmp_path, [])
    whole = (tmp_path / "log").read_bytes()
    for rubbish in (b"\0" * 4096, b"0" * 50 + b"\n", whole[:-1][-30:], b"deadbeef []\n\n"):
        (tmp_path / "log").write_bytes(whole + rubbish)
        with open_log(tmp_path) as log:
            assert len(log.finished) == 3
        assert (tmp_path / "log").read_bytes() == whole


def test_damage_before_sound_records_is_refused_by_line(tmp_path: Path) -> None:
    run_graph(tmp_path, [])
    lines = (tmp_path / "log").read_bytes().splitlines(keepends=True)
    lines[2] = lines[2].replace(b"a", b"b", 1)
    (tmp_path / "log").write_bytes(b"".join(lines))
    with pytest.raises(UserError, match=r"log:3: the record is damaged, and sound records follow it; restore"):
        open_log(tmp_path)


def test_somebody_elses_file_is_left_alone(tmp_path: Path) -> None:
    for text in ("my diary\n", "deadbeef", "no newline here", "deadbeef [\n"):
        (tmp_path / "log").write_text(text)
        if text == "deadbeef":
            continue
        with pytest.raises(UserError, match="not the first of a durable log"):
            open_log(tmp_path)
        assert (tmp_path / "log").read_text() == text


def test_a_log_of_something_else_is_refused(tmp_path: Path) -> None:
    open_log(tmp_path, of="one").close()
    with pytest.raises(UserError, match="the log is of 'one' in version 1, this is 'two'"):
        open_log(tmp_path, of="two")


def test_one_process_writes_at_a_time(tmp_path: Path) -> None:
    with open_log(tmp_path), pytest.raises(UserError, match="another process writes this log"):
        open_log(tmp_path)
    open_log(tmp_path).close()


def test_a_log_that_cannot_be_opened_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be opened"):
        DurableLog(tmp_path / "no" / "log")


def test_a_full_disk_ends_the_run_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write

    def full(file: int, data: bytes) -> int:
        if b'"b"' in data:
            raise OSError(28, "No space left on device")
        return write(file, data)

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(UserError, match="the log cannot be written: No space left on device"):
        run_graph(tmp_path, [])


def test_records_are_flushed_together_at_the_beat_and_alone_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[float] = []
    fsync = os.fsync

    def count(file: int) -> None:
        synced.append(time.perf_counter())
        fsync(file)

    with DurableLog(tmp_path / "log", beat_s=0.02) as log:
        time.sleep(0.05)
        monkeypatch.setattr(os, "fsync", count)
        for key in range(100):
            log.finish(str(key), "1", 0.0)
        log.sync()
        assert 1 <= len(synced) < 20
        synced.clear()
        for key in range(5):
            log.finish(str(key), "1", 0.0, sync=True)
        assert len(synced) >= 5


def test_ten_kills(tmp_path: Path) -> None:
    killed(tmp_path, seed=1, kills=10)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2, 12))
def test_a_hundred_kills(tmp_path: Path, seed: int) -> None:
    killed(tmp_path, seed=seed, kills=10)


def killed(folder: Path, *, seed: int, kills: int) -> None:
    """Run the victim again and again, killed each time at a random instant, then to its end, beside a quiet run."""
    (folder / "quiet").mkdir()
    expected = asyncio.run(victim.main(folder / "quiet", seed))
    draw = random.Random(seed)
    for _ in range(kills):
        process = start(folder, seed)
        assert process.stderr is not None
        process.stderr.readline()
        time.sleep(draw.random() * 0.06)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        done = _finished((folder / "log").read_bytes().rpartition(b"\n")[0])
        with open(folder / "calls", "a") as calls:
            calls.write(f"finished {' '.join(done)}\n")
    process = start(folder, seed)
    out, _ = process.communicate(timeout=60)
    found = json.loads(out)
    assert found["outcomes"] == expected["outcomes"]
    no_finished_node_ran_again((folder / "calls").read_text().splitlines())
    assert expected["spent"] <= found["spent"] <= victim.BUDGET
    charges = {line.split()[0]: float(line.split()[1]) for line in (folder / "charges").read_text().splitlines()}
    assert len(charges) == len({key.rpartition("/")[2] for key in charges}), "one key a node over all runs"


def start(folder: Path, seed: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.core.victim", str(folder), str(seed)]
    root = Path(__file__).parents[2]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def no_finished_node_ran_again(lines: list[str]) -> None:
    done: set[str] = set()
    for line in lines:
        if line.startswith("finished"):
            done |= set(line.split()[1:])
        else:
            assert line not in done, f"node {line} ran after it was finished"


def test_the_real_clock_writes_the_same_log(tmp_path: Path) -> None:
    async def main() -> list[Any]:
        async def one() -> int:
            return 1

        with DurableLog(tmp_path / "log") as log:
            graph = Graph(RealClock(), log=log)
            graph.add(one)
            graph.close()
            return await graph.run()

    assert asyncio.run(main()) == [1]
    with open_log(tmp_path, of="") as log:
        assert log.finished["0"].value == 1


def test_a_second_run_with_the_same_log_finds_what_the_first_made(tmp_path: Path) -> None:
    made: list[int] = []

    async def ask(log: DurableLog) -> tuple[list[Any], float]:
        graph = Graph(RealClock(), log=log, budget=3.0)

        async def call() -> Paid:
            made.append(1)
            return Paid((1, "x"), 1.0)

        graph.add(call, terms=Terms(bound=2.0), key="call")
        graph.close()
        return await graph.run(), graph.spent

    with open_log(tmp_path) as log:
        first, again = asyncio.run(ask(log)), asyncio.run(ask(log))
        spent = log.spent
    assert first == again == ([[1, "x"]], 1.0)
    assert made == [1]
    with open_log(tmp_path) as log:
        assert log.spent == spent == 1.0


def test_a_flush_that_failed_is_told_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = DurableLog(tmp_path / "log", beat_s=0.01)
    failed, fsync = threading.Event(), os.fsync

    def broken(file: int) -> None:
        failed.set()
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    log.paid("a", 1.0)
    assert failed.wait(10)
    log._flusher.join(10)  # type: ignore[union-attr]
    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(UserError, match="the log cannot be written: Input/output error"):
        log.close()


def test_what_is_no_file_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="/dev/null: the log cannot be written: "):
        DurableLog("/dev/null")


def test_a_record_that_is_nested_too_deep_is_damage(tmp_path: Path) -> None:
    with open_log(tmp_path) as log:
        log.paid("a", 1.0)
    deep = b'["end","b",1.0,null,' + b"[" * 100_000 + b"]" * 100_000 + b"]"
    with (tmp_path / "log").open("ab") as file:
        file.write(b"%08x %b\n" % (zlib.crc32(deep), deep))
    with open_log(tmp_path) as log:
        assert log.finished == {}


def test_processes_that_a_writer_forked_do_not_keep_its_log_when_it_is_killed(tmp_path: Path) -> None:
    code = """
import os, sys, time
from stretto.core.durable import DurableLog
log = DurableLog(sys.argv[1])
child = os.fork()
if child == 0:
    try:
        log.paid("a", 1.0)
    except Exception as problem:
        print(problem, flush=True)
    log.close()
    time.sleep(30)
    os._exit(0)
print(child, flush=True)
time.sleep(30)
"""
    path = tmp_path / "log"
    writer = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    refused, number = sorted((writer.stdout.readline() for _ in range(2)), key=lambda line: line.strip().isdigit())
    child = int(number)
    assert "it is written by the process that this one was forked from" in refused
    try:
        with pytest.raises(UserError, match="another process writes this log"):
            DurableLog(path)
        writer.kill()
        writer.wait(10)
        os.kill(child, 0)  # it is alive
        DurableLog(path).close()
    finally:
        writer.kill()
        writer.stdout.close()
        os.kill(child, signal.SIGKILL)
