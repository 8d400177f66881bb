"""Rank processes that live as long as the test session: starting one costs seconds, a call of one does not.

`run(world, "module:function", ...)` calls `function(rank, start, *arguments)` in processes 0 .. world - 1, each of one
thread; `start(grid)` makes a transport for this call. After a failure the processes are started anew.
"""

from __future__ import annotations

import atexit
import importlib
import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from time import monotonic
from typing import Any

if "MUTANT" in os.environ:  # ranks import what is mutated, too
    import tests.mutants.plugin  # noqa: F401

from stretto.comm.grid import RankGrid
from stretto.comm.transport import Disturbance, Transport

Start = Callable[..., Transport]
_CALL_S = 20.0
"""How long a rank waits for another in a test, unless it says otherwise."""


class RankFailed(AssertionError):
    """A rank raised: its number, and its traceback."""


class _Rank:
    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def end(self) -> None:
        self.process.kill()
        self.process.join(10)
        self.pipe.close()


_ranks: list[_Rank] = []


def run(world: int, name: str, *arguments: Any, timeout_s: float = 90.0) -> list[Any]:
    """The results of `name` ("module:function") by rank.

    Raises:
        RankFailed: a rank raised or died, or some did not end in time; names the first.
    """
    while len(_ranks) < world:
        _ranks.append(_Rank())
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        try:
            for rank in range(world):
                _ranks[rank].pipe.send((name, rank, store, arguments))
            found, problem = _collected(world, monotonic() + timeout_s)
        except OSError as broken:
            found, problem = {}, f"a rank died before its call: {broken}"
    if problem is not None:
        close()
        raise RankFailed(problem)
    return [found[rank] for rank in range(world)]


def outcomes(world: int, name: str, *arguments: Any, timeout_s: float = 90.0) -> list[Any]:
    """As `run`, with the text of what a rank raised in place of its result; the processes are started anew after."""
    try:
        return run(world, f"{__name__}:_caught", name, arguments, timeout_s=timeout_s)
    finally:
        close()


def close() -> None:
    """End all processes."""
    while _ranks:
        _ranks.pop().end()


atexit.register(close)


def _collected(world: int, deadline: float) -> tuple[dict[int, Any], str | None]:
    pipes = {_ranks[rank].pipe: rank for rank in range(world)}
    found: dict[int, Any] = {}
    problems: list[str] = []
    while pipes and (not problems or monotonic() < deadline):
        ready = wait(list(pipes), timeout=max(0.0, deadline - monotonic()))
        if not ready:
            problems.append(f"ranks {sorted(pipes.values())} did not end in time")
            break
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = pipes.pop(pipe)
            try:
                good, value = pipe.recv()
            except EOFError:
                good, value = False, "died"
            if good:
                found[rank] = value
            else:
                problems.append(f"rank {rank}: {value}")
                deadline = min(deadline, monotonic() + 5)
    return found, "\n".join(problems) or None


class _Starter:
    """`start(grid, ...)` of one call."""

    def __init__(self, rank: int, store: Path):
        self.rank, self.store = rank, store
        self.opened: Transport | None = None

    def __call__(self, grid: RankGrid, timeout_s: float = _CALL_S, disturbance: Disturbance | None = None) -> Transport:
        self.opened = Transport.start(
            grid, rank=self.rank, timeout_s=timeout_s, store=self.store, disturbance=disturbance
        )
        return self.opened

    def close(self) -> None:
        if self.opened is not None:
            self.opened.close()


def _serve(pipe: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            name, rank, store, arguments = pipe.recv()
        except EOFError:
            return
        starter = _Starter(rank, Path(store))
        try:
            answer = (True, _function(name)(rank, starter, *arguments))
        except BaseException:  # noqa: BLE001 (whatever it is, the test is told)
            answer = (False, traceback.format_exc())
        starter.close()
        pipe.send(answer)


def _function(name: str) -> Callable[..., Any]:
    module, _, function = name.partition(":")
    found: Callable[..., Any] = getattr(importlib.import_module(module), function)
    return found


def _caught(rank: int, start: Start, name: str, arguments: tuple[Any, ...]) -> Any:
    try:
        return _function(name)(rank, start, *arguments)
    except Exception as problem:  # noqa: BLE001 (the test looks at it)
        return f"{type(problem).__name__}: {problem}"
