"""The fused decoder against the torch one, and against itself: the same bits in any company, cut and team."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")

from stretto.core.errors import UserError  # noqa: E402
from stretto.models.assemble import build  # noqa: E402
from stretto.models.fused import FusedDecoder, build_fused  # noqa: E402
from stretto.models.kv_cache import KVCache  # noqa: E402
from stretto.models.load import Model, load_model, open_model  # noqa: E402
from stretto.models.packable import why_not_fused  # noqa: E402
from stretto.models.segment import Segment  # noqa: E402

TEXT = (
    "The history of the printing press begins long before its famous inventor set his first line of type. Paper had "
    "come from the east along the roads of trade, and with it came the idea that a page could be pressed."
)
PATHS = ["exact", "bf16", "fast"]
BOUND = {"exact": 2e-3, "bf16": 2.0, "fast": 3.0}


@pytest.fixture(scope="module")
def model(packaged: Path) -> Model:
    return load_model(str(packaged), threads=1)


@pytest.fixture(scope="module")
def ids(model: Model) -> list[int]:
    return model.tokenizer.encode(TEXT)[:40]


@pytest.fixture(scope="module", params=PATHS)
def fused(packaged: Path, request: pytest.FixtureRequest) -> FusedDecoder:
    files = open_model(str(packaged))
    dtype = torch.float32 if request.param == "exact" else torch.bfloat16
    return build_fused(files.spec, files.weights, path=request.param, dtype=dtype, threads=1)


@pytest.fixture(autouse=True)
def _two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def logits_of(decoder: FusedDecoder, ids: Sequence[int], cuts: Sequence[int], page_tokens: int) -> torch.Tensor:
    """Logits after every token, the text given in pieces of these lengths, on scattered pages."""
    pages = -(-len(ids) // page_tokens)
    table = [2 * pages - 2 * i for i in range(pages)]
    cache = decoder.new_cache(pages=2 * pages + 1, page_tokens=page_tokens)
    found, at = [], 0
    for count in cuts:
        found.append(
            decoder.forward(torch.tensor(ids[at : at + count]), [Segment(0, count, at, tuple(table), count)], cache)
        )
        at += count
    assert at == len(ids)
    return torch.cat(found)


def test_logits_are_those_of_the_torch_decoder(model: Model, fused: FusedDecoder, ids: list[int]) -> None:
    cache = model.transformer.new_cache(pages=1, page_tokens=64)
    wanted = model.transformer.forward(torch.tensor(ids), [Segment(0, len(ids), 0, (0,), len(ids))], cache)
    found = logits_of(fused, ids, [len(ids)], 64)
    assert (found - wanted).abs().max() < BOUND[fused.path]
    if fused.path == "exact":
        assert torch.equal(found.argmax(-1), wanted.argmax(-1))


@pytest.mark.parametrize("cuts", [[1] * 40, [16, 16, 8], [39, 1], [1, 30, 9], [7, 1, 1, 31]])
@pytest.mark.parametrize("page_tokens", [5, 16, 64])
def test_cuts_and_pages_change_no_bit(fused: FusedDecoder, ids: list[int], cuts: list[int], page_tokens: int) -> None:
    assert torch.equal(logits_of(fused, ids, cuts, page_tokens), logits_of(fused, ids, [40], 64))


@pytest.mark.parametrize("cuts", [[1] * 20 + [180], [130, 1, 1, 17, 51], [64, 64, 64, 8], [63, 2, 127, 8]])
@pytest.mark.parametrize("page_tokens", [16, 64])
def test_cuts_of_a_text_of_many_blocks_change_no_bit(
    model: Model, fused: FusedDecoder, cuts: list[int], page_tokens: int
) -> None:
    long = model.tokenizer.encode(5 * TEXT)[:200]
    assert torch.equal(logits_of(fused, long, cuts, page_tokens), logits_of(fused, long, [200], 64))


@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_changes_no_bit(fused: FusedDecoder, ids: list[int], threads: int) -> None:
    wanted = logits_of(fused, ids, [30, 10], 16)
    torch.set_num_threads(threads)
    assert torch.equal(logits_of(fused, ids, [30, 10], 16), wanted)


def test_company_changes_no_bit(fused: FusedDecoder, ids: list[int]) -> None:
    """Twenty sequences at different places, a prompt among them: each row as if alone."""
    lengths = [1 + (7 * i) % 30 for i in range(20)]
    cache = fused.new_cache(pages=21, page_tokens=64)
    for i, length in enumerate(lengths):
        fused.forward(torch.tensor(ids[:length]), [Segment(0, length, 0, (i,), 0)], cache)
    segments = [Segment(i, 1, length, (i,)) for i, length in enumerate(lengths)]
    segments.append(Segment(20, 12, 0, (20,)))
    tokens = [ids[length] for length in lengths] + ids[:12]
    together = fused.forward(torch.tensor(tokens), segments, cache)
    alone = [logits_of(fused, ids[: length + 1], [length, 1], 64)[-1] for length in [*lengths, 11]]
    assert torch.equal(together, torch.stack(alone))


def test_threads_may_share_a_decoder(fused: FusedDecoder, ids: list[int]) -> None:
    """Passes take turns over what a decoder has only once, and each comes out as it would alone."""
    texts = [ids, ids[::-1], ids[:7], ids[3:30]]
    alone = [logits_of(fused, text, [len(text)], 16) for text in texts]
    with ThreadPoolExecutor(len(texts)) as pool:
        for _ in range(5):
            found = list(pool.map(lambda text: logits_of(fused, text, [len(text)], 16), texts))
            assert all(torch.equal(a, b) for a, b in zip(found, alone, strict=True))


def test_only_wanted_rows_have_logits_and_mistakes_are_named(fused: FusedDecoder, ids: list[int]) -> None:
    cache = fused.new_cache(pages=2, page_tokens=64)
    assert fused.forward(torch.tensor(ids[:5]), [Segment(0, 5, 0, (0,), 0)], cache).shape == (0, fused.spec.vocab)
    with pytest.raises(ValueError, match="2 rows"):
        fused.forward(torch.tensor(ids[:2]), [Segment(0, 5, 0, (0,), 0)], cache)
    with pytest.raises(ValueError, match="pages"):
        fused.forward(torch.tensor(ids[:5]), [Segment(0, 5, 62, (0,), 0)], cache)


def test_models_that_are_not_packed_are_refused_with_the_reason(saved: Path) -> None:
    files = open_model(str(saved))
    assert why_not_fused(files.spec, files.weights) is not None
    with pytest.raises(UserError, match="fused decoder"):
        build_fused(files.spec, files.weights, path="exact", dtype=torch.float32, threads=1)


@pytest.fixture(scope="module", params=["llama", "qwen2", "qwen3"])
def folder(request: pytest.FixtureRequest, tiny_tokenizer_json: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in bf16 as transformers saves it: rotary partners half a head apart, biases, head norms."""
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "num_attention_heads": 3}
    shape |= {"vocab_size": 101, "num_key_value_heads": 1, "max_position_embeddings": 256, "head_dim": 16}
    config = transformers.AutoConfig.for_model(request.param, tie_word_embeddings=request.param == "llama", **shape)
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.2)
    path = tmp_path_factory.mktemp(request.param)
    model.bfloat16().save_pretrained(path)
    (path / "tokenizer.json").write_text(tiny_tokenizer_json)
    return path


@pytest.mark.parametrize("path", PATHS)
def test_plain_bf16_weights_run_fused(folder: Path, path: str) -> None:
    files = open_model(str(folder))
    assert why_not_fused(files.spec, files.weights) is None
    ids = list(range(3, 43))
    cache = load_model(str(folder), threads=1).transformer.new_cache(pages=1, page_tokens=64)
    torch_model = load_model(str(folder), threads=1).transformer
    wanted = torch_model.forward(torch.tensor(ids), [Segment(0, 40, 0, (0,), 40)], cache)  # type: ignore[arg-type]
    fused = build_fused(files.spec, files.weights, path=path, dtype=torch.float32, threads=2)  # type: ignore[arg-type]
    found = logits_of(fused, ids, [40], 64)
    bound = 1e-5 if path == "exact" else 3e-2  # the others round activations to bf16
    assert (found - wanted).abs().max() < bound * wanted.abs().max()
    assert torch.equal(logits_of(fused, ids, [1, 12, 27], 16), found)


def test_ids_of_any_whole_type_are_the_same(fused: FusedDecoder, ids: list[int]) -> None:
    found = []
    for dtype in (torch.int32, torch.int64):
        cache = fused.new_cache(pages=1, page_tokens=64)
        found.append(fused.forward(torch.tensor(ids, dtype=dtype), [Segment(0, 40, 0, (0,), 1)], cache))
    assert torch.equal(*found)


def test_a_cache_of_another_model_is_refused(model: Model, fused: FusedDecoder, ids: list[int]) -> None:
    segments = [Segment(0, 40, 0, (0,), 1)]
    for decoder in (fused, model.transformer):
        for other in (replace(model.spec, kv_heads=1), replace(model.spec, layers=2), replace(model.spec, head_dim=32)):
            cache = KVCache(other, pages=1, page_tokens=64, dtype=decoder.dtype)
            with pytest.raises(ValueError, match="the cache is of another model or type"):
                decoder.forward(torch.tensor(ids), segments, cache)
        cache = KVCache(model.spec, pages=1, page_tokens=64, dtype=torch.float64)
        with pytest.raises(ValueError, match="the cache is of another model or type"):
            decoder.forward(torch.tensor(ids), segments, cache)


@pytest.mark.parametrize("name", ["self_attn.q_proj.bias", "self_attn.o_proj.bias", "mlp.down_proj.bias"])
def test_a_bias_that_the_configuration_does_not_mention_is_never_left_out(packaged: Path, name: str) -> None:
    files = open_model(str(packaged))
    strange = f"model.layers.3.{name}"
    weights = replace(files.weights, sources={**files.weights.sources, strange: lambda: torch.ones(576)})
    assert why_not_fused(files.spec, weights) == f"its configuration does not mention {strange}"
    with pytest.raises(UserError, match=f"has {strange}, which its configuration does not mention"):
        build(files.spec, weights, dtype=torch.float32, threads=1)


def test_layers_that_are_not_there_are_told_at_once(packaged: Path) -> None:
    files = open_model(str(packaged))
    with pytest.raises(UserError, match=r"model\.layers\.1999999999\.input_layernorm\.weight"):
        build(replace(files.spec, layers=2 * 10**9), files.weights, dtype=torch.float32, threads=1)


def test_a_matrix_that_is_not_there_is_told(packaged: Path) -> None:
    files = open_model(str(packaged))
    missing = "model.layers.3.mlp.up_proj.weight"
    left = {name: source for name, source in files.weights.sources.items() if name != missing}
    with pytest.raises(UserError, match=missing):
        build_fused(files.spec, replace(files.weights, sources=left), path="exact", dtype=torch.float32, threads=1)
