"""`stretto serve` beside vLLM's server, through one real client: the official `openai` package, streaming.

Both run the same weights (ours packed, vLLM's in bf16), each on all cores, greedy, answers of a fixed length; no two
prompts begin alike. The client counts tokens as they come: tokens a second over all streams, the median time to the
first token and between tokens. Servers run one at a time and are interleaved; the client works on the same cores.
The peer needs an environment of its own: `make peers`.

Usage: python benchmarks/serve_over_http.py [--json] [--quick] [--vllm PYTHON]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx
import openai

import harness
from serve_vs_peers import PATHS, VLLM, vllm_folder
from stretto.models.load import open_model

STREAMS = (1, 4, 16)
NEW = 96
START_S = 300.0
GOALS = {4: 5.0, 16: 3.0}
QUESTIONS = ("Tell me about the sea.", "What is a river?", "Describe a town in winter.", "Why is the sky blue?")


@dataclass(frozen=True)
class Heard:
    """What the client saw: tokens a second over all streams, and the medians of two waits, in seconds."""

    speed: float
    first_token_s: float
    between_s: float


@contextlib.contextmanager
def served(command: Sequence[str | Path], environment: dict[str, str], port: int) -> Iterator[None]:
    """A server that answers on `port`, ended when the block is left."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | environment)
        try:
            deadline = time.monotonic() + START_S
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(f"http://127.0.0.1:{port}/health", timeout=2).status_code == 200:
                        break
                if process.poll() is not None or time.monotonic() > deadline:
                    output.seek(0)
                    raise SystemExit(f"{command[0]} does not serve: {output.read()[-1500:].decode(errors='replace')}")
                time.sleep(0.2)
            yield
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


async def listen(port: int, model: str, streams: int, new: int) -> Heard:
    """So many answers at once."""
    client = openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", timeout=120)
    more = {"ignore_eos": True}

    async def one(number: int) -> list[float]:
        # A number of its own keeps any cache of prefixes out of it.
        prompt = f"Letter {time.monotonic_ns() % 10**6} {number}: {QUESTIONS[number % len(QUESTIONS)]}"
        stream = await client.completions.create(
            model=model, prompt=prompt, max_tokens=new, temperature=0, stream=True, extra_body=more
        )
        return [time.perf_counter() async for event in stream if event.choices]

    start = time.perf_counter()
    times = await asyncio.gather(*(one(number) for number in range(streams)))
    spent = max(heard[-1] for heard in times) - start
    await client.close()
    return Heard(
        speed=streams * new / spent,
        first_token_s=statistics.median(heard[0] - start for heard in times),
        between_s=statistics.median((heard[-1] - heard[0]) / (new - 1) for heard in times),
    )


def measure(quick: bool) -> Sequence[harness.Row]:
    found: dict[str, dict[int, list[Heard]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "model"
        folder.mkdir()
        servers = dict(commands(vllm_folder(folder)))
        for _ in range(1 if quick else 2):
            for server, (command, environment) in servers.items():
                with socket.socket() as free:
                    free.bind(("127.0.0.1", 0))
                    port = free.getsockname()[1]
                with served([*command, "--port", str(port)], environment, port):
                    asyncio.run(listen(port, "model", 2, 8))
                    for streams in STREAMS:
                        rounds = [asyncio.run(listen(port, "model", streams, NEW)) for _ in range(1 if quick else 3)]
                        found.setdefault(server, {}).setdefault(streams, []).extend(rounds)
    return list(rows(found))


def commands(folder: Path) -> Iterator[tuple[str, tuple[list[str | Path], dict[str, str]]]]:
    most = str(max(STREAMS))
    open_model("default").tokenizer.save(folder)
    ours: list[str | Path] = [sys.executable, "-m", "stretto", "serve", "default", "--served-model-name", "model"]
    for path, dtype in PATHS.items():
        yield path, ([*ours, "--path", path, "--dtype", dtype, "--max-num-seqs", most], {})
    python = harness.options.vllm
    if python.exists():
        cores = ",".join(map(str, sorted(os.sched_getaffinity(0))))
        environment = {"VLLM_CPU_OMP_THREADS_BIND": cores, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
        # Not its command, which asks for a package of the name vllm: the CPU build has another.
        command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
        command += ["--served-model-name", "model", "--dtype", "bfloat16", "--max-model-len", "2048"]
        command += ["--max-num-seqs", most, "--no-enable-prefix-caching"]
        yield "vLLM", (command, environment)


def rows(found: dict[str, dict[int, list[Heard]]]) -> Iterator[harness.Row]:
    peer = found.pop("vLLM", None)
    for path, by_streams in found.items():
        for streams, heard in by_streams.items():
            ours = statistics.median(each.speed for each in heard)
            beside = statistics.median(each.speed for each in peer[streams]) if peer else None
            note = f"ours: {_waits(heard)}"
            note += f"; vLLM: {_waits(peer[streams])}" if peer else "; vLLM is not installed, see `make peers`"
            yield harness.Row(
                name=f"{path}, {streams} streams through one client",
                ours=ours,
                peer=beside,
                ratio=None if beside is None else ours / beside,
                unit="tokens/s",
                goal=GOALS.get(streams) if beside and path == "fast" else None,
                spread=(max(each.speed for each in heard) - min(each.speed for each in heard)) / ours,
                note=note,
            )


def _waits(heard: Sequence[Heard]) -> str:
    first = statistics.median(each.first_token_s for each in heard)
    between = statistics.median(each.between_s for each in heard)
    return f"{1e3 * first:.0f} ms to the first token, {1e3 * between:.1f} ms between tokens"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--vllm", type=Path, default=VLLM, help="interpreter that has vLLM's CPU build")


if __name__ == "__main__":
    sys.exit(harness.main(measure, __doc__, add=add_options))
