"""What MARLIN (2024) states of its kernel, from the striped partition here and the cost model fitted on other kernels.

The published figures are speed-ups over a product in fp16, read off plots to about 0.05. Both products take what they
read or what they compute, whichever is longer, after a launch; the share of the bandwidth and the launch are those of
`hardware.kernel_model`, fitted on an A100's kernels. The packed one waits for its longest stripe besides and adds up
partial sums, as `kernels.stripes` deals them out.
"""

from __future__ import annotations

from collections.abc import Sequence

from stretto.claims.registry import Figure, claim

GROUP = 128
CONSTANTS = {
    "bandwidth, FLOP/s": "catalog a10, rtx-3090: NVIDIA data sheets and the GA102 white paper (2021)",
    "kernel model": "hardware/fitted.yaml: fitted on an A100's kernels, not on this table",
    "layer shapes": "the publication's: hidden h, MLP f: h to 3h, h to h, h to 2f, f to h",
}
ROOFLINE = "null: the roofline of the data sheet"
LARGE = [(18432, 73728)]
SEVEN = (4096, 10752)
SIXTY_FIVE = (8192, 21760)


def _layers(widths: tuple[int, int]) -> list[tuple[int, int]]:
    """(inner, columns) of a layer's products."""
    hidden, ffn = widths
    return [(hidden, 3 * hidden), (hidden, hidden), (hidden, 2 * ffn), (ffn, hidden)]


def _speedup(rows: int, shapes: Sequence[tuple[int, int]], device_name: str) -> tuple[float, float]:
    """By the model, and by the roofline."""
    from stretto.hardware import catalog
    from stretto.hardware.kernel_model import fitted
    from stretto.kernels.roofline import bytes_per_weight, plan
    from stretto.kernels.stripes import BLOCK_ROWS, plan_stripes, tile_shape

    device, constants = catalog.device(device_name), fitted("gpu")

    launch_s = constants.launch_s + constants.matmul_setup_s
    plain = packed = plain_bound = packed_bound = 0.0
    for inner, columns in shapes:
        stripes = plan_stripes(rows, inner, columns, workers=device.units, group=GROUP)
        wait = stripes.length * device.units / stripes.tiles  # the longest stripe over the mean
        partial = 4.0 * min(rows, BLOCK_ROWS) * tile_shape(rows)[1] * stripes.exchanges  # written and read, in fp16

        def seconds(weight_bytes: float, extra: float, inner: int = inner, columns: int = columns) -> float:
            moved = weight_bytes * inner * columns + 2.0 * rows * (inner + columns) + extra
            reading = moved / (device.bandwidth * constants.bandwidth["matmul"])
            return max(reading, 2.0 * rows * inner * columns / device.peak("fp16"))

        plain += launch_s + seconds(2.0, 0.0)
        packed += launch_s + wait * seconds(bytes_per_weight(4, GROUP), partial)
        bound = plan(rows, inner, columns, device, group=GROUP, dtype="fp16")
        plain_bound += bound.plain_s
        packed_bound += bound.packed_s
    return plain / packed, plain_bound / packed_bound


def _figure(rows: int, shapes: Sequence[tuple[int, int]], device: str) -> Figure:
    ours, bound = _speedup(rows, shapes, device)
    return Figure(ours=ours, null=bound, note=ROOFLINE)


@claim(
    system="marlin",
    says="one row times a large matrix is 3.87 times as fast as in fp16 on an A10",
    kind="simulated",
    published=3.87,
    unit="x",
    setting="18,432 by 73,728, groups of 128, one row, A10",
    constants=CONSTANTS,
    tolerance=0.05,
)
def one_row(quick: bool) -> Figure:
    return _figure(1, LARGE, "a10")


@claim(
    system="marlin",
    says="32 rows times a large matrix are 3.82 times as fast as in fp16 on an A10",
    kind="simulated",
    published=3.82,
    unit="x",
    setting="18,432 by 73,728, groups of 128, 32 rows, A10",
    constants=CONSTANTS,
    tolerance=0.08,
)
def thirty_two_rows(quick: bool) -> Figure:
    return _figure(32, LARGE, "a10")


@claim(
    system="marlin",
    says="128 rows times a large matrix are 1.56 times as fast as in fp16 on an A10",
    kind="simulated",
    published=1.56,
    unit="x",
    setting="18,432 by 73,728, groups of 128, 128 rows, A10",
    constants=CONSTANTS,
    tolerance=0.15,
)
def many_rows(quick: bool) -> Figure:
    return _figure(128, LARGE, "a10")


@claim(
    system="marlin",
    says="the layers of a 7B model are 3.69 times as fast at batch 16 on an A10",
    kind="simulated",
    published=3.69,
    unit="x",
    setting="h 4,096, f 10,752, groups of 128, 16 rows, A10",
    constants=CONSTANTS,
    tolerance=0.08,
)
def seven_billion(quick: bool) -> Figure:
    return _figure(16, _layers(SEVEN), "a10")


@claim(
    system="marlin",
    says="the layers of a 65B model are 3.84 times as fast at batch 16 on an A10",
    kind="simulated",
    published=3.84,
    unit="x",
    setting="h 8,192, f 21,760, groups of 128, 16 rows, A10",
    constants=CONSTANTS,
    tolerance=0.08,
)
def sixty_five_billion(quick: bool) -> Figure:
    return _figure(16, _layers(SIXTY_FIVE), "a10")


@claim(
    system="marlin",
    says="the layers of a 7B model are 3.60 times as fast at batch 16 on a GeForce RTX 3090",
    kind="simulated",
    published=3.60,
    unit="x",
    setting="h 4,096, f 10,752, groups of 128, 16 rows, RTX 3090",
    constants=CONSTANTS,
    tolerance=0.08,
)
def seven_billion_on_a_3090(quick: bool) -> Figure:
    return _figure(16, _layers(SEVEN), "rtx-3090")


@claim(
    system="marlin",
    says="a packed matrix takes half a byte a weight and two bytes a group, and nothing else",
    kind="exact",
    published=None,
    setting="all widths and groups of the tests, on the CPU kernels",
)
def bytes_are_counted(quick: bool) -> Figure:
    from stretto.kernels.packed import packed_bytes

    shapes = [(16, 128, 128), (64, 576, 32), (1536, 576, 64), (4096, 4096, 128)]
    found = [packed_bytes(columns, inner, group, 4, False) for columns, inner, group in shapes]
    return Figure(ours=found == [c * i // 2 + 2 * c * i // g for c, i, g in shapes])


@claim(
    system="marlin",
    says="a product over P workers hands on at most P - 1 partial sums, and each tile is one worker's",
    kind="exact",
    published=None,
    setting="1 to 40 workers, 1 to 12 slices of 1 to 12 tiles",
)
def stripes_hand_on_little(quick: bool) -> Figure:
    from stretto.kernels.stripes import Stripes

    def sound(workers: int, slices: int, tiles: int) -> bool:
        stripes = Stripes(inner_tiles=tiles, slices=slices, workers=workers)
        owned = [tile for worker in range(workers) for tile in stripes.stripe(worker)]
        return stripes.exchanges <= workers - 1 and owned == list(range(tiles * slices))

    found = [sound(p, s, t) for p in range(1, 41) for s in range(1, 13) for t in range(1, 13)]
    return Figure(ours=all(found))
