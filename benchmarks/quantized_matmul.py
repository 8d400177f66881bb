"""Products with packed 4-bit weights beside torch's own: bf16, fp32, int4 weights, dynamic int8.

Layers of a Llama of 7 B at 1 to 256 rows, weights rotated over at least 256 MB so that they come from memory, all
contenders on the same pinned threads, round by round in turn; the fastest call counts, on both sides. The roofline is
what anything reached in the same run (the probe's loops: streamed reads, tiles in bf16 and int8; and the contenders
themselves), laid on each product by `kernels.roofline`. Goals: at 1 row 5 times torch bf16 and 80 % of the roofline;
at 8 to 32 rows 1.5 times torch's int4 (bf16 and fast), 60 % (bf16) and 50 % (fast, groups of 32) of the roofline;
never under 0.9 of torch bf16 (bf16); packing 200 MB of fp32 a second on one core; 0.27 of the bytes of bf16. Order-
invariance is built in, so what it costs cannot be switched off and measured; it is held against the order it forbids,
the inner dimension in two halves whose sums are added, on one thread: at most 3 % slower.

Usage: python benchmarks/quantized_matmul.py [--json] [--quick] [--threads N]
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

os.environ.setdefault("OMP_PROC_BIND", "true")
os.environ.setdefault("OMP_PLACES", "cores")

import torch
from torch import nn

import harness
from stretto.hardware import _native, probe
from stretto.hardware.device import Device
from stretto.kernels.linear import QuantLinear, round_to_nearest
from stretto.kernels.packed import PackedMatrix, Path, pack
from stretto.kernels.roofline import bytes_per_weight, plan

LAYERS = ((4096, 4096), (4096, 11008))
ROWS = (1, 8, 16, 32, 64, 128, 256)
ROTATED = 256 << 20
GROUP = 128
GOAL_BF16_ONE_ROW, GOAL_INT4, GOAL_NEVER_BELOW = 5.0, 1.5, 0.9
GOAL_ROOFLINE_ONE_ROW = 0.8
GOAL_ROOFLINE: Mapping[str, float] = {"bf16": 0.6, "fast32": 0.5}
GOAL_PACK_MB_S, GOAL_BYTES, GOAL_INVARIANCE = 200.0, 0.27, 1.03
FEW = (8, 16, 32)
OURS: Mapping[str, tuple[Path, int]] = {
    "exact": ("exact", GROUP),
    "bf16": ("bf16", GROUP),
    "fast": ("fast", GROUP),
    "fast32": ("fast", 32),
}

Run = Callable[[int, torch.Tensor], torch.Tensor]


@dataclass
class Contender:
    """One way to compute a layer: `run(copy, x)` over so many copies of its weights."""

    name: str
    copies: int
    dtype: torch.dtype
    run: Run
    turn: int = 0
    best: dict[int, float] = field(default_factory=dict)
    spread: dict[int, float] = field(default_factory=dict)

    def seconds(self, x: torch.Tensor, calls: int) -> float:
        """The fastest of so many calls, each on the next copy: a call that lost its core does not count."""
        fastest = float("inf")
        for _ in range(calls):
            start = time.perf_counter()
            self.run(self.turn, x)
            fastest = min(fastest, time.perf_counter() - start)
            self.turn = (self.turn + 1) % self.copies
        return fastest


def copies_of(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Enough equal tensors that together no cache holds."""
    count = max(2, -(-ROTATED // (tensor.numel() * tensor.element_size())))
    return [tensor.clone() for _ in range(count)]


def ours(weight: torch.Tensor, threads: int) -> Iterator[Contender]:
    packed: dict[tuple[int, bool], list[PackedMatrix]] = {}
    for name, (path, group) in OURS.items():
        key = (group, path == "bf16")  # whose weights are on a grid, as the fused decoder has them
        if key not in packed:
            values, scales, _ = round_to_nearest(weight, group, 4)
            matrix = pack(values, scales, bits=4)
            if path == "bf16":
                matrix = matrix.on_grid()
            packed[key] = [replace(matrix, data=data) for data in copies_of(matrix.data)]

        def run(copy: int, x: torch.Tensor, path: Path = path, key: tuple[int, bool] = key) -> torch.Tensor:
            return packed[key][copy].multiply(x, path=path, threads=threads)

        yield Contender(name, len(packed[key]), torch.float32, run)


def plain(weight: torch.Tensor, name: str, dtype: torch.dtype) -> Contender:
    weights = copies_of(weight.to(dtype))
    return Contender(name, len(weights), dtype, lambda copy, x: nn.functional.linear(x, weights[copy]))


def int4(weight: torch.Tensor) -> Contender:
    """torch's own 4-bit weights, with groups as ours and activations in bf16."""
    values, scales, _ = round_to_nearest(weight, GROUP, 4)
    weights = copies_of(torch.ops.aten._convert_weight_to_int4pack_for_cpu(values.int(), 1))
    numbers = torch.stack([scales, torch.zeros_like(scales)], dim=-1).transpose(0, 1).bfloat16().contiguous()
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    return Contender(
        "torch int4", len(weights), torch.bfloat16, lambda copy, x: multiply(x, weights[copy], GROUP, numbers)
    )


def int8(weight: torch.Tensor) -> Contender:
    """torch's dynamic quantisation: weights of 8 bits a channel, activations made 8 bits in each call."""
    known = torch.backends.quantized.supported_engines
    torch.backends.quantized.engine = "x86" if "x86" in known else "onednn"
    scales = weight.abs().amax(1).double() / 127
    zeros = torch.zeros(len(weight), dtype=torch.int64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the rival is what torch has deprecated and not yet replaced
        quantized = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
    count = max(2, -(-ROTATED // weight.numel()))
    weights = [torch.ops.quantized.linear_prepack(quantized, None) for _ in range(count)]
    multiply = torch.ops.quantized.linear_dynamic
    return Contender("torch int8", count, torch.float32, lambda copy, x: multiply(x, weights[copy], False))


def timed(contenders: Sequence[Contender], inner: int, rows: Sequence[int], rounds: int) -> None:
    """Fill in each contender's best seconds by rows, and how far the middle round is from the best."""
    for m in rows:
        x = torch.randn(m, inner, generator=torch.Generator().manual_seed(m))
        inputs = {dtype: x.to(dtype) for dtype in (torch.float32, torch.bfloat16)}
        found: dict[str, list[float]] = {}
        calls = {c.name: max(1, round(0.02 / c.seconds(inputs[c.dtype], 2))) for c in contenders}
        for _ in range(rounds):
            for c in contenders:
                found.setdefault(c.name, []).append(c.seconds(inputs[c.dtype], calls[c.name]))
        for c in contenders:
            each = sorted(found[c.name])
            c.best[m], c.spread[m] = each[0], each[len(each) // 2] / each[0] - 1


def measured_roofline(threads: int) -> Device:
    """This machine's bandwidth and peaks as they are now."""
    fastest = probe._Fastest(3.0)
    level = _native.best_level()
    words = probe._aligned(probe.FOOTPRINTS[-1]).view("uint64")
    read_s = fastest(functools.partial(probe._read_seconds, level, words, threads))
    peaks = {dtype: probe._peak(fastest, dtype, level, threads) for dtype in ("fp32", "bf16", "int8")}
    return Device(
        name="this machine, now",
        kind="cpu",
        memory_bytes=1e9,
        bandwidth=words.nbytes / read_s,
        peak_flops=peaks,
        units=threads,
    )


def better(one: Device, other: Device) -> Device:
    """The larger of each figure: what the machine can do, not what others left of it."""
    peaks = {dtype: max(one.peak(dtype), other.peak(dtype)) for dtype in one.peak_flops}
    bandwidth = max(one.bandwidth, other.bandwidth)
    return Device(name=one.name, kind="cpu", memory_bytes=1e9, bandwidth=bandwidth, peak_flops=peaks, units=one.units)


def reached(device: Device, inner: int, columns: int, contenders: Sequence[Contender]) -> Device:
    """`device`, or where a contender was faster than the probe's loops what that one reached."""
    types = {"torch bf16": "bf16", "torch fp32": "fp32", "torch int8": "int8", "fast": "int8"}
    peaks, bandwidth = dict(device.peak_flops), device.bandwidth
    for c in contenders:
        dtype = types.get(c.name)
        if dtype is not None:
            fastest = max(2.0 * m * inner * columns / seconds for m, seconds in c.best.items())
            peaks[dtype] = max(peaks[dtype], fastest)
        if c.name in OURS:
            held = bytes_per_weight(4, OURS[c.name][1]) * inner * columns
            bandwidth = max(bandwidth, held / c.best[1])
    return Device(
        name=device.name, kind="cpu", memory_bytes=1e9, bandwidth=bandwidth, peak_flops=peaks, units=device.units
    )


def layer_rows(
    inner: int, columns: int, rows: Sequence[int], contenders: Mapping[str, Contender], device: Device
) -> Iterator[harness.Row]:
    """What has a goal in a row of its own; all else in the note of the share of the roofline."""
    where = f"{inner} x {columns}"
    peers = [c for c in contenders.values() if c.name not in OURS]
    for m in rows:
        for name, (path, group) in OURS.items():
            own = contenders[name]
            bound = plan(m, inner, columns, device, group=group, path=path)
            told = ", ".join(f"{peer.best[m] / own.best[m]:.2f} of {peer.name}" for peer in peers)
            yield harness.Row(
                name=f"{where}, {m} rows: {name}, share of the roofline",
                ours=bound.packed_s / own.best[m],
                unit="",
                goal=GOAL_ROOFLINE_ONE_ROW if m == 1 else GOAL_ROOFLINE.get(name) if m in FEW else None,
                spread=own.spread[m],
                note=f"{own.best[m] * 1e3:.3g} ms, bound by {bound.bound}, knee at {bound.knee:.1f} rows; speed {told}",
            )
            for peer in peers:
                goal = _goal(name, peer.name, m)
                if goal is not None:
                    yield harness.Row(
                        name=f"{where}, {m} rows: {name} over {peer.name}",
                        ours=own.best[m] * 1e3,
                        peer=peer.best[m] * 1e3,
                        unit="ms",
                        ratio=peer.best[m] / own.best[m],
                        goal=goal,
                        spread=own.spread[m],
                    )


def _goal(name: str, peer: str, m: int) -> float | None:
    if peer == "torch bf16" and m == 1:
        return GOAL_BF16_ONE_ROW
    if peer == "torch bf16" and name == "bf16":
        return GOAL_NEVER_BELOW
    if peer == "torch int4" and name in ("bf16", "fast") and m in FEW:
        return GOAL_INT4
    return None


def pack_row(weight: torch.Tensor, rounds: int) -> harness.Row:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        QuantLinear.from_linear(linear, group=GROUP)
        seconds.append(time.perf_counter() - start)
    torch.set_num_threads(threads)
    megabytes = weight.numel() * 4 / 1e6
    note = "rounding to nearest and packing, of fp32 weights"
    return harness.Row(
        name="packing, one core", ours=megabytes / min(seconds), unit="MB/s", goal=GOAL_PACK_MB_S, note=note
    )


def bytes_row(weight: torch.Tensor) -> harness.Row:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    held = sum(buffer.untyped_storage().nbytes() for buffer in QuantLinear.from_linear(linear).buffers())
    share = held / (weight.numel() * 2)
    return harness.Row(name="bytes held, of those of bf16", ours=share, unit="", goal=GOAL_BYTES, at_most=True)


def invariance_row(weight: torch.Tensor, m: int, rounds: int) -> harness.Row:
    """One order of sums beside two halves of it, on one thread, the weights rotated."""
    inner = weight.shape[1]

    def packed(part: torch.Tensor) -> list[PackedMatrix]:
        values, scales, _ = round_to_nearest(part.contiguous(), GROUP, 4)
        matrix = pack(values, scales, bits=4)
        return [PackedMatrix(data, matrix.columns, matrix.length, GROUP, 4, False) for data in copies_of(matrix.data)]

    whole, halves = packed(weight), [packed(half) for half in weight.chunk(2, dim=1)]
    x = torch.randn(m, inner)
    x_halves = [half.contiguous() for half in x.chunk(2, dim=1)]

    def split(copy: int, x: torch.Tensor) -> torch.Tensor:
        first, second = (part[copy].multiply(own) for part, own in zip(halves, x_halves, strict=True))
        return first.add_(second)

    contenders = [
        Contender("one order", len(whole), torch.float32, lambda copy, x: whole[copy].multiply(x)),
        Contender("two halves", len(halves[0]), torch.float32, split),
    ]
    timed(contenders, inner, (m,), rounds)
    one, two = (c.best[m] for c in contenders)
    return harness.Row(
        name=f"one order of sums, {m} rows: seconds over those of two halves",
        ours=one / two,
        unit="",
        goal=GOAL_INVARIANCE,
        at_most=True,
    )


def measure(quick: bool) -> Sequence[harness.Row]:
    threads = harness.options.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    layers, rows, rounds = (LAYERS[:1], (1, 8, 32), 3) if quick else (LAYERS, ROWS, 7)
    found: list[harness.Row] = []
    for inner, columns in layers:
        weight = torch.randn(columns, inner, generator=torch.Generator().manual_seed(0))
        before = measured_roofline(threads)
        contenders = [
            *ours(weight, threads),
            plain(weight, "torch bf16", torch.bfloat16),
            plain(weight, "torch fp32", torch.float32),
            int4(weight),
            int8(weight),
        ]
        timed(contenders, inner, rows, rounds)
        device = reached(better(before, measured_roofline(threads)), inner, columns, contenders)
        found.extend(layer_rows(inner, columns, rows, {c.name: c for c in contenders}, device))
        found.append(
            harness.Row(
                name=f"{inner} x {columns}: bandwidth of the roofline",
                ours=device.bandwidth / 1e9,
                unit="GB/s",
                goal=None,
                note=", ".join(f"{dtype} {peak / 1e9:.0f} GFLOP/s" for dtype, peak in device.peak_flops.items())
                + f"; {threads} threads",
            )
        )
        del contenders
    weight = torch.randn(LAYERS[0][1], LAYERS[0][0])
    found += [pack_row(weight, rounds), bytes_row(weight)]
    found += [invariance_row(weight, m, rounds) for m in ((1,) if quick else (1, 16))]
    return found


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=int, help="of all contenders; all cores by default")


if __name__ == "__main__":
    sys.exit(harness.main(measure, __doc__, add=add_options))
