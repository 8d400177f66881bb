"""Pipeline orders: lawful, free of deadlock, as long and as hungry as the formulas say, and torch's own."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from stretto.core.errors import FieldError
from stretto.core.order_schedule import lay_out
from stretto.core.orders import KINDS, ORDERS, Action, Message, Order, order_of
from stretto.core.schedule import Schedule
from stretto.core.simulate import simulate
from stretto.core.trace import Trace


@dataclass(frozen=True)
class Equal:
    """Every forward takes 1 second over the chunks, every backward 2, messages nothing; a forward holds a byte."""

    chunks: int = 1
    message_s: float = 0.0
    skip_s: float = 0.0

    def compute(self, action: Action) -> float:
        return (1.0 if action.kind == "forward" else 2.0) / self.chunks

    def message(self, message: Message) -> float:
        return self.message_s if message.skip is None else self.skip_s

    def held(self, action: Action) -> float:
        return 1.0


def play(order: Order, costs: Equal) -> Trace:
    schedule = Schedule()
    lanes = [schedule.lane(f"rank {rank}") for rank in range(order.ranks)]
    spaces = [schedule.space(f"memory {rank}") for rank in range(order.ranks)]
    lay_out(order, costs, schedule=schedule, lanes=lanes, spaces=spaces, step=0)
    schedule.validate()
    return simulate(schedule.timed())


def legal() -> list[tuple[str, int, int, int]]:
    found = []
    for name in ORDERS:
        for ranks in range(1, 9):
            for micro_batches in (*range(1, 9), 12, 16, 24, 32):
                for chunks in (1, 2, 3, 4):
                    try:
                        order_of(name, ranks, micro_batches, chunks)
                    except FieldError:
                        continue
                    found.append((name, ranks, micro_batches, chunks))
    return found


def test_every_legal_order_gets_through_even_with_one_slot_a_link() -> None:
    cases = legal()
    assert len(cases) > 500
    for case in cases:
        order = order_of(*case)
        order.check()
        if case[0] != "looped":
            order.check(slots=1)


def test_a_breadth_first_order_needs_room_on_the_link_back_to_the_first_rank() -> None:
    order = order_of("looped", 2, 8, 2)
    with pytest.raises(ValueError, match="rank 1 waits for room to send"):
        order.check(slots=1)
    order.check(slots=8)


@pytest.mark.parametrize("name", ["fill-drain", "1f1b"])
@pytest.mark.parametrize(("ranks", "micro_batches"), [(1, 3), (2, 1), (2, 8), (4, 8), (8, 4)])
def test_equal_stages_take_the_time_of_the_formula(name: str, ranks: int, micro_batches: int) -> None:
    trace = play(order_of(name, ranks, micro_batches), Equal())
    assert trace.makespan == pytest.approx((micro_batches + ranks - 1) * 3.0, rel=1e-12)


@pytest.mark.parametrize(("ranks", "micro_batches", "chunks"), [(2, 2, 2), (2, 4, 4), (4, 8, 2), (8, 16, 3)])
def test_interleaving_divides_the_bubble_by_the_chunks(ranks: int, micro_batches: int, chunks: int) -> None:
    trace = play(order_of("interleaved", ranks, micro_batches, chunks), Equal(chunks))
    bubble = trace.makespan / (3.0 * micro_batches) - 1
    assert bubble == pytest.approx((ranks - 1) / (micro_batches * chunks), rel=1e-12)


@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 8), (4, 4), (4, 16), (8, 3)])
def test_1f1b_holds_as_many_micro_batches_as_there_are_ranks_ahead(ranks: int, micro_batches: int) -> None:
    order = order_of("1f1b", ranks, micro_batches)
    held = [order.in_flight(rank) for rank in range(ranks)]
    assert held == [min(ranks - rank, micro_batches) for rank in range(ranks)]
    peaks = play(order, Equal()).peak_memory
    assert [peaks[f"memory {rank}"] for rank in range(ranks)] == held
    assert order_of("fill-drain", ranks, micro_batches).in_flight(0) == micro_batches


@pytest.mark.parametrize(("ranks", "micro_batches", "chunks"), [(2, 4, 2), (4, 8, 2), (4, 16, 4)])
def test_interleaving_holds_what_the_publication_says(ranks: int, micro_batches: int, chunks: int) -> None:
    assert order_of("interleaved", ranks, micro_batches, chunks).in_flight(0) == ranks * chunks + ranks - 1


def test_messages_that_take_time_are_under_way_while_both_ranks_compute() -> None:
    slow = play(order_of("1f1b", 2, 8), Equal(message_s=0.5)).makespan
    assert 27.0 < slow <= 27.0 + 16 * 0.5


def test_backwards_of_a_stage_ascend_in_every_order() -> None:
    for case in [("fill-drain", 3, 5, 1), ("1f1b", 3, 5, 1), ("interleaved", 3, 6, 2), ("looped", 3, 5, 2)]:
        order = order_of(*case)
        for stage in range(order.stages):
            backwards = [
                a.micro_batch for a in order.programs[order.rank_of(stage)] if a.kind == "backward" and a.stage == stage
            ]
            assert backwards == sorted(backwards) == list(range(order.micro_batches))


@pytest.mark.parametrize(
    ("case", "said"),
    [
        (("zigzag", 2, 2, 1), "schedule is 'zigzag'; it must be one of"),
        (("1f1b", 2, 2, 2), "chunks is 2; it must be 1"),
        (("interleaved", 2, 3, 2), "micro_batches is 3; it must be a multiple of the 2"),
        (("interleaved", 1, 2, 2), "pp is 1; it must be at least 2"),
        (("interleaved", 2, 2, 1), "chunks is 1; it must be at least 2"),
        (("1f1b", 2, 0, 1), "micro_batches is 0"),
    ],
)
def test_orders_that_do_not_go_are_refused(case: tuple[str, int, int, int], said: str) -> None:
    with pytest.raises(FieldError, match=said):
        order_of(*case)


def test_a_table_that_waits_for_itself_names_who_waits_for_what() -> None:
    swapped = (
        (Action("backward", 0, 0), Action("forward", 0, 0)),
        (Action("forward", 0, 1), Action("backward", 0, 1)),
    )
    order = Order(name="edited", stages=2, micro_batches=1, programs=swapped)
    with pytest.raises(ValueError, match="rank 0 waits before the backward of micro-batch 0 in stage 0"):
        order.check()


def test_a_table_with_a_hole_or_a_twin_is_refused() -> None:
    one = (Action("forward", 0, 0),)
    with pytest.raises(ValueError, match="backward of micro-batch 0 in stage 0 is missing"):
        Order(name="edited", stages=1, micro_batches=1, programs=(one,)).check()
    twice = (Action("forward", 0, 0), Action("forward", 0, 0), Action("backward", 0, 0))
    with pytest.raises(ValueError, match="stands twice"):
        Order(name="edited", stages=1, micro_batches=1, programs=(twice,)).check()
    strays = ((Action("forward", 0, 1), Action("backward", 0, 1)), (Action("forward", 0, 0), Action("backward", 0, 0)))
    with pytest.raises(ValueError, match="stands on rank 0"):
        Order(name="edited", stages=2, micro_batches=1, programs=strays).check()


@pytest.mark.parametrize(("ranks", "micro_batches", "chunks"), [(2, 4, 2), (4, 8, 2), (2, 8, 3)])
def test_interleaved_order_is_torchs(ranks: int, micro_batches: int, chunks: int) -> None:
    from torch.distributed.pipelining.schedules import _get_1f1b_rank_ops

    def torch_actions(rank: int) -> list[Action]:
        warm_up = min(2 * (ranks - rank - 1) + (chunks - 1) * ranks, micro_batches * chunks)
        rest = micro_batches * chunks - warm_up
        ops = _get_1f1b_rank_ops(
            chunks,
            ranks,
            warm_up,
            rest,
            warm_up,
            rank,
            lambda index: (index // ranks) % chunks * ranks + rank,
            lambda index: (chunks - 1 - (index - warm_up) // ranks % chunks) * ranks + rank,
        )
        kinds = {"FORWARD": KINDS[0], "FULL_BACKWARD": KINDS[1]}
        return [Action(kinds[op.computation_type.name], op.microbatch_index, op.stage_index) for op in ops if op]

    order = order_of("interleaved", ranks, micro_batches, chunks)
    for rank in range(ranks):
        assert list(order.programs[rank]) == torch_actions(rank)


def test_a_link_holds_as_many_messages_as_it_has_slots() -> None:
    first = tuple(Action(kind, m, 0) for kind in KINDS for m in range(3))
    # The last message is wanted first: those before it must find room beside it.
    last = (*(Action("forward", m, 1) for m in (2, 0, 1)), *(Action("backward", m, 1) for m in range(3)))
    order = Order(name="late", stages=2, micro_batches=3, programs=(first, last))
    order.check(slots=2)
    with pytest.raises(ValueError, match="rank 0 waits for room to send the forward of micro-batch 1"):
        order.check(slots=1)


def u_shaped(order: Order) -> Order:
    """With a skip connection from each stage of the first half to its like in the second."""
    return replace(order, skips=tuple((stage, order.stages - 1 - stage) for stage in range(order.stages // 2)))


def test_a_skip_connection_goes_from_the_stage_that_makes_it_to_the_one_that_takes_it_and_back() -> None:
    order = u_shaped(order_of("1f1b", 4, 8))
    made, taken = Action("forward", 2, 0), Action("forward", 2, 3)
    assert order.outputs(made) == (Message(made, Action("forward", 2, 1)), Message(made, taken, 0))
    assert order.inputs(taken) == (Message(Action("forward", 2, 2), taken), Message(made, taken, 0))
    late, early = Action("backward", 2, 3), Action("backward", 2, 0)
    assert order.outputs(late) == (Message(late, Action("backward", 2, 2)), Message(late, early, 0))
    assert order.needs(early) == (made, Action("backward", 2, 1), late)


def test_what_goes_out_comes_in_and_nothing_leaves_a_stage_for_itself() -> None:
    for case in [("1f1b", 4, 3, 1), ("interleaved", 2, 4, 3), ("looped", 3, 2, 2)]:
        order = u_shaped(order_of(*case))
        order = replace(order, skips=(*order.skips, (1, 1)))
        actions = [action for program in order.programs for action in program]
        out = [message for action in actions for message in order.outputs(action)]
        assert sorted(map(str, out)) == sorted(str(message) for action in actions for message in order.inputs(action))
        pairs = order.stages - 1 + order.stages // 2
        assert len(out) == len(set(out)) == 2 * order.micro_batches * pairs
        assert all(message.source.stage != message.target.stage for message in out)


def test_orders_with_skip_connections_get_through() -> None:
    for case in legal():
        if case[1] * case[3] > 1:
            order = u_shaped(order_of(*case))
            order.check()
            if case[0] == "fill-drain":
                order.check(slots=1)
            elif case[0] == "1f1b":  # the first rank warms up ahead of the last one
                order.check(slots=1 if order.ranks < 6 else 3)


def test_a_skip_connection_that_finds_no_room_is_named() -> None:
    order = u_shaped(order_of("interleaved", 2, 4, 2))
    with pytest.raises(ValueError, match="rank 1 waits for room to send the skip connection 0 of the backward of"):
        order.check(slots=1)
    order.check(slots=4)


def test_a_skip_connection_leads_to_a_later_stage() -> None:
    order = replace(order_of("1f1b", 3, 2), skips=((2, 0),))
    with pytest.raises(ValueError, match="must lead from a stage to a later one"):
        order.check()


def test_skip_connections_are_messages_of_the_schedule() -> None:
    order = replace(order_of("1f1b", 3, 1), skips=((0, 2),))
    # Forwards at 0 and 1; the last waits for the skip until 6. Its gradient is back at 6 + 3 + 5.
    trace = play(order, Equal(skip_s=5.0))
    assert trace.makespan == pytest.approx(16.0, rel=1e-12)
    assert play(order, Equal()).makespan == pytest.approx(9.0, rel=1e-12)
    there = [span for span in trace if span.key.phase == "send forward skip 0"]
    back = [span for span in trace if span.key.phase == "send backward skip 0"]
    assert [(span.start, span.finish) for span in there + back] == [(1.0, 6.0), (9.0, 14.0)]
