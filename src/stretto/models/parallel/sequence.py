"""Attention whose sequence is split over ranks, three ways behind one face.

"rsa" holds complete rows of scores, as first published; "blockwise" joins blocks by their log-sum-exp and holds none;
"all_to_all" exchanges heads for tokens. Each equals attention over the whole sequence, with all its gradients.
"""

from __future__ import annotations

from typing import Literal

import torch

from stretto.comm.transport import Axis
from stretto.core.errors import require
from stretto.models.parallel.blockwise import BlockwiseAttention
from stretto.models.parallel.head_exchange import exchanged, whole_attention
from stretto.models.parallel.layout import LAYOUTS, Layout, join_sequence, positions, split_sequence
from stretto.models.parallel.rsa import RingSelfAttention

Mode = Literal["rsa", "blockwise", "all_to_all"]
MODES = ("rsa", "blockwise", "all_to_all")

__all__ = ["LAYOUTS", "MODES", "Layout", "Mode", "join_sequence", "positions", "seq_attention", "split_sequence"]


def seq_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    axis: Axis,
    *,
    causal: bool,
    mode: Mode = "blockwise",
    layout: Layout = "contiguous",
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scaled dot-product attention of this rank's tokens to the whole sequence.

    Args:
        q: [B, Q, L/N, D].
        k, v: [B, K, L/N, D]; Q is a multiple of K.
        axis: the ranks that share the sequence; with one, torch's own attention is called.
        mode: one of `MODES`.
        layout: which tokens each rank holds.
        mask: bool [B, L] over the whole sequence, true for keys that count; a row that sees none gives zeros.

    Returns:
        [B, Q, L/N, D].

    Raises:
        FieldError: an unknown mode, or more ranks than KV heads for all_to_all.
    """
    require(mode in MODES, "attention", mode, f"one of {', '.join(MODES)}")
    if axis.size == 1:
        return whole_attention(q, k, v, causal, mask)
    if mode == "all_to_all":
        return exchanged(q, k, v, axis, causal, layout, mask, whole_attention)
    function = BlockwiseAttention if mode == "blockwise" else RingSelfAttention
    return function.apply(q, k, v, axis, causal, layout, mask)  # type: ignore[no-any-return, no-untyped-call]
