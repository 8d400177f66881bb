"""A trained model as a Hugging Face folder that transformers, and this package, load."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from stretto.core.errors import UserError
from stretto.models.configs import config_of
from stretto.models.tokenizer import Tokenizer
from stretto.models.weights import ROPE_DIVISORS
from stretto.train.checkpoint import Reader
from stretto.train.job import TrainJob
from stretto.train.session import model_of

_MIXTRAL = {"gate": "w1", "up": "w3", "down": "w2"}


def check_place(folder: Path) -> None:
    """`UserError` unless `folder` can be made: it must not exist, and its parent must."""
    if folder.exists():
        raise UserError("exists already", file=str(folder), field="export", right="give the name of a new folder")
    if not folder.absolute().parent.is_dir():
        raise UserError("its parent is no folder", file=str(folder), field="export", right="make it first")


def check_model(job: TrainJob) -> None:
    """`UserError` unless the job's model can be written in Hugging Face's form, or its adapters alone are."""
    weights = model_of(job).weights
    if job.adapters is None and weights is not None and ROPE_DIVISORS in weights:
        raise UserError(
            "has rotary divisors, which config.json cannot express",
            file=weights.file,
            field="export",
            right="finetune the original folder, or adapters",
        )


def export(job: TrainJob, checkpoint: Path, folder: Path) -> None:
    """Write the model of a checkpoint; of a job with adapters the adapters alone, in the form that peft reads.

    A model with experts takes Mixtral's form, whose router and experts it has.

    Raises:
        UserError: the folder exists or cannot be written; nothing is left of it.
    """
    check_place(folder)
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.absolute().parent))
        try:
            _write(job, Reader(checkpoint), temporary)
            temporary.chmod(0o755)
            os.rename(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except (OSError, SafetensorError) as problem:
        raise UserError(
            f"cannot be written: {getattr(problem, 'strerror', None) or problem}",
            file=str(folder),
            field="export",
            right=f"another place, and run the job again: {checkpoint} is whole, no step is repeated",
        ) from None


def _write(job: TrainJob, reader: Reader, folder: Path) -> None:
    if job.adapters is not None:
        tensors = {f"base_model.model.{name}.weight": reader.whole(name) for name in reader.names()}
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        _write_json(folder / "adapter_config.json", _adapter_config(job))
        return
    model = model_of(job)
    tensors = {
        new: part.contiguous() for name in reader.names() for new, part in _renamed(name, reader.whole(name).float())
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", config_of(model.spec))
    if isinstance(model.encoder, Tokenizer):
        model.encoder.save(folder)


def _renamed(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensor by the name that transformers has for it; those of experts one by one."""
    layer, moe, part = name.partition(".mlp.moe.")
    if not moe:
        yield name, tensor
    elif part == "router":
        yield f"{layer}.block_sparse_moe.gate.weight", tensor
    else:
        for number, matrix in enumerate(tensor):
            yield f"{layer}.block_sparse_moe.experts.{number}.{_MIXTRAL[part]}.weight", matrix


def _adapter_config(job: TrainJob) -> dict[str, Any]:
    assert job.adapters is not None
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": job.model,
        "r": job.adapters.rank,
        "lora_alpha": job.adapters.alpha,
        "lora_dropout": job.adapters.dropout,
        "bias": "none",
        "target_modules": list(job.adapters.targets),
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
