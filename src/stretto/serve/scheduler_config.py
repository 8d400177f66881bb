"""What the scheduler's decisions depend on besides events: values of a plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stretto.serve.slots import Reorder


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulerConfig:
    """Everything the scheduler's decisions depend on besides events.

    Attributes:
        joining: name of the joining policy.
        slots: most requests that run at once.
        pages, page_tokens: size of the KV pool.
        prefill_tokens: most prompt tokens in one step.
        max_wait_s: longest wait for company, for policies that have one.
        layout: "pages", or "slots", where each page is a slot for one whole request and steps work on a range of them.
        reorder: when holes in the range of slots are closed; see `slots.SlotPool`.
        prefix_cache: whether requests share pages whose texts begin alike, with layout "pages".
        preemption: what becomes of the pages of a request that is put back: "recompute", or "swap" to spare memory as
            long as there is room, with layout "pages".
        spare_pages: how many pages that memory holds.
        prefill: "mixed" puts prompt chunks and decoding rows into one step; "whole" gives prompts steps of their own,
            before any decoding, and never cuts one (vLLM's policy before chunking; a prompt longer than
            `prefill_tokens` has a step to itself); "lanes" puts them into passes that run beside those of the decoding
            rows (`lanes.LaneScheduler`).
        horizon: how long a decision of decoding rows alone holds: to the next "page" boundary of any of them, or until
            the free pages run out ("shortage"). The pages of all those steps are then given out with the decision and
            taken back if it ends early, so that steps are the same one by one.
    """

    joining: str
    slots: int
    pages: int
    page_tokens: int
    prefill_tokens: int
    max_wait_s: float = 0.05
    layout: Literal["pages", "slots"] = "pages"
    reorder: Reorder = "eager"
    prefix_cache: bool = False
    preemption: Literal["recompute", "swap"] = "recompute"
    spare_pages: int = 0
    prefill: Literal["mixed", "whole", "lanes"] = "mixed"
    horizon: Literal["page", "shortage"] = "page"

    @property
    def room(self) -> str:
        """What one request must fit into, in words."""
        if self.layout == "slots":
            return f"a slot of {self.page_tokens} tokens"
        return f"the KV pool of {self.pages * self.page_tokens} tokens"
