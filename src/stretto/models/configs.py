"""How model files describe themselves, read into a `ModelSpec`: `config.json` and GGUF metadata."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from stretto.core.errors import FieldError, UserError
from stretto.models.spec import FAMILIES, ModelSpec, RopeScaling

QUANTISED_FORM = ("compressed-tensors", "pack-quantized")
"""The method and the format of quantised checkpoints that are read and written."""
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}


class _Fields:
    """Typed look-ups in a mapping that say which field of which file is wrong."""

    def __init__(self, values: Mapping[str, Any], file: str) -> None:
        self.values = values
        self.file = file

    def count(self, name: str, default: int | None = None) -> int:
        value = self.values.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
            raise self.wrong(name, value, "a positive whole number")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.values.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.wrong(name, value, "a number")
        try:
            number = float(value)
        except OverflowError:
            number = math.inf
        if not math.isfinite(number):
            raise self.wrong(name, value, "a finite number")
        return number

    def wrong(self, name: str, value: object, right: str) -> UserError:
        shown = "is missing" if value is None else f"is {str(value)[:60]!r}"
        return UserError(shown, file=self.file, field=name, right=f"it must be {right}")

    def scaling(self, **values: Any) -> RopeScaling:
        try:
            return RopeScaling(**values)
        except FieldError as error:
            raise self.wrong(f"rope_scaling.{error.field}", error.value, error.right) from None

    def spec(self, **values: Any) -> ModelSpec:
        try:
            return ModelSpec(**values)
        except FieldError as error:
            raise UserError(str(error), file=self.file) from None


def spec_from_config(config: Mapping[str, Any], *, file: str = "config.json") -> ModelSpec:
    """The spec of a Hugging Face `config.json`; `UserError` for other models and missing fields."""
    fields = _Fields(config, file)
    family = config.get("model_type")
    if family not in FAMILIES:
        raise fields.wrong("model_type", family, f"one of {', '.join(FAMILIES)}")
    if config.get("hidden_act", "silu") != "silu":
        raise fields.wrong("hidden_act", config["hidden_act"], "silu")
    if config.get("mlp_bias"):
        raise fields.wrong("mlp_bias", config["mlp_bias"], "absent; biased MLPs are not supported")
    quantisation = config.get("quantization_config")
    if quantisation:
        found = isinstance(quantisation, Mapping) and (quantisation.get("quant_method"), quantisation.get("format"))
        if found != QUANTISED_FORM:
            raise fields.wrong("quantization_config", quantisation, f"of {' in form '.join(QUANTISED_FORM)}, or absent")
    if family == "llama" and config.get("attention_bias"):
        raise fields.wrong("attention_bias", True, "false; a biased output projection is not supported")
    if family == "qwen3" and config.get("attention_bias"):
        raise fields.wrong("attention_bias", True, "false")
    hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    theta, scaling = _rope(fields)
    return fields.spec(
        family=family,
        layers=fields.count("num_hidden_layers"),
        hidden=hidden,
        heads=heads,
        kv_heads=fields.count("num_key_value_heads", heads),
        head_dim=fields.count("head_dim", hidden // heads),
        ffn=fields.count("intermediate_size"),
        vocab=fields.count("vocab_size"),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        norm_eps=fields.number("rms_norm_eps", 1e-6),
        rope_theta=theta,
        rope_scaling=scaling,
        max_positions=min(fields.count("max_position_embeddings", 2048), _window(fields)),
    )


def config_of(spec: ModelSpec) -> dict[str, Any]:
    """A `config.json` from which `spec_from_config` makes `spec` again; with experts, Mixtral's."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": spec.rope_theta}
    scaling = spec.rope_scaling
    if scaling is not None:
        rope |= {"rope_type": scaling.kind, "factor": scaling.factor}
        if scaling.kind == "llama3":
            rope |= {
                "low_freq_factor": scaling.low_frequency,
                "high_freq_factor": scaling.high_frequency,
                "original_max_position_embeddings": scaling.original_positions,
            }
    experts = {"num_local_experts": spec.experts, "num_experts_per_tok": spec.top_k, "sliding_window": None}
    return {
        "architectures": ["MixtralForCausalLM" if spec.experts else _ARCHITECTURES[spec.family]],
        "model_type": "mixtral" if spec.experts else spec.family,
        "hidden_act": "silu",
        "hidden_size": spec.hidden,
        "intermediate_size": spec.ffn,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "vocab_size": spec.vocab,
        "tie_word_embeddings": spec.tied_embeddings,
        "rms_norm_eps": spec.norm_eps,
        "max_position_embeddings": spec.max_positions,
        "rope_theta": spec.rope_theta,
        "rope_parameters": rope,
        "dtype": "float32",
    } | (experts if spec.experts else {"sliding_window": None} if spec.family == "mistral" else {})


def _window(fields: _Fields) -> int:
    """The sliding window when one is in use; attention is plain causal as long as a sequence fits in it."""
    used = fields.values.get("use_sliding_window", fields.values.get("model_type") == "mistral")
    return fields.count("sliding_window", 2**31) if used else 2**31


def _rope(fields: _Fields) -> tuple[float, RopeScaling | None]:
    """Theta and scaling from `rope_parameters` (transformers 5), or `rope_theta` and `rope_scaling`."""
    rope = fields.values.get("rope_parameters") or fields.values.get("rope_scaling") or {}
    if not isinstance(rope, Mapping):
        raise fields.wrong("rope_scaling", rope, "a mapping")
    theta = _Fields(rope, fields.file).number("rope_theta", fields.number("rope_theta", 10000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return theta, None
    inner = _Fields(rope, fields.file)
    if kind == "linear":
        return theta, fields.scaling(kind="linear", factor=inner.number("factor"))
    if kind == "llama3":
        return theta, fields.scaling(
            kind="llama3",
            factor=inner.number("factor"),
            low_frequency=inner.number("low_freq_factor"),
            high_frequency=inner.number("high_freq_factor"),
            original_positions=inner.count("original_max_position_embeddings"),
        )
    raise fields.wrong("rope_scaling.rope_type", kind, "default, linear or llama3")


def spec_from_gguf(
    metadata: Mapping[str, Any], *, tied_embeddings: bool = True, vocab: int | None = None, file: str = "GGUF"
) -> ModelSpec:
    """The spec of GGUF metadata; only the tensors show whether the head is tied, so the caller says."""
    family = metadata.get("general.architecture")
    if family not in FAMILIES:
        raise _Fields(metadata, file).wrong("general.architecture", family, f"one of {', '.join(FAMILIES)}")
    fields = _Fields(metadata, file)
    hidden, heads = fields.count(f"{family}.embedding_length"), fields.count(f"{family}.attention.head_count")
    kind = metadata.get(f"{family}.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise fields.wrong(f"{family}.rope.scaling.type", kind, "none or linear")
    factor = fields.number(f"{family}.rope.scaling.factor", 1.0)
    head_dim = fields.count(f"{family}.attention.key_length", hidden // heads)
    if fields.count(f"{family}.rope.dimension_count", head_dim) != head_dim:
        raise fields.wrong(f"{family}.rope.dimension_count", metadata[f"{family}.rope.dimension_count"], str(head_dim))
    tokens = metadata.get("tokenizer.ggml.tokens")
    return fields.spec(
        family=family,
        layers=fields.count(f"{family}.block_count"),
        hidden=hidden,
        heads=heads,
        kv_heads=fields.count(f"{family}.attention.head_count_kv", heads),
        head_dim=head_dim,
        ffn=fields.count(f"{family}.feed_forward_length"),
        vocab=vocab or fields.count(f"{family}.vocab_size", len(tokens) if isinstance(tokens, list) else None),
        tied_embeddings=tied_embeddings,
        qkv_bias=family == "qwen2",
        qk_norm=family == "qwen3",
        norm_eps=fields.number(f"{family}.attention.layer_norm_rms_epsilon"),
        rope_theta=fields.number(f"{family}.rope.freq_base", 10000.0),
        rope_scaling=fields.scaling(kind="linear", factor=factor) if kind == "linear" else None,
        max_positions=fields.count(f"{family}.context_length"),
    )
