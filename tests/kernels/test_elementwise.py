"""The layer's elementwise kernels against plain torch, at every level of instructions this machine has."""

from __future__ import annotations

import pytest
import torch

from stretto.kernels.elementwise import gated_silu, rotate, scatter
from stretto.kernels.levels import BEST_LEVEL, LEVELS

AVAILABLE = LEVELS[LEVELS.index(BEST_LEVEL) :]
DTYPES = [torch.float32, torch.bfloat16]
BOUND = {torch.float32: 1e-6, torch.bfloat16: 1e-2}


@pytest.mark.parametrize("level", AVAILABLE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [2, 6, 16, 48, 64, 80, 128])
@pytest.mark.parametrize("threads", [1, 2])
def test_rotation(level: str, dtype: torch.dtype, dim: int, threads: int) -> None:
    torch.manual_seed(dim)
    whole = torch.randn(300, 5, dim).to(dtype)
    before = whole.clone()
    angles = torch.rand(300, 1, dim // 2) * 6.3
    rotate(whole[:, :3], torch.polar(torch.tensor(1.0), angles), threads=threads, level=level)
    pairs = before[:, :3].double().view(300, 3, dim // 2, 2)
    x, y = pairs.unbind(-1)
    sine, cosine = angles.double().sin(), angles.double().cos()
    wanted = torch.stack([x * cosine - y * sine, y * cosine + x * sine], -1).view(300, 3, dim)
    torch.testing.assert_close(whole[:, :3].double(), wanted, atol=BOUND[dtype], rtol=BOUND[dtype])
    assert torch.equal(whole[:, 3:], before[:, 3:])  # what lies beside is not touched


@pytest.mark.parametrize("level", AVAILABLE)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 7, 16, 40, 1536])
@pytest.mark.parametrize("threads", [1, 2])
def test_gated_silu(level: str, dtype: torch.dtype, width: int, threads: int) -> None:
    torch.manual_seed(width)
    both = (torch.randn(40, 2 * width) * 5).to(dtype)
    both[0, 0], both[1, 0], both[2, 0], both[3, 0] = 200.0, -200.0, 0.0, -0.0
    found = gated_silu(both, threads=threads, level=level)
    gate, up = both.double().split(width, dim=1)
    torch.testing.assert_close(found.double(), gate * gate.sigmoid() * up, atol=BOUND[dtype], rtol=BOUND[dtype])


@pytest.mark.parametrize("threads", [1, 2])
def test_scatter_writes_the_named_places_alone(threads: int) -> None:
    torch.manual_seed(0)
    wide = torch.randn(200, 7, 24).to(torch.bfloat16)
    cache = torch.zeros(5000, 24, dtype=torch.bfloat16)
    places = torch.randperm(5000)[: 200 * 4]
    wanted = cache.index_copy(0, places, wide[:, 3:].reshape(-1, 24))
    scatter(wide[:, 3:], cache, places, threads=threads)
    assert torch.equal(cache, wanted)


def test_an_unknown_level_is_refused() -> None:
    with pytest.raises(ValueError, match="level is mmx"):
        gated_silu(torch.zeros(1, 4), level="mmx")
