"""Loading the packaged GGUF model and generating with it, against transformers on the same file and threads.

Goals: ready to run in 1.5 s; fp32 logits of 16 prompts within 1e-4 of transformers' (the fused decoder's exact
path within 1e-3); the same 64 greedy tokens; a batch of 16 at twice the speed of transformers' `generate`
(left-padded, its faster attention), in fp32, in bf16 and on the fused paths. The reference is read by
transformers' own GGUF loader, so nothing of ours is on its side. `--quick` leaves out bf16 and one of three
rounds, but not the peer's loading of some 18 s. Exit 1 when a goal is missed.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

# Before torch is imported, so that both sides' weights lie in huge pages.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch
import transformers

import harness
from stretto.models import Model, load_model
from stretto.models.segment import Segment
from stretto.models.source import packaged_model
from stretto.models.thread import compute

NEW_TOKENS = 64
BATCH = 16
LOAD_GOAL_S, LOGIT_GOAL, SPEED_GOAL = 1.5, 1e-4, 2.0
FUSED_LOGIT_GOAL = 1e-3  # activations in 24 bits of the largest of a group; logits go up to 40
_TEXT = (
    "The history of the printing press begins long before its famous inventor set his first line of "
    "type. Paper had come from the east along the roads of trade, and with it came the idea that a page"
    " could be pressed from a carved block instead of being copied by hand. In the monasteries of "
    "Europe the scribes went on writing, a year to a book, and the price of a library was the price of "
    "a farm. What changed was not one machine but several small inventions meeting: an oily ink that "
    "held to metal, a mould that cast the same letter a thousand times, and a screw press borrowed from"
    " wine."
)


def prompts(model: Model) -> list[list[int]]:
    """Sixteen prompts of 4 to 110 tokens."""
    ids = model.tokenizer.encode(_TEXT)
    return [ids[3 * i : 3 * i + 4 + 7 * i] for i in range(BATCH)]


def load_in_a_fresh_process(dtype: str, path: str) -> dict[str, float]:
    """Seconds to import torch, and to load once it is imported."""
    code = (
        "import os, time; os.environ['THP_MEM_ALLOC_ENABLE'] = '1'; a = time.perf_counter(); import torch;"
        "b = time.perf_counter(); from stretto.models import load_model;"
        f"load_model('default', dtype={dtype!r}, path={path!r}); c = time.perf_counter(); print(b - a, c - b)"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=300)
    imported, loaded = map(float, printed.stdout.split())
    return {"import": imported, "load": loaded}


def load_peer(dtype: torch.dtype) -> Any:
    path = packaged_model()
    return transformers.AutoModelForCausalLM.from_pretrained(str(path.parent), gguf_file=path.name, dtype=dtype).eval()


def prefill(model: Model, texts: Sequence[list[int]], room: int) -> tuple[torch.Tensor, Any]:
    """Logits after each prompt, and the cache with one slot a prompt."""
    cache = model.transformer.new_cache(pages=len(texts), page_tokens=room)
    segments, at = [], 0
    for slot, text in enumerate(texts):
        segments.append(Segment(at, len(text), 0, (slot,)))
        at += len(text)
    return model.transformer.forward(torch.tensor([token for text in texts for token in text]), segments, cache), cache


def generate(model: Model, texts: Sequence[list[int]], new: int = NEW_TOKENS) -> list[list[int]]:
    """Greedy tokens of each prompt, all in one batch."""
    logits, cache = prefill(model, texts, max(map(len, texts)) + new)
    columns = [logits.argmax(-1)]
    for step in range(new - 1):
        segments = [Segment(i, 1, len(text) + step, (i,)) for i, text in enumerate(texts)]
        columns.append(model.transformer.forward(columns[-1], segments, cache).argmax(-1))
    return torch.stack(columns, dim=1).tolist()


@torch.inference_mode()
def generate_peer(peer: Any, texts: Sequence[list[int]], new: int = NEW_TOKENS) -> list[list[int]]:
    """The same by transformers' own `generate` on a left-padded batch."""
    longest = max(map(len, texts))
    ids = torch.tensor([[0] * (longest - len(text)) + text for text in texts])
    mask = torch.tensor([[0] * (longest - len(text)) + [1] * len(text) for text in texts])
    out = peer.generate(
        ids, attention_mask=mask, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
    )
    return out[:, longest:].tolist()


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def check_load(rounds: int, peer_seconds: float) -> Iterator[harness.Row]:
    for dtype, path in (("fp32", "torch"), ("bf16", "torch"), ("fp32", "exact")):
        seen = [load_in_a_fresh_process(dtype, path) for _ in range(rounds)]
        load, imported = (statistics.median(each[what] for each in seen) for what in ("load", "import"))
        yield harness.Row(
            name=f"load GGUF, {dtype} on path {path}",
            ours=load,
            unit="s",
            goal=LOAD_GOAL_S,
            at_most=True,
            note=f"transformers {peer_seconds:.1f} s; torch itself is imported in {imported:.1f} s",
        )


def check_numbers(
    model: Model, peer: Any, texts: Sequence[list[int]], goal: float = LOGIT_GOAL
) -> Iterator[harness.Row]:
    """Logits after each prompt; and the peer's choice after each prefix of what we chose.

    As long as the choices agree, those are the peer's own greedy run.
    """
    worst, equal = 0.0, 0
    logits, _ = prefill(model, texts, 256)
    ours = generate(model, texts)
    for index, (text, reply) in enumerate(zip(texts, ours, strict=True)):
        with torch.inference_mode():
            wanted = peer(torch.tensor([text + reply[:-1]])).logits[0, len(text) - 1 :]
        worst = max(worst, (logits[index] - wanted[0]).abs().max().item())
        equal += reply == wanted.argmax(-1).tolist()
    kind = "fp32" if model.path == "torch" else f"fused {model.path}"
    yield harness.Row(name=f"{kind} logits, 16 prompts", ours=worst, unit="max abs difference", goal=goal, at_most=True)
    yield harness.Row(name=f"greedy 64 tokens, {kind}", ours=equal, unit="of 16 sequences equal", goal=BATCH)


def check_speed(model: Model, peer: Any, texts: Sequence[list[int]], rounds: int) -> harness.Row:
    """Ours against the peer with each of its attentions, interleaved; the peer's best median counts."""
    ways = {"ours": lambda: generate(model, texts)}
    for attention in ("sdpa", "eager"):
        ways[attention] = lambda attention=attention: (
            peer.set_attn_implementation(attention),
            generate_peer(peer, texts),
        )
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for call in ways.values():
        call()
    for _ in range(rounds):
        for name, call in ways.items():
            seconds[name].append(timed(call))
    speed = {name: BATCH * NEW_TOKENS / statistics.median(times) for name, times in seconds.items()}
    best = max(("sdpa", "eager"), key=speed.__getitem__)
    ratios = [peer_time / our_time for our_time, peer_time in zip(seconds["ours"], seconds[best], strict=True)]
    ratio = statistics.median(ratios)
    kind = model.dtype if model.path == "torch" else f"fused {model.path} beside {peer.dtype}"
    name = f"batch of {BATCH}, {NEW_TOKENS} tokens, {kind}"
    return harness.Row(
        name=name,
        ours=speed["ours"],
        peer=speed[best],
        unit="tokens/s",
        ratio=ratio,
        goal=SPEED_GOAL,
        note=f"transformers with {best} attention; ratios {min(ratios):.2f} to {max(ratios):.2f}",
    )


def measure(quick: bool) -> Sequence[harness.Row]:
    transformers.logging.set_verbosity_error()
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    rounds = 2 if quick else 3

    start = time.perf_counter()
    peer = load_peer(torch.float32)
    rows = list(check_load(1 if quick else 3, time.perf_counter() - start))
    model = load_model("default", threads=threads)
    texts = prompts(model)
    rows += check_numbers(model, peer, texts)
    rows.append(check_speed(model, peer, texts, rounds))
    exact = load_model("default", dtype="fp32", path="exact", threads=threads)
    rows += check_numbers(exact, peer, texts, FUSED_LOGIT_GOAL)
    if not quick:
        rows.append(check_speed(exact, peer, texts, rounds))
        half = peer.bfloat16()
        for path in ("torch", "bf16", "fast"):
            rows.append(
                check_speed(load_model("default", dtype="bf16", path=path, threads=threads), half, texts, rounds)
            )
    return rows


if __name__ == "__main__":
    # Both rivals compute in one and the same thread: with two, OpenMP would manage more threads than there are cores.
    sys.exit(compute(harness.main, measure, __doc__))
