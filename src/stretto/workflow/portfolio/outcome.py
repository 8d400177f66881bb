"""What an attempt gives back, and what is known of a run when it is over."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from stretto.workflow.portfolio.course import End
from stretto.workflow.portfolio.problem import MAX_SAMPLES


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an attempt gives back.

    Attributes:
        success: whether its output passed the check.
        cost: in the unit of the budget; at most the bound of its law.
        output: anything; that of a node's first success is kept.
    """

    success: bool
    cost: float
    output: object = None


Attempt = Callable[[str, str, int], Awaitable[Outcome]]
"""`await attempt(node, model, seed)`: one sample. Seeds of a node differ from sample to sample and from run to run."""


def sample_seed(seed: int, launch: int, sample: int) -> int:
    """The seed of a sample of a node: that of the run in the upper bits, then the launch and the sample's number."""
    return (seed << 32) + launch * MAX_SAMPLES + sample


RunEnd = End | Literal["cancelled"]
"""Why a real run is over: as a simulated one, or because it was stopped."""

How = Literal["returned", "raised", "cancelled", "abandoned"]


@dataclass(frozen=True, kw_only=True)
class SampleRecord:
    """One sample of a run.

    Attributes:
        start_s, end_s: counted from the start of the run.
        cost: what was charged.
        how: it "returned"; "raised"; was "cancelled" (it may have returned its cost then); or was "abandoned": it did
            not end when it was cancelled.
        error: what it raised, in one line.
    """

    node: str
    model: str
    seed: int
    start_s: float
    end_s: float
    success: bool
    cost: float
    how: How
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Run:
    """What came of a run.

    Attributes:
        end: why it is over.
        seconds: until then.
        spent: the sum of all charges; at most the budget, as long as no attempt costs more than its bound.
        outputs: of each node that is done, that of its first success.
        samples: in the order of their ends.
        plans: how often the policy was asked.
    """

    end: RunEnd
    seconds: float
    spent: float
    outputs: Mapping[str, object]
    samples: tuple[SampleRecord, ...]
    plans: int

    @property
    def completed(self) -> bool:
        return self.end == "completed"
