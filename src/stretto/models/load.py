"""From a model's name to a model that runs: spec, tokenizer and transformer from one source."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stretto.core.errors import UserError
from stretto.hardware.probe import cores_here
from stretto.models.configs import spec_from_config, spec_from_gguf
from stretto.models.gguf_file import read_gguf
from stretto.models.passes import arithmetic
from stretto.models.source import find_model
from stretto.models.spec import ModelSpec
from stretto.models.thread import compute
from stretto.models.tokenizer import Tokenizer
from stretto.models.weights import Weights, gguf_weights, read_json, safetensors_weights

if TYPE_CHECKING:
    import torch

    from stretto.models.fused import FusedDecoder
    from stretto.models.shard import Shard
    from stretto.models.transformer import Transformer

DTYPES = ("fp32", "bf16", "int4")
PATHS = ("torch", "exact", "bf16", "fast")
ENVIRONMENT = {
    # Read by torch at its first large allocation: with huge pages the weights stream 1.2 to 1.6 times as
    # fast (31 against 23 GB/s in fp32, 35 against 21 in bf16 for the head) and are laid out in a third of
    # the time.
    "THP_MEM_ALLOC_ENABLE": "1",
    # Read by OpenMP when torch is first imported. By default its threads spin so long at barriers that one busy
    # neighbour makes every barrier take a time slice (1208 ms for a step of 47 ms, seen); 60,000 turns are under a
    # millisecond, which covers the host's work between two passes (20,000 do not: steps took a quarter longer).
    "GOMP_SPINCOUNT": "60000",
}
"""What a process that runs models wants in its environment before torch is imported, unless the user set it."""


@dataclass(frozen=True, slots=True)
class Model:
    """A loaded model.

    Attributes:
        name: as it was asked for.
        dtype: "fp32" or "bf16", the type of its products in torch and of its KV cache; or "int4" for a cache in 4 bits.
        path: "torch", or how activations enter the products of the fused decoder: "exact", "bf16" or "fast".
    """

    name: str
    dtype: str
    spec: ModelSpec
    tokenizer: Tokenizer
    transformer: Transformer | FusedDecoder
    path: str = "torch"


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """What a model's files hold, before anything is laid out to run."""

    spec: ModelSpec
    tokenizer: Tokenizer
    weights: Weights


def load_model(
    name_or_path: str,
    *,
    dtype: str = "fp32",
    threads: int | None = None,
    shard: Shard | None = None,
    path: str = "torch",
) -> Model:
    """Load a model ready to run on this CPU.

    Args:
        name_or_path: "default", the path of a .gguf file or of a safetensors folder, or a Hugging Face id.
        dtype: "fp32" or "bf16", or with a path other than "torch" "int4" for a KV cache in 4 bits.
        threads: CPU threads, which are set for the whole process as torch has one pool; all CPUs when None.
        shard: the rank whose part is loaded; the whole model when None.
        path: "torch", or "exact", "bf16" or "fast" for the fused decoder on packed weights; see `models/fused.py`.

    Raises:
        UserError: the model is not to be found, its files are damaged or of an unknown kind, it has fewer KV heads
        than there are ranks, or torch is not installed.
    """
    if dtype not in DTYPES:
        raise UserError(f"models do not run in {dtype!r}", field="dtype", right=f"one of {', '.join(DTYPES)}")
    if threads is not None and threads < 1:
        raise UserError(f"is {threads}", field="threads", right="at least 1, or none for all CPUs")
    if path not in PATHS:
        raise UserError(f"there is no path {path!r}", field="path", right=f"one of {', '.join(PATHS)}")
    if dtype == "int4" and path == "torch":
        raise UserError("path torch keeps no keys and values in 4 bits", field="dtype", right="fp32 or bf16")
    if path != "torch" and shard is not None:
        raise UserError("the fused decoder is not split over ranks yet", field="path", right="torch")
    return compute(_load, name_or_path, dtype, threads or cores_here(), shard, path)


def _load(name_or_path: str, dtype: str, threads: int, shard: Shard | None, path: str) -> Model:
    torch_dtype = _torch_dtype(arithmetic(dtype, path))
    files = open_model(name_or_path)
    if path != "torch":
        from stretto.models.fused import KV, build_fused

        kv: KV = "int4" if dtype == "int4" else "plain"
        fused = build_fused(files.spec, files.weights, path=path, dtype=torch_dtype, threads=threads, kv=kv)  # type: ignore[arg-type]
        return Model(name_or_path, dtype, files.spec, files.tokenizer, fused, path)

    from stretto.models.assemble import build

    transformer = build(files.spec, files.weights, dtype=torch_dtype, threads=threads, shard=shard)
    return Model(name_or_path, dtype, files.spec, files.tokenizer, transformer)


def open_model(name_or_path: str) -> ModelFiles:
    """Read a model's spec and tokenizer, index its weights and unpack none; raises as `load_model` does."""
    source = find_model(name_or_path)
    return _open_gguf(source.path) if source.kind == "gguf" else _open_folder(source.path)


def prepare_environment() -> None:
    """Set what torch reads when it is imported and the user did not set; without effect once it is."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def _torch_dtype(dtype: str) -> torch.dtype:
    prepare_environment()
    try:
        import torch
    except ImportError:
        raise UserError(
            "running a model needs torch, which is not installed", right="pip install 'stretto[models]'"
        ) from None
    found: torch.dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    return found


def _open_gguf(path: Path) -> ModelFiles:
    file = read_gguf(path)
    table = file.tensors.get("token_embd.weight")
    spec = spec_from_gguf(
        file.metadata,
        tied_embeddings="output.weight" not in file.tensors,
        vocab=table.shape[0] if table else None,
        file=str(path),
    )
    return ModelFiles(spec, Tokenizer.from_gguf(file.metadata, file=str(path)), gguf_weights(file))


def _open_folder(folder: Path) -> ModelFiles:
    file = folder / "config.json"
    config = read_json(file)
    spec = spec_from_config(config, file=str(file))
    return ModelFiles(spec, Tokenizer.from_folder(folder), safetensors_weights(folder, config))
