"""What can be asked of the deployment domain: a model that is to serve a load, with an objective and limits.

A deployment knows lengths and no texts, so it can be planned for models and machines that are not here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from stretto.core.errors import require
from stretto.serve.deploy.engines import HERE, engine
from stretto.serve.deploy.load import MAX_REQUESTS, MAX_TOKENS


@dataclass(frozen=True, kw_only=True)
class LoadSpec:
    """Where the requests are from: a trace, or drawn from a seed.

    Attributes:
        trace: a file of requests, as APEX, Azure or Mooncake publish them or with our own columns; None draws them.
        requests: how many to draw; of a trace, how many of its first ones to take (None: all).
        arrivals: "poisson" at `rate_per_s`, "even" gaps of that rate, or all "at_once".
        rate_per_s: requests a second; of a trace, None keeps its own times and a number stretches them evenly.
        prompt_tokens, output_tokens: mean lengths that are drawn.
        spread: standard deviation of drawn lengths as a share of their means; 0 makes all alike. Lengths are
            log-normal.
        turns: requests of one conversation; each prompt holds the texts before it, which a prefix cache may know.
        think_s: seconds from one turn's arrival to the next one's.
        seed: of all draws.
    """

    trace: str | None = None
    requests: int | None = None
    arrivals: Literal["poisson", "even", "at_once"] = "poisson"
    rate_per_s: float | None = None
    prompt_tokens: int = 512
    output_tokens: int = 128
    spread: float = 0.0
    turns: int = 1
    think_s: float = 30.0
    seed: int = 0

    def __post_init__(self) -> None:
        require(self.requests is None or 1 <= self.requests <= MAX_REQUESTS, "requests", self.requests, "1 .. 1000000")
        rate = self.rate_per_s
        require(rate is None or 0 < rate <= 1e6, "rate_per_s", rate, "requests a second, above 0 and at most 1e6")
        if self.trace is None:
            require(self.requests is not None, "requests", self.requests, "given where there is no trace")
            drawn = self.arrivals == "at_once" or rate is not None
            require(drawn, "rate_per_s", rate, "given where arrivals are drawn")
        for name in ("prompt_tokens", "output_tokens"):
            require(1 <= getattr(self, name) <= MAX_TOKENS, name, getattr(self, name), f"in 1 .. {MAX_TOKENS}")
        require(0 <= self.spread <= 4, "spread", self.spread, "in 0 .. 4")
        require(1 <= self.turns <= 1000, "turns", self.turns, "in 1 .. 1000")
        require(0 <= self.think_s <= 1e6, "think_s", self.think_s, "seconds from 0 to 1e6")
        require(0 <= self.seed < 2**63, "seed", self.seed, "in 0 .. 2**63 - 1")


@dataclass(frozen=True, kw_only=True)
class Slo:
    """What a request is promised, and to how many of them.

    Attributes:
        first_token_s: most seconds from arrival to the first token.
        token_s: most seconds per output token after the first, on average over the request.
        latency_s: most seconds from arrival to the last token.
        share: of the requests that must be served so.
    """

    first_token_s: float | None = None
    token_s: float | None = None
    latency_s: float | None = None
    share: float = 0.9

    def __post_init__(self) -> None:
        for name in ("first_token_s", "token_s", "latency_s"):
            value = getattr(self, name)
            require(value is None or 0 < value < 1e6, name, value, "seconds above 0")
        require(0 < self.share <= 1, "share", self.share, "in (0, 1]")


@dataclass(frozen=True, kw_only=True)
class DeploymentJob:
    """Serve a load with a model on some machines.

    Attributes:
        model: a shipped name ("llama-3-70b"), a Hugging Face folder, or a `config.json`.
        load: the requests.
        weights: how the layers' matrices are stored; arithmetic and activations have 16 bits.
        kv: how keys and values are stored.
        objective: "throughput" (output tokens a second), "latency" (mean seconds from arrival to the last token),
            "energy" (joules an output token), "cost" (dollars a million output tokens) or "slo" (share of requests
            served as promised).
        slo: the promise.
        engine: whose constants and defaults hold, by name and version; "stretto" is the product's own, measured on this
            machine. None takes that here and vllm-0.6 elsewhere.
        policy: "auto" weighs the engine's own and chunked prefill; "whole" prompts first in steps of their own,
            "chunked" prompts beside decoding rows, "static" batches, or two "lanes" with a few shares of the devices.
        preemption: what becomes of the pages of a request that is put back.
        prefix_cache: whether requests share the pages of texts that begin alike; None weighs both where the load says
            what its requests share.
        slots: most sequences at once in a batch; None takes the engine's.
        memory_share: of each device's memory that the engine may take; None takes the engine's.
        devices: use so many of the cluster's devices; None uses all of them.
        prices: dollars an hour of one device, by its type.
    """

    kind: Literal["deployment"] = "deployment"
    model: str
    load: LoadSpec
    weights: Literal["bf16", "fp8"] = "bf16"
    kv: Literal["bf16", "fp8"] = "bf16"
    objective: Literal["throughput", "latency", "energy", "cost", "slo"] = "throughput"
    slo: Slo = field(default_factory=Slo)
    engine: str | None = None
    policy: Literal["auto", "whole", "chunked", "static", "lanes"] = "auto"
    preemption: Literal["recompute", "swap"] = "recompute"
    prefix_cache: bool | None = None
    slots: int | None = None
    memory_share: float | None = None
    devices: int | None = None
    prices: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.engine not in (None, HERE):
            engine(self.engine)
        require(self.slots is None or 1 <= self.slots <= 65536, "slots", self.slots, "in 1 .. 65536")
        share = self.memory_share
        require(share is None or 0 < share <= 1, "memory_share", share, "in (0, 1]")
        require(self.devices is None or 1 <= self.devices <= 65536, "devices", self.devices, "in 1 .. 65536")
        for name, price in self.prices.items():
            require(0 < price < 1e6, f"prices.{name}", price, "dollars an hour, above 0")
        slo = self.slo
        promised = any(limit is not None for limit in (slo.first_token_s, slo.token_s, slo.latency_s))
        require(self.objective != "slo" or promised, "slo", slo, "a promise, where it is the objective")

    def __hash__(self) -> int:
        return hash((self.model, self.load, self.weights, self.kv, self.objective, self.engine, self.policy))
