"""A model split over ranks against the whole one. The ranks are threads here; tests/serve has them as processes."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest
import torch
import transformers

from stretto.core.errors import UserError
from stretto.models import Model, load_model
from stretto.models.segment import Segment
from stretto.models.shard import Shard

T = TypeVar("T")
TOLERANCE = 1e-5


def together(work: Callable[[int], T], ranks: int) -> list[T]:
    """`work(rank)` of every rank at the same time."""
    with ThreadPoolExecutor(ranks, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(work, range(ranks), timeout=60))


def joined(folder: Path, ranks: int) -> list[Shard]:
    def join(rank: int) -> Shard:
        return Shard.join(rank=rank, world=ranks, rendezvous=folder / "rendezvous", timeout_s=30)

    return together(join, ranks)


def logits_of(models: Sequence[Model]) -> list[list[torch.Tensor]]:
    """Logits by rank and pass: prompts in chunks and single tokens, mixed, over small pages."""
    draw = random.Random(5)
    texts = [[draw.randrange(95) for _ in range(length)] for length in (23, 9, 17)]
    takes = ((9, 4, 0), (5, 1, 7), (1, 1, 1), (4, 0, 6), (1, 1, 1), (1, 1, 1))

    def run(rank: int) -> list[torch.Tensor]:
        transformer = models[rank].transformer
        cache = transformer.new_cache(pages=15, page_tokens=5)
        done = [0, 0, 0]
        found = []
        for take in takes:
            rows: list[int] = []
            segments = []
            for i, count in enumerate(take):
                if count:
                    segments.append(Segment(len(rows), count, done[i], tuple(range(5 * i, 5 * i + 5)), count))
                    rows += texts[i][done[i] : done[i] + count]
                    done[i] += count
            found.append(transformer.forward(torch.tensor(rows), segments, cache))
        return found

    return together(run, len(models))


def assert_split_equals_whole(model: str, ranks: int, folder: Path, *, dtype: str = "fp32", atol: float) -> None:
    shards = joined(folder, ranks)
    split = logits_of([load_model(model, dtype=dtype, threads=1, shard=shard) for shard in shards])[0]
    (whole,) = logits_of([load_model(model, dtype=dtype, threads=1)])
    for got, want in zip(split, whole, strict=True):
        assert got.shape == want.shape
        assert (got - want).abs().max() <= atol * max(1.0, want.abs().max())


def test_two_ranks_give_the_logits_of_one(saved: Path, tmp_path: Path) -> None:
    assert_split_equals_whole(str(saved), 2, tmp_path, atol=TOLERANCE)


@pytest.fixture(scope="session")
def three_heads(tiny_tokenizer_json: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with three KV heads, and no width that two or three ranks share evenly otherwise."""
    config = transformers.Qwen3Config(
        vocab_size=101,
        hidden_size=48,
        intermediate_size=79,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=16,
        attention_bias=False,
    )
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.2 if weight.dim() == 1 else 0.3)
    folder = tmp_path_factory.mktemp("three")
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tiny_tokenizer_json)
    return folder


@pytest.mark.parametrize("ranks", [2, 3])
def test_uneven_shares_give_the_same_logits(three_heads: Path, tmp_path: Path, ranks: int) -> None:
    assert_split_equals_whole(str(three_heads), ranks, tmp_path, atol=TOLERANCE)


def test_bf16_sums_in_fp32(three_heads: Path, tmp_path: Path) -> None:
    assert_split_equals_whole(str(three_heads), 2, tmp_path, dtype="bf16", atol=0.05)


def test_each_rank_keeps_its_own_kv_heads(three_heads: Path, tmp_path: Path) -> None:
    shards = joined(tmp_path, 2)
    models = [load_model(str(three_heads), threads=1, shard=shard) for shard in shards]
    caches = [model.transformer.new_cache(pages=1, page_tokens=4) for model in models]
    assert [cache.spec.kv_heads for cache in caches] == [2, 1]
    assert [cache.token_bytes for cache in caches] == [4 * 16 * 4, 2 * 16 * 4]
    assert [model.spec.kv_heads for model in models] == [3, 3]


def test_shares_cover_everything_once(tmp_path: Path) -> None:
    shards = joined(tmp_path, 3)
    for units in (3, 4, 5, 101):
        shares = [shard.share(units) for shard in shards]
        assert [unit for share in shares for unit in share] == list(range(units))
        assert len(shares[0]) == -(-units // 3)


def test_sums_are_in_the_order_of_the_ranks_bit_for_bit(tmp_path: Path) -> None:
    """Large and small terms mixed: any other order of the three additions rounds differently somewhere."""
    shards = joined(tmp_path, 3)
    torch.manual_seed(1)
    parts = torch.randn(3, 40, 7) * torch.tensor([1.0, 1e4, 1e-3])[torch.randint(3, (3, 40, 7))]
    want = parts[0] + parts[1] + parts[2]
    assert not torch.equal(want, parts[2] + parts[1] + parts[0])
    held = parts.clone()
    for got in together(lambda rank: shards[rank].reduce_(held[rank]), 3):
        assert torch.equal(got, want)
    assert torch.equal(held, want.expand(3, -1, -1))
    few = together(lambda rank: shards[rank].reduce_(parts[rank, :1].clone()), 3)
    assert torch.equal(few[2], want[:1])


def test_a_silent_rank_ends_the_sum(tmp_path: Path) -> None:
    shards = together(lambda rank: Shard.join(rank=rank, world=2, rendezvous=tmp_path / "rendezvous", timeout_s=1), 2)
    with pytest.raises(RuntimeError):
        shards[0].reduce_(torch.ones(3))


def test_more_ranks_than_kv_heads_are_refused(three_heads: Path) -> None:
    shard = Shard(rank=0, world=4, group=None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="tp: is 4, but the model has 3 KV heads; from 1 to 3"):
        load_model(str(three_heads), threads=1, shard=shard)


def test_a_rank_outside_the_world_is_refused() -> None:
    with pytest.raises(ValueError, match="rank is 2; it must be from 0 to 1"):
        Shard(rank=2, world=2, group=None)  # type: ignore[arg-type]
