"""From instants to figures: latencies and their percentiles, promises kept, energy, price, each with its interval.

Time to first token runs from arrival to the end of the step that yields it, so it holds the queue; the queue stands
beside it on its own. Time per token is a request's time from first to last token over the tokens after the first. A
request of one token has none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import numpy as np
import yaml

from stretto.core.errors import UserError
from stretto.core.plan import Metric
from stretto.core.statistics import Interval
from stretto.serve.deploy.costs import StepCosts
from stretto.serve.deploy.job import Slo
from stretto.serve.deploy.layout import Layout
from stretto.serve.deploy.load import Floats, Load
from stretto.serve.deploy.sharing import SharedCosts
from stretto.serve.deploy.simulate import Served

_AMPLIFIED = 10.0
"""How many times a relative error of the seconds of a step grows where waiting is all of the time to first token: near
saturation a queue is the small difference of what comes and what is served.
"""
OUTSIDE = 2.0
"""How many times wider intervals are outside what the engine's constants were fitted on."""


@dataclass(frozen=True, kw_only=True)
class Latencies:
    """Seconds of each request, in the load's order."""

    first: Floats
    queue: Floats
    token: Floats
    whole: Floats

    @classmethod
    def of(cls, load: Load, served: Served) -> Latencies:
        after = np.maximum(load.output - 1, 1)
        token = np.where(load.output > 1, (served.finished_s - served.first_s) / after, np.nan)
        return cls(
            first=served.first_s - load.arrival_s,
            queue=served.started_s - load.arrival_s,
            token=token,
            whole=served.finished_s - load.arrival_s,
        )

    def kept(self, slo: Slo) -> float:
        """Share of requests that were served as promised."""
        good = np.ones(len(self.first), np.bool_)
        for seconds, limit in ((self.first, slo.first_token_s), (self.token, slo.token_s), (self.whole, slo.latency_s)):
            if limit is not None:
                good &= ~(seconds > limit)
        return float(good.mean())


@cache
def _power() -> Mapping[str, float]:
    document = yaml.safe_load((files("stretto.serve.deploy") / "power.yaml").read_text(encoding="utf-8"))
    found = {name: float(fields["watts"]) for name, fields in document["devices"].items()}
    return found | {"idle": float(document["idle_share"]["value"])}


def joules(device: str, devices: int, busy_s: float, whole_s: float) -> Interval | None:
    """Energy of `devices` that work for `busy_s` of `whole_s` each; None where their power is not known.

    Under load a device takes at most its limit, and rarely less than half of it: that is the interval.
    """
    watts = _power().get(device)
    if watts is None:
        return None
    idle = _power()["idle"] * watts
    value, low, high = (
        devices * (idle * (whole_s - busy_s) + max(idle, share * watts) * busy_s) for share in (0.75, 0.5, 1.0)
    )
    return Interval(value=value, low=low, high=high)


def sequences(served: Served, layout: Layout) -> float:
    """Requests that a replica has under way, on average over the run."""
    return float(np.sum(served.finished_s - served.started_s)) / served.makespan_s / layout.replicas


def outside(costs: StepCosts, served: Served) -> str:
    """In what a run differs from all that the engine's constants were fitted on; empty if in nothing."""
    fitted, layout = costs.engine.fitted_on, costs.layout
    found = []
    if costs.machine.device.name not in fitted.devices:
        found.append(costs.machine.device.name)
    ranks = layout.devices
    if not fitted.ranks[0] <= ranks <= fitted.ranks[1]:
        found.append(f"{ranks} ranks")
    if ranks > costs.machine.node_devices:
        found.append("ranks on several nodes")
    if layout.stages > 1:
        found.append("a pipeline")
    if layout.attention_replicas > 1 or layout.mlp_replicas > 1 or layout.mlp_split == "expert":
        found.append("cells of unlike replicas")
    if isinstance(costs, SharedCosts):
        found.append("two lanes")
    if costs.spec.experts:
        found.append("experts")
    if costs.types.weights not in fitted.weights:
        found.append(f"{costs.types.weights} weights")
    held = sequences(served, layout)
    if held > fitted.sequences:
        found.append(f"{held:.0f} sequences at once")
    return ", ".join(found)


def described(load: Load) -> str:
    """A load in half a sentence."""
    rate = (len(load) - 1) / max(float(load.arrival_s[-1]), 1e-9) if len(load) > 1 else 0.0
    text = f"{len(load)} requests, {np.mean(load.prompt):.0f} prompt and {np.mean(load.output):.0f} output tokens"
    return text + (f" in the mean, {rate:.3g} a second" if load.arrival_s[-1] else " in the mean, all at once")


def spread(costs: StepCosts, served: Served) -> float:
    """Relative uncertainty of the seconds of a run's steps."""
    return costs.spread(served.parts) * (OUTSIDE if outside(costs, served) else 1.0)


def metrics(
    load: Load,
    served: Served,
    *,
    layout: Layout,
    device: str,
    wide: float,
    slo: Slo,
    prices: Mapping[str, float],
    memory: float,
) -> dict[str, Metric]:
    """All figures of a run, by name, in the order in which people read them.

    Args:
        device: the type of the layout's devices.
        wide: relative uncertainty of the seconds of a step.
        prices: dollars an hour of a device, by type.
        memory: bytes of a device.
    """
    seconds = Latencies.of(load, served)
    busy = min(1.0, served.parts.total / (layout.replicas * served.makespan_s))
    waiting = float(np.mean(seconds.queue)) - served.parts.total / served.steps  # beyond the step that was under way
    queued = wide * (1 + (_AMPLIFIED - 1) * min(1.0, max(0.0, waiting / float(np.mean(seconds.first)))))
    tokens = float(load.output.sum())
    last = float(load.arrival_s[-1])
    tail = served.makespan_s - last
    whole = Interval(
        value=served.makespan_s,
        low=max(last + tail / (1 + wide), served.makespan_s / (1 + wide)),
        high=last + tail * (1 + queued),
    )

    def timed(values: Floats, relative: float) -> dict[str, Metric]:
        values = values[~np.isnan(values)]
        if not len(values):
            return {}
        points = {"": float(values.mean())}
        points |= {f"_p{q}": float(np.quantile(values, q / 100)) for q in (50, 90, 99)}
        return {
            name: Metric(
                value=Interval(value=v, low=v / (1 + relative), high=v * (1 + relative)),
                unit="s",
            )
            for name, v in points.items()
        }

    found = {"throughput": Metric(value=whole.reciprocal(tokens), unit="tokens/s", higher_is_better=True)}
    found |= {f"first_token{name}": metric for name, metric in timed(seconds.first, queued).items()}
    found |= {f"token{name}": metric for name, metric in timed(seconds.token, wide).items()}
    found |= {f"latency{name}": metric for name, metric in timed(seconds.whole, queued).items()}
    found["queue"] = timed(seconds.queue, queued)[""]
    found["slo"] = Metric(value=_kept(seconds, slo, wide, queued), unit="share", higher_is_better=True)
    if load.prefixes:
        found["cached"] = Metric(value=Interval.exact(float(served.cached.sum())), unit="tokens", higher_is_better=True)
    energy = joules(device, layout.total, busy * served.makespan_s, served.makespan_s)
    if energy is not None:
        found["energy"] = Metric(value=energy.scaled(1 / tokens), unit="J/token")
    if device in prices:
        hourly = layout.total * prices[device] / 3600
        found["cost"] = Metric(value=whole.scaled(hourly / tokens * 1e6), unit="$/M tokens")
    found["memory"] = Metric(value=Interval.exact(memory), unit="bytes")
    return found


def _kept(seconds: Latencies, slo: Slo, wide: float, queued: float) -> Interval:
    def at(pace: float, queue_pace: float) -> float:
        scaled = Latencies(
            first=seconds.first * queue_pace,
            queue=seconds.queue * queue_pace,
            token=seconds.token * pace,
            whole=seconds.whole * queue_pace,
        )
        return scaled.kept(slo)

    return Interval(value=at(1.0, 1.0), low=at(1 + wide, 1 + queued), high=at(1 / (1 + wide), 1 / (1 + queued)))


def require_power(device: str) -> None:
    """Known watts of `device`, or a `UserError`."""
    if joules(device, 1, 1.0, 1.0) is None:
        right = "throughput, latency, cost or slo"
        raise UserError(f"the watts of {device} are not known", field="objective", right=right)


def require_price(device: str, prices: Mapping[str, float]) -> None:
    """A price for `device`, or a `UserError` that names the field."""
    if device not in prices:
        raise UserError(
            f"there is no price of {device}", field=f"prices.{device}", right="dollars an hour of one device"
        )
