"""The engine beside llama.cpp on the same model file, greedy: one stream, and the prefill of 1,024 tokens.

Ours is the product's engine in front of the fused decoder, with all that belongs to it (scheduler, sampling,
hand-out); llama.cpp's is its own eval loop, on the file as it is (Q4_1) and requantised to Q4_0, with 1 thread
and with all, whichever is faster. Rounds are interleaved, ours between the peer's. 4 and 16 streams of ours are
reported. The peer needs an environment of its own: `make peers`.

Usage: python benchmarks/serve_vs_peers.py [--json] [--quick] [--llama PYTHON]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness
import stretto
from stretto.core.clock import RealClock
from stretto.core.record import Recorder
from stretto.models.calibrate import warm_up
from stretto.models.load import Model, load_model
from stretto.models.source import packaged_model
from stretto.serve.engine import Engine
from stretto.serve.local import LocalBackend
from stretto.serve.request import Answer, Request
from stretto.serve.scheduler import Scheduler, SchedulerConfig

PEER = Path(__file__).parent / "peers" / "llama_eval.py"
DEFAULT_PEER = Path(".peers/llama/bin/python")
PATHS = {"exact": "fp32", "bf16": "bf16", "fast": "bf16"}
PROMPT, NEW, PREFILL = 32, 128, 1024
GOAL_STREAM = {"exact": 2.2, "fast": 2.5}
GOAL_PREFILL = 2.5


def answers(model: Model, streams: int, prompt: Sequence[int], new: int) -> list[Answer]:
    """So many requests at once through the engine, to the end."""

    async def main() -> list[Answer]:
        clock = RealClock()
        room = len(prompt) + new
        settings = SchedulerConfig(
            joining="continuous", slots=streams, pages=streams, page_tokens=room, prefill_tokens=max(512, len(prompt))
        )
        backend = LocalBackend(model, pages=streams, page_tokens=room, clock=clock)
        engine = Engine(Scheduler(settings), backend, clock, Recorder("measured"))
        handles = [engine.submit(Request(id=i, prompt=tuple(prompt), limit=new)) for i in range(streams)]
        engine.close()
        await engine.run()
        return [handle.result() for handle in handles]

    return asyncio.run(main())


def decode_speed(model: Model, streams: int, prompt: Sequence[int], new: int) -> float:
    """Tokens a second after the first token of the last stream."""
    found = answers(model, streams, prompt, new)
    first = max(answer.token_times_s[0] for answer in found)
    tokens = sum(sum(at > first for at in answer.token_times_s) for answer in found)
    return tokens / (max(answer.finished_s for answer in found) - first)


def prefill_speed(model: Model, prompt: Sequence[int]) -> float:
    (answer,) = answers(model, 1, prompt, 1)
    assert answer.first_token_s is not None
    return len(prompt) / (answer.first_token_s - answer.arrived_s)


def peer(python: Path, threads: int, rounds: int, ids: Sequence[int], requantize: str | None) -> dict[str, Any]:
    asked = {
        "model": str(packaged_model()),
        "threads": threads,
        "prompt": list(ids[:PROMPT]),
        "prefill": list(ids[:PREFILL]),
        "new": NEW,
        "rounds": rounds,
        "requantize": requantize,
    }
    done = subprocess.run(
        [python, PEER], input=json.dumps(asked), capture_output=True, text=True, timeout=600, check=False
    )
    if done.returncode:
        raise SystemExit(f"the peer failed: {done.stderr[-1000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def peers(python: Path, threads: int, quick: bool, ids: Sequence[int]) -> tuple[float, float, str]:
    """The best decode and prefill speed over formats and numbers of threads, and what they were."""
    decode: dict[str, float] = {}
    prefill: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, requantize in (("Q4_1", None), ("Q4_0", str(Path(folder) / "q4_0.gguf"))):
            for count in sorted({1, threads}):
                found = peer(python, count, 1 if quick else 3, ids, requantize)
                what = f"{name}, {count} threads"
                decode[what] = statistics.median(found["decode"])
                prefill[what] = statistics.median(found["prefill"])
    best = max(decode, key=decode.__getitem__), max(prefill, key=prefill.__getitem__)
    return decode[best[0]], prefill[best[1]], f"llama.cpp at its best: decode {best[0]}; prefill {best[1]}"


def measure(quick: bool) -> Sequence[harness.Row]:
    threads = next(iter(stretto.probe().devices().values())).units
    python = harness.options.llama
    models = {path: load_model("default", dtype=dtype, path=path, threads=threads) for path, dtype in PATHS.items()}
    tokenizer = models["exact"].tokenizer
    ids = (tokenizer.encode(" ".join(f"Item {i}: the river runs past house number {i}." for i in range(200))))[:PREFILL]
    for model in models.values():
        warm_up(model)
        answers(model, 1, ids[:PROMPT], 8)
    before = peers(python, threads, quick, ids) if python.exists() else None
    speed: dict[tuple[str, str], list[float]] = {}
    for _ in range(2 if quick else 5):
        for path, model in models.items():
            for streams in (1, 4, 16):
                speed.setdefault((path, f"{streams} streams"), []).append(
                    decode_speed(model, streams, ids[:PROMPT], NEW)
                )
            speed.setdefault((path, "prefill"), []).append(prefill_speed(model, ids))
    after = peers(python, threads, quick, ids) if python.exists() else None
    return list(rows(speed, before, after))


def rows(speed: dict[tuple[str, str], list[float]], before: Any, after: Any) -> Any:
    """Ours beside the mean of the peer before and after; a peer that is not installed is said to be missing."""
    beside: dict[str, float] = {}
    note = f"llama.cpp is not installed at {harness.options.llama}; see `make peers`"
    if before is not None:
        beside = {"1 streams": (before[0] + after[0]) / 2, "prefill": (before[1] + after[1]) / 2}
        note = (
            f"{before[2]}; before {before[0]:.0f} and {before[1]:.0f}, after {after[0]:.0f} and {after[1]:.0f} tokens/s"
        )
    for (path, what), found in speed.items():
        ours = statistics.median(found)
        against = beside.get(what)
        goal = None
        if against is not None:
            goal = GOAL_STREAM.get(path) if what == "1 streams" else GOAL_PREFILL if path != "bf16" else None
        yield harness.Row(
            name=f"{path}, {what}",
            ours=ours,
            peer=against,
            ratio=None if against is None else ours / against,
            unit="tokens/s",
            goal=goal,
            spread=(max(found) - min(found)) / ours,
            note=note if what in ("1 streams", "prefill") else "",
        )


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--llama", type=Path, default=DEFAULT_PEER, help="interpreter that has llama-cpp-python")


if __name__ == "__main__":
    sys.exit(harness.main(measure, __doc__, add=add_options))
