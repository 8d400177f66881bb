"""Some hundreds of layouts, every pair of features among them that can be, each the step of one process."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from stretto.train.check import check_layout
from stretto.train.plan import AXES
from tests.train import kit
from tests.train.test_equivalence import SHAPES, expected

COUNT, MOST_RANKS = 300, 8
FEATURES: dict[str, tuple[Any, ...]] = {
    "shape": tuple(SHAPES),
    "pp": (1, 2, 4),
    "dp": (1, 2, 4),
    "ep": (1, 2, 4),
    "cp": (1, 2, 4),
    "tp": (1, 2, 3),
    "schedule": ("fill-drain", "1f1b", "interleaved", "looped"),
    "micro_batch": (1, 2, 4),
    "recompute": (False, True),
    "attention": ("blockwise", "rsa", "all_to_all"),
    "cp_layout": ("contiguous", "zigzag"),
    "experts": ("llep", "ep"),
}

Case = tuple[tuple[str, Any], ...]


def legal() -> Iterator[dict[str, Any]]:
    """All that the planner takes, features that do nothing left at their first value."""
    for values in itertools.product(*FEATURES.values()):
        case = dict(zip(FEATURES, values, strict=True))
        ranks = int(np.prod([case[axis] for axis in AXES]))
        if ranks > MOST_RANKS or _idle(case):
            continue
        name = case.pop("shape")
        chunks = 2 if case["schedule"] in ("interleaved", "looped") else 1
        job = kit.job_of(SHAPES[name])
        spec = SHAPES[name].spec(vocab=kit.VOCAB, positions=kit.LENGTH)
        if case["pp"] * chunks > spec.layers:
            continue
        plan = kit.plan_of(job, chunks=chunks, **case)
        if check_layout(job, plan, spec) is None:
            yield {"shape": name, "chunks": chunks, **case}


def _idle(case: dict[str, Any]) -> bool:
    """Whether a feature is at another value than its first and has nothing to do."""
    dense = not SHAPES[case["shape"]].experts
    return (
        (case["pp"] == 1 and case["schedule"] != "fill-drain")
        or (case["cp"] == 1 and (case["attention"], case["cp_layout"]) != ("blockwise", "contiguous"))
        or (case["ep"] > 1 and dense)
        or (case["ep"] == 1 and case["experts"] != "llep")
    )


def chosen() -> list[dict[str, Any]]:
    """`COUNT` of them: greedily those with most pairs not yet seen, then others drawn by a seed."""
    cases = list(legal())
    order = np.random.default_rng(7).permutation(len(cases))
    missing = {pair for case in cases for pair in itertools.combinations(case.items(), 2)}
    found: list[int] = []
    for index in order:
        pairs = missing.intersection(itertools.combinations(cases[index].items(), 2))
        if len(pairs) >= 4 or (pairs and len(missing) < 40):
            found.append(int(index))
            missing -= pairs
    for index in order:  # what no case with many new pairs had
        pairs = missing.intersection(itertools.combinations(cases[index].items(), 2))
        if pairs:
            found.append(int(index))
            missing -= pairs
    assert not missing
    rest = (int(index) for index in order if int(index) not in set(found))
    found += itertools.islice(rest, max(0, COUNT - len(found)))
    return [cases[index] for index in found]


@pytest.mark.slow
def test_every_pair_of_features() -> None:
    cases = chosen()
    assert len(cases) >= COUNT
    failed = []
    for case in cases:
        choices = dict(case)
        job, reference = expected(choices.pop("shape"))
        try:
            kit.compare(job, kit.plan_of(job, **choices), reference)
        except AssertionError as problem:
            failed.append(f"{case}: {problem}")
    assert not failed, f"{len(failed)} of {len(cases)}: " + "\n".join(failed[:5])
