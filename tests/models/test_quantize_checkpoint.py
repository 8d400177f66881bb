"""Quantised models written and read again: the same numbers by every reader, and damage told in one line."""

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

from stretto.core.errors import UserError  # noqa: E402
from stretto.models.configs import config_of, spec_from_config  # noqa: E402
from stretto.models.fused import build_fused  # noqa: E402
from stretto.models.load import ModelFiles, open_model  # noqa: E402
from stretto.models.packable import why_not_fused  # noqa: E402
from stretto.models.quantize.checkpoint import stored, write_checkpoint  # noqa: E402
from stretto.models.quantize.grid import Grid, round_to_nearest  # noqa: E402
from stretto.models.quantize.layerwise import (  # noqa: E402
    Method,
    Recipe,
    from_q8_0,
    quantise_model,
    with_quantised,
)
from stretto.models.quantize.run import quantise_to  # noqa: E402
from stretto.models.quantized import BlockTensor, GroupedTensor, Quantised  # noqa: E402
from stretto.models.tokenizer import Tokenizer  # noqa: E402
from stretto.models.weights import query_key_order, state_dict  # noqa: E402

from .quantising import logits_of, some_windows, torch_model  # noqa: E402


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


def test_a_group_is_no_wider_than_its_row(wide: Path, tmp_path: Path) -> None:
    """A file may claim any size of a group; memory follows the rows."""
    written(tmp_path / "new", wide, Recipe(method="rtn", grid=Grid(group=-1)))
    file = tmp_path / "new" / "config.json"
    config = json.loads(file.read_text())
    for group in config["quantization_config"]["config_groups"].values():
        if group["weights"]["strategy"] == "channel":
            group["weights"] |= {"strategy": "group", "group_size": 2**40}
    file.write_text(json.dumps(config))
    source = open_model(str(tmp_path / "new")).weights.sources["model.layers.1.mlp.up_proj.weight"]
    assert isinstance(source, GroupedTensor)
    assert source.group == 64
    assert torch.isfinite(source.dequantize()).all()


def test_of_schemes_that_fit_the_one_with_zero_points_is_for_those_that_have_them(wide: Path, tmp_path: Path) -> None:
    files, found = written(tmp_path / "new", wide, Recipe(method="rtn", grid=Grid(group=32, symmetric=False)))
    file = tmp_path / "new" / "config.json"
    config = json.loads(file.read_text())
    groups = config["quantization_config"]["config_groups"]
    first = next(iter(groups.values()))
    config["quantization_config"]["config_groups"] = {
        "other": {**first, "weights": {**first["weights"], "symmetric": True}},
        **groups,
    }
    file.write_text(json.dumps(config))
    name = "model.layers.1.mlp.up_proj.weight"
    again = open_model(str(tmp_path / "new")).weights.sources[name]
    assert torch.equal(again.dequantize(), found[name].dequantize()[:, : files.spec.hidden])


def test_a_place_that_cannot_be_written_is_told(wide: Path) -> None:
    files = open_model(str(wide))
    with pytest.raises(UserError, match="out: cannot be written"):
        write_checkpoint(Path("/proc/new"), files.spec, files.weights, files.tokenizer, Recipe(method="rtn"), ())
