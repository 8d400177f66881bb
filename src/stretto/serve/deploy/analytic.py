"""Plans ranked by a closed form, for a first look at many: the seconds of a step at the batch that the rate keeps busy.

Little's law gives the batch, prompts take their share of the time, and what cannot be served is what the slots, the
pages or the time do not allow. No request waits for another, so near saturation, or where requests are put back, only
the simulation tells plans apart.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from stretto.hardware.cluster import Cluster
from stretto.serve.deploy.costs import Lane
from stretto.serve.deploy.drawn import load_of
from stretto.serve.deploy.job import DeploymentJob
from stretto.serve.deploy.plan import DeploymentPlan, costs_of, scheduler_config

_ROUNDS = 12
"""Fixed-point rounds of the batch: each halves its error at least, where the load can be served."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What the closed form says of a plan.

    Attributes:
        first_token_s, token_s: mean seconds to the first token and per token after it.
        latency_s: mean seconds of a request.
        throughput: output tokens a second.
    """

    plan: DeploymentPlan
    first_token_s: float
    token_s: float
    latency_s: float
    throughput: float


def estimate(job: DeploymentJob, plan: DeploymentPlan, cluster: Cluster) -> Estimate:
    """The closed form of one plan that can run."""
    load, costs, config = load_of(job.load), costs_of(job, plan, cluster), scheduler_config(job, plan, cluster)
    layout = plan.layout
    prompt, output = float(np.mean(load.prompt)), float(np.mean(load.output))
    span = float(load.arrival_s[-1])
    lanes = layout.replicas * layout.lanes
    rate = len(load) / span / lanes if span > 0 else np.inf
    most = min(config.slots, max(1.0, config.pages * config.page_tokens / (prompt + output / 2)))

    def seconds(lane: Lane) -> float:
        group = [lane] * layout.attention_replicas
        return costs.cycle([group] * layout.stages).total

    tokens = round(prompt)
    attention_s = costs.prompt_attention_s(tokens, 0)
    first = seconds(Lane(rows=tokens, tokens=1, sequences=1, prompt_s=attention_s, eager=True))
    rows, token = most if np.isinf(rate) else 1.0, 0.0
    for _ in range(1 if np.isinf(rate) else _ROUNDS):
        held = max(1, round(min(rows, most)))
        cached = round(held * (prompt + output / 2))
        step = seconds(Lane(rows=held, tokens=held, sequences=held, decoders=held, cached=cached))
        prompts_s = held / output * first  # prompts that are served for each step of the batch
        token = step + min(prompts_s, rate * step * first)
        rows = rate * output * token if np.isfinite(rate) else most
    served = min(rate, min(rows, most) / (output * token)) * lanes
    return Estimate(
        plan=plan,
        first_token_s=first + token / 2,
        token_s=token,
        latency_s=first + output * token,
        throughput=served * output,
    )


def rank(job: DeploymentJob, cluster: Cluster, plans: Iterable[DeploymentPlan]) -> list[Estimate]:
    """Estimates of plans that can run, the best for the job's objective first; by throughput where a closed form cannot
    tell what is asked.
    """
    found = [estimate(job, plan, cluster) for plan in plans]
    if job.objective == "latency":
        return sorted(found, key=lambda one: one.latency_s)
    return sorted(found, key=lambda one: -one.throughput)
