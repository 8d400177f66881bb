"""What a device holds: its share of the weights, the engine's workspace, and pages of keys and values in the rest."""

from __future__ import annotations

from stretto.models.spec import ModelSpec
from stretto.serve.deploy.curves import Machine
from stretto.serve.deploy.engines import EngineConstants
from stretto.serve.deploy.layout import Layout, device_weight_bytes, kv_bytes_per_token


def device_bytes(
    spec: ModelSpec, layout: Layout, weights: str, kv: str, constants: EngineConstants, tokens: int
) -> float:
    """Bytes of the fullest device with keys and values of so many positions."""
    cached = tokens * kv_bytes_per_token(spec, layout, kv)
    return constants.workspace_bytes + device_weight_bytes(spec, layout, weights) + cached


def pool_pages(
    spec: ModelSpec,
    layout: Layout,
    weights: str,
    kv: str,
    machine: Machine,
    constants: EngineConstants,
    memory_share: float,
) -> int:
    """KV pages of one lane; the batches of a pipeline share them equally. Negative where the weights do not fit."""
    free = machine.device.memory_bytes * memory_share - device_bytes(spec, layout, weights, kv, constants, 0)
    page = constants.page_tokens * kv_bytes_per_token(spec, layout, kv)
    return int(free // page) // layout.stages if free >= 0 else -1
