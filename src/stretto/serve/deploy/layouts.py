"""Every layout of a model on a tree of equal devices (APEX's enumeration), without doubles.

Replicas, then pipeline stages of a layer at least, then replicas of each kind of cell within a stage: each
division must follow the tree. A plan whose cells all have a common number of replicas is a plan of more model replicas,
so it is left to that one; between neighbouring cells the counts must divide one another, so that rows can be dealt
anew.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd

from stretto.models.spec import ModelSpec
from stretto.serve.deploy.layout import Layout, Split
from stretto.serve.deploy.tree import Tree


def divisors(number: int) -> list[int]:
    """In ascending order."""
    return [d for d in range(1, number + 1) if number % d == 0]


def layouts(spec: ModelSpec, tree: Tree) -> Iterator[Layout]:
    """All layouts on all devices of `tree`."""
    total = tree.size
    for replicas in divisors(total):
        if not tree.is_partitionable(replicas):
            continue
        for stages in divisors(total // replicas):
            if stages > spec.layers or not tree.is_partitionable(replicas * stages):
                continue
            devices = total // (replicas * stages)
            yield from _cells(spec, tree, replicas, stages, devices)


def _cells(spec: ModelSpec, tree: Tree, replicas: int, stages: int, devices: int) -> Iterator[Layout]:
    counts = [c for c in divisors(devices) if tree.is_partitionable(replicas * stages * c)]
    for attention in counts:
        if not attention_fits(spec, devices // attention):
            continue
        for mlp in counts:
            if gcd(attention, mlp) > 1 or (attention % mlp and mlp % attention):
                continue
            for split in mlp_splits(spec, devices // mlp):
                yield Layout(
                    replicas=replicas,
                    stages=stages,
                    devices=devices,
                    attention_replicas=attention,
                    mlp_replicas=mlp,
                    mlp_split=split,
                )


def attention_fits(spec: ModelSpec, ranks: int) -> bool:
    """Whether so many ranks each get whole KV groups, or with KV heads repeated whole query heads, evenly."""
    if ranks <= spec.kv_heads:
        return True
    return ranks % spec.kv_heads == 0 and ranks <= spec.heads


def mlp_splits(spec: ModelSpec, ranks: int) -> Iterator[Split]:
    """How an MLP can be cut over so many ranks; on one device all ways are the same."""
    if ranks <= spec.ffn:
        yield "tensor"
    if spec.experts >= ranks > 1:
        yield "expert"
