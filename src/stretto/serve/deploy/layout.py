"""How one model lies on equal devices: replicas, pipeline stages, and how each kind of cell is split within a stage.

A stage of a replica has `devices` devices. Attention runs there in `attention_replicas` groups, each of which holds all
heads of the stage's layers and its own requests (data parallelism of the attention cell); the MLP likewise in
`mlp_replicas` groups, each split by columns ("tensor") or by whole experts ("expert"). Shares are as even as can be and
the largest is the one that counts (APEX: device 0 holds most tasks). Stages differ by at most one layer, and the last
one, which has the head besides, is among those with fewer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from stretto.core.errors import require
from stretto.models.spec import ModelSpec, bytes_of

Split = Literal["tensor", "expert"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """See the module; all counts are positive and replicas divide the devices of a stage."""

    replicas: int = 1
    stages: int = 1
    devices: int = 1
    attention_replicas: int = 1
    mlp_replicas: int = 1
    mlp_split: Split = "tensor"

    def __post_init__(self) -> None:
        for field in ("replicas", "stages", "devices", "attention_replicas", "mlp_replicas"):
            require(1 <= getattr(self, field) <= 65536, field, getattr(self, field), "from 1 to 65536")
        for field in ("attention_replicas", "mlp_replicas"):
            count = getattr(self, field)
            require(self.devices % count == 0, field, count, f"a divisor of the {self.devices} devices of a stage")

    @property
    def total(self) -> int:
        """Devices in all."""
        return self.replicas * self.stages * self.devices

    @property
    def attention_ranks(self) -> int:
        """Devices that share an attention cell."""
        return self.devices // self.attention_replicas

    @property
    def mlp_ranks(self) -> int:
        """Devices that share an MLP cell."""
        return self.devices // self.mlp_replicas

    @property
    def lanes(self) -> int:
        """Batches that a replica keeps under way: one a stage and attention replica."""
        return self.stages * self.attention_replicas

    def __str__(self) -> str:
        """As people write it: what is 1 is left out.

        >>> str(Layout(replicas=2, devices=4)), str(Layout(devices=2, attention_replicas=2))
        ('2DP4TP', '1DP2TP, attention x2')
        """
        text = f"{self.replicas}DP" if self.replicas > 1 or self.attention_replicas > 1 else ""
        text += f"{self.stages}PP" if self.stages > 1 else ""
        text += f"{self.devices}{'EP' if self.mlp_split == 'expert' else 'TP'}" if self.devices > 1 or not text else ""
        text += f", attention x{self.attention_replicas}" if self.attention_replicas > 1 else ""
        return text + (f", MLP x{self.mlp_replicas}" if self.mlp_replicas > 1 else "")


def attention_share(spec: ModelSpec, layout: Layout) -> ModelSpec:
    """The heads of the device that holds most of an attention cell: whole KV groups, or with more ranks than KV heads
    one KV head, repeated, and a part of its query heads; and the vocabulary's share of all the stage's devices.
    """
    ranks = layout.attention_ranks
    group = spec.heads // spec.kv_heads
    if ranks <= spec.kv_heads:
        kv_heads = -(-spec.kv_heads // ranks)
        heads = kv_heads * group
    else:
        kv_heads = 1
        heads = -(-group // (ranks // spec.kv_heads))
    return replace(spec, heads=heads, kv_heads=kv_heads, vocab=-(-spec.vocab // layout.devices))


def experts_held(spec: ModelSpec, layout: Layout) -> int:
    """Experts on the device that holds most of an MLP cell; 0 for a dense model."""
    return -(-spec.experts // layout.mlp_ranks) if layout.mlp_split == "expert" else spec.experts


def mlp_width(spec: ModelSpec, layout: Layout) -> int:
    """Columns of the MLP, or of each expert, on the device that holds most of them."""
    return spec.ffn if layout.mlp_split == "expert" else -(-spec.ffn // layout.mlp_ranks)


def stage_layers(layers: int, stages: int) -> tuple[int, ...]:
    """How many layers each stage has; the first ones have what is left over.

    >>> stage_layers(80, 4), stage_layers(126, 4)
    ((20, 20, 20, 20), (32, 32, 31, 31))
    """
    each, over = divmod(layers, stages)
    return (each + 1,) * over + (each,) * (stages - over)


def layer_weight_bytes(spec: ModelSpec, layout: Layout, weights: str) -> float:
    """One layer's weights on the fullest device: matrices in `weights`, norms and the router in 16 bits."""
    share = attention_share(spec, layout)
    attention = spec.hidden * (share.qkv_width + share.q_width)
    mlp = 3 * spec.hidden * mlp_width(spec, layout) * max(1, experts_held(spec, layout))
    rest = spec.experts * spec.hidden + 2 * spec.hidden + (share.qkv_width if spec.qkv_bias else 0)
    return (attention + mlp) * bytes_of(weights) + rest * 2.0


def table_bytes(spec: ModelSpec, layout: Layout) -> float:
    """A device's part of the embedding, or of the head, in 16 bits."""
    return attention_share(spec, layout).vocab * spec.hidden * 2.0


def device_weight_bytes(spec: ModelSpec, layout: Layout, weights: str) -> float:
    """Weights of the fullest device, in the first stage: its layers, the embedding and, with one stage, the head."""
    layers = stage_layers(spec.layers, layout.stages)[0]
    tables = 2 if layout.stages == 1 and not spec.tied_embeddings else 1
    return layers * layer_weight_bytes(spec, layout, weights) + tables * table_bytes(spec, layout) + 2.0 * spec.hidden


def kv_bytes_per_token(spec: ModelSpec, layout: Layout, dtype: str) -> float:
    """Bytes that one position takes on each device of its attention cell, in the stage with most layers."""
    share = attention_share(spec, layout)
    return 2.0 * share.kv_width * stage_layers(spec.layers, layout.stages)[0] * bytes_of(dtype)
