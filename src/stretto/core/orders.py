"""Pipeline orders as tables: which forward and backward each rank does, one after another.

A model is cut into stages, dealt out to the ranks in turn: stage s lies on rank s modulo the number of ranks, so that
with several *chunks* a rank holds stages that are not neighbours. One table is checked for deadlock, laid out as a
`Schedule` to be simulated, and walked by the runtime of each rank.

- fill-drain: all forwards, then all backwards (GPipe, Huang et al., 2019);
- 1F1B: as soon as a rank can, one backward after each forward (PipeDream-flush, Narayanan et al., 2021);
- interleaved 1F1B: the same with several chunks a rank (Megatron-LM, Narayanan et al., 2021);
- looped breadth-first: with several chunks, all micro-batches of a chunk first (Lamy-Poirier, 2023).

A result goes to the next stage. A model may also have skip connections, whose tensors go from the stage that makes them
straight to the one that takes them, past those between, and their gradients straight back (the portals of torchgpipe,
Kim et al., 2020).

Backwards of a stage come in ascending order of the micro-batches in each of them, so that gradients are summed in one
order and come out with the same bits whichever is chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from stretto.core.errors import FieldError, require


class Action(NamedTuple):
    """One pass of one micro-batch through one stage: `kind` is "forward" or "backward"."""

    kind: str
    micro_batch: int
    stage: int

    def __str__(self) -> str:
        return f"{self.kind} of micro-batch {self.micro_batch} in stage {self.stage}"


class Message(NamedTuple):
    """A tensor that one action makes and another of its kind and micro-batch takes.

    `skip` is the number of the skip connection that it goes by, None for the result that goes to the next stage.
    """

    source: Action
    target: Action
    skip: int | None = None

    def __str__(self) -> str:
        return str(self.source) if self.skip is None else f"skip connection {self.skip} of the {self.source}"


@dataclass(frozen=True, kw_only=True)
class Order:
    """What each rank does in one step.

    Attributes:
        name: of the order, as in `ORDERS`.
        stages: pieces of the model, a multiple of the ranks.
        programs: of each rank, its actions in turn.
        skips: of each skip connection, the stage that makes its tensor and the later one that takes it; the same stage
            twice where it goes nowhere.
    """

    name: str
    stages: int
    micro_batches: int
    programs: tuple[tuple[Action, ...], ...]
    skips: tuple[tuple[int, int], ...] = ()

    @property
    def ranks(self) -> int:
        return len(self.programs)

    def rank_of(self, stage: int) -> int:
        return stage % self.ranks

    def needs(self, action: Action) -> tuple[Action, ...]:
        """The actions that must be done before `action`, beside those before it on its rank."""
        sources = [message.source for message in self.inputs(action)]
        if action.kind == "backward":
            sources.insert(0, action._replace(kind="forward"))
        return tuple(dict.fromkeys(sources))

    def outputs(self, action: Action) -> tuple[Message, ...]:
        """What other stages take of an action's results, that for the next stage first."""
        ends = self._ends(action, 1 if action.kind == "forward" else -1, forward=action.kind == "forward")
        return tuple(Message(action, end, skip) for end, skip in ends)

    def inputs(self, action: Action) -> tuple[Message, ...]:
        """What an action takes of the results of other stages, that of the stage before it first."""
        ends = self._ends(action, -1 if action.kind == "forward" else 1, forward=action.kind == "backward")
        return tuple(Message(end, action, skip) for end, skip in ends)

    def _ends(self, action: Action, step: int, *, forward: bool) -> Iterator[tuple[Action, int | None]]:
        """Where lines end that begin with `action`: one a `step` of stages on, skips as they are or in reverse."""
        kind, micro_batch, stage = action
        if 0 <= stage + step < self.stages:
            yield Action(kind, micro_batch, stage + step), None
        for number, pair in enumerate(self.skips):
            begin, end = pair if forward else pair[::-1]
            if begin == stage != end:
                yield Action(kind, micro_batch, end), number

    def crosses(self, message: Message) -> bool:
        """Whether a message goes to another rank."""
        return self.rank_of(message.source.stage) != self.rank_of(message.target.stage)

    def in_flight(self, rank: int) -> int:
        """Most forwards of `rank` whose backwards are yet to come."""
        held = most = 0
        for action in self.programs[rank]:
            held += 1 if action.kind == "forward" else -1
            most = max(most, held)
        return most

    def check(self, *, slots: int | None = None) -> None:
        """Play the table, and see that all of it can be done.

        Args:
            slots: messages that a link holds between two ranks, each way; a sender waits for room. A rank takes in
                the input of its next forward and of its next backward as soon as it can. None: as many as there are.

        Raises:
            ValueError: an action is missing or stands twice, or the ranks wait for each other; each of them is named
                with what it waits for.
        """
        if not all(0 <= first <= last < self.stages for first, last in self.skips):
            raise ValueError(f"order {self.name}: skips {self.skips} must lead from a stage to a later one")
        wanted = {Action(kind, m, s) for kind in KINDS for m in range(self.micro_batches) for s in range(self.stages)}
        listed = [action for program in self.programs for action in program]
        for action in listed:
            if action not in wanted:
                raise ValueError(f"order {self.name}: {action} stands twice or belongs to no stage")
            wanted.remove(action)
        if wanted:
            raise ValueError(f"order {self.name}: {min(wanted)} is missing")
        for rank, program in enumerate(self.programs):
            for action in program:
                if self.rank_of(action.stage) != rank:
                    raise ValueError(f"order {self.name}: {action} stands on rank {rank}")
        waiting = _Play(self, slots).run()
        if waiting:
            raise ValueError(f"order {self.name} cannot go on: " + "; ".join(waiting))


KINDS = ("forward", "backward")


class _Play:
    """The ranks walk their programs; messages lie in the slots of links until their receiver comes to them."""

    def __init__(self, order: Order, slots: int | None) -> None:
        self.order = order
        self.inputs, self.needs = cache(order.inputs), cache(order.needs)
        self.slots = slots
        self.at = [0] * order.ranks
        self.done: set[Action] = set()
        self.lying: dict[tuple[int, int], set[Message]] = {}
        self.unsent: dict[int, list[Message]] = {}

    def run(self) -> list[str]:
        """What each rank that is stuck waits for; none if all got through."""
        moved = True
        while moved:
            moved = any(self._move(rank) for rank in range(self.order.ranks))
        return [self._why(rank) for rank in range(self.order.ranks) if self._left(rank)]

    def _left(self, rank: int) -> bool:
        return rank in self.unsent or self.at[rank] < len(self.order.programs[rank])

    def _move(self, rank: int) -> bool:
        """As many steps of one rank as it can take; whether it took any."""
        moved = False
        while self._left(rank) and (self._send(rank) if rank in self.unsent else self._do(rank)):
            moved = True
        return moved

    def _do(self, rank: int) -> bool:
        action = self.order.programs[rank][self.at[rank]]
        inputs = self.inputs(action)
        if any(need not in self.done for need in self.needs(action)):
            return False
        if any(message in self.unsent.get(self.order.rank_of(message.source.stage), ()) for message in inputs):
            return False
        for lying in self.lying.values():
            lying.difference_update(inputs)
        self.done.add(action)
        self.at[rank] += 1
        leaving = [message for message in self.order.outputs(action) if self.order.crosses(message)]
        if leaving:
            self.unsent[rank] = leaving
        return True

    def _send(self, rank: int) -> bool:
        message = self.unsent[rank][0]
        receiver = self.order.rank_of(message.target.stage)
        lying = self.lying.setdefault((rank, receiver), set())
        taken = {each for next_ in self._next(receiver) for each in self.inputs(next_)}
        if self.slots is not None and len(lying - taken) >= self.slots and message not in taken:
            return False
        lying.add(message)
        del self.unsent[rank][0]
        if not self.unsent[rank]:
            del self.unsent[rank]
        return True

    def _next(self, rank: int) -> list[Action]:
        """The next forward and the next backward of a rank."""
        left = self.order.programs[rank][self.at[rank] :]
        found = (next((action for action in left if action.kind == kind), None) for kind in KINDS)
        return [action for action in found if action]

    def _why(self, rank: int) -> str:
        if rank in self.unsent:
            return f"rank {rank} waits for room to send the {self.unsent[rank][0]}"
        action = self.order.programs[rank][self.at[rank]]
        missing = [str(need) for need in self.needs(action) if need not in self.done]
        return f"rank {rank} waits before the {action} for the {' and the '.join(missing)}"


def fill_drain(ranks: int, micro_batches: int, chunks: int = 1) -> Order:
    """All forwards, then all backwards.

    >>> [str(action) for action in fill_drain(2, 1).programs[1]]
    ['forward of micro-batch 0 in stage 1', 'backward of micro-batch 0 in stage 1']
    """
    _one_chunk("fill-drain", chunks)
    return _order("fill-drain", ranks, micro_batches, 1, lambda rank: (_units(rank, ranks, micro_batches, 1), None))


def one_f_one_b(ranks: int, micro_batches: int, chunks: int = 1) -> Order:
    """Rank r does `ranks - r - 1` forwards to warm up, then one forward and one backward in turn."""
    _one_chunk("1f1b", chunks)

    def program(rank: int) -> tuple[list[tuple[int, int]], int | None]:
        return _units(rank, ranks, micro_batches, 1), ranks - rank - 1

    return _order("1f1b", ranks, micro_batches, 1, program)


def interleaved(ranks: int, micro_batches: int, chunks: int = 2) -> Order:
    """1F1B over `chunks` stages a rank, micro-batches in groups as large as the pipeline is long.

    Raises:
        FieldError: the micro-batches are no multiple of the ranks, or there is one rank or one chunk.
    """
    require(ranks > 1, "pp", ranks, "at least 2 for interleaved 1F1B")
    require(chunks > 1, "chunks", chunks, "at least 2 for interleaved 1F1B")
    if micro_batches % ranks:
        raise FieldError(
            "micro_batches", micro_batches, f"a multiple of the {ranks} pipeline ranks for interleaved 1F1B"
        )

    def program(rank: int) -> tuple[list[tuple[int, int]], int | None]:
        table = [
            (micro_batch, chunk)
            for first in range(0, micro_batches, ranks)
            for chunk in range(chunks)
            for micro_batch in range(first, first + ranks)
        ]
        return table, 2 * (ranks - rank - 1) + (chunks - 1) * ranks

    return _order("interleaved", ranks, micro_batches, chunks, program)


def looped(ranks: int, micro_batches: int, chunks: int = 2) -> Order:
    """All micro-batches through a chunk before the next chunk: forwards, then backwards."""
    return _order(
        "looped", ranks, micro_batches, chunks, lambda rank: (_units(rank, ranks, micro_batches, chunks), None)
    )


ORDERS: Mapping[str, Callable[[int, int, int], Order]] = {
    "fill-drain": fill_drain,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "looped": looped,
}


@cache
def order_of(name: str, ranks: int, micro_batches: int, chunks: int = 1) -> Order:
    """The order `name` of `ORDERS`.

    Raises:
        FieldError: there is none of this name, or it does not go with these numbers.
    """
    require(name in ORDERS, "schedule", name, f"one of {', '.join(ORDERS)}")
    for field, value in (("pp", ranks), ("micro_batches", micro_batches), ("chunks", chunks)):
        require(value >= 1, field, value, "at least 1")
    return ORDERS[name](ranks, micro_batches, chunks)


def _one_chunk(name: str, chunks: int) -> None:
    require(chunks == 1, "chunks", chunks, f"1 for {name}; interleaved and looped take more")


def _units(rank: int, ranks: int, micro_batches: int, chunks: int) -> list[tuple[int, int]]:
    return [(micro_batch, chunk) for chunk in range(chunks) for micro_batch in range(micro_batches)]


_Program = Callable[[int], tuple[list[tuple[int, int]], int | None]]


def _order(name: str, ranks: int, micro_batches: int, chunks: int, program: _Program) -> Order:
    """The order of forward tables (micro-batch, chunk) and warm-ups (None: all forwards first) by rank.

    Backwards take the same table with the chunks in reverse.
    """
    programs = []
    for rank in range(ranks):
        table, warm_up = program(rank)
        forwards = [Action("forward", m, chunk * ranks + rank) for m, chunk in table]
        backwards = [Action("backward", m, (chunks - 1 - chunk) * ranks + rank) for m, chunk in table]
        ahead = len(table) if warm_up is None else min(warm_up, len(table))
        pairs = zip(forwards[ahead:], backwards, strict=False)
        steady = [action for pair in pairs for action in pair]
        programs.append((*forwards[:ahead], *steady, *backwards[len(table) - ahead :]))
    return Order(name=name, stages=ranks * chunks, micro_batches=micro_batches, programs=tuple(programs))
