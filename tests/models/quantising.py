"""What tests of quantised models share: windows of tokens, and the logits of any decoder."""

from __future__ import annotations

from typing import Any

import torch

from stretto.models.assemble import build
from stretto.models.load import ModelFiles
from stretto.models.segment import Segment
from stretto.models.spec import ModelSpec
from stretto.models.transformer import Transformer
from stretto.models.weights import Weights


def some_windows(spec: ModelSpec, count: int = 6, tokens: int = 24) -> torch.Tensor:
    return torch.randint(0, spec.vocab, (count, tokens), generator=torch.Generator().manual_seed(2))


def logits_of(decoder: Any, ids: torch.Tensor) -> torch.Tensor:
    cache = decoder.new_cache(pages=1, page_tokens=len(ids))
    return decoder.forward(ids, [Segment(0, len(ids), 0, (0,), len(ids))], cache)


def torch_model(files: ModelFiles, weights: Weights | None = None, **more: Any) -> Transformer:
    return build(files.spec, weights or files.weights, dtype=torch.float32, threads=1, **more)
