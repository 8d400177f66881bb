"""Writes a quantised model as a Hugging Face folder in compressed-tensors' `pack-quantized` form.

For each matrix `x.weight`: `x.weight_packed` (int32, 32 / bits values a word, the first in the lowest bits),
`x.weight_scale` [rows, groups], `x.weight_shape` and, where the grid is not symmetric, `x.weight_zero_point` (packed
along the rows). Rows of query and key projections are laid out in halves, as transformers has them. The folder is
written beside its place under another name and renamed when it is whole.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from stretto.core.errors import UserError
from stretto.models.configs import config_of
from stretto.models.quantize.grid import Grid
from stretto.models.quantize.layerwise import HEAD_GRID, Recipe
from stretto.models.quantized import PackedTensor, Quantised, pack_words
from stretto.models.spec import ModelSpec
from stretto.models.tokenizer import Tokenizer
from stretto.models.weights import ROPE_DIVISORS, Weights, query_key_order

_EMBEDDING = "model.embed_tokens.weight"


def check_place(folder: Path) -> None:
    """`UserError` unless `folder` can be made: it must not exist, and its parent must."""
    if folder.exists():
        raise UserError("exists already", file=str(folder), field="out", right="give the name of a new folder")
    if not folder.absolute().parent.is_dir():
        raise UserError("its parent is no folder", file=str(folder), field="out", right="make it first")


def write_checkpoint(
    folder: Path,
    spec: ModelSpec,
    weights: Weights,
    tokenizer: Tokenizer,
    recipe: Recipe,
    quantised: Iterable[tuple[str, Quantised]],
) -> None:
    """Write the model that `quantised` makes of `weights`; what it leaves out is stored as it is.

    Raises:
        UserError: the folder exists, cannot be written, or the model's rotary positions have no form there.
    """
    check_place(folder)
    if ROPE_DIVISORS in weights:
        raise UserError(
            "has rotary divisors, which config.json cannot express", file=weights.file, right="use the original folder"
        )
    temporary = None
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.absolute().parent))
        tensors = _tensors(spec, weights, quantised)
        save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
        config = {**config_of(spec), "quantization_config": quantisation_config(recipe, spec)}
        _write_json(temporary / "config.json", config)
        tokenizer.save(temporary)
        _write_json(temporary / "generation_config.json", _ends(tokenizer))
        temporary.chmod(0o755)
        os.rename(temporary, folder)
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise UserError(
            f"cannot be written: {why}", file=str(folder), field="out", right="give another place"
        ) from None
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def stored(name: str, matrix: Quantised) -> dict[str, torch.Tensor]:
    """The tensors of a file that stand for the matrix `name` ("...weight")."""
    rows, length = len(matrix.values), matrix.length
    tensors = {
        f"{name}_packed": pack_words(matrix.values[:, :length], matrix.bits),
        f"{name}_scale": matrix.scales.contiguous(),
        f"{name}_shape": torch.tensor([rows, length]),
    }
    if matrix.zeros is not None:
        tensors[f"{name}_zero_point"] = pack_words(matrix.zeros.T.contiguous(), matrix.bits).T.contiguous()
    return tensors


def quantisation_config(recipe: Recipe, spec: ModelSpec) -> dict[str, Any]:
    """What `config.json` says about it."""
    groups = {"group_0": quantisation_group(["Linear"], recipe.grid)}
    if recipe.head == "8":
        groups["group_1"] = quantisation_group(
            ["Embedding"] + ([] if spec.tied_embeddings else ["re:.*lm_head"]), HEAD_GRID
        )
    ignore = ["lm_head"] if recipe.head == "keep" or spec.tied_embeddings else []
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "config_groups": groups,
        "ignore": ignore,
    }


def quantisation_group(targets: list[str], grid: Grid) -> dict[str, Any]:
    """One of its groups: modules of these kinds, quantised on this grid."""
    whole = grid.group == -1
    return {
        "targets": targets,
        "input_activations": None,
        "output_activations": None,
        "weights": {
            "num_bits": grid.bits,
            "type": "int",
            "symmetric": grid.symmetric,
            "strategy": "channel" if whole else "group",
            "group_size": None if whole else grid.group,
            "dynamic": False,
        },
    }


def _tensors(spec: ModelSpec, weights: Weights, quantised: Iterable[tuple[str, Quantised]]) -> dict[str, torch.Tensor]:
    tensors: dict[str, torch.Tensor] = {}
    done: set[str] = set()
    for name, matrix in quantised:
        done.add(name)
        tensors.update(stored(name, matrix.rows(_halves(name, spec, weights, len(matrix.values)))))
    for name, source in weights.sources.items():
        if name in done or (name == "lm_head.weight" and spec.tied_embeddings):
            continue
        plain = source.dequantize() if isinstance(source, PackedTensor) else source()
        tensors[name] = plain[_halves(name, spec, weights, len(plain))].contiguous()
    return tensors


def _halves(name: str, spec: ModelSpec, weights: Weights, rows: int) -> torch.Tensor:
    """Which row of the source each row of the file is."""
    order = torch.arange(rows)
    if any(f".{part}_{kind}." in name for part in "qk" for kind in ("proj", "norm")):
        return query_key_order(order, spec.head_dim, have=weights.rotary, want="halves")
    return order


def _ends(tokenizer: Tokenizer) -> dict[str, Any]:
    ends = sorted(tokenizer.eos_ids)
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends or None}


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
