"""The trainable decoder: transformers' numbers, and one model however it is cut."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from stretto.comm.grid import RankGrid
from stretto.models.causal import CausalStage
from stretto.models.causal_layers import Lora, Split
from stretto.models.causal_weights import initialise, load_weights, part_of
from stretto.models.dropout import Dropout
from stretto.models.load import open_model
from stretto.models.parallel.layout import split_sequence
from stretto.models.spec import ModelSpec
from tests.comm import pool

HERE = __name__
DENSE: dict[str, Any] = {
    "family": "llama",
    "layers": 2,
    "hidden": 24,
    "heads": 6,
    "kv_heads": 3,
    "head_dim": 4,
    "ffn": 20,
    "vocab": 29,
    "tied_embeddings": True,
}
QWEN3 = DENSE | {"family": "qwen3", "qk_norm": True, "tied_embeddings": False}
QWEN2 = DENSE | {"family": "qwen2", "qkv_bias": True}
MIXED = DENSE | {"experts": 4, "top_k": 2}
LENGTH = 8


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    text = torch.randint(0, 29, (2, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    targets = text[:, 1:].clone()
    targets[0, 2] = -100
    return text[:, :-1], targets


def one_rank(values: dict[str, Any], lora: Lora | None = None) -> tuple[float, dict[str, torch.Tensor]]:
    model = CausalStage(ModelSpec(**values), dtype=torch.float64, lora=lora)
    _start(model)
    tokens, targets = batch()
    loss = model(tokens, targets, length=LENGTH)
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def _start(model: CausalStage) -> None:
    initialise(model, seed=5)
    with torch.no_grad():  # adapters that begin as nothing would hide half of their gradients
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                place = model.placements()[name]
                whole = torch.randn(place.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
                parameter.copy_(part_of(whole, place, parameter))


def split_rank(rank: int, start: pool.Start, axes: dict[str, int], values: dict[str, Any], how: dict[str, Any]) -> Any:
    grid = RankGrid(axes=tuple(axes.items()))
    transport = start(grid)
    split = Split(
        **{name: transport.axis(name) for name in axes if name != "dp"},
        **{name: how[name] for name in ("attention", "layout", "experts") if name in how},
    )
    model = CausalStage(ModelSpec(**values), dtype=torch.float64, split=split, lora=how.get("lora"))
    _start(model)
    tokens, targets = batch()
    if "ep" in axes:
        place, size = split.ep.rank, split.ep.size
        tokens, targets = tokens[place::size], targets[place::size]
    tokens, targets = (split_sequence(x, split.cp, 1, split.layout) for x in (tokens, targets))
    loss = model(tokens, targets, length=LENGTH, recompute=how.get("recompute", False))
    loss.backward()
    places, found = model.placements(), {}
    data = transport.axis("cp", "ep") if {"cp", "ep"} <= set(axes) else split.cp if "cp" in axes else split.ep
    total = data.all_reduce_(loss.detach().clone())
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            continue
        place = places[name]
        if data.size > 1:
            axis = data if "ep" not in place.split else split.cp
            axis.all_reduce_(parameter.grad)
        for axis_name in place.partial:
            transport.axis(axis_name).all_reduce_(parameter.grad)
        found[name] = (place, parameter.grad)
    return float(total), found


def assembled(found: list[Any]) -> dict[str, torch.Tensor]:
    whole: dict[str, torch.Tensor] = {}
    for _, gradients in found:
        for name, (place, part) in gradients.items():
            target = whole.setdefault(name, torch.full(place.shape, float("nan"), dtype=part.dtype))
            part_of(target, place, part).copy_(part)
    return whole


CASES = [
    ({"tp": 2}, DENSE, {}),
    ({"tp": 3}, QWEN3, {}),
    ({"tp": 2}, QWEN2, {"recompute": True}),
    ({"cp": 2}, DENSE, {"attention": "rsa"}),
    ({"cp": 2}, QWEN3, {"attention": "blockwise", "layout": "zigzag", "recompute": True}),
    ({"cp": 2}, DENSE, {"attention": "all_to_all", "layout": "zigzag"}),
    ({"cp": 2, "tp": 2}, DENSE, {"attention": "blockwise"}),
    ({"ep": 2}, MIXED, {"experts": "ep"}),
    ({"ep": 2, "tp": 2}, MIXED, {"recompute": True}),
    ({"ep": 2, "cp": 2}, MIXED, {"layout": "zigzag"}),
    ({"tp": 2}, DENSE, {"lora": Lora(rank=3, alpha=6.0)}),
    ({"tp": 3, "cp": 2}, QWEN3, {"lora": Lora(rank=2, alpha=4.0, targets=("q_proj", "o_proj", "down_proj"))}),
]


@pytest.mark.parametrize(("axes", "values", "how"), CASES)
def test_a_split_model_has_the_loss_and_gradients_of_one_rank(
    axes: dict[str, int], values: dict[str, Any], how: dict[str, Any]
) -> None:
    world = RankGrid(axes=tuple(axes.items())).world
    found = pool.run(world, f"{HERE}:split_rank", axes, values, how)
    loss, gradients = one_rank(values, how.get("lora"))
    assert found[0][0] == pytest.approx(loss, rel=1e-12)
    whole = assembled(found)
    assert whole.keys() == gradients.keys()
    for name, reference in gradients.items():
        torch.testing.assert_close(whole[name], reference, rtol=1e-11, atol=1e-12, msg=lambda m, n=name: f"{n}\n{m}")


@pytest.mark.parametrize("values", [DENSE, QWEN3])
def test_stages_one_after_another_are_the_model(values: dict[str, Any]) -> None:
    spec = ModelSpec(**values)
    first = CausalStage(spec, range(1), last=False, dtype=torch.float64)
    last = CausalStage(spec, range(1, 2), first=False, dtype=torch.float64)
    for stage in (first, last):
        initialise(stage, seed=5)
    tokens, targets = batch()
    between = first(tokens, length=LENGTH)
    loss = last(between, targets, length=LENGTH)
    loss.backward()
    expected, gradients = one_rank(values)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-14)
    found = {name: p.grad for stage in (first, last) for name, p in stage.named_parameters() if p.grad is not None}
    pair = first.tied_pair, last.tied_pair
    assert (pair[0] is not None) == spec.tied_embeddings
    if pair[0] is not None and pair[1] is not None:
        found["model.embed_tokens.weight"] = pair[0].grad + pair[1].grad
        found.pop("lm_head.weight")
    for name, reference in gradients.items():
        torch.testing.assert_close(found[name], reference, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("values", [DENSE, QWEN2, QWEN3])
def test_the_loss_and_gradients_are_those_of_transformers(values: dict[str, Any]) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    from stretto.models.configs import config_of

    spec = ModelSpec(**values)
    model = CausalStage(spec, dtype=torch.float64)
    initialise(model, seed=5)
    config = config_of(spec)
    config.pop("architectures")
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float64)
    missing = theirs.load_state_dict(model.state_dict(), strict=False)
    assert set(missing.missing_keys) <= {"lm_head.weight"}
    assert not missing.unexpected_keys
    tokens, targets = batch()
    loss = model(tokens, targets, length=LENGTH)
    loss.backward()
    logits = theirs(tokens).logits
    reference = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    reference.backward()
    assert float(loss.detach()) == pytest.approx(float(reference.detach()), rel=1e-6)  # its rotary angles are fp32
    gradients = dict(theirs.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-4, atol=1e-6)


def test_the_packaged_model_is_loaded_as_it_is() -> None:
    files = open_model("default")
    stage = CausalStage(files.spec, range(1), last=False)
    load_weights(stage, files.weights)
    table = files.weights.tensor("model.embed_tokens.weight", (files.spec.vocab, files.spec.hidden))
    assert torch.equal(stage.model.embed_tokens.weight, table)  # type: ignore[union-attr]


def test_an_adapter_begins_as_nothing_and_alone_is_trained() -> None:
    plain = CausalStage(ModelSpec(**DENSE), dtype=torch.float64)
    adapted = CausalStage(ModelSpec(**DENSE), dtype=torch.float64, lora=Lora(rank=2, alpha=4.0))
    for model in (plain, adapted):
        initialise(model, seed=5)
    tokens, targets = batch()
    assert torch.equal(plain(tokens, targets, length=LENGTH), adapted(tokens, targets, length=LENGTH))
    adapted(tokens, targets, length=LENGTH).backward()
    trained = {name for name, p in adapted.named_parameters() if p.grad is not None}
    assert trained == {name for name, _ in adapted.named_parameters() if "lora_" in name}


def test_half_precision_products_keep_the_residual_stream_whole() -> None:
    model = CausalStage(ModelSpec(**DENSE), compute=torch.bfloat16)
    initialise(model, seed=5)
    tokens, targets = batch()
    loss = model(tokens, targets, length=LENGTH)
    assert loss.dtype == torch.float32
    exact = CausalStage(ModelSpec(**DENSE))
    initialise(exact, seed=5)
    assert float(loss.detach()) == pytest.approx(float(exact(tokens, targets, length=LENGTH).detach()), rel=2e-2)


@pytest.mark.parametrize("layers", [4, 5])
def test_skip_connections_are_what_their_definition_says(layers: int) -> None:
    model = CausalStage(ModelSpec(**DENSE | {"layers": layers, "skips": "unet"}), dtype=torch.float64)
    initialise(model, seed=5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("skip.weight"):
                assert parameter.tolist() == [1.0]
                parameter.fill_(0.5 + int(name.split(".")[2]))
    tokens, targets = batch()
    found = model(tokens, targets, length=LENGTH)
    results: list[torch.Tensor] = []
    assert model.model.embed_tokens is not None
    assert model.model.norm is not None
    x = model.model.embed_tokens.embed(tokens)
    for index, layer in enumerate(model.model.layers.values()):
        if index > (layers - 1) / 2:
            x = x + (0.5 + index) * results[layers - 1 - index]
        x = layer(x, model._turn(LENGTH))
        results.append(x)
    expected = model.head.losses(model.model.norm(x).flatten(0, 1), targets.flatten()).sum()
    assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-14)
    assert sum(parameter.numel() for parameter in model.parameters()) == model.spec.parameters()


def test_every_place_that_drops_has_a_number_of_its_own() -> None:
    spec = ModelSpec(**DENSE)
    model = CausalStage(spec, dropout=0.1, lora=Lora(rank=2, alpha=4.0, dropout=0.1))
    places = [module.place for module in model.modules() if isinstance(module, Dropout)]
    assert len(places) == len(set(places)) == spec.layers * (2 + 7)
