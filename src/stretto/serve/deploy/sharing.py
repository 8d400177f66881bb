"""What passes cost when prompts and decoding rows have passes at once, each in a lane of its own, on the same devices.

A lane has its share of each device's multiprocessors, always the same (Nexus, Shi et al., 2025, whose shares move), so
its arithmetic is as much slower and its waves are as much narrower; an operation loses nothing by that as far as memory
is what bounds it. So the publication's curve of speed over shares comes out of the operations: nearly straight for
prompts, saturating early for decoding rows (`tests/serve/deploy/test_lanes.py`). What cannot be partitioned (memory
bandwidth, links between devices, the engine's host thread) goes to the two by their demand: a pass asks for its mean
demand all along, and if both ask for more than there is, one factor slows both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

from stretto.core.fluid import Fluid
from stretto.hardware.device import Device
from stretto.serve.decision import Lane as LaneName
from stretto.serve.deploy.costs import Lane, Parts, StepCosts
from stretto.serve.deploy.curves import Machine

_FREE = 1e6
"""So many times its arithmetic, a device takes as long as its memory does."""


class Work(NamedTuple):
    """A pass, before it is known what it costs: chunks of prompts (new tokens, cached tokens), how many of them yield a
    token, or rows that decode and the positions that these read, their own included.
    """

    chunks: tuple[tuple[int, int], ...] = ()
    tokens: int = 0
    decoders: int = 0
    cached: int = 0

    def later(self, steps: int) -> Work:
        """The same rows so many steps later."""
        return self._replace(cached=self.cached + steps * self.decoders)


@dataclass(frozen=True, slots=True)
class Demand:
    """A pass that nobody disturbs: its seconds by cause, and for how many of them memory is read at full bandwidth."""

    parts: Parts
    memory_s: float

    @property
    def seconds(self) -> float:
        return self.parts.total

    @property
    def use(self) -> Mapping[str, float]:
        """Seconds of each shared resource."""
        return {"memory": self.memory_s, "links": self.parts.messages, "host": self.parts.engine}


def shared_resources() -> Fluid:
    """What the two lanes of a replica share, one second of each a second."""
    return Fluid({"memory": 1.0, "links": 1.0, "host": 1.0})


class SharedCosts(StepCosts):
    """`StepCosts` of the undivided devices, and `demand` of passes in lanes.

    Args:
        decode_share: of each device's arithmetic, what the decoding rows' lane has.
    """

    def __init__(self, *, decode_share: float, machine: Machine, **of: Any) -> None:
        super().__init__(machine=machine, **of)
        shares: dict[LaneName, float] = {"prompts": 1 - decode_share, "tokens": decode_share}
        self._lanes = {
            name: StepCosts(machine=replace(machine, device=part(machine.device, share)), **of)
            for name, share in shares.items()
        }
        self._memory = StepCosts(machine=replace(machine, device=part(machine.device, _FREE)), **of)
        self._demand = lru_cache(maxsize=4096)(self._demand_of)

    def demand(self, work: Work) -> Demand:
        """What a pass asks for."""
        return self._demand(work)

    def _demand_of(self, work: Work) -> Demand:
        costs = self._lanes["prompts" if work.chunks else "tokens"]
        parts = costs.stage([_shape(work, costs)])
        reading = self._memory.stage([_shape(work, self._memory)])
        return Demand(parts=parts, memory_s=min(reading.kernels, parts.kernels))


def _shape(work: Work, costs: StepCosts) -> Lane:
    rows = work.decoders + sum(new for new, _ in work.chunks)
    return Lane(
        rows=rows,
        tokens=work.decoders + work.tokens,
        sequences=work.decoders + len(work.chunks),
        decoders=work.decoders,
        cached=work.cached,
        prompt_s=sum(costs.prompt_attention_s(new, cached) for new, cached in work.chunks),
        eager=bool(work.chunks),
    )


def part(device: Device, share: float) -> Device:
    """So much of a device's multiprocessors, with all of its memory.

    Launching is left out where there is more arithmetic than the device has: no memory is read meanwhile.
    """
    return replace(
        device,
        name=f"{share:g} of {device.name}",
        peak_flops={dtype: peak * share for dtype, peak in device.peak_flops.items()},
        units=max(1, round(device.units * min(1.0, share))),
        launch_s=device.launch_s if share <= 1 else 0.0,
    )
