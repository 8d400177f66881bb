"""What LLEP (arXiv 2601.17111, 2026) states of lending experts, from the planner that training runs.

A layer's time is played on eight H200: every expert's products by the kernel model on the tokens that the plan gives
it, rows and lent weights over NVLink. What the published implementation spends beside that (planning in Python, the
gate, launching transfers) is one constant, fitted on the table of another model (128 experts of width 2048); the table
of gpt-oss-120b's layer is judged.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from stretto.claims.registry import Figure, claim

if TYPE_CHECKING:
    from stretto.models.parallel.expert_plan import ExpertPlan

PLACES, EXPERTS, TOP_K, TOKENS = 8, 128, 4, 32768
_LINK = 450e9
CONSTANTS = {
    "kernels": "hardware/fitted.yaml: fitted on other kernels",
    "peak, bandwidth": "catalog h200-sxm: NVIDIA data sheets",
    "NVLink 450 GB/s each way": "NVIDIA H100 data sheet (2023)",
    "overhead": "fitted on the table of 128 experts of width 2048",
}
SETTING = "8 H200, forward of a layer of gpt-oss-120b: 128 experts, width 2880, top 4, 32768 tokens a GPU"

_GPT_OSS = (
    (30, 16, 1.73),
    (30, 4, 2.09),
    (30, 1, 2.41),
    (50, 16, 2.85),
    (50, 4, 3.05),
    (50, 1, 3.48),
    (80, 16, 4.37),
    (80, 4, 4.47),
    (80, 1, 5.26),
    (95, 16, 5.19),
    (95, 4, 5.22),
    (95, 1, 6.11),
)
_NARROW = (
    (30, 16, 1.5),
    (30, 4, 1.8),
    (30, 1, 1.9),
    (80, 16, 3.7),
    (80, 4, 3.7),
    (80, 1, 4.2),
    (95, 16, 4.3),
    (95, 4, 4.2),
    (95, 1, 4.9),
)


def hot_counts(percent: int, hot: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Copies by expert when `percent` of the tokens send all theirs to the first `hot` experts in turn."""
    total = TOKENS * PLACES * TOP_K
    counts = np.zeros(EXPERTS, np.int64)
    counts[:hot] = total * percent // 100 // hot
    counts[hot:] = (total - counts.sum()) // (EXPERTS - hot)
    return counts


@lru_cache(maxsize=4096)
def _expert_s(rows: int, width: int) -> float:
    """A SwiGLU expert of inner width `width` on some rows."""
    from stretto.hardware import catalog, cost
    from stretto.hardware.operation import Operation

    device = catalog.device("h200-sxm")

    def product(inner: int, columns: int) -> Operation:
        moved = 2.0 * (rows * inner + inner * columns + rows * columns)
        return Operation(
            name="expert",
            kind="matmul",
            dtype="bf16",
            flops=2.0 * rows * inner * columns,
            bytes=moved,
            shape=(rows, inner, columns),
        )

    gating = 2.0 * rows * (2 + 1 + 1) * width  # reads gate and up, writes their product, which the next reads
    return cost.total([product(width, 2 * width), product(width, width)], device).seconds + gating / device.bandwidth


def _computing_s(plan: ExpertPlan, width: int) -> float:
    seconds = [0.0] * PLACES
    for stretches in plan.stretches:
        for stretch in stretches:
            seconds[stretch.place] += _expert_s(stretch.stop - stretch.start, width)
    return max(seconds)


def _rows_s(plan: ExpertPlan, width: int) -> float:
    """Rows one way, until the busiest place has all of its."""
    return max(plan.loads) * (PLACES - 1) / PLACES * width * 2.0 / _LINK


@lru_cache(maxsize=64)
def _layer_s(percent: int, hot: int, width: int) -> tuple[float, float]:
    """A layer with every token at its expert, and lent but for the implementation's overhead."""
    from stretto.models.parallel.expert_plan import lla_plan, native_plan

    counts = hot_counts(percent, hot)
    native, lent = native_plan(counts, PLACES), lla_plan(counts, PLACES)
    plain = 2 * _rows_s(native, width) + _computing_s(native, width)
    owners = [loan.owner for loan in lent.loans]
    weights = max((owners.count(owner) for owner in set(owners)), default=0) * 3 * width * width * 2.0 / _LINK
    rows = _rows_s(lent, width)
    return plain, rows + max(rows, weights) + _computing_s(lent, width)


@lru_cache(maxsize=1)
def _overhead_s() -> float:
    """The mean, over the cells of the other table, of what is missing from the lent layer's time."""
    missing = []
    for percent, hot, speedup in _NARROW:
        plain, lent = _layer_s(percent, hot, 2048)
        missing.append(plain / speedup - lent)
    return sum(missing) / len(missing)


def _bound(percent: int, hot: int) -> float:
    """The busiest place's load over the mean: the speed-up if lending cost nothing."""
    from stretto.models.parallel.expert_plan import imbalance

    return imbalance(hot_counts(percent, hot), PLACES)


def _speedup(percent: int, hot: int) -> Callable[[bool], Figure]:
    def compute(quick: bool) -> Figure:
        plain, lent = _layer_s(percent, hot, 2880)
        overhead = _overhead_s()
        note = f"null: the loads' own ratio; overhead {overhead * 1e3:.2f} ms"
        return Figure(ours=plain / (lent + overhead), null=_bound(percent, hot), note=note)

    compute.__name__ = f"hot_{percent}_on_{hot}"
    return compute


for _percent, _hot, _published in _GPT_OSS:
    claim(
        system="llep",
        says=f"{_percent} % of the tokens on {_hot} expert{'s' if _hot > 1 else ''}: {_published} times as fast",
        kind="simulated",
        published=_published,
        setting=SETTING,
        constants=CONSTANTS,
        tolerance=0.15,
    )(_speedup(_percent, _hot))


@claim(
    system="llep",
    says="with all tokens on one expert of eight places, eight near-equal stretches and seven loans",
    kind="exact",
    published=7,
    unit="loans",
    setting="64 experts, 100,000 copies, capacity 1.0, no least part",
)
def one_hot_expert(quick: bool) -> Figure:
    from stretto.models.parallel.expert_plan import lla_plan

    counts = np.zeros(64, np.int64)
    counts[0] = 100_000
    plan = lla_plan(counts, PLACES, min_tokens=1)
    even = max(plan.loads) - min(plan.loads) <= PLACES
    return Figure(ours=len(plan.loans) if even and len(plan.stretches[0]) == PLACES else -1)


@claim(
    system="llep",
    says="balanced routing moves no weights",
    kind="exact",
    published=0,
    unit="loans",
    setting="128 experts on 8 places, as many tokens each",
)
def balanced(quick: bool) -> Figure:
    from stretto.models.parallel.expert_plan import lla_plan

    return Figure(ours=len(lla_plan(np.full(EXPERTS, 8192), PLACES).loans))


@claim(
    system="llep",
    says="the fullest place's activations fall at least as much as the speed-up bound says: 5 times at 95 % on one",
    kind="exact",
    published=None,
    setting="128 experts on 8 places, 95 % of the tokens on one expert: rows on the fullest place, EP over LLEP",
)
def memory(quick: bool) -> Figure:
    from stretto.models.parallel.expert_plan import lla_plan, native_plan

    counts = hot_counts(95, 1)
    ratio = max(native_plan(counts, PLACES).loads) / max(lla_plan(counts, PLACES).loads)
    return Figure(ours=ratio >= 5, note=f"{ratio:.2f} times fewer rows")
