"""Plans as commands: flags of other engines, devices of each node, and what they cannot do."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import stretto
from stretto.core.errors import UserError
from stretto.serve.deploy.emit import commands
from stretto.serve.deploy.plan import DeploymentPlan
from stretto.serve.deploy.planned import published_name, shipped

from .planning import JOB, cluster


@pytest.mark.parametrize(
    ("engine", "plan", "expected"),
    [
        ("vllm", {"devices": 8}, ["--tensor-parallel-size 8", "--max-num-seqs 256", "--gpu-memory-utilization 0.9"]),
        ("vllm", {"devices": 2, "stages": 2, "weights": "fp8"}, ["--pipeline-parallel-size 2", "--quantization fp8"]),
        (
            "vllm",
            {"policy": "chunked", "prefill_tokens": 2048},
            ["--enable-chunked-prefill", "--max-num-batched-tokens 2048"],
        ),
        ("sglang", {"replicas": 2, "devices": 4}, ["--tp-size 4", "--dp-size 2", "--chunked-prefill-size -1"]),
        ("sglang", {"devices": 4, "attention_replicas": 4}, ["--enable-dp-attention", "--dp-size 4"]),
        ("sglang", {"prefix_cache": False}, ["--disable-radix-cache"]),
        ("vllm", {"prefix_cache": True}, [" --enable-prefix-caching"]),
        ("vllm", {}, ["--no-enable-prefix-caching"]),
        ("vllm", {"stages": 3}, ["VLLM_PP_LAYER_PARTITION=11,11,10 vllm serve", "--pipeline-parallel-size 3"]),
        ("sglang", {"stages": 3}, ["SGLANG_PP_LAYER_PARTITION=11,11,10 python -m sglang", "--pp-size 3"]),
        ("llama.cpp", {"policy": "chunked", "devices": 2}, ["--split-mode row", "--tensor-split 1,1", "-np 256"]),
        ("llama.cpp", {"policy": "chunked", "stages": 3}, ["--split-mode layer", "--tensor-split 11,11,10"]),
    ],
)
def test_flags_of_other_engines(engine: str, plan: dict[str, Any], expected: list[str]) -> None:
    (line,) = commands(engine, JOB, DeploymentPlan(**plan), cluster(8))
    assert [flag for flag in expected if flag not in line] == []


def test_copies_are_commands_on_devices_of_their_own() -> None:
    lines = commands("vllm", JOB, DeploymentPlan(replicas=2, devices=2), cluster(8))
    assert [line.split()[0] for line in lines] == ["CUDA_VISIBLE_DEVICES=0,1", "CUDA_VISIBLE_DEVICES=2,3"]
    assert "--port 8001" in lines[1]
    assert not any("#" in line for line in lines)


def test_devices_and_ports_are_numbered_on_each_node_anew() -> None:
    lines = commands("vllm", JOB, DeploymentPlan(replicas=4, devices=4), cluster(8, nodes=2))
    assert [line.split()[0] for line in lines] == ["CUDA_VISIBLE_DEVICES=0,1,2,3", "CUDA_VISIBLE_DEVICES=4,5,6,7"] * 2
    assert [re.findall(r"--port (\d+)", line) for line in lines] == [["8000"], ["8001"]] * 2
    assert [line.partition("  # ")[2] for line in lines] == ["on node 1", "on node 1", "on node 2", "on node 2"]
    lines = commands("sglang", JOB, DeploymentPlan(replicas=4, devices=4), cluster(8, nodes=2))
    assert ["--dp-size 2" in line for line in lines] == [True, True]
    assert ["--max-running-requests 256 " in line for line in lines] == [True, True]


def test_a_copy_over_nodes_is_told_how_they_are_joined() -> None:
    over = DeploymentPlan(stages=2, devices=8)
    (line,) = commands("vllm", JOB, over, cluster(8, nodes=2))
    assert "--distributed-executor-backend ray" in line
    assert line.endswith("# on node 1, joined with the 1 after it by Ray")
    lines = commands("sglang", JOB, over, cluster(8, nodes=2))
    assert ["--nnodes 2 --node-rank 0" in lines[0], "--node-rank 1" in lines[1], len(lines)] == [True, True, 2]
    with pytest.raises(UserError, match=r"llama\.cpp cannot do copies of 16 devices on nodes of 8"):
        commands("llama.cpp", JOB, replace(over, policy="chunked", devices=1, stages=16), cluster(8, nodes=2))


def test_models_go_by_the_names_that_engines_know(tmp_path: Path) -> None:
    (line,) = commands("vllm", JOB, DeploymentPlan(), cluster(8))
    assert "vllm serve meta-llama/Llama-3.1-8B --port" in line
    folder = tmp_path / "my model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(shipped()["llama-3.1-8b"]))
    (line,) = commands("sglang", replace(JOB, model=str(folder / "config.json")), DeploymentPlan(), cluster(8))
    assert f"--model-path '{folder}'" in line
    assert set(shipped()) == {name for name in shipped() if "/" in published_name(name)}


def test_what_runs_here_is_started_by_run() -> None:
    with pytest.raises(UserError, match="the plan is for the product's own engine on this machine; `stretto run`"):
        commands("vllm", replace(JOB, engine=None), DeploymentPlan(), stretto.probe())


def test_even_stages_are_not_told_and_radix_trees_are_kept() -> None:
    (line,) = commands("vllm", JOB, DeploymentPlan(stages=2), cluster(8))
    assert line.startswith("vllm serve")
    (line,) = commands("sglang", JOB, DeploymentPlan(prefix_cache=True), cluster(8))
    assert "radix" not in line


@pytest.mark.parametrize(
    ("engine", "plan", "expected"),
    [
        ("vllm", {"policy": "static"}, "vllm cannot do static batches; policy: whole or chunked"),
        (
            "vllm",
            {"devices": 2, "attention_replicas": 2},
            "vllm cannot do data parallel attention over split dense MLPs",
        ),
        ("sglang", {"devices": 2, "mlp_replicas": 2}, "sglang cannot do MLPs in more copies"),
        ("llama.cpp", {}, "llama.cpp cannot do whole prompts; policy: chunked"),
        ("llama.cpp", {"policy": "chunked", "prefix_cache": True}, "llama.cpp cannot do prefixes that all slots share"),
        ("exo", {}, "emit: there are no flags for 'exo'; one of vllm, sglang, llama.cpp"),
    ],
)
def test_what_an_engine_cannot_do_is_refused(engine: str, plan: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=re.escape(expected)):
        commands(engine, JOB, DeploymentPlan(**plan), cluster(8))
