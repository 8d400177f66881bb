"""A user's mistake is one clear line on stderr (file, field, value, what would be right), exit code 2, and
nothing half-written.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from stretto.models.source import packaged_model

JOB = """\
kind: serve
model: smollm2-135m-instruct
max_new_tokens: 8
prompts:
  - Hello there
"""

CLUSTER = """\
name: two
nodes:
  - name: a
    devices: [{type: a100-sxm-80gb}]
  - name: b
    devices: [{type: a100-sxm-80gb}]
links:
  - {name: wire, ends: [a, nowhere], bandwidth: 1.0e+10, latency_s: 1.0e-6, kind: ethernet}
"""


def stretto(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "stretto", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=cwd, check=False)


def assert_one_clear_line(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("stretto: ")
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


JOB_MISTAKES = [
    ("unknown kind", JOB.replace("serve", "swerve"), ["job.yaml:1", "kind", "'swerve'", "serve"]),
    ("no kind", JOB.replace("kind: serve\n", ""), ["job.yaml", "kind", "missing"]),
    ("missing field", JOB.split("prompts")[0], ["job.yaml", "prompts", "missing"]),
    (
        "wrong type",
        JOB.replace("tokens: 8", "tokens: eight"),
        ["job.yaml:3", "max_new_tokens", "'eight'", "integer"],
    ),
    (
        "a number in quotes",
        JOB.replace("tokens: 8", "tokens: '8'"),
        ["job.yaml:3", "max_new_tokens", "integer"],
    ),
    ("unknown field", JOB + "tokens: 3\n", ["job.yaml:6", "tokens", "no such field", "max_new_tokens"]),
    ("negative limit", JOB + "limits:\n  memory_gb: -1\n", ["job.yaml:7", "limits.memory_gb", "-1", "> 0"]),
    ("zero tokens", JOB.replace("tokens: 8", "tokens: 0"), ["job.yaml:3", "max_new_tokens", "0", ">= 1"]),
    ("empty prompt", JOB.replace("Hello there", "''"), ["job.yaml:5", "prompts.0", "not empty"]),
    (
        "bad sampling",
        JOB + "sampling: {temperature: -2}\n",
        ["job.yaml:6", "sampling.temperature", "-2", "0 .. 100"],
    ),
    ("not yaml", JOB + "  - [\n", ["job.yaml", "not valid YAML"]),
    ("twice", JOB + "kind: serve\n", ["job.yaml:6", "kind", "twice"]),
    ("an alias", JOB + "stop: &x [a]\nsystem: *x\n", ["job.yaml", "aliases"]),
    ("a list", "- a\n- b\n", ["job.yaml", "list", "fields"]),
    ("empty", "", ["job.yaml", "empty"]),
    ("no model", JOB.replace("smollm2-135m-instruct", "no/such-model.gguf"), ["no/such-model.gguf", "model"]),
    ("too long", JOB.replace("tokens: 8", "tokens: 100000"), ["positions", "would fit"]),
    ("too many threads", JOB + "threads: 512\n", ["512 threads", "cores"]),
    ("too much memory", JOB + "limits: {memory_gb: 0.1}\n", ["limits.memory_gb", "0.10 GB", "needs"]),
    ("bad dtype", JOB + "dtype: fp7\n", ["job.yaml:6", "dtype", "fp7", "bf16"]),
]


@pytest.mark.parametrize(("text", "words"), [m[1:] for m in JOB_MISTAKES], ids=[m[0] for m in JOB_MISTAKES])
def test_mistakes_in_a_job(text: str, words: list[str], tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(text)
    done = stretto("plan", "job.yaml", "--save", "plan.yaml", cwd=tmp_path)
    assert_one_clear_line(done, *words)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["job.yaml"]


def _truncate(path: Path) -> None:
    path.write_bytes(packaged_model().read_bytes()[:100_000])


def _corrupt(path: Path) -> None:
    data = bytearray(packaged_model().read_bytes()[:5_000_000])
    data[8:16] = (2**60).to_bytes(8, "little")
    path.write_bytes(data)


def _not_gguf(path: Path) -> None:
    path.write_bytes(b"this is not a model" * 100)


def _empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [_truncate, _corrupt, _not_gguf, _empty])
def test_damaged_models(damage: Callable[[Path], None], tmp_path: Path) -> None:
    damage(tmp_path / "bad.gguf")
    (tmp_path / "job.yaml").write_text(JOB.replace("smollm2-135m-instruct", "bad.gguf"))
    done = stretto("run", "job.yaml", "--output", "out", cwd=tmp_path)
    assert_one_clear_line(done, "bad.gguf")
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path(tmp_path / "sprung").touch, ())

    (tmp_path / "model.pkl").write_bytes(pickle.dumps(Trap()))
    (tmp_path / "job.yaml").write_text(JOB.replace("smollm2-135m-instruct", "model.pkl"))
    assert_one_clear_line(stretto("plan", "job.yaml", cwd=tmp_path), "model.pkl", "safetensors")
    assert not (tmp_path / "sprung").exists()


def test_a_cluster_with_a_dangling_link(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "cluster.yaml").write_text(CLUSTER)
    done = stretto("plan", "job.yaml", "--on", "cluster.yaml", cwd=tmp_path)
    assert_one_clear_line(done, "cluster.yaml:8", "links.0.ends", "nowhere", "wire")


def test_a_device_that_the_catalog_does_not_have(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "cluster.yaml").write_text(CLUSTER.split("links:")[0].replace("a100-sxm-80gb", "a1000", 1))
    done = stretto("plan", "job.yaml", "--on", "cluster.yaml", cwd=tmp_path)
    assert_one_clear_line(done, "cluster.yaml", "a1000", "a100")


def test_a_plan_for_another_machine(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    (tmp_path / "cluster.yaml").write_text(CLUSTER.split("links:")[0])
    done = stretto("plan", "job.yaml", "--on", "cluster.yaml", "--save", "plan.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_one_clear_line(
        stretto("run", "plan.yaml", cwd=tmp_path),
        "plan.yaml",
        "cluster.fingerprint",
        "made for two",
        "--recheck",
    )
    assert_one_clear_line(stretto("run", "plan.yaml", "--recheck", cwd=tmp_path), "plan.yaml", "a/gpu0")


def test_a_deployment_that_was_planned_for_other_machines(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(
        "kind: deployment\nmodel: llama-3.1-8b\nload: {requests: 5, rate_per_s: 1.0}\ndevices: 1\n", encoding="utf-8"
    )
    (tmp_path / "cluster.yaml").write_text(CLUSTER.split("links:")[0])
    done = stretto("plan", "job.yaml", "--on", "cluster.yaml", "--save", "plan.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert_one_clear_line(stretto("run", "plan.yaml", cwd=tmp_path), "made for two", "`stretto plan --emit`")


def test_files_that_are_not_there(tmp_path: Path) -> None:
    assert_one_clear_line(stretto("run", "job.yaml", cwd=tmp_path), "job.yaml", "no such file")
    (tmp_path / "job.yaml").write_text(JOB)
    done = stretto("plan", "job.yaml", "--on", "nowhere.yaml", cwd=tmp_path)
    assert_one_clear_line(done, "nowhere.yaml", "no such file")


TRAINING = """\
kind: train
shape: {layers: 2, hidden: 32, heads: 4, kv_heads: 2, ffn: 48}
tokenizer: bytes
sequence: 32
global_batch: 8
"""


def test_a_place_for_a_plan_is_looked_at_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(JOB)
    for arguments in (["plan", "job.yaml", "--save", "none/plan.yaml"], ["probe", "--save", "none/here.yaml"]):
        done = stretto(*arguments, cwd=tmp_path)
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1
        assert "the file cannot be written: " in done.stderr
        assert "none is no folder that may be written" in done.stderr


def test_planning_without_torch_says_what_is_missing(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(TRAINING)
    cluster = Path(__file__).parents[2] / "clusters" / "8xa100.yaml"
    without = "import sys; sys.modules['torch'] = None; from stretto.cli import main; main()"
    for arguments in (["plan", "job.yaml", "--on", str(cluster)], ["rank", "job.yaml", "--on", str(cluster)]):
        done = subprocess.run(
            [sys.executable, "-c", without, *arguments],
            capture_output=True,
            text=True,
            timeout=120,
            cwd=tmp_path,
            check=False,
        )
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("\n") == 1
        assert "torch" in done.stderr
        assert "pip install 'stretto[models]'" in done.stderr
