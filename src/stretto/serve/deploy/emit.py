"""A plan as the command that starts it: flags of vLLM, SGLang and llama.cpp.

What an engine cannot do is refused with the reason, never left out. A model that is served in several copies is several
commands, unless the engine deals requests to copies itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from stretto.core.errors import UserError
from stretto.serve.deploy.drawn import load_of
from stretto.serve.deploy.job import DeploymentJob
from stretto.serve.deploy.layout import stage_layers
from stretto.serve.deploy.plan import DeploymentPlan
from stretto.serve.deploy.planned import planned_spec


def commands(engine: str, job: DeploymentJob, plan: DeploymentPlan) -> list[str]:
    """One command a copy, or a single one where the engine has copies of its own.

    Raises:
        UserError: if the engine is not known, or cannot do what the plan says.
    """
    if engine not in ENGINES:
        raise UserError(f"there are no flags for {engine!r}", field="emit", right=f"one of {', '.join(ENGINES)}")
    if plan.policy == "lanes":
        raise _refuse(engine, "two lanes on one device", "policy: chunked")
    return ENGINES[engine](job, plan)


def _refuse(engine: str, what: str, nearest: str) -> UserError:
    return UserError(f"{engine} cannot do {what}", field="emit", right=nearest)


def _length(job: DeploymentJob) -> int:
    return load_of(job.load).longest


def _copies(count: int, devices: int, command: Callable[[int], str]) -> list[str]:
    """A command for each copy, on devices and a port of its own."""
    if count == 1:
        return [command(0)]
    numbers = [",".join(str(copy * devices + i) for i in range(devices)) for copy in range(count)]
    return [f"CUDA_VISIBLE_DEVICES={numbers[copy]} {command(copy)}" for copy in range(count)]


def _vllm(job: DeploymentJob, plan: DeploymentPlan) -> list[str]:
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
    before, text = _uneven(job, plan, "VLLM_PP_LAYER_PARTITION"), " ".join(flags)
    return _copies(
        plan.replicas,
        plan.stages * plan.devices,
        lambda copy: f"{before}vllm serve {job.model} --port {8000 + copy} {text}",
    )


def _sglang(job: DeploymentJob, plan: DeploymentPlan) -> list[str]:
    if plan.policy == "static":
        raise _refuse("sglang", "static batches", "policy: whole or chunked")
    if plan.mlp_replicas > 1:
        raise _refuse("sglang", "MLPs in more copies than attention", "a plan with mlp_replicas: 1")
    dealt = plan.replicas * plan.attention_replicas
    if plan.replicas > 1 and plan.attention_replicas > 1:
        raise _refuse("sglang", "copies of a model whose attention is data parallel", "replicas: 1")
    chunk = plan.prefill_tokens if plan.policy == "chunked" else -1
    flags = [f"--model-path {job.model}", f"--context-length {_length(job)}"]
    flags += [f"--tp-size {plan.devices}"]
    flags += [f"--pp-size {plan.stages}"] if plan.stages > 1 else []
    flags += [f"--dp-size {dealt}"] if dealt > 1 else []
    flags += ["--enable-dp-attention"] if plan.attention_replicas > 1 else []
    flags += [f"--ep-size {plan.devices}"] if plan.mlp_split == "expert" else []
    flags += [f"--mem-fraction-static {plan.memory_share}", f"--max-running-requests {plan.slots * dealt}"]
    flags += [f"--chunked-prefill-size {chunk}"]
    flags += _types(plan, {"weights": "--quantization fp8", "kv": "--kv-cache-dtype fp8_e5m2"})
    flags += [] if plan.prefix_cache else ["--disable-radix-cache"]
    before = _uneven(job, plan, "SGLANG_PP_LAYER_PARTITION")
    return [f"{before}python -m sglang.launch_server {' '.join(flags)}"]


def _llama_cpp(job: DeploymentJob, plan: DeploymentPlan) -> list[str]:
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
    shares = [1] * count if plan.devices > 1 else stage_layers(planned_spec(job.model).layers, plan.stages)
    split = f"--split-mode {'row' if plan.devices > 1 else 'layer'} --tensor-split {','.join(map(str, shares))}"
    context = plan.slots * _length(job)
    flags = f"-ngl 999 -np {plan.slots} -c {context} -b {plan.prefill_tokens} -ub {plan.prefill_tokens}"
    flags += f" {split}" if count > 1 else " --split-mode none"
    return _copies(
        plan.replicas,
        count,
        lambda copy: f"llama-server -m {job.model}.gguf --port {8080 + copy} --cont-batching {flags}",
    )


def _uneven(job: DeploymentJob, plan: DeploymentPlan, variable: str) -> str:
    """The environment variable by which an engine is told the layers of stages that differ; empty if they do not."""
    layers = stage_layers(planned_spec(job.model).layers, plan.stages)
    return f"{variable}={','.join(map(str, layers))} " if layers[0] > layers[-1] else ""


def _types(plan: DeploymentPlan, flags: Mapping[str, str]) -> list[str]:
    return [flag for field, flag in flags.items() if getattr(plan, field) == "fp8"]


ENGINES: Mapping[str, Callable[[DeploymentJob, DeploymentPlan], list[str]]] = {
    "vllm": _vllm,
    "sglang": _sglang,
    "llama.cpp": _llama_cpp,
}
