"""A plan as the commands that start it: flags of vLLM, SGLang and llama.cpp.

What an engine cannot do is refused with the reason, never left out. A model that is served in several copies is several
commands, unless the engine deals requests to copies itself. Where there are several nodes a comment says on which one a
command is to be given; devices are numbered on each node anew.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from stretto.core.errors import UserError
from stretto.hardware.cluster import Cluster
from stretto.serve.deploy.drawn import load_of
from stretto.serve.deploy.here.choices import is_here
from stretto.serve.deploy.job import DeploymentJob
from stretto.serve.deploy.layout import stage_layers
from stretto.serve.deploy.plan import DeploymentPlan
from stretto.serve.deploy.planned import planned_spec, published_name
from stretto.serve.deploy.tree import machine_of


@dataclass(frozen=True, slots=True)
class Place:
    """Where copies run that one command starts: on how many nodes from which one on (counted from 1), and on which
    devices there; None where they need not be told.
    """

    node: int
    nodes: int
    copies: int
    devices: tuple[int, ...] | None = None

    @property
    def prefix(self) -> str:
        """The devices, for the front of a command."""
        return "" if self.devices is None else f"CUDA_VISIBLE_DEVICES={','.join(map(str, self.devices))} "


def commands(engine: str, job: DeploymentJob, plan: DeploymentPlan, cluster: Cluster) -> list[str]:
    """One command a copy, or a single one where the engine has copies of its own.

    Raises:
        UserError: if the engine is not known, cannot do what the plan says, or is not what the plan is for.
    """
    if engine not in ENGINES:
        raise UserError(f"there are no flags for {engine!r}", field="emit", right=f"one of {', '.join(ENGINES)}")
    if is_here(job, cluster):
        right = "`stretto run` starts it; name a cluster, or another engine in the job"
        raise UserError("the plan is for the product's own engine on this machine", field="emit", right=right)
    if plan.policy == "lanes":
        raise _refuse(engine, "two lanes on one device", "policy: chunked")
    machine, _ = machine_of(cluster, job.devices)
    return ENGINES[engine](job, plan, machine.node_devices)


def _places(engine: str, plan: DeploymentPlan, node_devices: int, *, together: bool) -> Iterator[Place]:
    """Copies on nodes, node after node; those of a node `together` by one command, or each by its own."""
    each = plan.stages * plan.devices
    if each > node_devices:
        nodes, over = divmod(each, node_devices)
        if over:
            raise _refuse(
                engine, f"copies of {each} devices on nodes of {node_devices}", "whole nodes, or parts of one"
            )
        yield from (Place(1 + copy * nodes, nodes, 1) for copy in range(plan.replicas))
        return
    room = node_devices // each
    for first in range(0, plan.replicas, room):
        here = min(room, plan.replicas - first)
        if together or room == 1:
            yield Place(1 + first // room, 1, here)
            continue
        for copy in range(here):
            alone = plan.replicas == 1
            yield Place(1 + first // room, 1, 1, None if alone else tuple(range(copy * each, (copy + 1) * each)))


def _told(places: list[Place], started: list[str]) -> list[str]:
    """Commands with the node that each is for, if there are several."""
    if max(place.node + place.nodes - 1 for place in places) == 1:
        return started
    return [f"{command}  # on node {place.node}" for place, command in zip(places, started, strict=True)]


def _refuse(engine: str, what: str, nearest: str) -> UserError:
    return UserError(f"{engine} cannot do {what}", field="emit", right=nearest)


def _length(job: DeploymentJob) -> int:
    return load_of(job.load).longest


def _ports(places: list[Place], first: int) -> list[int]:
    """A port for each command that no other one on its node has."""
    return [first + sum(before.node == place.node for before in places[:i]) for i, place in enumerate(places)]


def _vllm(job: DeploymentJob, plan: DeploymentPlan, node_devices: int) -> list[str]:
    flags = [f"--max-model-len {_length(job)}", f"--max-num-seqs {plan.slots}"]
    flags += [f"--gpu-memory-utilization {plan.memory_share}", f"--max-num-batched-tokens {plan.prefill_tokens}"]
    if plan.policy == "static":
        raise _refuse("vllm", "static batches", "policy: whole or chunked")
    if plan.policy == "chunked":
        flags.append("--enable-chunked-prefill")
    if plan.mlp_replicas > 1:
        raise _refuse("vllm", "MLPs in more copies than attention", "a plan with mlp_replicas: 1")
    if plan.attention_replicas > 1:
        if plan.mlp_split != "expert":
            raise _refuse("vllm", "data parallel attention over split dense MLPs", "mlp_split: expert")
        flags.append(f"--data-parallel-size {plan.attention_replicas}")
    if plan.mlp_split == "expert":
        flags.append("--enable-expert-parallel")
    ranks = plan.devices // plan.attention_replicas
    flags += [f"--tensor-parallel-size {ranks}"] if ranks > 1 else []
    flags += [f"--pipeline-parallel-size {plan.stages}"] if plan.stages > 1 else []
    flags += _types(plan, {"weights": "--quantization fp8", "kv": "--kv-cache-dtype fp8"})
    flags.append("--enable-prefix-caching" if plan.prefix_cache else "--no-enable-prefix-caching")
    places = list(_places("vllm", plan, node_devices, together=False))
    flags += ["--distributed-executor-backend ray"] if places[0].nodes > 1 else []
    before, text = _uneven(job, plan, "VLLM_PP_LAYER_PARTITION"), " ".join(flags)
    model = shlex.quote(published_name(job.model))
    started = [
        f"{place.prefix}{before}vllm serve {model} --port {port} {text}"
        for place, port in zip(places, _ports(places, 8000), strict=True)
    ]
    joined = f", joined with the {places[0].nodes - 1} after it by Ray" if places[0].nodes > 1 else ""
    return [f"{line}{joined}" for line in _told(places, started)]


def _sglang(job: DeploymentJob, plan: DeploymentPlan, node_devices: int) -> list[str]:
    if plan.policy == "static":
        raise _refuse("sglang", "static batches", "policy: whole or chunked")
    if plan.mlp_replicas > 1:
        raise _refuse("sglang", "MLPs in more copies than attention", "a plan with mlp_replicas: 1")
    if plan.replicas > 1 and plan.attention_replicas > 1:
        raise _refuse("sglang", "copies of a model whose attention is data parallel", "replicas: 1")
    chunk = plan.prefill_tokens if plan.policy == "chunked" else -1
    flags = [f"--model-path {shlex.quote(published_name(job.model))}", f"--context-length {_length(job)}"]
    flags += [f"--tp-size {plan.devices}"]
    flags += [f"--pp-size {plan.stages}"] if plan.stages > 1 else []
    flags += [f"--dp-size {plan.attention_replicas} --enable-dp-attention"] if plan.attention_replicas > 1 else []
    flags += [f"--ep-size {plan.devices}"] if plan.mlp_split == "expert" else []
    flags += [f"--max-running-requests {plan.slots * plan.attention_replicas}"]
    flags += [f"--mem-fraction-static {plan.memory_share}", f"--chunked-prefill-size {chunk}"]
    flags += _types(plan, {"weights": "--quantization fp8", "kv": "--kv-cache-dtype fp8_e5m2"})
    flags += [] if plan.prefix_cache else ["--disable-radix-cache"]
    before = _uneven(job, plan, "SGLANG_PP_LAYER_PARTITION")
    places, started = [], []
    for place in _places("sglang", plan, node_devices, together=True):
        copies = f" --dp-size {place.copies}" if place.copies > 1 else ""
        for rank in range(place.nodes):
            joined = f" --nnodes {place.nodes} --node-rank {rank} --dist-init-addr ADDRESS_OF_NODE_{place.node}:20000"
            places.append(Place(place.node + rank, 1, place.copies))
            started.append(
                f"{before}python -m sglang.launch_server {' '.join(flags)}{copies}{joined if place.nodes > 1 else ''}"
            )
    return _told(places, started)


def _llama_cpp(job: DeploymentJob, plan: DeploymentPlan, node_devices: int) -> list[str]:
    if plan.attention_replicas > 1 or plan.mlp_replicas > 1 or plan.mlp_split == "expert":
        raise _refuse("llama.cpp", "cells of unlike replicas or whole experts", "a plan of tensor parallelism alone")
    if plan.stages > 1 and plan.devices > 1:
        raise _refuse("llama.cpp", "stages that are split themselves", "stages: 1 or devices: 1")
    if plan.weights == "fp8" or plan.kv == "fp8":
        raise _refuse("llama.cpp", "fp8", "weights: bf16 and kv: bf16")
    if plan.policy != "chunked":
        raise _refuse("llama.cpp", f"{plan.policy} prompts", "policy: chunked")
    if plan.prefix_cache:
        raise _refuse("llama.cpp", "prefixes that all slots share", "prefix_cache: false")
    count = plan.devices * plan.stages
    if count > node_devices:
        raise _refuse("llama.cpp", f"copies of {count} devices on nodes of {node_devices}", "fewer devices a copy")
    shares = [1] * count if plan.devices > 1 else stage_layers(planned_spec(job.model).layers, plan.stages)
    split = f"--split-mode {'row' if plan.devices > 1 else 'layer'} --tensor-split {','.join(map(str, shares))}"
    context = plan.slots * _length(job)
    flags = f"-ngl 999 -np {plan.slots} -c {context} -b {plan.prefill_tokens} -ub {plan.prefill_tokens}"
    flags += f" {split}" if count > 1 else " --split-mode none"
    places = list(_places("llama.cpp", plan, node_devices, together=False))
    model = shlex.quote(job.model if job.model.endswith(".gguf") else f"{job.model}.gguf")
    started = [
        f"{place.prefix}llama-server -m {model} --port {port} --cont-batching {flags}"
        for place, port in zip(places, _ports(places, 8080), strict=True)
    ]
    return _told(places, started)


def _uneven(job: DeploymentJob, plan: DeploymentPlan, variable: str) -> str:
    """The environment variable by which an engine is told the layers of stages that differ; empty if they do not."""
    layers = stage_layers(planned_spec(job.model).layers, plan.stages)
    return f"{variable}={','.join(map(str, layers))} " if layers[0] > layers[-1] else ""


def _types(plan: DeploymentPlan, flags: Mapping[str, str]) -> list[str]:
    return [flag for field, flag in flags.items() if getattr(plan, field) == "fp8"]


ENGINES: Mapping[str, Callable[[DeploymentJob, DeploymentPlan, int], list[str]]] = {
    "vllm": _vllm,
    "sglang": _sglang,
    "llama.cpp": _llama_cpp,
}
