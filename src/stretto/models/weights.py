"""Named tensors of a model, whatever file they come from, under Hugging Face's names.

GGUF names are translated. GGUF files of the llama architecture store query and key rows with rotary
partners next to each other, all others store them half a head apart; `rotary` says which, so that nothing
is shuffled twice.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from stretto.core.errors import UserError
from stretto.models.gguf_file import GGUFFile
from stretto.models.quantized import PackedTensor
from stretto.models.spec import ModelSpec

if TYPE_CHECKING:
    import torch

Rotary = Literal["adjacent", "halves"]

_GGUF_NAMES = {
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GGUF_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
ROPE_DIVISORS = "rope_freqs.weight"
"""The GGUF tensor that divides rotary frequencies, one a pair (Llama 3's scaling)."""


@dataclass(frozen=True, slots=True)
class Weights:
    """Tensors by name; values are made when asked for.

    Attributes:
        file: what to name in errors.
        rotary: how the rows of query and key projections pair up.
        sources: name to packed tensor, or to a function that reads a plain one.
    """

    file: str
    rotary: Rotary
    sources: Mapping[str, PackedTensor | Callable[[], torch.Tensor]]

    def __contains__(self, name: str) -> bool:
        return name in self.sources

    def tensor(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """A new fp32 tensor `name`; `UserError` if it is missing or its shape is not `shape`."""
        import torch

        if name not in self.sources:
            raise UserError(
                f"tensor {name} is missing", file=self.file, right="the file does not fit its configuration"
            )
        source = self.sources[name]
        values = source.dequantize() if isinstance(source, PackedTensor) else source().to(torch.float32, copy=True)
        if tuple(values.shape) != shape:
            raise UserError(f"tensor {name} has shape {tuple(values.shape)}", file=self.file, right=f"expected {shape}")
        return values


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of a safetensors file, read when it is called.

    Attributes:
        dtype: its type by safetensors' name, as "BF16".
    """

    dtype: str
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]

    def __call__(self) -> torch.Tensor:
        return self.read()

    @property
    def nbytes(self) -> int:
        """Bytes as stored."""
        bits = int("".join(c for c in self.dtype.partition("_")[0] if c.isdigit()) or 8)  # F8_E4M3 has 8, BOOL too
        return math.prod(self.shape) * bits // 8


def gguf_weights(file: GGUFFile) -> Weights:
    """The tensors of an open GGUF file."""
    rotary: Rotary = "adjacent" if file.metadata.get("general.architecture") == "llama" else "halves"
    return Weights(str(file.path), rotary, {_translated(name): packed for name, packed in file.tensors.items()})


def _translated(name: str) -> str:
    """`blk.3.attn_q.weight` as `model.layers.3.self_attn.q_proj.weight`; unknown names stay."""
    match name.split("."):
        case ["blk", layer, part, kind] if part in _GGUF_NAMES:
            return f"model.layers.{layer}.{_GGUF_NAMES[part]}.{kind}"
        case [part, kind] if part in _GGUF_TOP:
            return f"{_GGUF_TOP[part]}.{kind}"
        case _:
            return name


def safetensors_weights(folder: Path, config: Mapping[str, Any] | None = None) -> Weights:
    """The tensors of `model.safetensors`, or of the shards that `model.safetensors.index.json` lists.

    Args:
        config: what `config.json` says; matrices of a quantised checkpoint stay packed.
    """
    index = folder / "model.safetensors.index.json"
    files = _sharded(folder, index) if index.is_file() else [folder / "model.safetensors"]
    plain: dict[str, Callable[[], torch.Tensor]] = {}
    for file in files:
        plain.update(_opened(file))
    quantisation = (config or {}).get("quantization_config")
    if not quantisation:
        return Weights(str(folder), "halves", plain)

    from stretto.models.groups import grouped

    return Weights(str(folder), "halves", grouped(plain, quantisation, str(folder)))


def _sharded(folder: Path, index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise UserError(
            "is not a map of names to files", file=str(index), field="weight_map", right="download it again"
        )
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise UserError(
                f"names the shard {name!r}",
                file=str(index),
                field="weight_map",
                right="a .safetensors file beside it",
            )
    return [folder / name for name in names]


def _opened(file: Path) -> Iterator[tuple[str, Callable[[], torch.Tensor]]]:
    from safetensors import SafetensorError, safe_open

    try:
        opened: Any = safe_open(file, framework="pt")
        names: list[str] = list(opened.keys())
    except FileNotFoundError:
        raise UserError("is missing", file=str(file), right="download the model's safetensors files") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"is damaged: {error}", file=str(file), right="download it again") from None
    for name in names:
        part = opened.get_slice(name)
        yield name, StoredTensor(part.get_dtype(), tuple(part.get_shape()), partial(opened.get_tensor, name))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; `UserError` if it cannot be read or is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"cannot be read as JSON: {error}", file=str(path), right="download it again") from None
    if not isinstance(value, dict):
        raise UserError("holds no JSON object", file=str(path), right="download it again")
    return value


def query_key_order(rows: torch.Tensor, head_dim: int, *, have: Rotary, want: Rotary) -> torch.Tensor:
    """`rows` [heads * head_dim, ...] with the rotary partners of each head laid out as `want`."""
    if have == want:
        return rows
    split = (-1, head_dim // 2, 2) if have == "adjacent" else (-1, 2, head_dim // 2)
    return rows.view(*split, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def state_dict(weights: Weights, spec: ModelSpec) -> dict[str, torch.Tensor]:
    """Every tensor in fp32 as transformers' own module would hold it, to compare with."""
    result = {}
    for name in weights.sources:
        if name == ROPE_DIVISORS:
            continue
        source = weights.sources[name]
        values = source.dequantize() if isinstance(source, PackedTensor) else source().float()
        if ".q_proj." in name or ".k_proj." in name:
            values = query_key_order(values, spec.head_dim, have=weights.rotary, want="halves")
        result[name] = values
    return result
