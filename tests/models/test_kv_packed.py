"""Keys and values in 4 bits: what they stand for, and that a query sees the same however its text was cut."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from stretto.kernels.levels import BEST_LEVEL, LEVELS  # noqa: E402
from stretto.models.fused import FusedDecoder, build_fused  # noqa: E402
from stretto.models.kv_cache import KVCache  # noqa: E402
from stretto.models.kv_packed import PAGE_TOKENS, PackedKVCache, page_bytes  # noqa: E402
from stretto.models.load import open_model  # noqa: E402
from stretto.models.segment import Segment  # noqa: E402
from stretto.models.spec import ModelSpec  # noqa: E402

AVAILABLE = LEVELS[LEVELS.index(BEST_LEVEL) :]
IDS = [(17 * i * i + 5 * i) % 2000 + 20 for i in range(3 * PAGE_TOKENS + 9)]


@pytest.fixture(scope="module", params=[torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def fused(packaged: Path, request: pytest.FixtureRequest) -> FusedDecoder:
    files = open_model(str(packaged))
    path = "exact" if request.param == torch.float32 else "bf16"
    return build_fused(files.spec, files.weights, path=path, dtype=request.param, threads=2, kv="int4")  # type: ignore[arg-type]


def new_cache(fused: FusedDecoder, pages: int = 16) -> PackedKVCache:
    cache = fused.new_cache(pages=pages, page_tokens=1)
    assert isinstance(cache, PackedKVCache)
    return cache


def fed(
    fused: FusedDecoder,
    cuts: Sequence[int],
    table: tuple[int, ...] = (9, 2, 11, 4),
    cache: PackedKVCache | None = None,
) -> tuple[torch.Tensor, PackedKVCache]:
    """Logits after every token of a text given in pieces of these lengths, and the cache that it left."""
    cache = cache or new_cache(fused)
    found, at = [], 0
    for count in cuts:
        ids = torch.tensor(IDS[at : at + count])
        found.append(fused.forward(ids, [Segment(0, count, at, table, count)], cache))
        at += count
    return torch.cat(found or [torch.empty(0)]), cache


@pytest.fixture(scope="module")
def whole(fused: FusedDecoder) -> tuple[torch.Tensor, PackedKVCache]:
    """A text that was given in one piece."""
    return fed(fused, [201])


def test_a_page_stands_for_what_was_written_to_half_a_step(fused: FusedDecoder) -> None:
    _, cache = fed(fused, [PAGE_TOKENS])
    for layer in (0, 7, 29):
        written, found = cache.opened(layer, 9).float(), cache.dequantize(layer, 9)
        step = (written.amax(1) - written.amin(1)) / 15
        assert ((found - written).abs() <= 0.52 * step[:, None] + 2e-3 * written.abs().amax()).all()
        assert (found - written).abs().max() > 0


@pytest.mark.parametrize("level", AVAILABLE)
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 66, 127, 128, 129, 200])
def test_attention_is_that_on_what_the_pages_stand_for(fused: FusedDecoder, level: str, length: int) -> None:
    """One more token beside a cache of plain numbers that holds the same keys and values, at every group boundary."""
    table = (3, 0, 2, 1)
    _, packed = fed(fused, [length - 1] if length > 1 else [], table)
    plain = KVCache(fused.spec, pages=4, page_tokens=PAGE_TOKENS, dtype=fused.dtype)
    full = (length - 1) // PAGE_TOKENS
    for layer, to in enumerate(plain.layers):
        for index, page in enumerate(table[: -(-(length - 1) // PAGE_TOKENS)]):
            to[page] = packed.dequantize(layer, page) if index < full else packed.opened(layer, page)
    token, segment = torch.tensor(IDS[length - 1 : length]), [Segment(0, 1, length - 1, table)]
    found = fused.forward(token, segment, packed, level=level)
    wanted = fused.forward(token, segment, plain, level=level)
    bound = 1e-3 if fused.dtype == torch.float32 else 0.6  # a page is rounded to bf16 in the plain cache alone
    assert (found - wanted).abs().max() < bound


@pytest.mark.parametrize("cuts", [[1] * 201, [64, 64, 73], [63, 1, 1, 136], [65, 127, 9], [200, 1]])
def test_cuts_change_no_bit(fused: FusedDecoder, whole: tuple[torch.Tensor, PackedKVCache], cuts: list[int]) -> None:
    wanted, cache = whole
    found, other = fed(fused, cuts)
    assert torch.equal(found, wanted)
    for page in (9, 2, 11):
        for layer in range(fused.spec.layers):
            assert torch.equal(cache.layers[layer][page], other.layers[layer][page])


def test_packed_pages_stay_as_they_are_while_others_are_written(fused: FusedDecoder) -> None:
    _, cache = fed(fused, [130])
    before = [layer[[9, 2]].clone() for layer in cache.layers]
    fed(fused, [150], table=(1, 3, 5), cache=cache)
    at = 130
    ids = torch.tensor(IDS[at : at + 40])
    fused.forward(ids, [Segment(0, 40, at, (9, 2, 11), 1)], cache)
    assert all(torch.equal(layer[[9, 2]], kept) for layer, kept in zip(cache.layers, before, strict=True))


def test_a_shared_page_serves_both_texts(fused: FusedDecoder) -> None:
    """A second text adopts the first page of another, as the prefix cache lets it."""
    wanted, _ = fed(fused, [100])
    _, cache = fed(fused, [80], table=(6, 7))
    found = fused.forward(torch.tensor(IDS[64:100]), [Segment(0, 36, 64, (6, 8), 36)], cache)
    assert torch.equal(found, wanted[64:])
    more = fused.forward(torch.tensor(IDS[80:100]), [Segment(0, 20, 80, (6, 7), 20)], cache)
    assert torch.equal(more, wanted[80:])


def test_a_step_taken_twice_changes_nothing(fused: FusedDecoder) -> None:
    """A step that went ahead in vain may have packed the page already."""
    wanted, _ = fed(fused, [64, 1, 1])
    _, cache = fed(fused, [63])
    for _ in range(2):
        fused.forward(torch.tensor(IDS[63:64]), [Segment(0, 1, 63, (9, 2), 1)], cache)
    again = fused.forward(torch.tensor(IDS[64:66]), [Segment(0, 2, 64, (9, 2), 2)], cache)
    assert torch.equal(again, wanted[64:])


def test_open_pages_come_back(fused: FusedDecoder) -> None:
    """Many texts, each of which ends in the middle of a page: no more pages are open than are in use."""
    cache = new_cache(fused, pages=8)
    for i in range(40):
        table = (i % 8,)
        fused.forward(torch.tensor(IDS[:5]), [Segment(0, 5, 0, table, 1)], cache)
        cache.release(table)
    assert cache.open_pages <= 2
    fed(fused, [200], table=(0, 1, 2, 3), cache=cache)
    assert cache.open_pages <= 5


def test_more_open_pages_than_there_was_room_for(fused: FusedDecoder) -> None:
    cache = new_cache(fused, pages=40)
    segments = [Segment(3 * i, 3, 0, (i,), 1) for i in range(40)]
    first = fused.forward(torch.tensor(IDS[:3] * 40), segments, cache)
    assert torch.equal(first, first[:1].expand_as(first))
    second = fused.forward(torch.tensor([IDS[3]] * 40), [Segment(i, 1, 3, (i,)) for i in range(40)], cache)
    wanted, _ = fed(fused, [4])
    assert torch.equal(second, wanted[3:].expand_as(second))


def test_bytes_are_those_of_4_bits_and_their_scales(fused: FusedDecoder) -> None:
    cache = new_cache(fused, pages=10)
    spec = fused.spec
    a_token = 2 * spec.kv_heads * spec.head_dim * (1 / 2 + 4 / PAGE_TOKENS)
    assert cache.token_bytes == a_token
    assert sum(layer.nbytes for layer in cache.layers) == 10 * PAGE_TOKENS * a_token * spec.layers
    plain = KVCache(spec, pages=1, page_tokens=PAGE_TOKENS, dtype=torch.bfloat16)
    assert plain.token_bytes / cache.token_bytes > 3.5


def test_a_constant_channel_and_a_lost_one() -> None:
    from stretto.kernels import _native

    dim = 32
    x = torch.randn(PAGE_TOKENS, dim)
    x[:, 3], x[:, 4], x[:, 5], x[10, 6] = 0.0, 1234.5, 1e4 + torch.arange(PAGE_TOKENS), float("inf")
    page = torch.zeros(page_bytes(dim) // 2, dtype=torch.uint8)
    _native.pack_page(x.data_ptr(), dim, True, page.data_ptr())
    codes, numbers = page[: 32 * dim].view(dim, 32), page[32 * dim :].view(torch.float16).view(2, dim).float()
    found = torch.cat([codes & 15, codes >> 4], 1).float() * numbers[0][:, None] + numbers[1][:, None]
    assert torch.equal(found[3], torch.zeros(PAGE_TOKENS))
    assert (found[4] - 1234.5).abs().max() <= 0.5
    assert (found[5] - x[:, 5]).abs().max() < 4.5
    assert found[6].isnan().all()
    assert found[[0, 1, 2, 7]].isfinite().all()


def test_heads_that_are_no_multiple_of_32_are_refused() -> None:
    spec = ModelSpec(family="llama", layers=1, hidden=80, heads=1, kv_heads=1, head_dim=80, ffn=32, vocab=32)
    with pytest.raises(ValueError, match="head_dim"):
        PackedKVCache(spec, pages=1, dtype=torch.float32)
