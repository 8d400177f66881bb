"""The rollouts in plain Python: the twin that native code is checked against, and the loop that benchmarks beat.

A rollout launches one action, then follows Seq-(model, count): every ready node gets so many samples on that model,
again and again to the end. Nodes are launched in their order as far as the money goes; the others wait for what comes
back. Money that a batch does not need comes back when it ends.
"""

from __future__ import annotations

from collections.abc import Mapping

from stretto.workflow.portfolio.draws import Batch, Draws, Sample, remainders, samples, settle
from stretto.workflow.portfolio.problem import MAX_LAUNCHES, MONEY_SLACK, Action, Problem
from stretto.workflow.portfolio.state import Flight, State


def wins(problem: Problem, state: State, action: Action, model: str, count: int, draws: Draws, rollout: int) -> bool:
    """Whether the workflow completes in time and money in this rollout: `action` first, then Seq-(model, count)."""
    workflow = problem.workflow
    now, money, done = 0.0, state.money_left, set(state.done)
    slack = state.money_left * MONEY_SLACK
    flying: dict[str, tuple[float, Batch]] = {}
    for flight in state.flights:
        batch = _land(problem, flight, draws, rollout)
        flying[flight.node] = (batch.seconds, batch)
    launches = dict.fromkeys(workflow.nodes, 0)
    opening: Mapping[str, tuple[str, int]] | None = {each.node: (each.model, each.count) for each in action}
    while len(done) < len(workflow.nodes):
        for node in workflow.ready(done, flying):
            chosen = (model, count) if opening is None else opening.get(node)
            if chosen is None:
                continue
            batch = _launch(problem, node, *chosen, launches[node], draws, rollout)
            if not batch.taken <= money + slack:
                continue
            launches[node] += 1
            if sum(launches.values()) > MAX_LAUNCHES:
                return False
            money -= batch.taken
            flying[node] = (now + batch.seconds, batch)
        opening = None
        if not flying:
            return False

        now = min(end for end, _ in flying.values())
        if now > state.time_left_s:
            return False
        for node in [node for node in workflow.nodes if node in flying and flying[node][0] == now]:
            batch = flying.pop(node)[1]
            money += batch.back
            if batch.success:
                done.add(node)
    return True


def _launch(problem: Problem, node: str, model: str, count: int, launch: int, draws: Draws, rollout: int) -> Batch:
    law = problem.estimates.law(node, model)
    words = draws.words(rollout, problem.workflow.index[node], launch, count)
    return settle(problem.rules, law.bound, samples(law, words))


def _land(problem: Problem, flight: Flight, draws: Draws, rollout: int) -> Batch:
    """How a batch in flight ends in this rollout."""
    law = problem.estimates.law(flight.node, flight.model)
    words = draws.words(rollout, problem.workflow.index[flight.node], 0, flight.running, in_flight=True)
    if flight.remaining_s is None:
        drawn = remainders(law, words, flight.elapsed_s)
    else:
        drawn = [
            Sample(latency_s=flight.elapsed_s + left, success=each.success, cost=each.cost)
            for each, left in zip(samples(law, words), flight.remaining_s, strict=True)
        ]
    return settle(problem.rules, law.bound, drawn, elapsed_s=flight.elapsed_s, succeeded=flight.succeeded)
