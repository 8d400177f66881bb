"""A GGUF file with the shape of a Llama of 1.1 billion parameters and random weights in Q4_0.

Its words are those of another file: what matters is how fast it is read and multiplied.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

LAYERS, HIDDEN, HEADS, KV_HEADS, FFN = 16, 2048, 32, 8, 8192
BLOCK, BLOCK_BYTES = 32, 18


def write(path: Path, words: Path) -> None:
    """Write the file at `path`, with the vocabulary of the model in `words`."""
    reader = gguf.GGUFReader(words)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(4096)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(HIDDEN // HEADS)
    writer.add_rope_freq_base(10000.0)
    vocabulary = 0
    for name, field in reader.fields.items():
        if name.startswith("tokenizer."):
            value = field.contents()
            writer.add_key_value(name, value, field.types[0], field.types[-1] if len(field.types) > 1 else None)
            if name == "tokenizer.ggml.tokens":
                vocabulary = len(value)
    writer.add_vocab_size(vocabulary)
    rng = np.random.default_rng(0)

    def matrix(name: str, rows: int, inner: int) -> None:
        blocks = rng.integers(0, 256, (rows, inner // BLOCK, BLOCK_BYTES), dtype=np.uint8)
        scale = np.float16(0.3 / np.sqrt(inner))
        blocks[:, :, :2] = np.frombuffer(scale.tobytes(), np.uint8)
        shape = (rows, inner // BLOCK * BLOCK_BYTES)
        writer.add_tensor(name, blocks.reshape(shape), raw_dtype=gguf.GGMLQuantizationType.Q4_0)

    kv = HIDDEN // HEADS * KV_HEADS
    matrix("token_embd.weight", vocabulary, HIDDEN)
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    for i in range(LAYERS):
        writer.add_tensor(f"blk.{i}.attn_norm.weight", np.ones(HIDDEN, np.float32))
        writer.add_tensor(f"blk.{i}.ffn_norm.weight", np.ones(HIDDEN, np.float32))
        shapes = {"attn_q": (HIDDEN, HIDDEN), "attn_k": (kv, HIDDEN), "attn_v": (kv, HIDDEN)}
        shapes |= {"attn_output": (HIDDEN, HIDDEN), "ffn_gate": (FFN, HIDDEN), "ffn_up": (FFN, HIDDEN)}
        for name, (rows, inner) in (shapes | {"ffn_down": (HIDDEN, FFN)}).items():
            matrix(f"blk.{i}.{name}.weight", rows, inner)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
