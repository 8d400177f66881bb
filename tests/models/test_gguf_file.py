"""GGUF files: good ones against the gguf package, bad ones against the promise of one clear error."""

from __future__ import annotations

import struct
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stretto.core.errors import UserError
from stretto.models.gguf_file import read_gguf

FORMATS = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q8_0"]


@pytest.fixture(scope="module")
def blocks() -> np.ndarray[Any, Any]:
    return np.random.default_rng(5).normal(size=(6, 96)).astype(np.float32)


@pytest.fixture(scope="module")
def written(blocks: np.ndarray[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "all.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("a.number", 7)
    writer.add_float32("a.fraction", 0.5)
    writer.add_bool("a.truth", True)
    writer.add_array("a.words", ["one", "zw\u00f6lf"])
    writer.add_array("a.counts", [3, 1, 2])
    for name in FORMATS:
        kind = gguf.GGMLQuantizationType[name]
        packed = gguf.quants.quantize(blocks, kind)
        writer.add_tensor(name, packed, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_is_read_as_values(written: Path) -> None:
    metadata = read_gguf(written).metadata
    assert metadata["general.architecture"] == "llama"
    assert (metadata["a.number"], metadata["a.fraction"], metadata["a.truth"]) == (7, 0.5, True)
    assert metadata["a.words"] == ["one", "zw\u00f6lf"]
    assert metadata["a.counts"] == [3, 1, 2]


@pytest.mark.parametrize("name", FORMATS)
def test_blocks_unpack_as_the_gguf_package_unpacks_them(written: Path, blocks: np.ndarray[Any, Any], name: str) -> None:
    packed = read_gguf(written).tensors[name]
    kind = gguf.GGMLQuantizationType[name]
    want = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(blocks, kind), kind))
    assert packed.shape == (6, 96)
    assert packed.format.name == name
    assert torch.equal(packed.dequantize(), want)
    assert torch.equal(packed.dequantize(torch.bfloat16), want.bfloat16())
    assert torch.equal(packed.rows(torch.tensor([4, 0, 4])), want[[4, 0, 4]])


def test_what_is_unpacked_may_be_changed_without_changing_the_file(written: Path) -> None:
    packed = read_gguf(written).tensors["F32"]
    packed.dequantize().zero_()
    assert packed.dequantize().abs().sum() > 0


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "0 bytes"),
        (b"PK\x03\x04" + bytes(60), "starts with"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**63), "metadata fields"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**40, 0), "tensors"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**62) + bytes(40), "bytes are left"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 77) + bytes(40), "unknown type 77"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 4, 2**60) + bytes(40), "array elements"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 9, 1) + bytes(40), "nested"),
        (b"GGUF" + struct.pack("<IQQQ2sI", 3, 0, 1, 2, b"\xff\xfe", 4) + bytes(40), "UTF-8"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 1, 0, 1, b"t", 9) + bytes(80), "dimensions"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 2**50, 0, 0) + bytes(80), "ends at byte"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 33, 3, 0) + bytes(80), "blocks"),
        (b"GGUF" + struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 32, 13, 0) + bytes(80), "format 13"),
    ],
)
def test_damage_is_told_in_one_line(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError, match=says) as caught:
        read_gguf(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_gguf(tmp_path / "none.gguf")


def test_every_truncation_is_refused(written: Path, tmp_path: Path) -> None:
    whole = written.read_bytes()
    path = tmp_path / "cut.gguf"
    for size in [*range(0, 900, 7), len(whole) // 2, len(whole) - 40]:
        path.write_bytes(whole[:size])
        with pytest.raises(UserError):
            read_gguf(path)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(4, 700), value=st.binary(min_size=1, max_size=8))
def test_overwritten_headers_are_read_or_refused_without_a_giant_allocation(
    written: Path, tmp_path: Path, at: int, value: bytes
) -> None:
    damaged = bytearray(written.read_bytes())
    damaged[at : at + len(value)] = value
    path = tmp_path / "noise.gguf"
    path.write_bytes(damaged)
    tracemalloc.start()
    try:
        for tensor in read_gguf(path).tensors.values():
            assert tensor.nbytes <= len(damaged)
    except UserError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < 4_000_000
