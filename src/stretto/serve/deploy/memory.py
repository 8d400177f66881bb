"""What fits: the weights of the fullest device, the pages that are left for keys and values, and what to change."""

from __future__ import annotations

from stretto.core.plan import Refusal
from stretto.serve.deploy.costs import StepCosts
from stretto.serve.deploy.layout import device_weight_bytes, kv_bytes_per_token


def pool_of(costs: StepCosts, *, memory_share: float) -> int | Refusal:
    """KV pages of one lane, or why the weights leave no room for any."""
    spec, layout, engine = costs.spec, costs.layout, costs.engine
    weights = device_weight_bytes(spec, layout, costs.types.weights)
    page = engine.page_tokens * kv_bytes_per_token(spec, layout, costs.types.kv)
    memory = costs.machine.device.memory_bytes * memory_share
    pages = int((memory - engine.workspace_bytes - weights) // page) // layout.stages
    if pages >= 1:
        return pages
    needed = weights + engine.workspace_bytes + page * layout.stages
    reason = (
        f"{needed / 1e9:.1f} GB a device ({weights / 1e9:.1f} GB of weights), of which it has {memory / 1e9:.1f} GB: "
        f"{(needed - memory) / 1e9:.1f} GB too much"
    )
    return Refusal(reason=reason, nearest=f"{needed / memory:.2f} times as many devices a replica")
