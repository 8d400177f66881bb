"""Whole models out of GGUF files: tiny ones written as llama.cpp's converter does, and the packaged one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

from stretto.models import Model, load_model
from stretto.models.configs import spec_from_config
from stretto.models.rope import rope_frequencies
from stretto.models.segment import Segment
from stretto.models.weights import ROPE_DIVISORS

NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
PROMPT = [5, 17, 40, 3, 3, 88, 61, 7]


def gguf_name(name: str) -> str:
    parts = name.removeprefix("model.").split(".")
    if parts[0] == "layers":
        return f"blk.{parts[1]}.{NAMES['.'.join(parts[2:-1])]}.{parts[-1]}"
    top = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
    return f"{top[parts[0]]}.{parts[-1]}"


def write(reference: Any, path: Path) -> None:
    config = reference.config
    family = config.model_type
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_key_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    letters = [chr(256 + i) for i in range(config.vocab_size - 1)]
    writer.add_token_list([*letters, letters[0] + letters[1]])
    writer.add_token_merges([f"{letters[0]} {letters[1]}"])
    for name, weight in reference.named_parameters():
        values = weight.detach().numpy()
        if family == "llama" and (".q_proj." in name or ".k_proj." in name):
            halves = values.reshape(-1, 2, head_dim // 2, *values.shape[1:])
            values = np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))
        writer.add_tensor(gguf_name(name), values)
    if config.rope_parameters["rope_type"] == "llama3":
        spec = spec_from_config(config.to_dict())
        plain = 1.0 / spec.rope_theta ** (torch.arange(0, head_dim, 2) / head_dim)
        writer.add_tensor(ROPE_DIVISORS, (plain / rope_frequencies(spec)).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def last_logits(model: Model, tokens: list[int]) -> torch.Tensor:
    cache = model.transformer.new_cache(pages=1, page_tokens=len(tokens))
    return model.transformer.forward(torch.tensor(tokens), [Segment(0, len(tokens), 0, (0,))], cache)[0]


def test_a_model_out_of_gguf_is_the_model(reference: Any, tmp_path: Path) -> None:
    if reference.config.model_type == "mistral" or reference.config.rope_parameters["rope_type"] == "linear":
        pytest.skip("llama.cpp writes Mistral as llama; linear scaling is tried from safetensors")
    write(reference, tmp_path / "tiny.gguf")
    model = load_model(str(tmp_path / "tiny.gguf"), threads=1)
    assert model.spec.parameters() == sum(weight.numel() for weight in reference.parameters())
    with torch.no_grad():
        wanted = reference(torch.tensor([PROMPT])).logits[0, -1]
    assert torch.allclose(last_logits(model, PROMPT), wanted, rtol=0, atol=1e-3)


def test_the_packaged_model_answers(packaged: Path) -> None:
    model = load_model(str(packaged), dtype="bf16", threads=1)
    prompt = model.tokenizer.chat([{"role": "user", "content": "What is the capital of France?"}])
    tokens = model.tokenizer.encode(prompt, special=False)
    reply: list[int] = []
    while len(reply) < 12 and not model.tokenizer.eos_ids & set(reply):
        reply.append(int(last_logits(model, tokens + reply).argmax()))
    assert model.tokenizer.decode(reply) == "The capital of France is Paris."


@pytest.mark.slow
def test_the_packaged_model_has_the_logits_of_transformers(packaged: Path) -> None:
    from transformers import AutoModelForCausalLM

    peer = AutoModelForCausalLM.from_pretrained(
        str(packaged.parent), gguf_file=packaged.name, dtype=torch.float32
    ).eval()
    model = load_model(str(packaged), threads=1)
    for text in ("Hello", "def fib(n):\n    return", "The history of printing begins long before 1450, when"):
        tokens = model.tokenizer.encode(text)
        with torch.no_grad():
            wanted = peer(torch.tensor([tokens])).logits[0, -1]
        assert (last_logits(model, tokens) - wanted).abs().max().item() <= 1e-4
