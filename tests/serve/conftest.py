"""A tiny random model for engines on real time."""

from __future__ import annotations

import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from stretto.models.load import Model, load_model

from ..models.conftest import _one_thread, make_reference, packaged, tiny_tokenizer_json  # noqa: F401


@pytest.fixture(scope="session")
def tiny_folder(tiny_tokenizer_json: str, tmp_path_factory: pytest.TempPathFactory) -> str:  # noqa: F811
    folder = tmp_path_factory.mktemp("tiny-llama")
    make_reference("llama").save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tiny_tokenizer_json)
    return str(folder)


@pytest.fixture(scope="session")
def tiny(tiny_folder: str) -> Model:
    return load_model(tiny_folder, dtype="fp32", threads=1)
