"""llama.cpp by its own eval loop: run by `serve_vs_peers.py` in an environment that has llama-cpp-python.

Reads {"model", "threads", "prompt", "new", "rounds", "prefill"} as JSON on stdin, prints {"decode": [...],
"prefill": [...]} in tokens a second, one figure a round. With "requantize", the model is turned into Q4_0, its faster
format on this kind of machine, and nothing is measured.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from typing import Any

import llama_cpp


def requantize(source: str, target: str) -> None:
    """Write `source` as Q4_0."""
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    parameters.allow_requantize = True
    if llama_cpp.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters)):
        raise SystemExit("llama.cpp could not requantise the model")


def main() -> None:
    asked: dict[str, Any] = json.load(sys.stdin)
    if asked.get("requantize"):
        requantize(asked["model"], asked["requantize"])
        json.dump({}, sys.stdout)
        return
    model = llama_cpp.Llama(
        asked["model"],
        n_ctx=2048,
        n_threads=asked["threads"],
        n_threads_batch=asked["threads"],
        n_batch=1024,
        verbose=False,
    )
    decode, prefill = [], []
    for number in range(asked["rounds"] + 1):  # the first one warms up
        model.reset()
        model.eval(asked["prompt"])
        token = int(model.scores[model.n_tokens - 1].argmax())
        start = time.perf_counter()
        for _ in range(asked["new"]):
            model.eval([token])
            token = int(model.scores[model.n_tokens - 1].argmax())
        spent = time.perf_counter() - start
        model.reset()
        start = time.perf_counter()
        model.eval(asked["prefill"])
        if number:
            decode.append(asked["new"] / spent)
            prefill.append(len(asked["prefill"]) / (time.perf_counter() - start))
    json.dump({"decode": decode, "prefill": prefill, "version": llama_cpp.__version__}, sys.stdout)


if __name__ == "__main__":
    main()
