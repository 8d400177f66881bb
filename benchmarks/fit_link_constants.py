"""Fit start-up time, latency a round and reached bandwidth share of each kind of link to measured
collectives.

Fitted on: NVLink on the H100 tables of `nccl`, InfiniBand on the A100 nodes of `network.csv`, PCIe and
Ethernet on the V100 tables (the network of those machines is not stated; 10 Gbit/s Ethernet is inferred from
the 1.2 GB/s that its send_recv reaches). The other machines are printed beside, as what such constants are
worth on machines that they were not fitted on.

    python benchmarks/fit_link_constants.py --data ../shared/data
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray
from scipy import optimize

from fit_gpu_constants import FITTED
from stretto.hardware import catalog, collective
from stretto.hardware.collective import LinkConstants
from stretto.hardware.link import Link

_NETWORKED = {
    "a100_dgx": ("nvlink3", "nvlink3", "ib-hdr200"),
    "h100_dgx": ("nvlink4", "nvlink4", "ib-ndr400"),
    "a100_pairwise_nvlink": ("nvlink3", "pcie4", None),
    "h100_pairwise_nvlink": ("nvlink4-bridge", "pcie5", None),
    "a40_pairwise_nvlink": ("nvlink3-bridge", "pcie4", None),
}
"""Links of the nodes in `network.csv`: within a pair, within the node, between nodes."""

_TABLED = {
    "H100-SXM-80GB": ("nvlink4", "ib-ndr400"),
    "H200": ("nvlink4", "ib-ndr400"),
    "V100-PCIE-16GB": ("pcie3", "ethernet-10g"),
}
_NAMES = {"alltoall": "all_to_all", "sendrecv": "send_recv"}
_FITTED_ON = {
    "nvlink": ("H100-SXM-80GB",),
    "infiniband": ("a100_dgx",),
    "pcie": ("V100-PCIE-16GB",),
    "ethernet": ("V100-PCIE-16GB",),
}


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One collective of one row."""

    machine: str
    name: str
    ranks: int
    bytes: float
    link: Link
    seconds: float


def read(profiles: Path, nccl: Path) -> list[Measurement]:
    """All rows of `network.csv` in `profiles` and of `*/*.csv` in `nccl` on machines with known links."""
    found = []
    for row in _rows(profiles / "network.csv"):
        ranks, each = int(row["num_workers"]), int(row["devices_per_node"])
        pair, node, network = _NETWORKED.get(row["node"], (None, None, None))
        link = network if each < ranks else pair if ranks == 2 else node
        if link is not None:
            seconds, size = float(row["ms"]) * 1e-3, float(row["bytes"])
            found.append(_measurement(row["node"], row["collective"], ranks, size, link, seconds))
    for file in sorted(nccl.glob("*/*.csv")):
        for row in _rows(file):
            if row["gpu"] in _TABLED:
                nodes, each = int(row["num_nodes"]), int(row["num_gpus_per_node"])
                link, seconds = _TABLED[row["gpu"]][nodes > 1], float(row["time(us)"]) * 1e-6
                size = float(row["size(kb)"]) * 1024
                found.append(_measurement(row["gpu"], file.stem, nodes * each, size, link, seconds))
    return [row for row in found if row.name in collective.COLLECTIVES]


def _rows(file: Path) -> list[dict[str, str]]:
    if not file.exists():
        return []
    with open(file, encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def _measurement(machine: str, name: str, ranks: int, size: float, link: str, seconds: float) -> Measurement:
    return Measurement(
        machine=machine,
        name=_NAMES.get(name, name),
        ranks=ranks,
        bytes=size,
        link=catalog.link(link),
        seconds=seconds,
    )


def log_ratios(rows: Sequence[Measurement], constants: LinkConstants) -> NDArray[np.float64]:
    """Log of predicted over measured seconds."""
    said = [collective.modelled(row.name, row.bytes, row.ranks, row.link, constants) for row in rows]
    return np.asarray(np.log(np.array(said) / np.array([row.seconds for row in rows])), np.float64)


def fit(rows: Sequence[Measurement], source: str) -> LinkConstants:
    """The three constants of least mean absolute log ratio; the spread is the 90th percentile error."""

    def constants(logs: Sequence[float]) -> LinkConstants:
        start, latency, share = (float(f"{value:.3g}") for value in np.exp(logs))
        return LinkConstants(start_s=start, latency_s=latency, share=min(share, 0.999), spread=0.0, source=source)

    def loss(logs: Sequence[float]) -> float:
        return float(np.mean(np.abs(log_ratios(rows, constants(logs)))))

    start = np.log([5e-6, 1e-6, 0.7])
    best = constants(optimize.minimize(loss, start, method="Nelder-Mead", options={"maxiter": 600}).x)
    spread = float(np.quantile(np.expm1(np.abs(log_ratios(rows, best))), 0.9))
    return LinkConstants(**{**asdict(best), "spread": round(spread, 2)})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    data = parser.parse_args().data
    rows = read(data / "gpu_profiles", data / "nccl")
    found = {
        kind: fit(
            [r for r in rows if r.link.kind == kind and r.machine in machines],
            f"fitted on {', '.join(machines)}",
        )
        for kind, machines in _FITTED_ON.items()
    }
    document = yaml.safe_load(FITTED.read_text(encoding="utf-8"))
    document["links"] = {**document.get("links", {}), **{kind: asdict(one) for kind, one in found.items()}}
    FITTED.write_text(yaml.safe_dump(document, sort_keys=False, width=110), encoding="utf-8")
    for machine, kind in sorted({(row.machine, row.link.kind) for row in rows}):
        errors = np.abs(
            np.expm1(log_ratios([r for r in rows if (r.machine, r.link.kind) == (machine, kind)], found[kind]))
        )
        mark = "fitted" if machine in _FITTED_ON[kind] else "left out"
        print(
            f"{machine:16s} {kind:10s} {mark:8s} {len(errors):4d} rows  median {np.median(errors):.0%}"
            f"  90th percentile {np.quantile(errors, 0.9):.0%}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
