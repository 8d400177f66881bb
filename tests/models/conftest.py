"""Tiny random models, saved as transformers saves them, and the packaged GGUF file."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

_SHAPE = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
}
_WIDE_SHAPE = {**_SHAPE, "num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**_SHAPE, tie_word_embeddings=False),
    "llama-tied-wide-heads": lambda: transformers.LlamaConfig(**_SHAPE, tie_word_embeddings=True, head_dim=16),
    "llama3-rope": lambda: transformers.LlamaConfig(**_SHAPE, rope_parameters=LLAMA3_ROPE),
    "linear-rope": lambda: transformers.LlamaConfig(
        **_SHAPE, rope_parameters={"rope_type": "linear", "rope_theta": 5000.0, "factor": 4.0}
    ),
    "qwen2": lambda: transformers.Qwen2Config(**_SHAPE, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**_SHAPE, head_dim=16),
    "mistral": lambda: transformers.MistralConfig(**_SHAPE, sliding_window=None),
}
WIDE: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**_WIDE_SHAPE, tie_word_embeddings=True),
    "qwen2": lambda: transformers.Qwen2Config(**_WIDE_SHAPE, tie_word_embeddings=True),
    "qwen3": lambda: transformers.Qwen3Config(**_WIDE_SHAPE, head_dim=16, tie_word_embeddings=False),
}
"""Heads of 16, for which there are kernels."""


def make_reference(kind: str) -> Any:
    """A transformers model of random weights, norms and biases too, so that none can be left out unseen."""
    torch.manual_seed(11)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[kind](), attn_implementation="eager").eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.2 if weight.dim() == 1 else 0.3)
    return model


@pytest.fixture(scope="session", params=list(CONFIGS))
def reference(request: pytest.FixtureRequest) -> Any:
    return make_reference(request.param)


@pytest.fixture(scope="session")
def tiny_tokenizer_json() -> str:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:95]
    backend = tokenizers.Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|im_end|>"])
    return backend.to_str()


@pytest.fixture(scope="session")
def saved(reference: Any, tiny_tokenizer_json: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reference as a folder in Hugging Face's layout."""
    folder = tmp_path_factory.mktemp("model")
    reference.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tiny_tokenizer_json)
    return folder


@pytest.fixture(scope="module", params=list(WIDE))
def wide(request: pytest.FixtureRequest, tiny_tokenizer_json: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model whose heads have kernels, as a folder in Hugging Face's layout."""
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_config(WIDE[request.param]()).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.2)
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tiny_tokenizer_json)
    return folder


@pytest.fixture(scope="session")
def packaged() -> Path:
    from stretto.core.errors import UserError
    from stretto.models.source import packaged_model

    try:
        return packaged_model()
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """One thread: these models are tiny, and a barrier may wait long on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
