"""Whether a model's weights can stay packed in the fused decoder; asked by planners too, so without torch."""

from __future__ import annotations

from stretto.kernels.attention import HEAD_DIMS
from stretto.kernels.packed import PANEL
from stretto.models.quantized import BlockTensor, GroupedTensor
from stretto.models.spec import ModelSpec
from stretto.models.weights import StoredTensor, Weights

PACKED_FORMATS = ("Q4_0", "Q4_1", "Q8_0", "BF16")
ALIGN = 32
"""Groups are multiples of it."""


def why_not_fused(spec: ModelSpec, weights: Weights) -> str | None:
    """None if the fused decoder can run this model, else what stands in its way."""
    if spec.head_dim not in HEAD_DIMS:
        return f"there is no attention kernel for heads of {spec.head_dim}"
    if spec.ffn % PANEL or spec.q_width % PANEL or spec.kv_width % PANEL:
        return f"its widths are not multiples of {PANEL}"
    strange = unexpected_bias(spec, weights)
    if strange is not None:
        return f"its configuration does not mention {strange}"
    kinds: dict[str, set[str]] = {}
    for name, source in weights.sources.items():
        if not name.endswith(("_proj.weight", "embed_tokens.weight", "lm_head.weight")):
            continue
        if name.endswith("embed_tokens.weight") and not spec.tied_embeddings:
            continue
        kind = packing(source)
        if kind is None:
            return f"{name} is not in one of {', '.join(PACKED_FORMATS)} or in groups that are multiples of {ALIGN}"
        group = name.rsplit(".", 2)[0] + ("qkv" if any(f".{n}_proj." in name for n in "qkv") else "")
        if "gate_proj" in name or "up_proj" in name or group.endswith("qkv"):
            kinds.setdefault(group, set()).add(kind)
    mixed = [group for group, names in kinds.items() if len(names) > 1]
    return f"{mixed[0]} mixes formats" if mixed else None


def unexpected_bias(spec: ModelSpec, weights: Weights) -> str | None:
    """A bias that a model of this shape does not have, if there is one."""
    known = "qkv" if spec.qkv_bias else ""
    biases = (name for name in weights.sources if name.endswith("_proj.bias"))
    return next((name for name in biases if not any(f".{each}_proj." in name for each in known)), None)


def packing(source: object) -> str | None:
    """What matrices must have in common to be one product; None if a matrix cannot be packed."""
    if isinstance(source, StoredTensor):
        return "BF16" if source.dtype == "BF16" else None
    if isinstance(source, BlockTensor):
        return source.format.name if source.format.name in PACKED_FORMATS else None
    if not isinstance(source, GroupedTensor) or source.group % ALIGN or (source.bits == 8 and source.zeros is not None):
        return None
    return f"{source.bits} bits in groups of {source.group}{'' if source.zeros is None else ' with minima'}"
