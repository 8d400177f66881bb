"""The engine beside llama.cpp and vLLM, each in its best setting, on the same model, greedy.

Ours is what `stretto.LLM` and `stretto serve` run: scheduler, pages, sampling, hand-out, and the fused decoder.
llama.cpp runs its own eval loop on the file as it is (Q4_1) and requantised to Q4_0, with 1 thread and with all,
whichever is faster; vLLM's CPU build runs its own engine on the same weights in bf16, with all cores bound to its
workers. No one shares prompts. The peers are run before and after ours, and the mean is taken. A model of 1.1 billion
random weights in Q4_0 is run beside llama.cpp besides, one stream. Each peer needs an environment of its own: `make
peers`. With --without-tiles nobody uses AMX, as on machines that have none: we ourselves are told so, and oneDNN, with
which vLLM multiplies; llama.cpp's build has no AMX in it.

Usage: python benchmarks/serve_vs_peers.py [--json] [--quick] [--llama PYTHON] [--vllm PYTHON] [--small-only]
    [--without-tiles]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import harness
from peers import random_model
from stretto.core.clock import RealClock
from stretto.models.configs import config_of
from stretto.models.load import Model, open_model
from stretto.models.source import packaged_model
from stretto.models.weights import state_dict
from stretto.serve.request import Answer, Request
from stretto.serve.settings import EngineSettings, load, new_backend, new_engine

WITHOUT_TILES = {"STRETTO_KERNELS": "avx512bf16", "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"}
HERE = Path(__file__).parent / "peers"
LLAMA, VLLM = Path(".peers/llama/bin/python"), Path(".peers/vllm/bin/python")
PATHS = {"exact": "fp32", "bf16": "bf16", "fast": "bf16"}
STREAMS = (1, 4, 16)
PROMPT, NEW, PREFILL = 32, 128, 1024
GOALS_LLAMA = {"1 streams": {"exact": 2.2, "fast": 2.5}, "prefill": {"exact": 2.5, "bf16": 2.5, "fast": 2.5}}
GOALS_VLLM = {
    "4 streams": {"exact": 5.0, "bf16": 5.0, "fast": 5.0},
    "16 streams": {"exact": 1.6, "bf16": 2.3, "fast": 3.0},
    "prefill": {"exact": 1.0, "bf16": 1.6, "fast": 2.2},
}

Speeds = dict[str, float]
"""Tokens a second by what was measured: "4 streams", "prefill"."""


def settings(model: str, path: str, streams: int = max(STREAMS)) -> EngineSettings:
    return EngineSettings(
        model=model,
        dtype=PATHS[path],  # type: ignore[arg-type]
        path=path,  # type: ignore[arg-type]
        slots=streams,
        max_model_len=2048,
        prefill_tokens=PREFILL,
        prefix_cache=False,
    )


def answers(model: Model, how: EngineSettings, streams: int, prompt: Sequence[int], new: int) -> list[Answer]:
    """So many requests at once through the engine, to the end."""

    async def main() -> list[Answer]:
        clock = RealClock()
        engine = new_engine(model, how, new_backend(model, how, clock), clock)
        handles = [engine.submit(Request(id=i, prompt=tuple(prompt), limit=new)) for i in range(streams)]
        engine.close()
        await engine.run()
        return [handle.result() for handle in handles]

    return asyncio.run(main())


def decode_speed(model: Model, how: EngineSettings, streams: int, prompt: Sequence[int], new: int) -> float:
    """Tokens a second after the first token of the last stream."""
    found = answers(model, how, streams, prompt, new)
    first = max(answer.token_times_s[0] for answer in found)
    tokens = sum(sum(at > first for at in answer.token_times_s) for answer in found)
    return tokens / (max(answer.finished_s for answer in found) - first)


def prefill_speed(model: Model, how: EngineSettings, prompt: Sequence[int]) -> float:
    (answer,) = answers(model, how, 1, prompt, 1)
    assert answer.first_token_s is not None
    return len(prompt) / (answer.first_token_s - answer.arrived_s)


class PeerFailed(Exception):
    """A peer does not run on this machine."""


def ask(python: Path, script: str, asked: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [python, HERE / script], input=json.dumps(asked), capture_output=True, text=True, timeout=900, check=False
    )
    if done.returncode:
        raise PeerFailed(f"{script} ended with {done.returncode}: {done.stderr[-1000:] or 'it said nothing'}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def llama(python: Path, files: dict[str, str], rounds: int, ids: Sequence[int], new: int) -> tuple[Speeds, str]:
    """The best decode and prefill speed over files and numbers of threads, and with what they were."""
    best: dict[str, tuple[float, str]] = {}
    for name, file in files.items():
        for threads in sorted({1, len(os.sched_getaffinity(0))}):
            asked = {"model": file, "threads": threads, "new": new, "rounds": rounds}
            asked |= {"prompt": list(ids[:PROMPT]), "prefill": list(ids)}
            found = ask(python, "llama_eval.py", asked)
            for what, part in (("1 streams", "decode"), ("prefill", "prefill")):
                best[what] = max(
                    best.get(what, (0.0, "")), (statistics.median(found[part]), f"{name}, {threads} threads")
                )
    note = "; ".join(f"{what}: {how}" for what, (_, how) in best.items())
    return {what: speed for what, (speed, _) in best.items()}, f"llama.cpp at its best ({note})"


def vllm(python: Path, folder: Path, rounds: int, ids: Sequence[int]) -> tuple[Speeds, str]:
    asked = {"folder": str(folder), "new": NEW, "streams": STREAMS, "rounds": rounds, "prefill": list(ids)}
    asked |= {"prompt": list(ids[:PROMPT]), "cpus": ",".join(map(str, sorted(os.sched_getaffinity(0))))}
    found = ask(python, "vllm_eval.py", asked)
    speeds = {f"{streams} streams": statistics.median(speed) for streams, speed in found["decode"].items()}
    return speeds | {"prefill": statistics.median(found["prefill"])}, f"vLLM {found['version']} in bf16"


def vllm_folder(folder: Path) -> Path:
    """The packaged model as vLLM reads it: its weights in bf16, its configuration."""
    import torch
    from safetensors.torch import save_file

    files = open_model("default")
    tensors = {
        name: part.to(torch.bfloat16).contiguous() for name, part in state_dict(files.weights, files.spec).items()
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = config_of(files.spec) | {"torch_dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def ours(rounds: int, ids: Sequence[int]) -> dict[tuple[str, str], list[float]]:
    speed: dict[tuple[str, str], list[float]] = {}
    loaded = {path: (settings("default", path), load(settings("default", path))) for path in PATHS}
    for how, model in loaded.values():
        answers(model, how, 1, ids[:PROMPT], 8)
    for _ in range(rounds):
        for path, (how, model) in loaded.items():
            for streams in STREAMS:
                found = decode_speed(model, how, streams, ids[:PROMPT], NEW)
                speed.setdefault((path, f"{streams} streams"), []).append(found)
            speed.setdefault((path, "prefill"), []).append(prefill_speed(model, how, ids))
    return speed


def measure(quick: bool) -> Sequence[harness.Row]:
    tokenizer = open_model("default").tokenizer
    ids = (tokenizer.encode(" ".join(f"Item {i}: the river runs past house number {i}." for i in range(200))))[:PREFILL]
    options, rounds = harness.options, 1 if quick else 3
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = {"Q4_1": str(packaged_model())}
        if options.llama.exists():
            files["Q4_0"] = str(folder / "q4_0.gguf")
            ask(options.llama, "llama_eval.py", {"model": files["Q4_1"], "requantize": files["Q4_0"], "rounds": 0})
        if options.vllm.exists():
            vllm_folder(folder)

        runs: dict[str, Callable[[], tuple[Speeds, str]]] = {}
        if options.llama.exists():
            runs["llama.cpp"] = lambda: llama(options.llama, files, rounds, ids, NEW)
        if options.vllm.exists():
            runs["vLLM"] = lambda: vllm(options.vllm, folder, rounds, ids)

        def peers() -> Iterator[tuple[str, Speeds, str]]:
            for name, run in list(runs.items()):
                try:
                    yield name, *run()
                except PeerFailed as problem:
                    print(f"{name} is left out: {problem}", file=sys.stderr)
                    del runs[name]

        before = list(peers())
        speed = ours(2 if quick else 5, ids)
        after = list(peers())
        found = list(rows(speed, before, after))
        if not quick and not options.small_only and "llama.cpp" in runs:
            found += large(options.llama, folder / "large.gguf", ids)
    return found


def rows(speed: dict[tuple[str, str], list[float]], before: Any, after: Any) -> Iterator[harness.Row]:
    """Ours beside the mean of each peer before and after; ours alone where no peer is installed."""
    goals = {"llama.cpp": GOALS_LLAMA, "vLLM": GOALS_VLLM}
    for (path, what), found in speed.items():
        beside = [
            (name, (first[what] + last[what]) / 2, f"{note}: {first[what]:.0f} before, {last[what]:.0f} after")
            for (name, first, note), (_, last, _) in zip(before, after, strict=True)
            if what in first
        ]
        for name, peer, note in beside or [("no peer", None, "no peer is installed; see `make peers`")]:
            yield row(f"{path}, {what}, beside {name}", found, peer, goals.get(name, {}).get(what, {}).get(path), note)


def row(name: str, found: Sequence[float], peer: float | None, goal: float | None, note: str) -> harness.Row:
    middle = statistics.median(found)
    return harness.Row(
        name=name,
        ours=middle,
        peer=peer,
        ratio=None if peer is None else middle / peer,
        unit="tokens/s",
        goal=goal,
        spread=(max(found) - min(found)) / middle,
        note=note,
    )


def large(python: Path, file: Path, ids: Sequence[int]) -> list[harness.Row]:
    """One stream of a model that no cache holds: bounded by memory."""
    new = 48
    random_model.write(file, packaged_model())
    first, note = llama(python, {"Q4_0": str(file)}, 1, ids[:256], new)
    found = []
    for path in PATHS:
        how = settings(str(file), path, streams=1)
        model = load(how)
        speeds = [decode_speed(model, how, 1, ids[:PROMPT], new) for _ in range(3)]
        name = f"1.1 billion weights, {path}, 1 streams, beside llama.cpp"
        found.append(row(name, speeds, first["1 streams"], GOALS_LLAMA["1 streams"].get(path), note))
        del model
    return found


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--llama", type=Path, default=LLAMA, help="interpreter that has llama-cpp-python")
    parser.add_argument("--vllm", type=Path, default=VLLM, help="interpreter that has vLLM's CPU build")
    parser.add_argument("--without-tiles", action="store_true", help="on a machine with AMX: as on one without")
    parser.add_argument("--small-only", action="store_true", help="without the model of 1.1 billion weights")


if __name__ == "__main__":
    if "--without-tiles" in sys.argv and not os.environ.items() >= WITHOUT_TILES.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | WITHOUT_TILES)  # read at the first import
    sys.exit(harness.main(measure, __doc__, add=add_options))
