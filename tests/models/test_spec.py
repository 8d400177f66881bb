"""Counts of a spec against the real modules of transformers."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from stretto.core.errors import FieldError, UserError
from stretto.models import ModelSpec, PassShape
from stretto.models.configs import spec_from_config

SMOLLM = ModelSpec(
    family="llama",
    layers=30,
    hidden=576,
    heads=9,
    kv_heads=3,
    head_dim=64,
    ffn=1536,
    vocab=49152,
    tied_embeddings=True,
)


def spec_of(model: Any) -> ModelSpec:
    return spec_from_config(model.config.to_dict())


def total(operations: Any, kind: str) -> float:
    return sum(o.flops * o.count for o in operations if o.kind == kind)


def test_parameters_are_those_of_the_module(reference: Any) -> None:
    assert spec_of(reference).parameters() == sum(weight.numel() for weight in reference.parameters())


def test_published_size_of_smollm() -> None:
    assert SMOLLM.parameters() == 134_515_008
    assert SMOLLM.weight_bytes("bf16") == 2 * 134_515_008
    assert SMOLLM.kv_bytes_per_token("fp32") == 30 * 2 * 3 * 64 * 4


def test_matmul_and_attention_flops_are_those_counted(reference: Any) -> None:
    tokens = torch.randint(0, 100, (3, 7))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        reference(tokens)
    spec = spec_of(reference)
    operations = spec.operations(PassShape(new_tokens=(7,) * 3, cached=(0,) * 3, logits_rows=21), dtype="fp32")
    attention = sum(3 * 4.0 * spec.heads * spec.head_dim * 7 * 7 for _ in range(spec.layers))
    # Eager attention multiplies the whole square, and the rotary table is an outer product.
    rope = 2 * 7 * (spec.head_dim // 2)
    counted = counter.get_total_flops() - attention
    assert counted - total(operations, "matmul") in (0, rope, 3 * rope)
    assert total(operations, "attention") == pytest.approx(attention * 28 / 49)


def test_a_mixed_pass_lists_its_decode_rows_together_and_each_prompt_alone() -> None:
    listed = SMOLLM.operations(PassShape(new_tokens=(1, 5, 1, 8), cached=(9, 2, 19, 0)), dtype="bf16")
    attention = [o for o in listed if o.kind == "attention"]
    assert [o.signature for o in attention] == [
        "attention-decode/bf16/h9/kv3/d64",
        *["attention-prefill/bf16/h9/kv3/d64"] * 2,
    ]
    assert [o.at for o in attention] == [(2.0, 15.0), (5.0, 7.0 / 5), (8.0, 1.0)]
    assert [o.shape[4] for o in attention] == [30, 5 * 2 + 15, 36]
    assert all(o.count == 30 for o in attention)
    head = listed[-1]
    assert (head.name, head.shape, head.signature, head.at) == (
        "lm_head",
        (4, 576, 49152),
        "matmul/bf16/k576/n49152",
        (4.0,),
    )
    qkv = next(o for o in listed if o.name == "qkv")
    assert qkv.bytes == 2 * (576 * 960 + 15 * (576 + 960))


def test_no_logits_means_no_head() -> None:
    listed = SMOLLM.operations(PassShape(new_tokens=(4,), cached=(0,), logits_rows=0), dtype="bf16")
    assert {o.name for o in listed} & {"lm_head", "norm_final"} == set()


def test_tensor_parallel_shares_cover_the_whole() -> None:
    shape = PassShape(new_tokens=(4,), cached=(0,))
    whole, third = (total(SMOLLM.operations(shape, dtype="bf16", tp=tp), "matmul") for tp in (1, 3))
    assert third == pytest.approx(whole / 3)
    with pytest.raises(FieldError, match="KV heads"):
        SMOLLM.operations(shape, dtype="bf16", tp=4)


def test_a_quantised_cache_moves_fewer_bytes() -> None:
    shape = PassShape(new_tokens=(1,), cached=(99,))
    bytes_of = {
        kv: next(o.bytes for o in SMOLLM.operations(shape, dtype="bf16", kv_dtype=kv) if o.kind == "attention")
        for kv in ("bf16", "fp8")
    }
    assert bytes_of["bf16"] - bytes_of["fp8"] == 2 * 100 * 3 * 64


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"model_type": "gpt2"}, "model_type"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"num_attention_heads": 5}, "heads"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 0.5}},
            "rope_scaling.factor: is .0.5.; it must",
        ),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_theta": 10**400}, "rope_theta: is '1000+'; it must be a finite number"),
        ({"rope_theta": float("inf")}, "rope_theta: is 'inf'"),
    ],
)
def test_a_config_that_cannot_be_run_is_refused(change: dict[str, Any], names: str) -> None:
    config = {
        "model_type": "llama",
        "hidden_size": 48,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
        "intermediate_size": 80,
        "vocab_size": 100,
    }
    assert spec_from_config(config).head_dim == 8
    with pytest.raises(UserError, match=names):
        spec_from_config({**config, **change})


def test_a_sliding_window_caps_the_positions() -> None:
    config = {"model_type": "mistral", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
    config |= {
        "intermediate_size": 8,
        "vocab_size": 9,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
    }
    assert spec_from_config(config).max_positions == 4096


@pytest.mark.parametrize("new", [(), (0,), (1, 1)])
def test_lengths_that_do_not_fit_are_refused(new: tuple[int, ...]) -> None:
    with pytest.raises(FieldError):
        PassShape(new_tokens=new, cached=(0,))


def test_specs_need_no_torch() -> None:
    code = "import sys, stretto.models; sys.exit('torch' in sys.modules or 'tokenizers.models' is None)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
