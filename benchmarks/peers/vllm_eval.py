"""vLLM by its own engine: run by `serve_vs_peers.py` in an environment that has vLLM's CPU build.

Reads {"folder", "prompt", "new", "streams", "prefill", "rounds", "cpus"} as JSON on stdin, prints {"decode":
{streams: [...]}, "prefill": [...]} in tokens a second, one figure a round. All CPUs are bound to its workers, since it
would else keep one for itself; the prefix cache is off, so that every prompt is computed.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def main() -> None:
    asked: dict[str, Any] = json.load(sys.stdin)
    os.environ |= {
        "VLLM_CPU_OMP_THREADS_BIND": asked["cpus"],
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    answer = os.dup(1)
    os.dup2(2, 1)  # what others print must not meet the answer
    from vllm import LLM, SamplingParams, __version__

    engine = LLM(
        asked["folder"],
        dtype="bfloat16",
        skip_tokenizer_init=True,
        max_model_len=2048,
        max_num_seqs=max(asked["streams"]),
        enable_prefix_caching=False,
    )

    def seconds(prompt: list[int], streams: int, new: int) -> float:
        how = SamplingParams(temperature=0.0, max_tokens=new, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        done = engine.generate([{"prompt_token_ids": prompt}] * streams, how, use_tqdm=False)
        spent = time.perf_counter() - start
        assert all(len(each.outputs[0].token_ids) == new for each in done)
        return spent

    decode: dict[int, list[float]] = {streams: [] for streams in asked["streams"]}
    prefill = []
    for number in range(asked["rounds"] + 1):  # the first one warms up
        for streams, found in decode.items():
            first = seconds(asked["prompt"], streams, 1)
            spent = seconds(asked["prompt"], streams, asked["new"]) - first
            if number:
                found.append(streams * (asked["new"] - 1) / spent)
        spent = seconds(asked["prefill"], 1, 1)
        if number:
            prefill.append(len(asked["prefill"]) / spent)
    with os.fdopen(answer, "w") as out:
        json.dump({"decode": decode, "prefill": prefill, "version": __version__}, out)


if __name__ == "__main__":
    main()
