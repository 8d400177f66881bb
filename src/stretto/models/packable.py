"""Whether a model's weights can stay packed in the fused decoder; asked by planners too, so without torch."""

from __future__ import annotations

from stretto.kernels.attention import HEAD_DIMS
from stretto.kernels.packed import PANEL
from stretto.models.quantized import PackedTensor
from stretto.models.spec import ModelSpec
from stretto.models.weights import Weights

PACKED_FORMATS = ("Q4_0", "Q4_1", "Q8_0")


def why_not_fused(spec: ModelSpec, weights: Weights) -> str | None:
    """None if the fused decoder can run this model, else what stands in its way."""
    if weights.rotary != "adjacent":
        return "its query and key rows are laid out in halves"
    if spec.head_dim not in HEAD_DIMS:
        return f"there is no attention kernel for heads of {spec.head_dim}"
    if spec.ffn % PANEL or spec.q_width % PANEL or spec.kv_width % PANEL:
        return f"its widths are not multiples of {PANEL}"
    kinds: dict[str, set[str]] = {}
    for name, source in weights.sources.items():
        if not name.endswith(("_proj.weight", "embed_tokens.weight", "lm_head.weight")):
            continue
        if not isinstance(source, PackedTensor) or source.format.name not in PACKED_FORMATS:
            return f"{name} is not in one of {', '.join(PACKED_FORMATS)}"
        group = name.rsplit(".", 2)[0] + ("qkv" if any(f".{n}_proj." in name for n in "qkv") else "")
        if "gate_proj" in name or "up_proj" in name or group.endswith("qkv"):
            kinds.setdefault(group, set()).add(source.format.name)
    mixed = [group for group, names in kinds.items() if len(names) > 1]
    return f"{mixed[0]} mixes formats" if mixed else None
