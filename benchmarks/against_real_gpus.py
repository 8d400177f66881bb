"""Predicted against measured seconds of transformer operators on real GPUs, for the product's cost model and
two null models.

Judged are rows above 20 microseconds (shorter ones are whole microseconds) of models that the constants were
not fitted on, and all rows of GPUs other than the A100, whose peaks and bandwidths come from the catalog
without a refit. Beside them stand the data sheet alone (the larger of flops over peak and bytes over
bandwidth) and a plain maximum with three constants fitted on the same rows as ours. Without --quick, every
way to halve the models is fitted anew and printed, to show what the choice of the split is worth. Error is
|predicted / measured - 1|.

    python benchmarks/against_real_gpus.py --data ../shared/data/gpu_profiles [--json] [--quick]
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from fit_gpu_constants import DEVICES, FIT_ABOVE_S, Measurement, fit, log_ratios, read
from fit_link_constants import log_ratios as link_log_ratios
from fit_link_constants import read as read_links
from stretto.hardware import catalog, collective, cost, kernel_model

JUDGE_ABOVE_S = 20e-6
GOALS = {
    "a100": {"median": 0.07, "p90": 0.19, "matmul median": 0.07, "matmul p90": 0.18, "worst kind": 0.25},
    "h100": {"median": 0.09, "p90": 0.24, "matmul median": 0.07, "matmul p90": 0.18, "worst kind": 0.25},
}

Errors = NDArray[np.float64]


def product(rows: Sequence[Measurement]) -> Errors:
    """Relative errors of `stretto.hardware.cost` on rows of one GPU."""
    device = catalog.device(DEVICES[rows[0].gpu])
    said = np.array([one.seconds for one in cost.estimates([row.operation for row in rows], device)])
    return np.abs(said / np.array([row.seconds for row in rows]) - 1)


def plain_maximum(rows: Sequence[Measurement], compute: float, bandwidth: float, launch_s: float) -> Errors:
    """Relative errors of the roofline with three constants; (1, 1, 0) is the data sheet itself."""
    device = catalog.device(DEVICES[rows[0].gpu])
    work = np.array([[row.operation.flops, row.operation.bytes, row.operation.count] for row in rows])
    roof = np.maximum(work[:, 0] / (device.peak("bf16") * compute), work[:, 1] / (device.bandwidth * bandwidth))
    said = (roof + launch_s) * work[:, 2]
    return np.abs(said / np.array([row.seconds for row in rows]) - 1)


def fit_plain_maximum(rows: Sequence[Measurement]) -> tuple[float, float, float]:
    """The three constants of least mean relative error on the rows that ours were fitted on."""

    def loss(logs: NDArray[np.float64]) -> float:
        return float(np.mean(plain_maximum(rows, *np.exp(logs))))

    best = optimize.minimize(loss, np.log([0.7, 0.7, 5e-6]), method="Nelder-Mead", options={"maxiter": 500}).x
    compute, bandwidth, launch = np.exp(best).tolist()
    return compute, bandwidth, launch


def figures(rows: Sequence[Measurement], errors: Errors) -> dict[str, float]:
    """Median and 90th percentile, of all rows and of matrix products, and the worst median of an operator."""
    operators = np.array([row.operator for row in rows])
    matmul = np.array([row.operation.kind == "matmul" for row in rows])
    found = {"median": float(np.median(errors)), "p90": float(np.quantile(errors, 0.9))}
    if matmul.any():
        found |= {"matmul median": float(np.median(errors[matmul]))}
        found |= {"matmul p90": float(np.quantile(errors[matmul], 0.9))}
    return found | {"worst kind": max(float(np.median(errors[operators == name])) for name in set(operators))}


def judged(rows: Sequence[Measurement], fitted_on: Sequence[str]) -> Iterator[tuple[str, list[Measurement]]]:
    """The sets that are judged: A100 rows of other models, and all rows of each other GPU."""
    for gpu in sorted({row.gpu for row in rows}):
        kept = [
            row
            for row in rows
            if row.gpu == gpu and row.seconds > JUDGE_ABOVE_S and (gpu != "a100" or row.model not in fitted_on)
        ]
        if kept:
            yield gpu, kept


def compare(rows: Sequence[Measurement]) -> list[dict[str, Any]]:
    """One row a figure: ours, both null models, the goal."""
    fitted_on = kernel_model.fitted("gpu").fitted_on
    train = [r for r in rows if r.gpu == "a100" and r.model in fitted_on and r.seconds >= FIT_ABOVE_S]
    three = fit_plain_maximum(train) if train else None
    table = []
    for gpu, kept in judged(rows, fitted_on):
        ours, sheet = figures(kept, product(kept)), figures(kept, plain_maximum(kept, 1, 1, 0))
        plain = figures(kept, plain_maximum(kept, *three)) if three else {}
        goals = GOALS.get(gpu, {})
        table += [
            {
                "name": f"{gpu} {what}",
                "rows": len(kept),
                "ours": value,
                "data sheet": sheet[what],
                "three constants": plain.get(what),
                "unit": "relative error",
                "goal": goals.get(what),
                "pass": value <= goals.get(what, math.inf),
            }
            for what, value in ours.items()
        ]
    return table


def operators(rows: Sequence[Measurement]) -> list[dict[str, Any]]:
    """The median error of each operator on each judged set."""
    found = []
    for gpu, kept in judged(rows, kernel_model.fitted("gpu").fitted_on):
        errors, names = product(kept), np.array([row.operator for row in kept])
        found += [
            {
                "name": f"{gpu} {name}",
                "rows": int((names == name).sum()),
                "median": float(np.median(errors[names == name])),
            }
            for name in sorted(set(names.tolist()))
        ]
    return found


def robustness(rows: Sequence[Measurement]) -> list[dict[str, Any]]:
    """Every way to take half of the A100's models, rounded down and up: fitted anew, judged on the rest."""
    models = sorted({row.model for row in rows if row.gpu == "a100"})
    sizes = sorted({max(1, len(models) // 2), math.ceil(len(models) / 2)})
    halves = [half for size in sizes for half in itertools.combinations(models, size) if len(half) < len(models)]
    found = []
    for half in halves[:20]:
        constants = fit(rows, half)
        for gpu, kept in judged(rows, half):
            errors = np.abs(np.expm1(log_ratios(kept, constants)))
            found.append({"fitted on": ", ".join(half), "judged on": gpu, "rows": len(kept)} | figures(kept, errors))
    return found


def links(folder: Path) -> list[dict[str, Any]]:
    """Errors of collectives by machine and kind of link, reported without a goal."""
    rows = read_links(folder, folder.parent / "nccl")
    found = []
    for machine, kind in sorted({(row.machine, row.link.kind) for row in rows}):
        kept = [row for row in rows if (row.machine, row.link.kind) == (machine, kind)]
        errors = np.abs(np.expm1(link_log_ratios(kept, collective.fitted(kind))))
        found.append(
            {"name": f"collectives, {machine} {kind}", "rows": len(kept)}
            | {"median": float(np.median(errors)), "p90": float(np.quantile(errors, 0.9))}
        )
    return found


def show(document: Mapping[str, Any]) -> None:
    """The document as text."""
    constants = kernel_model.fitted("gpu")
    print(f"constants fitted on A100 rows of {', '.join(constants.fitted_on)}")
    for row in document["rows"]:
        plain = "" if row["three constants"] is None else f"  three constants {row['three constants']:6.1%}"
        verdict = "ok" if row["pass"] else "MISSED"
        goal = "reported" if row["goal"] is None else f"goal <= {row['goal']:.0%}  {verdict}"
        print(
            f"{row['name']:20s} ({row['rows']} rows)  ours {row['ours']:6.1%}"
            f"  data sheet {row['data sheet']:6.1%}{plain}  {goal}"
        )
    for row in [*document["operators"], *document["links"]]:
        p90 = f"  90th percentile {row['p90']:.1%}" if "p90" in row else ""
        print(f"  {row['name']:32s} {row['rows']:4d} rows  median {row['median']:.1%}{p90}")
    for row in document["splits"]:
        numbers = "  ".join(f"{key} {row[key]:.1%}" for key in GOALS["a100"] if key in row)
        print(f"  fitted on {row['fitted on']:32s} judged on {row['judged on']:5s} {numbers}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/gpu_profiles"))
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.add_argument("--quick", action="store_true", help="without the fits of other splits")
    found = parser.parse_args()
    rows = read(found.data)
    document = {
        "rows": compare(rows),
        "operators": operators(rows),
        "links": links(found.data),
        "splits": [] if found.quick else robustness(rows),
    }
    if found.json:
        json.dump(document, sys.stdout, indent=2)
        print()
    else:
        show(document)
    return 0 if all(row["pass"] for row in document["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
