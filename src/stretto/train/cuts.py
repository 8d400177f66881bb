"""What a job and a plan say of a model's layers, in the types that the layers take."""

from __future__ import annotations

from stretto.comm.transport import Transport
from stretto.models.causal_layers import Lora, Split
from stretto.train.job import TrainJob
from stretto.train.plan import TrainPlan


def lora_of(job: TrainJob) -> Lora | None:
    """The job's adapters, if it has any."""
    adapters = job.adapters
    if adapters is None:
        return None
    return Lora(rank=adapters.rank, alpha=adapters.alpha, targets=adapters.targets, dropout=adapters.dropout)


def split_of(plan: TrainPlan, transport: Transport) -> Split:
    """How the plan cuts a layer, over the ranks that share it."""
    return Split(
        tp=transport.axis("tp"),
        cp=transport.axis("cp"),
        ep=transport.axis("ep"),
        attention=plan.attention,
        layout=plan.cp_layout,
        experts=plan.experts,
    )
