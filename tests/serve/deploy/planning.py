"""The job and the clusters that tests of planning deployments share."""

from __future__ import annotations

from pathlib import Path

from stretto.hardware.cluster import Cluster, Devices, Node
from stretto.serve.deploy.job import DeploymentJob, LoadSpec

ROOT = Path(__file__).parents[3]
LOAD = LoadSpec(requests=60, rate_per_s=4.0, prompt_tokens=400, output_tokens=60, spread=0.5)
JOB = DeploymentJob(model="llama-3.1-8b", load=LOAD)


def cluster(count: int = 2, kind: str = "h100-sxm", *, nodes: int = 1, link: str = "nvlink4") -> Cluster:
    held = (Devices(type=kind, count=count),)
    network = "ib-ndr400" if nodes > 1 else None
    return Cluster(
        name="test",
        nodes=(Node(name="n", devices=held, link=link if count > 1 else None, count=nodes),),
        network=network,
    )
