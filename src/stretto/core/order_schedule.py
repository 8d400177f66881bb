"""A pipeline order with what its actions cost, as a schedule that is simulated and that ranks carry out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from stretto.core.orders import Action, Message, Order
from stretto.core.schedule import Schedule
from stretto.core.trace import Key


class Costs(Protocol):
    """What the actions of an order cost, as seconds or as work that `hardware.lower` turns into seconds."""

    def compute(self, action: Action) -> Any:
        """Of the action itself: seconds, or work."""

    def message(self, message: Message) -> Any:
        """Of bringing a tensor to another rank: seconds, or work."""

    def held(self, action: Action) -> float:
        """Bytes that a forward keeps until its backward is done."""


def lay_out(
    order: Order,
    costs: Costs,
    *,
    schedule: Schedule,
    lanes: Sequence[int],
    spaces: Sequence[int] = (),
    step: int = -1,
    after: Iterable[int] = (),
    ranks: Sequence[int] = (),
) -> dict[Action, int]:
    """Add the tasks of one step to `schedule`.

    A message between two ranks is a task on a lane of its own a pair and direction: it is under way while both compute.
    Those of skip connections take their turn on the same lanes.

    Args:
        lanes: of each pipeline rank, where it computes.
        spaces: of each pipeline rank, its memory; none: memory is not followed.
        step: for the tasks' keys.
        after: tasks that each rank waits for before its first action.
        ranks: of each pipeline rank, its number in the run, for the keys; by default 0, 1, 2 and so on.

    Returns:
        The task of each action.
    """
    first = tuple(after)
    numbers = list(ranks or range(order.ranks))
    links: dict[tuple[int, int], int] = {}
    actions, messages = _ids(order, len(schedule))
    for rank, program in enumerate(order.programs):
        for place, action in enumerate(program):
            kind, micro_batch, stage = action
            needs = [messages.get(message, actions[message.source]) for message in order.inputs(action)]
            if kind == "backward":
                needs.append(actions[action._replace(kind="forward")])
            held = {spaces[rank]: costs.held(Action("forward", micro_batch, stage))} if spaces else {}
            schedule.add(
                [lanes[rank]],
                **_cost(costs.compute(action)),
                after=[*needs, *(() if place else first)],
                key=Key(kind, step, micro_batch, stage, numbers[rank]),
                op=action,
                takes=held if kind == "forward" else {},
                gives=held if kind == "backward" else {},
            )
            for message in filter(order.crosses, order.outputs(action)):
                pair = (rank, order.rank_of(message.target.stage))
                if pair not in links:
                    links[pair] = schedule.lane(f"rank {numbers[pair[0]]} to {numbers[pair[1]]}")
                what = kind if message.skip is None else f"{kind} skip {message.skip}"
                schedule.add(
                    [links[pair]],
                    **_cost(costs.message(message)),
                    after=[actions[action]],
                    key=Key(f"send {what}", step, micro_batch, stage, numbers[rank]),
                )
    return actions


def _ids(order: Order, first: int) -> tuple[dict[Action, int], dict[Message, int]]:
    """The tasks of actions and of messages as `lay_out` numbers them."""
    actions: dict[Action, int] = {}
    messages: dict[Message, int] = {}
    number = first
    for program in order.programs:
        for action in program:
            actions[action] = number
            number += 1
            for message in filter(order.crosses, order.outputs(action)):
                messages[message] = number
                number += 1
    return actions, messages


def _cost(cost: Any) -> dict[str, Any]:
    return {"seconds": float(cost)} if isinstance(cost, int | float) else {"work": cost}
