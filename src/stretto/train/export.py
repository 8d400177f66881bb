"""A trained model as a Hugging Face folder that transformers, and this package, load."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from stretto.core.errors import UserError
from stretto.models.causal import CausalStage, Lora, initialise, load_weights
from stretto.models.configs import config_of
from stretto.models.tokenizer import Tokenizer
from stretto.train.checkpoint import Reader
from stretto.train.job import TrainJob
from stretto.train.session import model_of


def check_place(folder: Path) -> None:
    """`UserError` unless `folder` can be made: it must not exist, and its parent must."""
    if folder.exists():
        raise UserError("exists already", file=str(folder), field="export", right="give the name of a new folder")
    if not folder.absolute().parent.is_dir():
        raise UserError("its parent is no folder", file=str(folder), field="export", right="make it first")


def export(job: TrainJob, checkpoint: Path, folder: Path) -> None:
    """Write the model of a checkpoint; of a job with adapters the adapters alone, in the form that peft reads.

    Raises:
        UserError: the folder exists or cannot be written, or the model has experts, for which there is no config yet.
    """
    check_place(folder)
    model = model_of(job)
    if model.spec.experts:
        raise UserError("a model with experts has no form there yet", field="export", right="leave it out")
    reader = Reader(checkpoint)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.absolute().parent))
    try:
        if job.adapters is None:
            tensors = {name: reader.whole(name).float().contiguous() for name in reader.names()}
            save_file(tensors, temporary / "model.safetensors", metadata={"format": "pt"})
            _write_json(temporary / "config.json", config_of(model.spec))
            if isinstance(model.encoder, Tokenizer):
                model.encoder.save(temporary)
        else:
            tensors = {f"base_model.model.{name}.weight": reader.whole(name) for name in reader.names()}
            save_file(tensors, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
            _write_json(temporary / "adapter_config.json", _adapter_config(job))
        temporary.chmod(0o755)
        os.rename(temporary, folder)
    except OSError as problem:
        raise UserError(
            f"cannot be written: {problem.strerror or problem}", file=str(folder), field="export", right="another place"
        ) from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def merged(job: TrainJob, checkpoint: Path) -> CausalStage:
    """The trained model on one rank, ready to be asked."""
    model, reader, adapters = model_of(job), Reader(checkpoint), job.adapters
    lora = Lora(rank=adapters.rank, alpha=adapters.alpha, targets=adapters.targets) if adapters else None
    stage = CausalStage(model.spec, lora=lora)
    if model.weights is None:
        initialise(stage, seed=job.seed)
    else:
        load_weights(stage, model.weights)
    places = stage.placements()
    with torch.no_grad():
        for name, parameter in stage.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(reader.read(reader.stored_name(name), places[name], parameter))
    return stage


def _adapter_config(job: TrainJob) -> dict[str, Any]:
    assert job.adapters is not None
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": job.model,
        "r": job.adapters.rank,
        "lora_alpha": job.adapters.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": list(job.adapters.targets),
    }


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
