"""The forward pass against transformers: prompts, chunks, single tokens, mixes, slots and small pages."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from stretto.core.errors import UserError
from stretto.models import Model, load_model
from stretto.models.batching import plan_pass
from stretto.models.configs import spec_from_config
from stretto.models.segment import Segment
from stretto.models.weights import safetensors_weights, state_dict

TOLERANCE = 1e-4


@pytest.fixture(scope="session")
def model(saved: Path) -> Model:
    return load_model(str(saved), threads=1)


def expected(reference: Any, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = reference(torch.tensor([tokens])).logits[0]
    return logits


def sequences(count: int, seed: int, longest: int = 40) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(95) for _ in range(draw.randint(3, longest))] for _ in range(count)]


def assert_close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.shape == want.shape
    scale = max([1.0, *want.abs().flatten().tolist()])
    assert torch.allclose(got, want, rtol=0, atol=TOLERANCE * scale)


def test_every_logit_of_a_prompt(model: Model, reference: Any) -> None:
    (tokens,) = sequences(1, seed=1)
    cache = model.transformer.new_cache(pages=1, page_tokens=64)
    got = model.transformer.forward(torch.tensor(tokens), [Segment(0, len(tokens), 0, (0,), len(tokens))], cache)
    assert_close(got, expected(reference, tokens))


@pytest.mark.parametrize("page_tokens", [64, 5])
def test_ragged_passes_in_any_mix(model: Model, reference: Any, page_tokens: int) -> None:
    """Random schedules: each pass takes a chunk, one token or nothing of each sequence, in a random order."""
    draw = random.Random(page_tokens)
    texts = sequences(6, seed=2)
    wanted = [expected(reference, tokens) for tokens in texts]
    per_sequence = -(-64 // page_tokens)
    cache = model.transformer.new_cache(pages=6 * per_sequence, page_tokens=page_tokens)
    free = draw.sample(range(cache.pages), cache.pages)
    tables = [free[i * per_sequence : (i + 1) * per_sequence] for i in range(6)]

    done = [0] * 6
    while any(done[i] < len(texts[i]) for i in range(6)):
        rows: list[int] = []
        segments, want = [], []
        for i in draw.sample(range(6), 6):
            left = len(texts[i]) - done[i]
            take = min(left, draw.choice([0, 1, 1, 1, 4, 9]))
            if take:
                logit_rows = draw.randint(0, take)
                segments.append(Segment(len(rows), take, done[i], tables[i], logit_rows))
                rows += texts[i][done[i] : done[i] + take]
                done[i] += take
                want.append(wanted[i][done[i] - logit_rows : done[i]])
        if segments:
            got = model.transformer.forward(torch.tensor(rows), segments, cache)
            assert_close(got, torch.cat(want))


def test_rows_that_decode_share_one_call(model: Model, reference: Any) -> None:
    texts = sequences(5, seed=3)
    cache = model.transformer.new_cache(pages=5, page_tokens=64)
    for i, tokens in enumerate(texts):
        model.transformer.forward(torch.tensor(tokens[:-1]), [Segment(0, len(tokens) - 1, 0, (i,), 0)], cache)
    segments = [Segment(i, 1, len(tokens) - 1, (i,)) for i, tokens in enumerate(texts)]
    plan = plan_pass(segments, cache)
    assert plan.order is None
    assert plan.decode is not None
    assert plan.decode.rows == 5
    assert plan.decode.lengths.tolist() == [len(tokens) for tokens in texts]
    assert plan.decode.tables.tolist() == [[i] for i in range(5)]
    got = model.transformer.forward(torch.tensor([tokens[-1] for tokens in texts]), segments, cache)
    assert_close(got, torch.stack([expected(reference, tokens)[-1] for tokens in texts]))


def test_a_stale_page_does_not_leak(model: Model, reference: Any) -> None:
    cache = model.transformer.new_cache(pages=2, page_tokens=64)
    for layer in cache.layers:
        layer.fill_(1e4)
    texts = [[1, 2, 3], [4, 5, 6, 7, 8]]
    for i, tokens in enumerate(texts):
        model.transformer.forward(torch.tensor(tokens[:-1]), [Segment(0, len(tokens) - 1, 0, (i,), 0)], cache)
    segments = [Segment(i, 1, len(tokens) - 1, (i,)) for i, tokens in enumerate(texts)]
    got = model.transformer.forward(torch.tensor([3, 8]), segments, cache)
    assert_close(got, torch.stack([expected(reference, tokens)[-1] for tokens in texts]))


def test_bf16_stays_near_fp32(saved: Path, model: Model) -> None:
    coarse = load_model(str(saved), dtype="bf16", threads=1)
    (tokens,) = sequences(1, seed=4)
    logits = []
    for each in (model, coarse):
        cache = each.transformer.new_cache(pages=1, page_tokens=64)
        each.transformer.forward(torch.tensor(tokens[:-1]), [Segment(0, len(tokens) - 1, 0, (0,), 0)], cache)
        logits.append(
            each.transformer.forward(torch.tensor(tokens[-1:]), [Segment(0, 1, len(tokens) - 1, (0,))], cache)
        )
    fine, rough = logits
    assert rough.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(fine, rough).item() > 0.99


def test_the_timer_sees_the_operations_of_the_spec(model: Model) -> None:
    from stretto.models import PassShape

    seen: list[str] = []
    cache = model.transformer.new_cache(pages=2, page_tokens=64)
    segments = [Segment(0, 1, 0, (0,)), Segment(1, 4, 0, (1,))]
    model.transformer.forward(torch.tensor([1, 2, 3, 4, 5]), segments, cache, seen.append)
    listed = model.spec.operations(PassShape(new_tokens=(1, 4), cached=(0, 0)), dtype="fp32")
    layers = model.spec.layers
    names = [o.name for o in listed]
    inside = [name for o, name in zip(listed, names, strict=True) if o.count == layers]
    assert seen == ["plan", names[0], *inside * layers, *names[-2:]]


@pytest.mark.parametrize(
    ("segment", "field"),
    [
        (Segment(1, 3, 0, (0,)), "first_row"),
        (Segment(0, 3, 62, (0,)), "pages"),
        (Segment(0, 3, 0, (7,)), "pages"),
        (Segment(0, 3, -1, (0,)), "cached"),
        (Segment(0, 3, 0, (0,), 4), "logit_rows"),
        (Segment(0, 2, 0, (0,)), "tokens"),
    ],
)
def test_rows_and_pages_that_do_not_fit_are_refused(model: Model, segment: Segment, field: str) -> None:
    cache = model.transformer.new_cache(pages=2, page_tokens=64)
    with pytest.raises(ValueError, match=field):
        model.transformer.forward(torch.tensor([1, 2, 3]), [segment], cache)


def test_sharded_files_hold_the_same_weights(reference: Any, tmp_path: Path) -> None:
    reference.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    held = state_dict(safetensors_weights(tmp_path), spec_from_config(reference.config.to_dict()))
    for name, weight in reference.named_parameters():
        assert torch.equal(held[name], weight)


def test_a_missing_tensor_is_named(reference: Any, saved: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    name = "model.layers.1.mlp.down_proj.weight"
    kept = {key: value for key, value in load_file(saved / "model.safetensors").items() if key != name}
    save_file(kept, tmp_path / "model.safetensors")
    for other in ("config.json", "tokenizer.json"):
        (tmp_path / other).write_bytes((saved / other).read_bytes())
    with pytest.raises(UserError, match=name):
        load_model(str(tmp_path), threads=1)
