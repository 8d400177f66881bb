"""Whole models quantised: what they are calibrated on, layer by layer, and what that is good for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


from stretto.core.errors import FieldError, UserError  # noqa: E402
from stretto.models.load import open_model  # noqa: E402
from stretto.models.quantize.gptq import gptq  # noqa: E402
from stretto.models.quantize.layerwise import (  # noqa: E402
    Recipe,
    Recorder,
    Stream,
    products_of,
    quantise_model,
    with_quantised,
)
from stretto.models.quantize.mixed import fake_product  # noqa: E402
from stretto.models.quantize.mixed_model import calibrate_mixed  # noqa: E402
from stretto.models.quantize.run import Calibration, quantise_to, text_windows  # noqa: E402

from .quantising import logits_of, some_windows, torch_model  # noqa: E402


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
