"""Fit the GPU constants of `stretto.hardware.kernel_model` to measured rows of half of the models, and write
them down.

Eleven constants: launch, set-up of a matrix product, its bandwidth share, tile edge, tile fill, what a cache
holds over, and one bandwidth share for each of five kernel families. The order of the p-norm (2) and the
reached share of the peak (1: tile edges carry the loss) are set by hand; free, they come out at 1.9 to 2.6
and 0.95 to 1. The loss is the mean absolute log ratio over A100 rows of at least 10 microseconds of the
training models (shorter rows are whole microseconds); rows above 20 microseconds of other models and other
GPUs are what `against_real_gpus.py` judges.

    python benchmarks/fit_gpu_constants.py --data ../shared/data/gpu_profiles
"""

from __future__ import annotations

import argparse
import csv
import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import yaml
from numpy.typing import NDArray
from scipy import optimize

from stretto.hardware import catalog, kernel_model
from stretto.hardware.kernel_model import Constants
from stretto.hardware.operation import Operation

SPLIT_SEED = 0
FIT_ABOVE_S = 10e-6
FITTED = Path(kernel_model.__file__).with_name("fitted.yaml")

DEVICES = {
    "a100": "a100-sxm-80gb",
    "a100_40gb": "a100-sxm-40gb",
    "h100": "h100-sxm",
    "h100_pcie": "h100-pcie",
    "h200": "h200-sxm",
    "a40": "a40",
}
"""The catalog's names of the GPUs in the csv."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One operator of one row of the csv."""

    gpu: str
    model: str
    operator: str
    operation: Operation
    seconds: float


def read(folder: Path) -> list[Measurement]:
    """All measured operators of `ops.csv` in `folder`; rows of GPUs that the catalog lacks are left out."""
    with open(folder / "ops.csv", encoding="utf-8") as file:
        return [
            Measurement(gpu=row["gpu"], model=row["model"], operator=name, operation=op, seconds=float(text) * 1e-3)
            for row in csv.DictReader(file)
            if row["gpu"] in DEVICES
            for name, op in operators(
                {key: row[key] for key in row if not key.endswith("_ms") and key != "gpu"}
            ).items()
            for text in [row.get(f"{name}_ms")]
            if text and float(text) > 0
        ]


def operators(row: dict[str, str]) -> dict[str, Operation]:
    """The operators of a layer with the work of a tensor-parallel share, as `ModelSpec.operations` has it."""
    number = {key: int(float(value)) for key, value in row.items() if key != "model"}
    tokens, tp, hidden, gated = (number[key] for key in ("num_tokens", "tp", "hidden", "use_gated_mlp"))
    dim = hidden // number["n_head"]
    heads, kv = number["n_head"] // tp, max(1, number["n_kv_head"] // tp)
    ffn = number["ffn"] // tp

    def matmul(name: str, k: int, n: int) -> Operation:
        moved = 2.0 * (k * n + tokens * (k + n))
        work = 2.0 * tokens * k * n
        return Operation(
            name=name,
            kind="matmul",
            dtype="bf16",
            flops=work,
            bytes=moved,
            shape=(tokens, k, n),
            signature="matmul",
        )

    def stream(name: str, kind: str, width: int, moves: int, flops: int, count: int = 1) -> Operation:
        work, moved = float(flops * tokens * width), 2.0 * moves * tokens * width
        return Operation(name=name, kind=kind, dtype="bf16", flops=work, bytes=moved, signature=name, count=count)

    return {
        "attn_pre_proj": matmul("qkv", hidden, (heads + 2 * kv) * dim),
        "attn_post_proj": matmul("out", heads * dim, hidden),
        "mlp_up_proj": matmul("gate_up", hidden, ffn * (1 + gated)),
        "mlp_down_proj": matmul("down", ffn, hidden),
        "input_layernorm": stream("norm", "norm", hidden, 2, 4),
        "attn_rope": stream("rope", "elementwise", (heads + kv) * dim, 2, 3),
        "mlp_act": stream("activation", "elementwise", ffn, 2 + gated, 5),
        # Models without a gate (phi, GPT-J) run attention and MLP side by side and add both to the stream:
        # two kernels.
        "add": stream("add", "elementwise", hidden, 3, 1, count=2 - gated),
        "emb": stream("embed", "gather", hidden, 2, 0),
    }


def split(models: Iterable[str], seed: int = SPLIT_SEED) -> tuple[str, ...]:
    """The models to fit on: half of them, rounded up, of the names in an order shuffled by `seed`."""
    names = sorted(set(models))
    random.Random(seed).shuffle(names)
    return tuple(sorted(names[: math.ceil(len(names) / 2)]))


_FAMILIES = ("norm", "rope", "activation", "add", "embed")
_START = (3e-6, 2e-6, 0.9, 25.0, 40.0, 0.2, 0.36, 0.44, 0.49, 0.9, 0.15)
_SHIFTS = (0.0, -0.3, 0.3)
"""Powell's method ends in a valley near its start; the best of three is kept, by the loss that was fitted."""
_SHARES = (2, 5, 6, 7, 8, 9, 10)
# FlashAttention-2 (Dao, 2023, figure 5) reaches about 60 % of an A100's peak with a causal mask and head dim
# 128; decoding streams the KV cache as matrix products stream weights. Neither is in the profiles, so the
# spread is wide.
_ATTENTION = {"compute": 0.6, "bandwidth": 0.8, "spread": 0.5}


def constants(fitted: Sequence[float]) -> Constants:
    """The model's constants from the eleven fitted ones, in the order of `_START`."""
    launch, setup, matmul, edge, fill, cached, *shares = (float(value) for value in fitted)
    by_family = dict(zip(_FAMILIES, shares, strict=True))
    other = float(np.exp(np.mean(np.log([by_family[name] for name in ("rope", "activation", "add")]))))
    return Constants(
        order=2.0,
        launch_s=launch,
        matmul_setup_s=setup,
        compute={
            "matmul": 1.0,
            "attention": _ATTENTION["compute"],
            "norm": 1.0,
            "elementwise": 1.0,
            "gather": 1.0,
        },
        bandwidth={
            "matmul": matmul,
            "attention": _ATTENTION["bandwidth"],
            **by_family,
            "elementwise": _rounded([other])[0],
            "gather": by_family["embed"],
        },
        cached=cached,
        tile_edge=edge,
        tile_fill=fill,
        spread={},
        fitted_on=(),
        source="",
    )


def log_ratios(rows: Sequence[Measurement], fitted: Constants) -> NDArray[np.float64]:
    """Log of predicted over measured seconds, for rows of one GPU."""
    device = catalog.device(DEVICES[rows[0].gpu])
    said = kernel_model.seconds([row.operation for row in rows], device, fitted)
    counts = np.array([row.operation.count for row in rows])
    return np.asarray(np.log(said * counts / np.array([row.seconds for row in rows])), np.float64)


def fit(rows: Sequence[Measurement], models: Sequence[str], gpu: str = "a100") -> Constants:
    """Constants for the rows of `models` on `gpu` of at least 10 microseconds; nothing else is looked at."""
    train = [row for row in rows if row.gpu == gpu and row.model in models and row.seconds >= FIT_ABOVE_S]

    def physical(logs: NDArray[np.float64]) -> NDArray[np.float64]:
        values = np.exp(np.clip(logs, -30, 30))
        values[list(_SHARES)] = np.minimum(values[list(_SHARES)], 0.999)
        return values

    def loss(logs: NDArray[np.float64]) -> float:
        return float(np.mean(np.abs(log_ratios(train, constants(physical(logs))))))

    options = {"maxfev": 6000, "xtol": 1e-3, "ftol": 1e-5}
    starts = [np.log(_START) + shift for shift in _SHIFTS]
    found = [optimize.minimize(loss, start, method="Powell", options=options) for start in starts]
    best = constants(_rounded(physical(min(found, key=lambda one: float(one.fun)).x)))
    return replace(
        best,
        spread=_spread(train, best),
        fitted_on=tuple(models),
        source=f"benchmarks/fit_gpu_constants.py on {len(train)} {gpu} rows of gpu_profiles/ops.csv "
        "(microsoft/vidur, MIT); attention: FlashAttention-2 (Dao, 2023)",
    )


def _spread(rows: Sequence[Measurement], fitted: Constants) -> dict[str, float]:
    """The 90th percentile of the relative error by kind, on the rows that were fitted."""
    errors = np.expm1(np.abs(log_ratios(rows, fitted)))
    kinds = np.array([row.operation.kind for row in rows])
    spread = {str(kind): round(float(np.quantile(errors[kinds == kind], 0.9)), 3) for kind in sorted(set(kinds))}
    return {**spread, "attention": _ATTENTION["spread"]}


def _rounded(values: Iterable[float]) -> list[float]:
    return [float(f"{value:.4g}") for value in values]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data/gpu_profiles"))
    folder = parser.parse_args().data
    rows = read(folder)
    models = split(row.model for row in rows if row.gpu == "a100")
    found = fit(rows, models)
    document = yaml.safe_load(FITTED.read_text(encoding="utf-8"))
    document["gpu"] = found.to_dict()
    FITTED.write_text(yaml.safe_dump(document, sort_keys=False, width=110), encoding="utf-8")
    print(f"fitted on {', '.join(models)}; written to {FITTED}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
