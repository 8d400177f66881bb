"""Whole models quantised, written, read again: the same numbers by every reader, and damage told in one line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file  # noqa: E402

from stretto.core.errors import FieldError, UserError  # noqa: E402
from stretto.models.configs import config_of, spec_from_config  # noqa: E402
from stretto.models.fused import build_fused  # noqa: E402
from stretto.models.load import ModelFiles, open_model  # noqa: E402
from stretto.models.packable import why_not_fused  # noqa: E402
from stretto.models.quantize.checkpoint import stored, write_checkpoint  # noqa: E402
from stretto.models.quantize.grid import Grid, round_to_nearest  # noqa: E402
from stretto.models.quantize.layerwise import (  # noqa: E402
    Method,
    Recipe,
    Recorder,
    Stream,
    from_q8_0,
    products_of,
    quantise_model,
    with_quantised,
)
from stretto.models.quantize.mixed import fake_product  # noqa: E402
from stretto.models.quantize.mixed_model import calibrate_mixed  # noqa: E402
from stretto.models.quantize.run import Calibration, quantise_to, text_windows  # noqa: E402
from stretto.models.quantized import BlockTensor, GroupedTensor, Quantised  # noqa: E402
from stretto.models.segment import Segment  # noqa: E402
from stretto.models.spec import ModelSpec  # noqa: E402
from stretto.models.tokenizer import Tokenizer  # noqa: E402
from stretto.models.transformer import Transformer, build  # noqa: E402
from stretto.models.weights import Weights, query_key_order, state_dict  # noqa: E402

WIDE = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE, head_dim=16, tie_word_embeddings=False),
}
SHAPE = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
"""Heads of 16, for which there are kernels."""


@pytest.fixture(scope="module", params=list(WIDE))
def wide(request: pytest.FixtureRequest, tiny_tokenizer_json: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(WIDE[request.param]()).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.2)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tiny_tokenizer_json)
    return folder


def some_windows(spec: ModelSpec, count: int = 6, tokens: int = 24) -> torch.Tensor:
    return torch.randint(0, spec.vocab, (count, tokens), generator=torch.Generator().manual_seed(2))


def logits_of(decoder: Any, ids: torch.Tensor) -> torch.Tensor:
    cache = decoder.new_cache(pages=1, page_tokens=len(ids))
    return decoder.forward(ids, [Segment(0, len(ids), 0, (0,), len(ids))], cache)


def torch_model(files: ModelFiles, weights: Weights | None = None, **more: Any) -> Transformer:
    return build(files.spec, weights or files.weights, dtype=torch.float32, threads=1, **more)


def written(folder: Path, source: Path, recipe: Recipe) -> tuple[ModelFiles, dict[str, Quantised]]:
    """A checkpoint of the model in `source`, and what it was made of."""
    files = open_model(str(source))
    windows = None if recipe.method == "rtn" else some_windows(files.spec)
    found = dict(quantise_model(files.spec, files.weights, recipe, windows))
    write_checkpoint(folder, files.spec, files.weights, files.tokenizer, recipe, found.items())
    return open_model(str(folder)), found


@pytest.mark.parametrize("method", ["rtn", "clip", "gptq"])
def test_a_checkpoint_holds_every_matrix_to_the_bit(saved: Path, tmp_path: Path, method: Method) -> None:
    """Every family, as transformers saves it: q, k and v, norms, biases and all."""
    recipe = Recipe(method=method, grid=Grid(group=32, symmetric=method != "clip"))
    again, found = written(tmp_path / "new", saved, recipe)
    source = open_model(str(saved))
    assert again.spec == source.spec
    meant = state_dict(with_quantised(source.weights, found), source.spec)
    read = state_dict(again.weights, again.spec)
    if source.spec.tied_embeddings:
        meant.pop("lm_head.weight", None)
    assert read.keys() == meant.keys()
    assert all(torch.equal(read[name], meant[name]) for name in meant)
    assert len(found) == 7 * source.spec.layers + (1 if source.spec.tied_embeddings else 2)
    ids = some_windows(source.spec)[0]
    assert torch.equal(
        logits_of(torch_model(again), ids),
        logits_of(torch_model(source, with_quantised(source.weights, found)), ids),
    )
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


@pytest.mark.parametrize(
    ("bits", "group", "symmetric"),
    [(4, 32, True), (4, 64, False), (4, 128, True), (4, -1, True), (4, -1, False), (8, 64, True)],
)
def test_the_fused_decoder_keeps_it_packed(wide: Path, tmp_path: Path, bits: int, group: int, symmetric: bool) -> None:
    recipe = Recipe(method="rtn", grid=Grid(bits=bits, group=group, symmetric=symmetric))
    files, _ = written(tmp_path / "new", wide, recipe)
    assert why_not_fused(files.spec, files.weights) is None
    fused = build_fused(files.spec, files.weights, path="exact", dtype=torch.float32, threads=1)
    ids = some_windows(files.spec)[0]
    wanted = logits_of(torch_model(files), ids)
    assert (logits_of(fused, ids) - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_what_cannot_stay_packed_is_refused_with_the_reason(wide: Path, tmp_path: Path) -> None:
    files, _ = written(tmp_path / "a", wide, Recipe(method="rtn", grid=Grid(bits=8, symmetric=False)))
    assert "is not in one of" in str(why_not_fused(files.spec, files.weights))
    files, _ = written(tmp_path / "b", wide, Recipe(method="rtn", head="keep"))
    assert "is not in one of" in str(why_not_fused(files.spec, files.weights))
    assert torch.isfinite(logits_of(torch_model(files), some_windows(files.spec)[0])).all()


def test_hessians_are_those_of_the_inputs_that_transformers_sees(reference: Any, saved: Path) -> None:
    files = open_model(str(saved))
    windows = some_windows(files.spec)
    seen: dict[str, list[Any]] = {}
    names = {
        "self_attn.qkv": "self_attn.k_proj",
        "self_attn.o_proj": "self_attn.o_proj",
        "mlp.gate_up": "mlp.up_proj",
        "mlp.down_proj": "mlp.down_proj",
    }
    hooks = []
    for index in range(files.spec.layers):
        for product, module in names.items():
            place = seen.setdefault(f"model.layers.{index}.{product}", [])
            target = reference.get_submodule(f"model.layers.{index}.{module}")
            hooks.append(target.register_forward_pre_hook(lambda _, given, place=place: place.append(given[0])))
    with torch.inference_mode():
        reference(windows)
    for hook in hooks:
        hook.remove()
    table = files.weights.tensor("model.embed_tokens.weight", (files.spec.vocab, files.spec.hidden))
    stream = Stream(files.spec, lambda tokens: table[tokens], windows)
    for index in range(files.spec.layers):
        recorder = Recorder(every=1)
        stream.watch(files.weights, index, recorder.product)
        for product in products_of(files.spec, index):
            x = torch.cat(seen[product]).flatten(0, 1)
            torch.testing.assert_close(recorder.hessian(product), 2 / len(x) * x.T @ x, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(recorder.peaks[product], x.abs().amax(0), rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(recorder.sample(product), x, rtol=1e-3, atol=1e-4)
        stream.advance(files.weights, index)


def test_later_layers_are_calibrated_on_what_the_quantised_ones_make(wide: Path) -> None:
    """The second layer's matrices differ when the first layer's are left as they were."""
    files = open_model(str(wide))
    windows = some_windows(files.spec)
    recipe = Recipe(method="gptq", head="keep")
    found = dict(quantise_model(files.spec, files.weights, recipe, windows))
    first = {name: each for name, each in found.items() if ".layers.0." in name}
    table = files.weights.tensor("model.embed_tokens.weight", (files.spec.vocab, files.spec.hidden))
    wanted = {}
    for kind, weights in (("quantised", with_quantised(files.weights, first)), ("plain", files.weights)):
        stream, recorder = Stream(files.spec, lambda tokens: table[tokens], windows), Recorder()
        stream.advance(weights, 0)
        stream.watch(files.weights, 1, recorder.product)
        from stretto.models.quantize.gptq import gptq

        name = "model.layers.1.mlp.down_proj"
        weight = files.weights.tensor(name + ".weight", (files.spec.hidden, files.spec.ffn))
        wanted[kind] = gptq(weight, recorder.hessian(name), recipe.grid).values
    assert torch.equal(found["model.layers.1.mlp.down_proj.weight"].values, wanted["quantised"])
    assert not torch.equal(wanted["plain"], wanted["quantised"])


def test_passes_of_any_size_gather_the_same(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import stretto.models.quantize.layerwise as module

    files = open_model(str(wide))
    windows = some_windows(files.spec, count=5)
    recipe = Recipe(method="gptq")
    whole = dict(quantise_model(files.spec, files.weights, recipe, windows))
    monkeypatch.setattr(module, "_PASS_TOKENS", 1)
    parts = dict(quantise_model(files.spec, files.weights, recipe, windows))
    for name, matrix in whole.items():
        assert (matrix.values == parts[name].values).float().mean() > 0.98, name


def test_gptq_changes_the_logits_less_than_rounding(wide: Path) -> None:
    files = open_model(str(wide))
    windows = some_windows(files.spec, count=40)
    held_out = torch.randint(0, files.spec.vocab, (60,), generator=torch.Generator().manual_seed(9))
    wanted = logits_of(torch_model(files), held_out)
    errors = {}
    for method in ("rtn", "gptq"):
        recipe = Recipe(method=method, head="keep")  # type: ignore[arg-type]
        found = dict(quantise_model(files.spec, files.weights, recipe, windows))
        made = logits_of(torch_model(files, with_quantised(files.weights, found)), held_out)
        errors[method] = float((made - wanted).square().mean())
    assert errors["gptq"] < errors["rtn"]


def test_a_head_in_8_bits_is_taken_as_it_is(packaged: Path) -> None:
    source = open_model(str(packaged)).weights.sources["model.embed_tokens.weight"]
    assert isinstance(source, BlockTensor)
    taken = from_q8_0(source)
    assert torch.equal(taken.dequantize(), source.dequantize())
    tensors = stored("table.weight", taken)
    assert tensors["table.weight_packed"].shape == (49152, 144)


def test_a_gguf_tokenizer_is_the_same_when_read_by_us_and_by_others(packaged: Path, tmp_path: Path) -> None:
    tokenizer = open_model(str(packaged)).tokenizer
    tokenizer.save(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    other = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    text = "In 1847 the town's café sold 23 <|im_start|>user\n loaves;\tand   more."
    assert again.encode(text) == tokenizer.encode(text) == other(text)["input_ids"]
    assert (again.bos_id, again.eos_id, again.eos_ids) == (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eos_ids)
    messages = [{"role": "user", "content": "Hello"}]
    assert again.chat(messages) == tokenizer.chat(messages)
    assert other.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == tokenizer.chat(messages)


def test_a_start_token_survives(tiny_tokenizer_json: str, tmp_path: Path) -> None:
    import tokenizers

    backend = tokenizers.Tokenizer.from_str(tiny_tokenizer_json)
    start = backend.token_to_id("<|im_end|>")
    tokenizer = Tokenizer(backend, file="x", bos_id=start, prefix=(start,))
    tokenizer.save(tmp_path)
    assert (
        Tokenizer.from_folder(tmp_path).encode("abc") == tokenizer.encode("abc") == [start, *backend.encode("abc").ids]
    )
    assert Tokenizer.from_folder(tmp_path).encode("abc", special=False) == backend.encode("abc").ids


def test_a_written_config_describes_the_same_model(reference: Any, saved: Path) -> None:
    spec = open_model(str(saved)).spec
    assert spec_from_config(config_of(spec)) == spec
    theirs = type(reference.config)(**config_of(spec))
    assert theirs.num_key_value_heads == spec.kv_heads


def test_nothing_is_left_behind_when_writing_fails(wide: Path, tmp_path: Path) -> None:
    files = open_model(str(wide))

    def broken() -> Iterator[tuple[str, Quantised]]:
        yield from list(quantise_model(files.spec, files.weights, Recipe(method="rtn")))[:3]
        raise RuntimeError("stopped half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        write_checkpoint(tmp_path / "new", files.spec, files.weights, files.tokenizer, Recipe(method="rtn"), broken())
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match="exists already"):
        quantise_to(tmp_path / "taken", str(wide), Recipe(method="rtn"))
    with pytest.raises(UserError, match="parent"):
        quantise_to(tmp_path / "no" / "new", str(wide), Recipe(method="rtn"))


def damaged(folder: Path, change: str, value: Any = None) -> None:
    """Put one thing of a written checkpoint wrong."""
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if change == "cut":
        data = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
        return
    if value is None:
        del tensors[name + change]
    else:
        tensors[name + change] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("change", "value", "says"),
    [
        ("cut", None, "damaged"),
        ("_scale", None, "up_proj.weight has no weight_scale"),
        ("_shape", None, "up_proj.weight has no weight_shape"),
        ("_zero_point", None, "has no weight_zero_point"),
        ("_packed", None, "up_proj.weight is missing"),
        ("_shape", torch.tensor([80, 4800]), "no scheme"),
        ("_shape", torch.tensor([80, -48]), "states a shape"),
        ("_shape", torch.tensor([1.5, 48]), "states a shape"),
        ("_shape", torch.tensor([2**40, 2**40]), "states a shape"),
        ("_packed", torch.zeros(80, 6), "words of torch.float32"),
        ("_packed", torch.zeros(80, 5, dtype=torch.int32), "no scheme"),
        ("_scale", torch.zeros(79, 2).half(), "scales of shape"),
        ("_scale", torch.zeros(80, 3).half(), "no scheme"),
        ("_zero_point", torch.zeros(3, 2, dtype=torch.int32), "zero points"),
        ("_g_idx", torch.zeros(48, dtype=torch.int32), "order of their own"),
    ],
)
def test_damage_is_one_line(wide: Path, tmp_path: Path, change: str, value: Any, says: str) -> None:
    recipe = Recipe(method="rtn", grid=Grid(group=32, symmetric=False))
    written(tmp_path / "new", wide, recipe)
    damaged(tmp_path / "new", change, value)
    with pytest.raises(UserError, match=says) as caught:
        torch_model(open_model(str(tmp_path / "new")))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("quant_method",), "gptq", "quantization_config"),
        (("format",), "naive-quantized", "quantization_config"),
        (("config_groups",), {}, "config_groups"),
        (("config_groups", "group_0", "weights"), None, "weights"),
        (("config_groups", "group_0", "weights", "num_bits"), 3, "num_bits"),
        (("config_groups", "group_0", "weights", "strategy"), "tensor", "strategy"),
        (("config_groups", "group_0", "weights", "group_size"), 0, "group_size"),
        (("config_groups", "group_0", "weights", "group_size"), 8, "no scheme"),
        (("config_groups", "group_0", "input_activations"), {"num_bits": 8}, "input_activations"),
    ],
)
def test_schemes_that_are_not_read_are_named(
    wide: Path, tmp_path: Path, path: tuple[str, ...], value: Any, says: str
) -> None:
    written(tmp_path / "new", wide, Recipe(method="rtn"))
    file = tmp_path / "new" / "config.json"
    config = json.loads(file.read_text())
    inner = config["quantization_config"]
    for part in path[:-1]:
        inner = inner[part]
    inner[path[-1]] = value
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=says):
        open_model(str(tmp_path / "new"))


def test_scales_too_large_for_fp16_run_in_torch_alone(wide: Path, tmp_path: Path) -> None:
    written(tmp_path / "new", wide, Recipe(method="rtn", grid=Grid(group=32)))
    damaged(tmp_path / "new", "_scale", torch.full((80, 2), 1e30, dtype=torch.bfloat16))
    files = open_model(str(tmp_path / "new"))
    assert isinstance(files.weights.sources["model.layers.1.mlp.up_proj.weight"], GroupedTensor)
    with pytest.raises(UserError, match="fp16"):
        build_fused(files.spec, files.weights, path="exact", dtype=torch.float32, threads=1)


def test_windows_are_spread_over_the_text(saved: Path, tmp_path: Path) -> None:
    tokenizer = open_model(str(saved)).tokenizer
    file = tmp_path / "text.txt"
    file.write_text("".join(chr(33 + i % 60) for i in range(1000)))
    ids = tokenizer.encode(file.read_text(), special=False)
    windows = text_windows(tokenizer, Calibration(file=file, windows=4, tokens=100))
    assert windows.tolist() == [ids[start : start + 100] for start in (0, 300, 600, 900)]
    assert text_windows(tokenizer, Calibration(file=file, windows=50, tokens=100)).shape == (10, 100)
    with pytest.raises(UserError, match="1000 tokens"):
        text_windows(tokenizer, Calibration(file=file, tokens=1001))
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="UTF-8"):
        text_windows(tokenizer, Calibration(file=file))
    with pytest.raises(UserError, match="cannot be read"):
        text_windows(tokenizer, Calibration(file=tmp_path / "none"))
    with pytest.raises(FieldError, match="windows"):
        Calibration(file=file, windows=0)


def test_gptq_needs_a_text(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="needs a text"):
        quantise_to(tmp_path / "new", str(saved), Recipe(method="gptq"), threads=1)


def test_mixed_models_are_as_good_as_their_8_bits(wide: Path) -> None:
    """Activations in 4 bits err more than mixed ones, those more than 8 bits; without plans nothing is rounded."""
    files = open_model(str(wide))
    mixed = calibrate_mixed(files.spec, files.weights, some_windows(files.spec, count=20))
    weights = mixed.weights(files.weights)
    held_out = torch.randint(0, files.spec.vocab, (50,), generator=torch.Generator().manual_seed(9))
    plain = logits_of(torch_model(files, weights), held_out)
    torch.testing.assert_close(logits_of(torch_model(files, weights, product=fake_product({})), held_out), plain)
    errors, totals = [], []
    for share in (0.0, 0.5, 1.0):
        plans = mixed.plans(share)
        found = logits_of(torch_model(files, weights, product=fake_product(plans, mixed.divisors)), held_out)
        errors.append(float((found - plain).square().mean()))
        eights = sum(int((plan.bits == 8).sum()) for plan in plans.values())
        assert eights == int(share * sum(len(plan.bits) for plan in plans.values()))
        report = mixed.report(plans)
        assert len(report) == 4 * files.spec.layers
        totals.append(sum(each.error for each in report))
        assert sum(each.weight_bytes for each in report) == sum(p.weight.nbytes for p in mixed.products.values())
    assert errors[0] > errors[1] > errors[2]
    assert totals[1] < (totals[0] + totals[2]) / 2  # the better half of the blocks


def test_a_product_keeps_its_rows_when_columns_are_put_in_order(wide: Path) -> None:
    files = open_model(str(wide))
    mixed = calibrate_mixed(files.spec, files.weights, some_windows(files.spec))
    for index in range(files.spec.layers):
        for name, shapes in products_of(files.spec, index).items():
            whole = torch.cat([files.weights.tensor(matrix, shape) for matrix, shape in shapes.items()])
            product = mixed.products[name]
            steps = product.weight.scales.float().amax()
            assert (product.in_own_order() - whole).abs().mean() < steps


def test_gguf_rows_are_written_in_halves(wide: Path, tmp_path: Path) -> None:
    """The same model with rotary partners adjacent, as GGUF files have it, gives the same checkpoint."""
    files = open_model(str(wide))
    spec, sources = files.spec, {}
    for name, read in files.weights.sources.items():
        turned = any(f".{part}_{kind}." in name for part in "qk" for kind in ("proj", "norm"))
        values = query_key_order(read(), spec.head_dim, have="halves", want="adjacent") if turned else read()
        sources[name] = values.clone
    adjacent = replace(files.weights, rotary="adjacent", sources=sources)
    recipe = Recipe(method="rtn")
    for place, weights in (("a", files.weights), ("b", adjacent)):
        found = quantise_model(spec, weights, recipe)
        write_checkpoint(tmp_path / place, spec, weights, files.tokenizer, recipe, found)
    ours, others = (load_file(tmp_path / place / "model.safetensors") for place in "ab")
    assert ours.keys() == others.keys()
    assert all(torch.equal(ours[name], others[name]) for name in ours)


def test_q8_0_rows_match_round_trip_of_words() -> None:
    matrix = round_to_nearest(torch.randn(10, 70), Grid(bits=8, group=32, symmetric=False))
    tensors = stored("m.weight", matrix)
    read = GroupedTensor(
        (10, 70),
        8,
        32,
        0,
        lambda: tensors["m.weight_packed"],
        lambda: matrix.scales,
        lambda: tensors["m.weight_zero_point"],
    )
    assert torch.equal(read.quantised().values, matrix.values)
    assert torch.equal(read.dequantize(), matrix.dequantize())
    index = torch.tensor([7, 0, 7])
    assert torch.equal(read.rows(index), matrix.dequantize()[index])
