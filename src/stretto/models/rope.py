"""Frequencies of rotary position embeddings (RoFormer, Su et al., 2021), scaled as checkpoints ask for it."""

from __future__ import annotations

import math

import torch

from stretto.models.spec import ModelSpec


def rope_frequencies(spec: ModelSpec, divisors: torch.Tensor | None = None) -> torch.Tensor:
    """Radians a position of each rotary pair, fp32 [D / 2], with the spec's scaling or explicit divisors."""
    pairs = torch.arange(0, spec.head_dim, 2, dtype=torch.int64).float() / spec.head_dim
    frequencies = 1.0 / (spec.rope_theta**pairs)
    if divisors is not None:
        return frequencies / divisors
    scaling = spec.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    turns = scaling.original_positions * frequencies / (2 * math.pi)
    fast = ((turns - scaling.low_frequency) / (scaling.high_frequency - scaling.low_frequency)).clamp(0, 1)
    return frequencies * (fast + (1 - fast) / scaling.factor)
