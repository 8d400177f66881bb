"""What can be asked of the serving domain: prompts to be answered by a language model, with an objective and limits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from stretto.core.errors import FieldError, require
from stretto.serve.joining import JOININGS
from stretto.serve.sampling import Sampling
from stretto.serve.slots import Reorder

MAX_PROMPTS = 100_000
MAX_NEW_TOKENS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a plan must keep to; None means no limit.

    Attributes:
        memory_gb: most memory, in units of 1e9 bytes, for weights and KV pages.
        threads: most CPU threads.
        seconds: the run is ended after this long, with what is done.
    """

    memory_gb: float | None = None
    threads: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("memory_gb", "seconds"):
            value = getattr(self, name)
            require(value is None or value > 0, name, value, "> 0")
        require(self.threads is None or self.threads >= 1, "threads", self.threads, ">= 1")


@dataclass(frozen=True, kw_only=True)
class ServeJob:
    """Answer prompts with a language model.

    Attributes:
        model: a name ("smollm2-135m-instruct"), a path (.gguf or a Hugging Face folder) or a Hugging Face id.
        prompts: the questions, each a user's message.
        system: a system message put before each, or None for the model's own.
        chat: whether prompts go through the model's chat template; else they are continued as they stand.
        max_new_tokens: longest answer, in tokens.
        expected_new_tokens: what the forecast assumes of an answer's length; None assumes half of the longest.
        ignore_eos: go on to `max_new_tokens` whatever the model says (for load tests).
        sampling: how tokens are drawn; request i uses seed + i.
        stop: an answer ends before the first of these strings.
        arrival_gap_s: seconds between two arrivals; 0: all are there at the start.
        objective: "throughput" (tokens a second over the whole job) or "latency" (mean seconds from arrival
            to the last token).
        dtype: "auto" weighs fp32 and bf16, else the one to use; "int4" keeps keys and values in 4 bits.
        path: "auto" weighs the fused decoder's "exact" and "bf16" where the weights can stay packed, else "torch";
            "fast" (8-bit activations) changes numbers, so it must be asked for.
        slots: None weighs several numbers of concurrent requests, else the one to use.
        threads: None weighs several numbers of threads, else the one to use.
        joining: "auto" weighs all joining policies, else the name of the one to use.
        layout: "auto" weighs all layouts of the KV cache, else the one to use.
        reorder: when holes are closed in layout "slots": "eager", "threshold" or "never".
        prefill: "mixed" puts prompts into the steps of decoding rows, "lanes" beside them, each on cores of its own;
            "auto" weighs both.
        instances: how many copies of the model run side by side. Not weighed: what they cost each other is not
            measured beyond the bandwidth and the cores they share.
        limits: what a plan must keep to.
    """

    kind: Literal["serve"] = "serve"
    model: str = "smollm2-135m-instruct"
    prompts: tuple[str, ...]
    system: str | None = None
    chat: bool = True
    max_new_tokens: int = 128
    expected_new_tokens: int | None = None
    ignore_eos: bool = False
    sampling: Sampling = field(default_factory=Sampling)
    stop: tuple[str, ...] = ()
    arrival_gap_s: float = 0.0
    objective: Literal["throughput", "latency"] = "throughput"
    dtype: Literal["auto", "fp32", "bf16", "int4"] = "auto"
    path: Literal["auto", "torch", "exact", "bf16", "fast"] = "auto"
    slots: int | None = None
    threads: int | None = None
    joining: str = "auto"
    layout: Literal["auto", "pages", "slots"] = "auto"
    reorder: Reorder = "eager"
    prefill: Literal["auto", "mixed", "lanes"] = "mixed"
    instances: int = 1
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        require(1 <= len(self.prompts) <= MAX_PROMPTS, "prompts", len(self.prompts), f"1 .. {MAX_PROMPTS} prompts")
        for number, prompt in enumerate(self.prompts):
            require(bool(prompt.strip()), f"prompts.{number}", prompt, "a text that is not empty")
        require(1 <= self.max_new_tokens <= MAX_NEW_TOKENS, "max_new_tokens", self.max_new_tokens, ">= 1")
        if self.expected_new_tokens is not None and not 1 <= self.expected_new_tokens <= self.max_new_tokens:
            raise FieldError("expected_new_tokens", self.expected_new_tokens, "in 1 .. max_new_tokens")
        require(all(self.stop), "stop", self.stop, "strings that are not empty")
        require(0 <= self.arrival_gap_s <= 3600, "arrival_gap_s", self.arrival_gap_s, "in 0 .. 3600")
        require(self.slots is None or 1 <= self.slots <= 4096, "slots", self.slots, "in 1 .. 4096")
        require(self.threads is None or self.threads >= 1, "threads", self.threads, ">= 1")
        require(1 <= self.instances <= 64, "instances", self.instances, "in 1 .. 64")
        choices = ("auto", *JOININGS)
        require(self.joining in choices, "joining", self.joining, f"one of {', '.join(choices)}")

    @property
    def assumed_new_tokens(self) -> int:
        """The length of an answer that the forecast assumes."""
        if self.ignore_eos:
            return self.max_new_tokens
        return self.expected_new_tokens or max(1, self.max_new_tokens // 2)
