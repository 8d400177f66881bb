"""Small models, machines and loads for the tests of deployments."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from stretto.hardware import catalog
from stretto.models.spec import ModelSpec
from stretto.serve.deploy.costs import StepCosts
from stretto.serve.deploy.curves import Machine, Types
from stretto.serve.deploy.engines import EngineConstants, engine
from stretto.serve.deploy.layout import Layout
from stretto.serve.deploy.load import Load
from stretto.serve.scheduler_config import SchedulerConfig

SMALL = ModelSpec(
    family="llama", layers=8, hidden=1024, heads=16, kv_heads=4, head_dim=64, ffn=2816, vocab=32000, max_positions=65536
)
EXPERTS = replace(SMALL, family="mistral", experts=8, top_k=2)
MACHINE = Machine(
    device=catalog.device("h100-sxm"),
    near=catalog.link("nvlink4"),
    far=catalog.link("ib-ndr400"),
    node_devices=8,
    host=catalog.link("pcie5"),
)
TYPES = Types(arithmetic="bf16", weights="bf16", kv="bf16")


def costs(
    layout: Layout | None = None,
    *,
    spec: ModelSpec = SMALL,
    machine: Machine = MACHINE,
    constants: EngineConstants | None = None,
    types: Types = TYPES,
) -> StepCosts:
    return StepCosts(
        spec=spec,
        layout=layout or Layout(),
        machine=machine,
        types=types,
        engine=constants or engine("vllm-0.6"),
        most_rows=8192,
    )


def config(**changes: object) -> SchedulerConfig:
    values: dict[str, object] = {
        "joining": "continuous",
        "slots": 32,
        "pages": 20000,
        "page_tokens": 16,
        "prefill_tokens": 4096,
        "prefill": "whole",
    }
    return SchedulerConfig(**{**values, **changes})  # type: ignore[arg-type]


def load(arrivals: Sequence[float], prompts: Sequence[int], outputs: Sequence[int]) -> Load:
    return Load(np.asarray(arrivals, np.float64), np.asarray(prompts, np.int64), np.asarray(outputs, np.int64))


def drawn(seed: int, count: int, *, gap_s: float = 0.02, prompt: int = 300, output: int = 60) -> Load:
    """Requests of mixed lengths at random times."""
    draw = np.random.default_rng(seed)
    arrivals = np.cumsum(draw.exponential(gap_s, count)) if gap_s else np.zeros(count)
    return load(arrivals, draw.integers(1, 2 * prompt, count), draw.integers(1, 2 * output, count))


def sharing(seed: int, count: int, *, gap_s: float, block: int) -> Load:
    """Requests whose prompts follow each other through a tree of blocks, as far as they go."""
    draw = np.random.default_rng(seed)
    plain = drawn(seed, count, gap_s=gap_s, prompt=120, output=40)
    prefixes = []
    for length in plain.prompt.tolist():
        path = [1]
        while len(path) * block < length:
            path.append(path[-1] * 3 + int(draw.integers(0, 2)))
        prefixes.append(tuple(path))
    return replace(plain, prefixes=tuple(prefixes), block_tokens=block)
