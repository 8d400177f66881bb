"""Predicted against measured latencies of real LLM servers, for the product's simulation and two null models.

A folder holds `measured.csv` (one replica a row: plan, weights, trace, mean time to first token, time per output
token), `models.json` (Hugging Face configurations) and the traces. The four constants of the engine (host time a step
and a sequence, launching a layer of an eager step, the pace of its kernels) are fitted with one *plan* left out at a
time and judged on the plan left out; beside them stand the constants that the product ships. Null models are fitted on
the same rows: data-sheet peaks with one host constant, and the product's seconds of a step in a closed form (Little's
law) without simulation.

    python benchmarks/against_real_servers.py --data ../shared/data/vllm_h100 [--json] [--quick] [--constants]
"""

from __future__ import annotations

import csv
import json
import re
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np

import harness
from harness import Row
from stretto.hardware import catalog
from stretto.models.spec import ModelSpec, bytes_of
from stretto.serve.deploy.costs import Lane, StepCosts
from stretto.serve.deploy.curves import Machine, Types
from stretto.serve.deploy.engines import EngineConstants, engine
from stretto.serve.deploy.layout import Layout
from stretto.serve.deploy.load import Load
from stretto.serve.deploy.memory import pool_pages
from stretto.serve.deploy.planned import spec_of_config
from stretto.serve.deploy.simulate import serve
from stretto.serve.scheduler_config import SchedulerConfig

ENGINE = "vllm-0.6"
MEMORY_SHARE = 0.97
TPOT_GOALS, TTFT_GOALS = (0.06, 0.11), (0.10, 0.20)
SLOPE_GOAL = 0.04
MACHINE = Machine(
    device=catalog.device("h100-sxm"),
    near=catalog.link("nvlink4"),
    far=catalog.link("ib-ndr400"),
    node_devices=8,
    host=catalog.link("pcie5"),
)


class Latency(NamedTuple):
    """Mean seconds to the first token and per output token."""

    ttft_s: float
    tpot_s: float


@dataclass(frozen=True, kw_only=True, eq=False)
class Measured:
    """One replica's run."""

    model: str
    spec: ModelSpec
    plan: str
    weights: str
    trace: str
    load: Load
    latency: Latency

    @property
    def layout(self) -> Layout:
        """The replica that the row is about."""
        parts = {axis: int(count) for count, axis in re.findall(r"(\d+)(DP|PP|TP|EP)", self.plan)}
        devices = parts.get("TP", parts.get("EP", 1))
        split = "expert" if "EP" in parts else "tensor"
        return Layout(stages=parts.get("PP", 1), devices=devices, mlp_split=split)  # type: ignore[arg-type]


def read(folder: Path) -> list[Measured]:
    """All rows of a folder."""
    models = json.loads((folder / "models.json").read_text(encoding="utf-8"))
    specs = {name: spec_of_config(config, file="models.json") for name, config in models.items()}
    with open(folder / "measured.csv", encoding="utf-8") as opened:
        return [
            Measured(
                model=row["model"],
                spec=specs[row["model"]],
                plan=row["plan"],
                weights=row["weights"],
                trace=row["trace"],
                load=load_of(folder / f"{row['trace']}.csv"),
                latency=Latency(float(row["ttft_s"]), float(row["tpot_s"])),
            )
            for row in csv.DictReader(opened)
        ]


@lru_cache
def load_of(file: Path) -> Load:
    with open(file, encoding="utf-8") as opened:
        fields = ("arrival_s", "prompt_tokens", "output_tokens")
        rows = sorted(tuple(float(row[field]) for field in fields) for row in csv.DictReader(opened))
    arrival, prompt, output = (np.array(column) for column in zip(*rows, strict=True))
    return Load(arrival, prompt.astype(np.int64), output.astype(np.int64))


def costs_of(row: Measured, constants: EngineConstants) -> StepCosts:
    return StepCosts(
        spec=row.spec,
        layout=row.layout,
        machine=MACHINE,
        types=Types(arithmetic="bf16", weights=row.weights, kv="bf16"),
        engine=constants,
        most_rows=4096,
    )


@cache
def simulated(row: Measured, constants: EngineConstants) -> Latency:
    """What the product says."""
    costs = costs_of(row, constants)
    pages = pool_pages(row.spec, row.layout, row.weights, "bf16", MACHINE, constants, MEMORY_SHARE)
    assert pages > 0, f"{row.model} does not fit on {row.plan}"
    config = SchedulerConfig(
        joining="continuous",
        slots=constants.slots,
        pages=pages,
        page_tokens=constants.page_tokens,
        prefill_tokens=constants.prefill_tokens,
        prefill="whole",
    )
    served, load = serve(row.load, costs, config), row.load
    ttft = float(np.mean(served.first_s - load.arrival_s))
    latency = float(np.sum(served.finished_s - load.arrival_s))
    return Latency(ttft, (latency - len(load) * ttft) / float(load.output.sum()))


def closed_form(row: Measured, constants: EngineConstants) -> Latency:
    """The same seconds of a step, at the batch of Little's law; a newcomer waits for half a step."""
    costs, load = costs_of(row, constants), row.load
    rate = len(load) / float(load.arrival_s[-1])
    prompt, output = float(load.prompt.mean()), float(load.output.mean())
    lane = Lane(rows=round(prompt), tokens=1, sequences=1, eager=True)
    prefill = costs.stage([lane._replace(prompt_s=costs.prompt_attention_s(round(prompt), 0))]).total
    tpot, rows = 0.02, 1.0
    for _ in range(50):
        count = max(1, round(rows))
        cached = round(count * (prompt + output / 2))
        decode = costs.stage([Lane(rows=count, tokens=count, sequences=count, decoders=count, cached=cached)]).total
        tpot = decode / (1 - min(0.9, rate * prefill))
        rows = rate * output * tpot
    return Latency(prefill + tpot * min(1.0, rows) / 2, tpot)


def data_sheet(row: Measured, host_s: float) -> Latency:
    """Weights once a step at the sheet's bandwidth, prompts at its peak, and one host constant for both."""
    device, ranks = MACHINE.device, row.layout.devices * row.layout.stages
    weights = row.spec.parameters() * bytes_of(row.weights) / ranks / device.bandwidth
    prompt = 2.0 * row.spec.parameters() * float(row.load.prompt.mean()) / ranks / device.peak("bf16")
    return Latency(max(weights, prompt) + host_s, weights + host_s)


Predict = Callable[[Measured, Sequence[float]], Latency]
"""A row and a model's free constants to what it says."""


def with_constants(free: Sequence[float]) -> EngineConstants:
    step, sequence, layer, pace = free
    return replace(engine(ENGINE), host_step_s=step, host_sequence_s=sequence, eager_layer_s=layer, kernel_pace=pace)


START = (2e-3, 3e-4, 3e-4, 1.0)
LEVEL, WITHIN = np.array([0.04, 0.02]), np.array([0.02, 0.01])
"""How well (ttft, tpot) are expected to be met: the mean of a plan, whose errors are alike, and what is within it."""
STEP = 0.1
PACE_PRIOR = 0.1
"""The kernel model's own error, which keeps the pace near 1 where rows do not tell it from the host."""

MODELS: Mapping[str, tuple[Predict, tuple[float, ...]]] = {
    "simulation": (lambda row, free: simulated(row, with_constants(free)), START),
    "closed form": (lambda row, free: closed_form(row, with_constants(free)), START),
    "data sheet": (lambda row, free: data_sheet(row, free[0]), (5e-3,)),
}


def log_errors(rows: Sequence[Measured], predict: Predict, free: Sequence[float]) -> np.ndarray:
    """Log of predicted over measured: a row of (ttft, tpot) each."""
    return np.array([np.log(np.array(predict(row, free)) / np.array(row.latency)) for row in rows])


def fit(rows: Sequence[Measured], predict: Predict, start: Sequence[float], *, steps: int) -> list[float]:
    """The constants of least squared errors; errors of one plan go together, so its mean counts as one figure."""
    plans = np.array([row.plan for row in rows])

    def residuals(scale: np.ndarray) -> np.ndarray:
        errors = log_errors(rows, predict, (scale * start).tolist())
        found = [np.log(scale[3:]) / PACE_PRIOR]
        for plan in dict.fromkeys(plans.tolist()):
            own = errors[plans == plan]
            found += [own.mean(axis=0) / LEVEL, ((own - own.mean(axis=0)) / WITHIN / np.sqrt(len(own) / 2)).ravel()]
        return np.concatenate(found)

    scale = np.ones(len(start))
    for _ in range(steps):
        here = residuals(scale)
        slope = np.stack([(residuals(scale + step) - here) / STEP for step in STEP * np.eye(len(scale))], axis=1)
        scale = np.maximum(scale + np.linalg.lstsq(slope, -here, rcond=None)[0], 0.1)
    return [float(value) for value in scale * start]


def left_out(rows: Sequence[Measured], name: str, *, steps: int) -> dict[str, np.ndarray]:
    """Relative errors on each plan, with constants fitted on the others."""
    predict, start = MODELS[name]
    found = {}
    for plan in dict.fromkeys(row.plan for row in rows):
        free = fit([row for row in rows if row.plan != plan], predict, start, steps=steps)
        found[plan] = np.expm1(log_errors([row for row in rows if row.plan == plan], predict, free))
    return found


def slopes(rows: Sequence[Measured], tpot: Sequence[float]) -> dict[str, float]:
    """Of each plan: by how much time per token grows from the lowest to the highest rate of requests."""
    found = {}
    for plan in dict.fromkeys(row.plan for row in rows):
        by_rate: dict[float, list[float]] = {}
        for row, value in zip(rows, tpot, strict=True):
            if row.plan == plan:
                rate = len(row.load) / float(row.load.arrival_s[-1])
                by_rate.setdefault(round(np.log2(rate) * 2), []).append(value)
        if len(by_rate) > 1:
            found[plan] = float(np.mean(by_rate[max(by_rate)]) / np.mean(by_rate[min(by_rate)]) - 1)
    return found


def misranked(rows: Sequence[Measured], tpot: Sequence[float]) -> int:
    """Pairs of plans whose mean times per token stand the other way round."""
    plans = list(dict.fromkeys(row.plan for row in rows))
    mean = [
        [np.mean([v for r, v in zip(rows, values, strict=True) if r.plan == plan]) for plan in plans]
        for values in ([row.latency.tpot_s for row in rows], tpot)
    ]
    return sum((mean[0][a] < mean[0][b]) != (mean[1][a] < mean[1][b]) for a, b in combinations(range(len(plans)), 2))


def measure(quick: bool) -> list[Row]:
    rows = read(harness.options.data)
    groups: dict[tuple[str, str], list[Measured]] = {}
    for row in rows:
        groups.setdefault((row.model, row.weights), []).append(row)
    table: list[Row] = []
    for (model, weights), group in groups.items():
        table += compare(f"{model} {weights}", group, quick)
    if harness.options.constants:
        print("fitted on all rows:", fit(rows, *MODELS["simulation"], steps=3), file=sys.stderr)
    return table


def compare(name: str, rows: Sequence[Measured], quick: bool) -> list[Row]:
    """One row a figure of one model: constants of other plans (where there are three), and the product's own."""
    shipped = engine(ENGINE)
    free = (shipped.host_step_s, shipped.host_sequence_s, shipped.eager_layer_s, shipped.kernel_pace)
    kept = one_a_rate(rows) if quick else rows
    plans = list(dict.fromkeys(row.plan for row in kept))
    ordered = [row for plan in plans for row in kept if row.plan == plan]
    own = np.expm1(log_errors(ordered, MODELS["simulation"][0], free))
    found = judged(f"{name}, shipped constants", ordered, own, {})
    if len(plans) >= 3:
        errors = {m: np.concatenate(list(left_out(ordered, m, steps=2 if quick else 3).values())) for m in MODELS}
        found += judged(f"{name}, plan left out", ordered, errors.pop("simulation"), errors)
    return found


def one_a_rate(rows: Sequence[Measured]) -> list[Measured]:
    """The first row of each plan and rate."""
    first: dict[tuple[str, int], Measured] = {}
    for row in rows:
        first.setdefault((row.plan, round(2 * np.log2(len(row.load) / float(row.load.arrival_s[-1])))), row)
    return list(first.values())


def judged(name: str, rows: Sequence[Measured], errors: np.ndarray, nulls: Mapping[str, np.ndarray]) -> list[Row]:
    table = []
    for column, (what, goals) in enumerate((("ttft", TTFT_GOALS), ("tpot", TPOT_GOALS))):
        for each, goal, of in (("mean", goals[0], np.mean), ("worst", goals[1], np.max)):
            beside = "; ".join(f"{null} {of(np.abs(e[:, column])):.1%}" for null, e in nulls.items())
            ours = float(of(np.abs(errors[:, column])))
            table.append(
                Row(name=f"{name}: {what} {each}", ours=ours, unit="error", goal=goal, at_most=True, note=beside)
            )
    tpot = [row.latency.tpot_s * (1 + e) for row, e in zip(rows, errors[:, 1], strict=True)]
    real, said = slopes(rows, [row.latency.tpot_s for row in rows]), slopes(rows, tpot)
    if real:
        note = "; ".join(f"{plan} {said[plan]:+.1%} measured {real[plan]:+.1%}" for plan in real)
        worst = max(abs(said[plan] - real[plan]) for plan in real)
        table.append(
            Row(name=f"{name}: slope", ours=worst, unit="points/100", goal=SLOPE_GOAL, at_most=True, note=note)
        )
    pairs = float(misranked(rows, tpot))
    table.append(Row(name=f"{name}: misranked pairs", ours=pairs, unit="pairs", goal=0, at_most=True))
    return table


def add(parser: ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, default=Path("../shared/data/vllm_h100"))
    parser.add_argument("--constants", action="store_true", help="also print the constants fitted on all rows")


if __name__ == "__main__":
    sys.exit(harness.main(measure, __doc__ or "", add=add))
