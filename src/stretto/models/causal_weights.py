"""What fills a trainable decoder: a model's files, or what a new model begins with, whoever holds which part."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from stretto.models.causal import CausalStage
from stretto.models.causal_layers import Placement
from stretto.models.rope import rope_frequencies
from stretto.models.spec import ModelSpec
from stretto.models.weights import ROPE_DIVISORS, Weights, query_key_order

_INIT_STD = 0.02


def load_weights(stage: CausalStage, weights: Weights) -> None:
    """Fill the stage from a model's files; adapters begin as `initialise` makes them.

    Raises:
        UserError: a tensor is missing or has another shape than the model's spec says.
    """
    if ROPE_DIVISORS in weights:
        pairs = stage.spec.head_dim // 2
        divisors = weights.tensor(ROPE_DIVISORS, (pairs,))
        stage.frequencies.copy_(rope_frequencies(stage.spec, divisors))
    initialise(stage, seed=0, only="lora_")
    with torch.no_grad():
        for name, parameter, place in _placed(stage):
            if "lora_" not in name:
                parameter.copy_(part_of(_whole(name, place, stage.spec, weights), place, parameter))


def initialise(stage: CausalStage, *, seed: int, only: str = "") -> None:
    """Fill the parameters whose names hold `only` with what a new model begins with, whoever holds which part.

    Matrices are normal with a deviation of 0.02 (those that write to the residual stream smaller by the root of twice
    the layers), norms and the weights of skip connections 1, biases 0; an adapter's second matrix is 0, so that it
    begins as nothing.
    """
    with torch.no_grad():
        for name, parameter, place in _placed(stage):
            if only in name:
                whole = _initial(name, place.shape, stage.spec, seed, parameter.dtype)
                parameter.copy_(part_of(whole, place, parameter))


def part_of(whole: torch.Tensor, place: Placement, part: torch.Tensor) -> torch.Tensor:
    """The stretch of `whole` that `place` says, of the shape of `part`."""
    for dim, (start, size) in enumerate(zip(place.start, part.shape, strict=True)):
        whole = whole.narrow(dim, start, size)
    return whole


def _placed(stage: CausalStage) -> Iterator[tuple[str, nn.Parameter, Placement]]:
    places = stage.placements()
    for name, parameter in stage.named_parameters():
        yield name, parameter, places[name]


def _whole(name: str, place: Placement, spec: ModelSpec, weights: Weights) -> torch.Tensor:
    if name == "lm_head.weight" and spec.tied_embeddings:
        name = "model.embed_tokens.weight"
    whole = weights.tensor(name, place.shape)
    if any(f".{part}_{kind}." in name for part in "qk" for kind in ("proj", "norm")):
        return query_key_order(whole, spec.head_dim, have=weights.rotary, want="halves")
    return whole


def _initial(name: str, shape: tuple[int, ...], spec: ModelSpec, seed: int, dtype: torch.dtype) -> torch.Tensor:
    if name.endswith(("norm.weight", "skip.weight")):
        return torch.ones(shape, dtype=dtype)
    if name.endswith((".bias", "lora_B")):
        return torch.zeros(shape, dtype=dtype)
    if name == "lm_head.weight" and spec.tied_embeddings:
        name = "model.embed_tokens.weight"
    deviation = _INIT_STD
    if name.endswith(("o_proj.weight", "down_proj.weight", "moe.down")):
        deviation /= (2 * spec.layers) ** 0.5
    drawn = int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1
    generator: Any = torch.Generator().manual_seed(drawn)
    return torch.empty(shape).normal_(0.0, deviation, generator=generator).to(dtype)
