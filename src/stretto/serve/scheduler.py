"""The engine's scheduler: a pure policy, events in, decisions out. It never sees a tensor, a clock or a token's value.

Iteration-level scheduling under a token budget (Orca, Yu et al., OSDI 2022; chunked prefill, Sarathi, Agrawal
et al. 2023) over one pool of KV pages (vLLM, Kwon et al., SOSP 2023). When pages run out, the least urgent request,
of equals the one that joined last, is put back to the head of its peers in the queue; its pages are computed again
later, or wait in spare memory until it comes back. A decision says for how many steps it stays valid, so that both
drivers may take them at once.

Urgency is strict: whoever has a lower `priority` number joins before all others and is put back after them. Among
equals order is that of arrival. A stream of urgent requests can therefore keep others waiting without end; a deadline
bounds that wait.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from stretto.core.errors import require
from stretto.serve.blocks import BlockPool
from stretto.serve.decision import Chunk, Decision
from stretto.serve.horizon import Need, page_needs, within
from stretto.serve.joining import JOININGS, Waiting
from stretto.serve.live import LiveRequest, by_urgency
from stretto.serve.scheduler_config import SchedulerConfig
from stretto.serve.slots import SlotPool

Copy = tuple[int, int, int]
"""(from, to, positions) of a page."""


@dataclass
class Scheduler:
    """See the module. `apply` takes an event, `decide` gives a decision; `waiting` and `running` are in order.

    Events: {"type": "arrive", "id", "at", "prompt", "limit", "prefix", "priority"}, {"type": "ran", "steps",
    "finished": [ids]} after each decision that was carried out, {"type": "cancel", "id"}, {"type": "expire", "id"} (its
    deadline has passed), {"type": "lost"} (the backend forgot all KV and the step's results), {"type": "close"} (no
    more will arrive), {"type": "tick", "at"} (time, where the policy asked to be woken).
    """

    prefills: ClassVar[tuple[str, ...]] = ("mixed", "whole")

    config: SchedulerConfig
    now_s: float = 0.0
    closed: bool = False
    waiting: list[LiveRequest] = field(default_factory=list)
    running: list[LiveRequest] = field(default_factory=list)
    preemptions: int = 0
    swaps: int = 0

    def __post_init__(self) -> None:
        c = self.config
        require(c.prefill in self.prefills, "prefill", c.prefill, f"one of {', '.join(self.prefills)}")
        self.pool = (
            SlotPool(slots=c.pages, slot_tokens=c.page_tokens, reorder=c.reorder)
            if c.layout == "slots"
            else BlockPool(pages=c.pages, page_tokens=c.page_tokens)
        )
        swaps = c.preemption == "swap" and c.spare_pages > 0
        self.spare = BlockPool(pages=c.spare_pages, page_tokens=c.page_tokens) if swaps else None
        self.joining = JOININGS[c.joining](slots=c.slots, max_wait_s=c.max_wait_s)
        self._last = Decision()
        self._ahead: list[Need] = []  # pages lent for later steps of the last decision: (step, request)

    # Events.

    def apply(self, event: dict[str, Any]) -> None:
        """Take in one event; see the class for their forms."""
        getattr(self, f"_on_{event['type']}")(event)

    def can_ever_fit(self, prompt: int, limit: int) -> bool:
        """Whether a request of this size fits into the empty pool (its last token needs no KV)."""
        return self.pool.fits(prompt + limit - 1)

    def _on_arrive(self, event: dict[str, Any]) -> None:
        self.now_s = max(self.now_s, event["at"])
        request = LiveRequest(
            event["id"],
            event["at"],
            event["prompt"],
            event["limit"],
            tuple(event.get("prefix", ())),
            event.get("priority", 0),
        )
        assert self.can_ever_fit(request.prompt, request.limit), f"request {request.id} can never fit"
        self.waiting = by_urgency([*self.waiting, request])

    def _on_ran(self, event: dict[str, Any]) -> None:
        self.now_s = max(self.now_s, event["at"])
        self._hand_back(event["steps"])
        self._credit(self._last, event["steps"], set(event["finished"]))

    def _credit(self, decision: Decision, steps: int, finished: set[int]) -> None:
        """What so many steps of a decision computed is there now; who is done leaves."""
        chunks = {chunk.id: chunk for chunk in decision.prefill}
        decoded = set(decision.decode)
        for request in self.running:
            if request.id in decoded:
                request.computed += steps
                request.produced += steps
            elif request.id in chunks:
                chunk = chunks[request.id]
                self._note_filled(request, request.computed, request.computed + chunk.count)
                request.computed += chunk.count
                request.produced += chunk.last
        self._drop({r.id for r in self.running if r.produced >= r.limit or r.id in finished})

    def _note_filled(self, request: LiveRequest, start: int, end: int) -> None:
        """Pages of the prompt that positions start .. end-1 made full can be shared from now on."""
        page = self.config.page_tokens
        for index in range(start // page, min(end // page, len(request.prefix))):
            self.pool.fill(request.id, index, request.prefix[index])

    def _on_cancel(self, event: dict[str, Any]) -> None:
        self._drop({event["id"]})
        self.waiting = [r for r in self.waiting if r.id != event["id"]]
        if self.spare is not None:
            self.spare.release(event["id"])

    _on_expire = _on_cancel

    def _on_lost(self, event: dict[str, Any]) -> None:
        self.now_s = max(self.now_s, event["at"])
        self._hand_back(0)
        self.pool.release_all()
        if self.spare is not None:
            self.spare.release_all()
        self.waiting = by_urgency(self.running + self.waiting)
        self.running = []
        for request in self.waiting:
            request.computed = 0

    def _on_close(self, event: dict[str, Any]) -> None:
        self.closed = True

    def _on_tick(self, event: dict[str, Any]) -> None:
        self.now_s = max(self.now_s, event["at"])

    def _drop(self, ids: set[int]) -> None:
        if not ids:
            return
        for request in self.running:
            if request.id in ids:
                self.pool.release(request.id)
        self.running = [r for r in self.running if r.id not in ids]

    # Decisions.

    def decide(self) -> dict[str, Any]:
        """`next_decision` as plain JSON values, for the event log."""
        return self.next_decision().to_json()

    def next_decision(self) -> Decision:
        """What to do now. Changes the state: joins, page tables and preemptions are settled here."""
        grown: dict[int, tuple[int, ...]] = {}
        decoders = self._decoders()
        preempted, swap_out = self._grow(decoders, grown)
        swap_in: list[Copy] = []
        if not preempted:
            self._admit([r for r in self.running if not r.decoding] if len(decoders) < len(self.running) else [])
            swap_in = self._bring_back(grown)
        if preempted or len(decoders) < len(self.running):
            prefill = self._fill(grown)
            decoders = [] if prefill and self.config.prefill == "whole" else self._decoders()
            begun = {chunk.id for chunk in prefill}  # who found all of its prompt again looks like a decoding row
            decoders = [r for r in decoders if r.id not in begun]
        else:
            prefill = ()
        decode = tuple(r.id for r in decoders)
        if not prefill and not decode:
            assert not [*swap_out, *swap_in], "pages are to be copied, but there is no pass"
            self._last = Decision(preempted=preempted, idle_until=self._idle_until())
        else:
            moves, slots = self._close_holes()
            steps = 1 if prefill else self._valid_steps(decoders, grown, far=not preempted)
            self._last = Decision(
                prefill=prefill,
                decode=decode,
                pages=tuple(grown.items()),
                preempted=preempted,
                moves=moves,
                slots=slots,
                steps=steps,
                swap_out=tuple(swap_out),
                swap_in=tuple(swap_in),
            )
        return self._last

    def _decoders(self) -> list[LiveRequest]:
        return [r for r in self.running if r.computed == r.prompt + r.produced - 1 and r.produced]

    def _grow(
        self, decoders: Sequence[LiveRequest], grown: dict[int, tuple[int, ...]]
    ) -> tuple[tuple[int, ...], list[Copy]]:
        """Give each decoding request the page for its next position, taking from the least urgent when none is free."""
        preempted: list[int] = []
        copies: list[Copy] = []
        tables, page = self.pool.tables, self.config.page_tokens
        for request in by_urgency([r for r in decoders if len(tables[r.id]) * page < r.prompt + r.produced]):
            if request.id in preempted:
                continue
            while not self.pool.can_allocate(request.id, request.length):
                victim = self._victim(request)
                if victim is None:
                    break
                preempted.append(victim.id)
                grown.pop(victim.id, None)
                copies += self._preempt(victim)
                if victim is request:
                    break
            else:
                self._allocate(request, request.length, grown)
        return tuple(preempted), copies

    def _victim(self, request: LiveRequest) -> LiveRequest | None:
        """Who gives its pages to `request`, perhaps itself; None if that is to wait."""
        return max(reversed(self.running), key=lambda r: r.priority)

    def _preempt(self, victim: LiveRequest) -> list[Copy]:
        """Put a request back; the pages to copy, if its own find room in spare memory."""
        self.preemptions += 1
        copies: list[Copy] = []
        if self.spare is not None and victim.computed and self.spare.can_allocate(victim.id, victim.computed):
            copies = self._copies(self.pool.table(victim.id), self.spare.allocate(victim.id, victim.computed), victim)
            self.swaps += 1
        else:
            victim.computed = 0
        self.pool.release(victim.id)
        self.running.remove(victim)
        self.waiting = by_urgency([victim, *self.waiting])
        return copies

    def _bring_back(self, grown: dict[int, tuple[int, ...]]) -> list[Copy]:
        """Give those who come back from spare memory their pages; what the pool still has of them is not copied."""
        if self.spare is None:
            return []
        copies: list[Copy] = []
        for request in self.running:
            away = self.spare.table(request.id)
            if away:
                there = self.pool.adopt(request.id, request.prefix[: request.computed // self.config.page_tokens])
                if there:
                    grown[request.id] = there
                self._allocate(request, request.length if request.decoding else request.computed, grown)
                copies += self._copies(away, self.pool.table(request.id), request)[len(there) :]
                self.spare.release(request.id)
        return copies

    def _copies(self, sources: Sequence[int], targets: Sequence[int], request: LiveRequest) -> list[Copy]:
        page = self.config.page_tokens
        left = range(request.computed, 0, -page)
        return [(source, target, min(page, n)) for source, target, n in zip(sources, targets, left, strict=False)]

    def _admit(self, beginning: Sequence[LiveRequest]) -> None:
        """Let in whom the policy chooses, while there are pages for them beside those that the beginners still need."""
        if not self.waiting or len(self.running) >= self.config.slots:
            return
        chosen = self.joining.join(self._seen(), len(self.running), self.now_s, self.closed)
        by_id = {r.id: r for r in self.waiting}
        promised = sum(self.pool.missing(r.id, r.length) for r in beginning)
        admitted = set()
        for request in (by_id[i] for i in chosen):
            promised += self.pool.missing(request.id, request.length)
            if promised > self.pool.free:
                break
            admitted.add(request.id)
            self.running.append(request)
        self.waiting = [r for r in self.waiting if r.id not in admitted]

    def _fill(self, grown: dict[int, tuple[int, ...]]) -> tuple[Chunk, ...]:
        """Prompt chunks, urgent ones first, within the step's budget of prompt tokens and the free pages."""
        budget = self.config.prefill_tokens
        chunks: list[Chunk] = []
        coming: set[str] = set()
        for request in by_urgency(self.running):
            if request.decoding or not budget:
                continue
            shares = False
            if not request.computed and request.prefix and not self.pool.table(request.id):
                if self._sees_coming(request, coming):
                    continue
                shares = self._share(request, grown)
            left = request.length - request.computed
            count = min(left, budget)
            if count < left and self.config.prefill == "whole":
                if chunks:
                    break
                count = left
            if not self.pool.can_allocate(request.id, request.computed + count):
                if shares:  # what it shares is of no use yet
                    del grown[request.id]
                    self.pool.release(request.id)
                    request.computed = 0
                break
            self._allocate(request, request.computed + count, grown)
            chunks.append(Chunk(id=request.id, start=request.computed, count=count, last=count == left))
            coming.update(request.prefix[request.computed // self.config.page_tokens :])
            budget = max(0, budget - count)
        return tuple(chunks)

    def _sees_coming(self, request: LiveRequest, coming: set[str]) -> bool:
        """Whether the first page that a newcomer lacks is being computed by one ahead of it, for which it waits."""
        lacking = (content for content in self._sharable(request) if not self.pool.knows(content))
        return next(lacking, None) in coming

    def _sharable(self, request: LiveRequest) -> tuple[str, ...]:
        """The pages that it may take over: its last token is always its own, since something must be computed."""
        return request.prefix[: (request.length - 1) // self.config.page_tokens]

    def _share(self, request: LiveRequest, grown: dict[int, tuple[int, ...]]) -> bool:
        """Let a newcomer start behind what others have computed of the same text; whether there is any of it."""
        found = self.pool.adopt(request.id, self._sharable(request))
        if found:
            request.computed = len(found) * self.config.page_tokens
            grown[request.id] = found
        return bool(found)

    def _close_holes(self) -> tuple[tuple[tuple[int, int, int, int], ...], tuple[int, int] | None]:
        """The moves that the layout asks for, and the range that the step works on; newcomers filled holes before."""
        if not isinstance(self.pool, SlotPool):
            return (), None
        moves = []
        computed = {r.id: r.computed for r in self.running}
        for source, target in self.pool.close_holes():
            request = self.pool.holder(target)
            assert request is not None
            moves.append((request, source, target, computed[request]))
        return tuple(moves), self.pool.range

    def _allocate(self, request: LiveRequest, tokens: int, grown: dict[int, tuple[int, ...]]) -> None:
        new = self.pool.allocate(request.id, tokens)
        if new:
            grown[request.id] = grown.get(request.id, ()) + new

    def _valid_steps(self, decoders: Sequence[LiveRequest], grown: dict[int, tuple[int, ...]], *, far: bool) -> int:
        """Steps until a request that decodes reaches its limit or needs a page that is not there; others wait for pages
        meanwhile, and so do newcomers, since pages only become fewer. `far` is false where nobody was let in for now.
        """
        tables, page = self.pool.tables, self.config.page_tokens
        decoders = by_urgency(decoders)
        steps = min([r.limit - r.produced for r in decoders])
        rooms = [len(tables[r.id]) * page - r.prompt - r.produced + 1 for r in decoders]
        settled = not self.waiting or self.joining.steady
        if self.config.horizon == "page" or not (far and settled):
            return min(steps, *rooms)
        steps, needs = within(page_needs(rooms, page, steps), self.pool.unused, steps)
        self._ahead = [(step, decoders[index].id) for step, index in needs]
        lent: dict[int, list[int]] = {}
        for (_, request), new in zip(self._ahead, self.pool.lend([request for _, request in self._ahead]), strict=True):
            lent.setdefault(request, []).append(new)
        grown |= {request: grown.get(request, ()) + tuple(pages) for request, pages in lent.items()}
        return steps

    def _hand_back(self, done: int) -> None:
        """Take back the pages of steps that were not carried out, as if they had never been given out."""
        self.pool.hand_back([request for step, request in self._ahead if step > done])
        self._ahead = []

    def _idle_until(self) -> float:
        wake = self.joining.wake_s(self._seen(), len(self.running))
        return float("inf") if wake is None else wake

    def _seen(self) -> list[Waiting]:
        """Who waits, as joining policies see it."""
        return [r.seen for r in self.waiting]

    def audit(self) -> None:
        """Check the pools, and that spare pages are held by those alone who wait for them, whole."""
        self.pool.audit()
        if self.spare is None:
            return
        self.spare.audit()
        away = {r.id: len(self.spare.table(r.id)) for r in self.waiting if self.spare.table(r.id)}
        assert sum(away.values()) == self.spare.held, "spare pages are held by nobody who waits"
        whole = {r.id: -(-r.computed // self.config.page_tokens) for r in self.waiting if r.computed}
        assert away == whole, "what waits is not in spare memory as a whole"
