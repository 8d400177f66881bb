"""The scheduler of two lanes: prompts and decoding rows in passes side by side, over one pool of KV pages.

Disaggregation inside one device (Nexus, Shi et al., 2025): a long prompt no longer lengthens the steps of those who
decode, and none of its keys and values are copied when it joins them. Each lane has at most one pass under way, and a
request is in at most one of them. A pass under way is not taken back: whoever is in it keeps its pages until the pass
has ended, whether a decoding row wants them or its caller has gone.

Where the publication repartitions the device from batch to batch, the lanes' shares stay as they are here.
"""

from __future__ import annotations

from typing import Any, ClassVar

from stretto.core.errors import require
from stretto.serve.decision import Decision, Lane
from stretto.serve.live import LiveRequest
from stretto.serve.scheduler import Scheduler
from stretto.serve.scheduler_config import SchedulerConfig


def scheduler_of(config: SchedulerConfig) -> Scheduler:
    """The scheduler that keeps `config`'s way with prompts."""
    return LaneScheduler(config) if config.prefill == "lanes" else Scheduler(config)


class LaneScheduler(Scheduler):
    """See the module. A decision is for one lane: ask again until there is nothing to do.

    Decoding rows get the pages of their next step before prompts get any, prompts before rows look further ahead. If a
    row finds no page and nobody outside the pass under way is less urgent, it waits, and no prompt begins before it has
    found one.

    Events beside those of `Scheduler`: "ran" names its "lane"; {"type": "cut", "steps"} says that the decision under
    way in lane "tokens" will end after so many steps, which must come before the next decision is asked for if anything
    has happened since it was given. After "lost" no pass is under way.
    """

    prefills: ClassVar[tuple[str, ...]] = ("lanes",)

    def __post_init__(self) -> None:
        super().__post_init__()
        c = self.config
        require(c.layout == "pages", "layout", c.layout, "pages, where prompts have lanes")
        require(c.preemption == "recompute", "preemption", c.preemption, "recompute, where prompts have lanes")
        self._under_way: dict[Lane, Decision] = {}
        self._gone: set[int] = set()  # ended by their callers while in a pass under way
        self._short = False  # a decoding row waits for a page
        self._grown: dict[int, tuple[int, ...]] = {}  # pages of decoding rows that no decision has told of yet
        self._put_back: tuple[int, ...] = ()  # likewise

    def members(self, lane: Lane) -> set[int]:
        """The requests of the pass under way in a lane."""
        decision = self._under_way.get(lane, Decision())
        return {chunk.id for chunk in decision.prefill} | set(decision.decode)

    # Events.

    def _on_ran(self, event: dict[str, Any]) -> None:
        self.now_s = max(self.now_s, event["at"])
        lane: Lane = event["lane"]
        if lane == "tokens":
            self._hand_back(event["steps"])
        gone = self._gone & self.members(lane)
        self._gone -= gone
        self._credit(self._under_way.pop(lane), event["steps"], gone | set(event["finished"]))

    def _on_cut(self, event: dict[str, Any]) -> None:
        kept = [(step, request) for step, request in self._ahead if step <= event["steps"]]
        self._hand_back(event["steps"])
        self._ahead = kept

    def _on_cancel(self, event: dict[str, Any]) -> None:
        if event["id"] in self.members("prompts") | self.members("tokens"):
            self._gone.add(event["id"])
        else:
            super()._on_cancel(event)

    _on_expire = _on_cancel

    def _on_lost(self, event: dict[str, Any]) -> None:
        self._hand_back(0)
        self._drop(self._gone)
        self._under_way.clear()
        self._gone.clear()
        self._grown.clear()
        self._short = False
        super()._on_lost(event)

    # Decisions.

    def next_decision(self) -> Decision:
        """What to do now in a lane that is free; `idle_until` once neither has anything to do."""
        free = {lane: lane not in self._under_way for lane in ("prompts", "tokens")}
        decoders = self._decoders() if free["tokens"] else []
        if decoders:
            self._put_back += self._grow(decoders, self._grown)[0]
            decoders = [r for r in self._decoders() if not self.pool.missing(r.id, r.length)]
        if free["tokens"]:
            self._short = len(decoders) < len(self._decoders())
        decision = self._prompts() if free["prompts"] and not self._short else None
        if decision is None and decoders:
            decision = self._tokens(decoders)
        if decision is None:
            return Decision(preempted=self._told(), idle_until=self._idle_until() if free["prompts"] else float("inf"))
        assert decision.lane is not None
        self._under_way[decision.lane] = decision
        return decision

    def _prompts(self) -> Decision | None:
        """A pass of prompt chunks, newcomers' included."""
        self._admit([r for r in self.running if not r.decoding])
        grown: dict[int, tuple[int, ...]] = {}
        chunks = self._fill(grown)
        if not chunks:
            return None
        return Decision(lane="prompts", prefill=chunks, pages=tuple(grown.items()), preempted=self._told())

    def _tokens(self, decoders: list[LiveRequest]) -> Decision:
        """Steps of those who have the page for their next position."""
        steps = self._valid_steps(decoders, self._grown, far=True)
        pages, self._grown = tuple(self._grown.items()), {}
        decode = tuple(r.id for r in decoders)
        return Decision(lane="tokens", decode=decode, pages=pages, preempted=self._told(), steps=steps)

    def _told(self) -> tuple[int, ...]:
        """Who was put back since the last decision."""
        told, self._put_back = self._put_back, ()
        return told

    def _decoders(self) -> list[LiveRequest]:
        begun = self.members("prompts")
        return [r for r in super()._decoders() if r.id not in begun]

    def _victim(self, request: LiveRequest) -> LiveRequest | None:
        """The least urgent whose pages nobody writes to; a request does not give way to those of a pass under way."""
        begun = self.members("prompts")
        victim = max(reversed([r for r in self.running if r.id not in begun]), key=lambda r: r.priority)
        return None if begun and victim is request else victim

    def audit(self) -> None:
        """Check the pool, and that each request is in one pass at most, with its pages."""
        super().audit()
        prompts, tokens = self.members("prompts"), self.members("tokens")
        assert not prompts & tokens, "a request is in both lanes"
        assert prompts | tokens <= {r.id for r in self.running if self.pool.table(r.id)}, "a pass has lost its pages"
        assert self._gone <= prompts | tokens, "who has gone is in no pass"
