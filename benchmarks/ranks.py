"""Ranks of a benchmark: processes of one thread, each bound to a CPU of its own once they have met."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from stretto.comm.grid import RankGrid
from stretto.comm.transport import Transport

_TIMEOUT_S = 120.0
_ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**32)}
"""As training's own ranks have it, for all ways and peers alike."""


def run(world: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 1200.0) -> list[Any]:
    """The results of `function(rank, transport, *arguments)` by rank; the transport's one axis is named "rank"."""
    for name, value in _ALLOCATOR.items():
        os.environ.setdefault(name, value)
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(world, mp_context=get_context("spawn")) as pool:
        store = Path(folder) / "store"
        futures = [pool.submit(_rank, function, rank, world, store, arguments) for rank in range(world)]
        return [future.result(timeout_s) for future in futures]


def _rank(function: Callable[..., Any], rank: int, world: int, store: Path, arguments: tuple[Any, ...]) -> Any:
    torch.set_num_threads(1)
    transport = Transport.start(RankGrid(axes=(("rank", world),)), rank=rank, timeout_s=_TIMEOUT_S, store=store)
    usable = sorted(os.sched_getaffinity(0))
    if len(usable) >= world:
        os.sched_setaffinity(0, {usable[rank]})  # now, so that the threads that carry messages stay free
    try:
        return function(rank, transport, *arguments)
    finally:
        transport.close()
