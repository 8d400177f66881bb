"""The shape of a model that is planned for and need not be here: by name, from a folder or from a `config.json`.

Mixtral's configurations are read as what they are, a Mistral decoder whose MLPs are experts.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml

from stretto.core.errors import UserError
from stretto.models.configs import spec_from_config
from stretto.models.load import open_model
from stretto.models.source import DEFAULT_NAMES
from stretto.models.spec import ModelSpec

MAX_CONFIG_BYTES = 4 * 2**20


@cache
def _document() -> Mapping[str, Any]:
    document: Mapping[str, Any] = yaml.safe_load(
        (files("stretto.serve.deploy") / "models.yaml").read_text(encoding="utf-8")
    )
    return document


def shipped() -> Mapping[str, Mapping[str, Any]]:
    """Configurations that come with the product, by name."""
    known: Mapping[str, Mapping[str, Any]] = _document()["models"]
    return known


def published_name(model: str) -> str:
    """What other engines know `model` by: its Hugging Face id, or the folder or file that it is."""
    path = Path(model)
    if path.suffix == ".json":
        return str(path.parent)
    known: Mapping[str, str] = _document()["published"]
    return known.get(model.lower(), model)


def spec_of_config(config: Mapping[str, Any], *, file: str) -> ModelSpec:
    """The shape that a Hugging Face configuration tells of, Mixtral's included."""
    if config.get("model_type") != "mixtral":
        return spec_from_config(config, file=file)
    dense = spec_from_config({**config, "model_type": "mistral"}, file=file)
    experts, top_k = config.get("num_local_experts"), config.get("num_experts_per_tok")
    for name, value in (("num_local_experts", experts), ("num_experts_per_tok", top_k)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(f"is {value!r}", file=file, field=name, right="it must be a positive whole number")
    assert isinstance(experts, int)
    assert isinstance(top_k, int)
    return replace(dense, experts=experts, top_k=top_k)


@cache
def planned_spec(model: str) -> ModelSpec:
    """The shape of `model`.

    Args:
        model: a shipped name, a folder with a `config.json`, such a file, or a model that runs here: the packaged one
            or a .gguf file.

    Raises:
        UserError: if there is none of that name, or its file cannot be read, naming the known ones.
    """
    if model in shipped():
        return spec_of_config(shipped()[model], file=f"models.yaml: {model}")
    path = Path(model)
    if model.lower() in DEFAULT_NAMES or path.suffix.lower() == ".gguf":
        return open_model(model).spec
    path = path / "config.json" if path.is_dir() else path
    if path.suffix != ".json" or not path.is_file():
        known = ", ".join(sorted(shipped()))
        raise UserError(f"there is no model {model!r}", field="model", right=f"a config.json, its folder, or {known}")
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise UserError("the file is too large", file=str(path), right=f"at most {MAX_CONFIG_BYTES} bytes")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise UserError(f"cannot be read: {problem}", file=str(path), right="a Hugging Face config.json") from None
    if not isinstance(config, dict):
        raise UserError("holds no fields", file=str(path), right="a Hugging Face config.json")
    return spec_of_config(config, file=str(path))
