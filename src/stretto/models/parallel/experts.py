"""Expert MLPs shared by the ranks of an axis, each token computed where the plan of this very batch says.

"ep" computes every token with its expert. "llep" (arXiv 2601.17111, 2026; see `expert_plan`) lends the weights of
busy experts to ranks that have less to do, whenever the busiest rank has more than `threshold` times the mean. Weights
travel beside the tokens, are dropped after use, and their gradients go home in the order of the helpers. Both are
exact: outputs and gradients are those of all experts on one rank.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn.functional import linear, silu

from stretto.comm.transport import Axis
from stretto.core.errors import require
from stretto.models.parallel.expert_plan import ExpertPlan, Loan, imbalance, lla_plan, native_plan, routes


@dataclass(frozen=True, kw_only=True)
class ExpertStatistics:
    """What the last pass did.

    Attributes:
        path: "ep" or "llep".
        ratio: the busiest rank's load over the mean, with every token at its expert.
        native_loads, loads: copies of tokens by rank, so and as computed.
        loans: experts whose weights were lent.
        weight_bytes: that this rank lent and borrowed.
        plan_s: seconds that planning took.
    """

    path: str
    ratio: float
    native_loads: tuple[int, ...]
    loads: tuple[int, ...]
    loans: int
    weight_bytes: int
    plan_s: float


class MoE(nn.Module):
    """A layer of SwiGLU experts behind a router that picks `top_k` of them for each token (Mixtral's rule).

    Args:
        hidden, ffn: widths; experts, top_k: how many there are, and how many a token goes to.
        axis: the ranks that share the experts, neighbours on one rank.
        policy: "llep" or "ep".
        threshold: from which imbalance on tokens are moved.
        alpha, min_tokens: of `lla_plan`.

    Attributes:
        router: [experts, hidden], the same on every rank.
        gate, up: [local experts, ffn, hidden]; down: [local experts, hidden, ffn].
        statistics: of the last pass.

    Raises:
        FieldError: the experts do not divide by the ranks, or top_k is more than there are.
    """

    def __init__(
        self,
        hidden: int,
        ffn: int,
        experts: int,
        top_k: int,
        axis: Axis,
        *,
        policy: Literal["llep", "ep"] = "llep",
        threshold: float = 1.3,
        alpha: float = 1.0,
        min_tokens: int = 1024,
    ):
        super().__init__()
        require(experts % axis.size == 0, "experts", experts, f"a multiple of the {axis.size} ranks")
        require(1 <= top_k <= experts, "top_k", top_k, f"from 1 to {experts}")
        require(policy in ("llep", "ep"), "experts", policy, "llep or ep")
        self.experts, self.top_k, self.axis = experts, top_k, axis
        self.policy, self.threshold, self.alpha, self.min_tokens = policy, threshold, alpha, min_tokens
        local = experts // axis.size
        self.aside = axis.apart("weights")
        self.router = nn.Parameter(torch.empty(experts, hidden))
        self.gate = nn.Parameter(torch.empty(local, ffn, hidden))
        self.up = nn.Parameter(torch.empty(local, ffn, hidden))
        self.down = nn.Parameter(torch.empty(local, hidden, ffn))
        self.statistics: ExpertStatistics | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., hidden] through the experts that the router picks for each row."""
        rows = x.flatten(0, -2)
        best, chosen = linear(rows, self.router).topk(self.top_k, dim=-1)
        gates = best.softmax(-1)
        return self.dispatch(rows, chosen, gates).view(x.shape)

    def dispatch(self, rows: torch.Tensor, chosen: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
        """Rows [T, hidden] through `chosen` experts [T, k], weighed by `gates` [T, k] and summed."""
        copies = chosen.flatten()
        counts = self.count(copies)
        plan = self._plan(counts)
        route = routes(plan, counts, self.axis.rank)

        # Copies by expert are in the order of their global numbers; then by place, each place's still so.
        by_expert = copies.argsort(stable=True)
        place = np.concatenate([np.repeat(np.arange(self.axis.size), each) for each in route.send])
        order = by_expert[torch.from_numpy(np.argsort(place, kind="stable"))]
        send, receive = route.send.sum(0).tolist(), route.arrive.sum(1).tolist()

        loans = _Loans(plan.loans, self.axis.rank, self.experts // self.axis.size)
        came = list(
            _Dispatch.apply(  # type: ignore[no-untyped-call]
                rows[order.div(self.top_k, rounding_mode="floor")],
                *(self.gate, self.up, self.down, self.axis, self.aside, send, receive, loans),
            )
        )
        unsorted: torch.Tensor = _Permuted.apply(  # type: ignore[no-untyped-call]
            _Exchange.apply(  # type: ignore[no-untyped-call]
                self._compute(came, route.arrive, loans), self.axis, receive, send
            ),
            _inverse(order),
        )
        return (unsorted.view(-1, self.top_k, rows.shape[1]) * gates[..., None].to(unsorted.dtype)).sum(1)

    def count(self, copies: torch.Tensor) -> np.ndarray[Any, np.dtype[np.int64]]:
        """[places, experts]: how many copies of its tokens each place has for each expert."""
        own = torch.bincount(copies, minlength=self.experts)[None]
        counts: np.ndarray[Any, np.dtype[np.int64]] = self.axis.all_gather(own).numpy()
        return counts

    def _plan(self, counts: np.ndarray[Any, np.dtype[np.int64]]) -> ExpertPlan:
        begun = time.perf_counter()
        world, total = self.axis.size, counts.sum(0)
        ratio = imbalance(total, world)
        spread = self.policy == "llep" and world > 1 and ratio >= self.threshold
        plan = (
            lla_plan(total, world, alpha=self.alpha, min_tokens=self.min_tokens)
            if spread
            else native_plan(total, world)
        )
        involved = sum(self.axis.rank in (loan.owner, loan.helper) for loan in plan.loans)
        one = 3 * self.gate[0].numel() * self.gate.element_size()
        self.statistics = ExpertStatistics(
            path="llep" if spread else "ep",
            ratio=ratio,
            native_loads=plan.native_loads,
            loads=plan.loads,
            loans=len(plan.loans),
            weight_bytes=involved * one,
            plan_s=time.perf_counter() - begun,
        )
        return plan

    def _compute(
        self,
        came: list[torch.Tensor],
        arrive: np.ndarray[Any, np.dtype[np.int64]],
        loans: _Loans,
    ) -> torch.Tensor:
        """Each expert's rows, from all ranks in turn, through its MLP; back in the order in which they came.

        Args:
            came: the rows, which are taken from the list so that they can be forgotten, and borrowed weights.
        """
        by_rank = torch.from_numpy(np.tile(np.arange(self.experts), self.axis.size).repeat(arrive.flatten()))
        together = by_rank.argsort(stable=True)
        rows = came.pop(0)
        parts = _Permuted.apply(rows, together).split(arrive.sum(0).tolist())  # type: ignore[no-untyped-call]
        gates, ups, downs = self.gate.unbind(), self.up.unbind(), self.down.unbind()
        results = []
        for expert, part in enumerate(parts):
            if len(part):
                at = loans.borrowed_at(expert)
                if at is None:
                    local = expert - self.axis.rank * len(self.gate)
                    gate, up, down = gates[local], ups[local], downs[local]
                else:
                    gate, up, down = came[3 * at : 3 * at + 3]
                results.append(linear(silu(linear(part, gate)) * linear(part, up), down))
        if not results:  # no row, but of the type that the others' results have
            return rows.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else rows
        del rows
        joined = torch.cat(results)
        results.clear()
        out: torch.Tensor = _Permuted.apply(joined, _inverse(together))  # type: ignore[no-untyped-call]
        return out


class _Loans:
    """The loans of a plan as one rank sees them."""

    def __init__(self, loans: Sequence[Loan], place: int, local: int):
        self.place, self.local = place, local
        self.lent = [loan for loan in loans if loan.owner == place]
        self.borrowed = [loan for loan in loans if loan.helper == place]
        self._at = {loan.expert: at for at, loan in enumerate(self.borrowed)}

    def borrowed_at(self, expert: int) -> int | None:
        """The place of a borrowed expert among all that are; None: it is not borrowed."""
        return self._at.get(expert)

    def row(self, loan: Loan) -> int:
        """The row of a lent expert among this rank's own."""
        return loan.expert - self.place * self.local


class _Dispatch(torch.autograd.Function):
    """Rows to the places that compute them, lent weights beside them; backward brings both gradients home.

    One function for both, so that every rank is in the same exchange at the same time, with loans or without.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        gate: torch.Tensor,
        up: torch.Tensor,
        down: torch.Tensor,
        axis: Axis,
        aside: Axis,
        send: list[int],
        receive: list[int],
        loans: _Loans,
    ) -> tuple[torch.Tensor, ...]:
        ctx.how = (axis, aside, send, receive, loans)
        ctx.save_for_backward(gate, up, down)
        matrices = (gate, up, down)
        sending = [aside.send(matrix[loans.row(loan)], loan.helper) for loan in loans.lent for matrix in matrices]
        coming = [aside.receive(matrix[0], loan.owner) for loan in loans.borrowed for matrix in matrices]
        came = axis.all_to_all(rows, send, receive)
        borrowed = [pending.wait() for pending in coming]
        for pending in sending:
            pending.wait()
        return (came.clone() if came is rows else came, *borrowed)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor, *lent: torch.Tensor) -> tuple[Any, ...]:
        axis, aside, send, receive, loans = ctx.how
        matrices = ctx.saved_tensors
        found = [torch.zeros_like(matrix) for matrix in matrices]
        coming = [
            (aside.receive(matrix[0], loan.helper), at, loans.row(loan))
            for loan in loans.lent
            for at, matrix in enumerate(matrices)
        ]
        owners = [loan.owner for loan in loans.borrowed for _ in matrices]
        sending = [aside.send(part, owner) for part, owner in zip(lent, owners, strict=True)]
        rows = axis.all_to_all(gradient, receive, send)
        for pending, at, row in coming:
            found[at][row] += pending.wait()
        for pending in sending:
            pending.wait()
        return rows, *found, None, None, None, None, None


class _Permuted(torch.autograd.Function):
    """Rows in another order, in which each is once: backward need not add, as that of an index would."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(order)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (order,) = ctx.saved_tensors
        return torch.empty_like(gradient).index_copy_(0, order, gradient), None


def _inverse(order: torch.Tensor) -> torch.Tensor:
    """The order that brings back what `order` moved."""
    return torch.empty_like(order).index_copy_(0, order, torch.arange(len(order)))


class _Exchange(torch.autograd.Function):
    """Results back to the ranks whose rows they are."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, axis: Axis, send: list[int], receive: list[int]) -> torch.Tensor:
        ctx.how = (axis, receive, send)
        came = axis.all_to_all(rows, send, receive)
        return came.clone() if came is rows else came

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        axis, send, receive = ctx.how
        return axis.all_to_all(gradient, send, receive), None, None, None


def reference(x: torch.Tensor, moe: Mapping[str, torch.Tensor], top_k: int) -> torch.Tensor:
    """All experts on one rank, one after another, from the whole parameters by name: what `MoE` is held against."""
    rows = x.flatten(0, -2)
    best, chosen = linear(rows, moe["router"]).topk(top_k, dim=-1)
    gates = best.softmax(-1)
    total = torch.zeros_like(rows)
    for expert in range(len(moe["router"])):
        inner = silu(linear(rows, moe["gate"][expert])) * linear(rows, moe["up"][expert])
        weight = (gates * (chosen == expert)).sum(-1, keepdim=True)
        total = total + weight * linear(inner, moe["down"][expert])
    return total.view(x.shape)
