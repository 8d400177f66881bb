"""Every layout, against counting by hand: divisions along the tree, shares of the model, no plan twice."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import gcd

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stretto.models.spec import ModelSpec
from stretto.serve.deploy.layout import (
    Layout,
    attention_share,
    device_weight_bytes,
    experts_held,
    kv_bytes_per_token,
    layer_weight_bytes,
    mlp_width,
    stage_layers,
    table_bytes,
)
from stretto.serve.deploy.layouts import layouts
from stretto.serve.deploy.tree import Tree, flat, halved

from .worlds import EXPERTS, SMALL


def by_hand(spec: ModelSpec, tree: Tree) -> set[Layout]:
    """All numbers that could be, kept where every rule of the enumeration holds."""
    total = tree.size
    found = set()
    numbers = range(1, total + 1)
    for r, s, a, m, split in product(numbers, numbers, numbers, numbers, ("tensor", "expert")):
        if total % (r * s):
            continue
        devices = total // (r * s)
        if s > spec.layers or devices % a or devices % m:
            continue
        if not all(tree.is_partitionable(groups) for groups in (r, r * s, r * s * a, r * s * m)):
            continue
        ranks, mlp = devices // a, devices // m
        if ranks > spec.kv_heads and (ranks % spec.kv_heads or ranks > spec.heads):
            continue
        if gcd(a, m) != 1 or (a % m and m % a):
            continue
        if split == "expert" and (mlp == 1 or spec.experts < mlp):
            continue
        found.add(
            Layout(replicas=r, stages=s, devices=devices, attention_replicas=a, mlp_replicas=m, mlp_split=split)  # type: ignore[arg-type]
        )
    return found


TREES = {
    "1": Tree(),
    "2": flat(2),
    "6": flat(6),
    "8": flat(8),
    "8 on a bus": halved(8),
    "12 on a bus": halved(12),
    "2 x 4": Tree((flat(4), flat(4))),
    "3 x 4": Tree((flat(4),) * 3),
    "2 x 8": Tree((flat(8), flat(8))),
}


@pytest.mark.parametrize("tree", TREES.values(), ids=TREES)
@pytest.mark.parametrize(
    "spec",
    [SMALL, EXPERTS, replace(SMALL, layers=7), replace(SMALL, layers=2)],
    ids=["dense", "experts", "seven layers", "two layers"],
)
def test_enumeration_equals_counting_by_hand_without_doubles(tree: Tree, spec: ModelSpec) -> None:
    found = list(layouts(spec, tree))
    assert len(found) == len(set(found))
    assert set(found) == by_hand(spec, tree)
    assert all(layout.total == tree.size for layout in found)


@pytest.mark.parametrize("spec", [SMALL, EXPERTS])
def test_one_device_has_one_plan(spec: ModelSpec) -> None:
    assert list(layouts(spec, Tree())) == [Layout()]


def test_division_follows_the_branches() -> None:
    assert [n for n in range(1, 9) if halved(8).is_partitionable(n)] == [1, 2, 4, 8]
    assert [n for n in range(1, 13) if flat(12).is_partitionable(n)] == [1, 2, 3, 4, 6, 12]
    assert [n for n in range(1, 13) if Tree((flat(6), flat(6))).is_partitionable(n)] == [1, 2, 4, 6, 12]
    assert not Tree((flat(6), flat(6))).is_partitionable(3)  # a group would lie on both nodes


def shares(units: int, ranks: int) -> list[int]:
    each, over = divmod(units, ranks)
    return [each + (rank < over) for rank in range(ranks)]


@given(
    kv_heads=st.sampled_from([1, 2, 4, 8]),
    group=st.sampled_from([1, 4, 8]),
    ranks=st.sampled_from([1, 2, 4, 8, 16]),
    experts=st.sampled_from([0, 8]),
)
def test_the_fullest_share_covers_the_model(kv_heads: int, group: int, ranks: int, experts: int) -> None:
    spec = replace(SMALL, kv_heads=kv_heads, heads=kv_heads * group, experts=experts, top_k=2 if experts else 0)
    if ranks > spec.heads:
        return
    layout = Layout(devices=ranks)
    share = attention_share(spec, layout)
    if ranks <= kv_heads:
        assert share.kv_heads == max(shares(kv_heads, ranks))
        assert share.heads == share.kv_heads * group
    else:  # KV heads are repeated, query heads are not
        assert share.kv_heads == 1
        assert share.heads * ranks == spec.heads
    assert mlp_width(spec, layout) == max(shares(spec.ffn, ranks))
    assert max(shares(spec.ffn, ranks)) - min(shares(spec.ffn, ranks)) <= 1
    whole = replace(layout, mlp_split="expert") if experts >= ranks else layout
    assert experts_held(spec, whole) == (max(shares(experts, ranks)) if experts >= ranks else experts)


@pytest.mark.parametrize(
    "layout",
    [
        Layout(devices=4),
        Layout(devices=2, stages=2),
        Layout(devices=4, attention_replicas=4),
        Layout(devices=4, mlp_replicas=2),
        Layout(devices=8),
    ],
    ids=str,
)
def test_weights_over_devices_are_the_cells_times_their_replicas(layout: Layout) -> None:
    """In matrices alone, which split evenly here: all devices hold as much as the fullest one."""
    head = SMALL.hidden * SMALL.vocab
    attention = SMALL.layers * SMALL.hidden * (SMALL.qkv_width + SMALL.q_width)
    repeated = max(1, layout.attention_ranks // SMALL.kv_heads)
    attention += SMALL.layers * SMALL.hidden * 2 * SMALL.kv_width * (repeated - 1)
    mlp = SMALL.layers * 3 * SMALL.hidden * SMALL.ffn
    norms = layout.stages * layout.devices * (SMALL.layers // layout.stages * 2 + 1) * SMALL.hidden
    tables = head * (2 if layout.stages == 1 else layout.stages)
    expected = layout.attention_replicas * attention + layout.mlp_replicas * mlp + norms + tables
    held = device_weight_bytes(SMALL, layout, "bf16") / 2 * layout.stages * layout.devices
    assert held == pytest.approx(expected)


@given(layers=st.integers(1, 200), stages=st.integers(1, 40))
def test_stages_cover_the_layers_and_differ_by_one_at_most(layers: int, stages: int) -> None:
    found = stage_layers(layers, stages)
    assert sum(found) == layers
    assert len(found) == stages
    assert max(found) - min(found) <= 1
    assert list(found) == sorted(found, reverse=True)  # the last one, with the head, has the fewest


@pytest.mark.parametrize("layers", [5, 8, 9, 11])
@pytest.mark.parametrize("stages", [2, 3, 4])
@pytest.mark.parametrize("tied", [False, True])
def test_memory_is_that_of_the_fullest_stage(layers: int, stages: int, tied: bool) -> None:
    spec, layout = replace(SMALL, layers=layers, tied_embeddings=tied), Layout(stages=stages)
    layer, table = layer_weight_bytes(spec, layout, "bf16"), table_bytes(spec, layout)
    ends = (0, stages - 1)
    by_stage = [n * layer + table * (number in ends) for number, n in enumerate(stage_layers(layers, stages))]
    assert device_weight_bytes(spec, layout, "bf16") == pytest.approx(max(by_stage) + 2 * spec.hidden)
    assert kv_bytes_per_token(spec, layout, "bf16") == 2 * spec.kv_width * -(-layers // stages) * 2


def test_keys_and_values_are_those_of_the_share() -> None:
    whole = kv_bytes_per_token(SMALL, Layout(), "bf16")
    assert whole == SMALL.kv_bytes_per_token("bf16")
    assert kv_bytes_per_token(SMALL, Layout(devices=4), "bf16") == whole / 4
    assert kv_bytes_per_token(SMALL, Layout(devices=8), "bf16") == whole / 4  # a KV head is repeated
    assert kv_bytes_per_token(SMALL, Layout(devices=4, attention_replicas=4), "bf16") == whole
    assert kv_bytes_per_token(SMALL, Layout(stages=2), "fp8") == whole / 4


def test_layouts_say_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="attention_replicas is 3; it must be a divisor of the 4 devices"):
        Layout(devices=4, attention_replicas=3)
