"""`stretto quantize` from end to end; its checkpoints read by transformers, where compressed-tensors is installed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from stretto.cli import application  # noqa: E402
from stretto.core.errors import UserError  # noqa: E402
from stretto.models.load import load_model  # noqa: E402
from stretto.models.quantize.checkpoint import quantisation_group, stored  # noqa: E402
from stretto.models.quantize.grid import Grid, round_to_nearest  # noqa: E402
from stretto.models.segment import Segment  # noqa: E402

runner = CliRunner()


def quantised(source: Path, out: Path, *options: str) -> dict[str, object]:
    """The report of `stretto quantize`."""
    result = runner.invoke(application(), ["quantize", str(source), "--out", str(out), "--json", *options])
    assert result.exit_code == 0, result.output
    report: dict[str, object] = json.loads(result.stdout)
    return report


def logits_of(folder: Path, ids: list[int], path: str = "torch") -> torch.Tensor:
    model = load_model(str(folder), path=path, threads=1)
    cache = model.transformer.new_cache(pages=1, page_tokens=len(ids))
    return model.transformer.forward(torch.tensor(ids), [Segment(0, len(ids), 0, (0,), len(ids))], cache)


def test_the_command_writes_a_model_and_a_report(saved: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(chr(33 + i % 60) for i in range(2000)))
    options = ("--method", "gptq", "--group", "32", "--text", str(text), "--windows", "2", "--threads", "1")
    report = quantised(saved, tmp_path / "a", *options)
    assert report["calibration_tokens"] == 2 * 256  # all that this model takes at once
    assert report["matrices"]["gptq"] == 21  # type: ignore[index]
    report = quantised(saved, tmp_path / "b", "--method", "clip", "--group", "column", "--asymmetric")
    assert report["folder"] == str(tmp_path / "b")
    assert report["calibration_tokens"] == 0
    for name in "ab":
        assert logits_of(tmp_path / name, [1, 2, 3]).shape == (3, 101)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--group", "48"], "group"),
        (["--bits", "3"], "bits"),
        (["--method", "awq"], "method"),
        (["--sparse", "1:2"], "sparse"),
        (["--head", "4"], "head"),
        (["--method", "gptq"], "needs a text"),
        (["--text", "/nowhere/at-all.txt"], "cannot be read"),
        (["--sparse", "2:4", "--act-order"], "act_order"),
    ],
)
def test_mistakes_are_one_line(packaged: Path, tmp_path: Path, options: list[str], says: str) -> None:
    result = runner.invoke(application(), ["quantize", str(packaged), "--out", str(tmp_path / "new"), *options])
    assert isinstance(result.exception, UserError)
    assert says in str(result.exception)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("group", ["32", "64", "column"])
def test_transformers_reads_the_packaged_model_in_4_bits(packaged: Path, tmp_path: Path, group: str) -> None:
    pytest.importorskip("compressed_tensors")
    quantised(packaged, tmp_path / "new", "--method", "rtn", "--group", group, "--head", "keep")
    ids = load_model(str(tmp_path / "new"), threads=1).tokenizer.encode("The history of the printing press begins")
    with torch.inference_mode():
        theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "new").eval()
        wanted = theirs(torch.tensor([ids])).logits[0]
    assert (logits_of(tmp_path / "new", ids) - wanted).abs().max() < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("bits", "group"), [(4, 32), (4, 64), (4, -1), (8, 32)])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_unpacks_what_we_store(bits: int, group: int, symmetric: bool) -> None:
    """Matrix by matrix: transformers 5.23 cannot load anybody's packed zero points, nor packed embeddings."""
    config = pytest.importorskip("compressed_tensors.quantization")
    compressors = pytest.importorskip("compressed_tensors.compressors")
    grid = Grid(bits=bits, group=group, symmetric=symmetric)
    matrix = round_to_nearest(torch.randn(40, 192, generator=torch.Generator().manual_seed(1)), grid)
    tensors = {name.removeprefix("m."): tensor for name, tensor in stored("m.weight", matrix).items()}
    tensors["weight_scale"] = tensors["weight_scale"].float()
    weights = config.QuantizationArgs(**quantisation_group(["Linear"], grid)["weights"])
    scheme = config.QuantizationScheme(targets=["Linear"], weights=weights)
    compressor = compressors.BaseCompressor.get_value_from_registry("pack-quantized")
    assert torch.equal(compressor.decompress(tensors, scheme)["weight"], matrix.dequantize())


@pytest.mark.slow
def test_the_packaged_model_runs_fused_in_groups_of_64(packaged: Path, tmp_path: Path) -> None:
    quantised(packaged, tmp_path / "new", "--method", "rtn", "--group", "64")
    ids = load_model(str(tmp_path / "new"), threads=1).tokenizer.encode("The history of the printing press begins")
    wanted = logits_of(tmp_path / "new", ids)
    for path, bound in (("exact", 2e-3), ("bf16", 2.0), ("fast", 3.0)):
        assert (logits_of(tmp_path / "new", ids, path) - wanted).abs().max() < bound
