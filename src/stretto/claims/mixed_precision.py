"""What COMET (ASPLOS 2025) states that can be counted or played here: bytes, whole numbers, schedules of tiles.

Its kernels' speeds on an A100 rest on 4-bit matrix units and conversion costs that nothing here is fitted to: they
are not played.
"""

from __future__ import annotations

from stretto.claims.registry import Figure, claim

INT8_SHARE = 0.25
"""Of the tiles in the publication's kernel study."""
CONSTANTS = {
    "cost of an 8-bit tile": "the publication: twice that of a 4-bit one",
    "share of 8-bit tiles": "the publication's kernel study: 25 %",
    "workers": "GA100 white paper (2020): 108 streaming multiprocessors",
}
WORKERS = 108


def _tiles() -> list[float]:
    """Costs of the tiles of 256 rows by 4,096 inner by 14,336 columns, 8-bit blocks first in each column."""
    blocks, columns = 4096 // 128, 2 * (14336 // 128)
    eights = round(INT8_SHARE * blocks)
    return [2.0 if tile % blocks < eights else 1.0 for tile in range(blocks * columns)]


def _over_w4a8(policy: str) -> Figure:
    from stretto.kernels.tiles import schedule

    costs = _tiles()
    all_eight = schedule(len(costs), [2.0] * len(costs), WORKERS, "naive").makespan
    found = schedule(len(costs), costs, WORKERS, policy).makespan  # type: ignore[arg-type]
    ideal = 2.0 / (1.0 + INT8_SHARE)
    return Figure(ours=all_eight / found, null=ideal, note="null: the mean cost, as if tiles could be cut at will")


@claim(
    system="comet",
    says="with tiles dealt out in turn, a barrier after each round, mixed tiles are 1.31 times as fast as 8-bit ones",
    kind="simulated",
    published=1.31,
    unit="x",
    setting="Llama-3-8B's products on an A100; which ones is not stated (taken: 256 rows by 4,096 by 14,336)",
    constants=CONSTANTS,
    tolerance=0.15,
    doubtful=True,
)
def dealt_in_turn(quick: bool) -> Figure:
    return _over_w4a8("naive")


@claim(
    system="comet",
    says="with 8-bit tiles spread evenly, 1.56 times",
    kind="simulated",
    published=1.56,
    unit="x",
    setting="as above",
    constants=CONSTANTS,
    tolerance=0.15,
    doubtful=True,
)
def spread_evenly(quick: bool) -> Figure:
    return _over_w4a8("remap")


@claim(
    system="comet",
    says="with idle workers taking slices of running tiles, 1.71 times",
    kind="simulated",
    published=1.71,
    unit="x",
    setting="as above",
    constants=CONSTANTS,
    tolerance=0.15,
    doubtful=True,
)
def taking_slices(quick: bool) -> Figure:
    return _over_w4a8("steal")


@claim(
    system="comet",
    says="a key or value in 4 bits takes 0.5625 bytes with groups of 64, so memory holds over 3.5 times bf16",
    kind="exact",
    published=None,
    setting="the cache of the CPU engine, SmolLM2-135M's heads",
)
def tokens_in_memory(quick: bool) -> Figure:
    from stretto.models.kv_packed import PAGE_TOKENS, page_bytes

    dim = 64
    a_value = page_bytes(dim) / (2 * dim * PAGE_TOKENS)
    return Figure(ours=a_value == 0.5625 and 2 / a_value > 3.5)


@claim(
    system="comet",
    says="no sum of a block of 128 overflows: the largest values come out to the last digit",
    kind="exact",
    published=None,
    setting="4-bit weights and 8-bit activations at their extremes, on the CPU kernels",
)
def sums_fit(quick: bool) -> Figure:
    import torch

    from stretto.kernels.packed import pack

    values = torch.full((16, 128), 15, dtype=torch.uint8)
    x = torch.full((1, 128), 127.0)
    found = pack(values, torch.ones(16, 1, dtype=torch.float16), bits=4).multiply(x, path="fast")
    return Figure(ours=bool((found == 128 * (15 - 8) * 127).all()))


@claim(
    system="comet",
    says="a tile's owner changes no sum: every schedule computes each slice of each tile once",
    kind="exact",
    published=None,
    setting="1 to 30 tiles of costs 1 and 2 on 1 to 5 workers, all four policies",
)
def schedules_cover(quick: bool) -> Figure:
    from stretto.kernels.tiles import POLICIES, schedule

    def sound(tiles: int, workers: int, policy: str) -> bool:
        costs = [2.0 if tile % 3 == 0 else 1.0 for tile in range(tiles)]
        found = schedule(tiles, costs, workers, policy, slices=4)  # type: ignore[arg-type]
        slices = sorted((p.tile, part) for p in found.pieces for part in range(p.first, p.last))
        return slices == [(tile, part) for tile in range(tiles) for part in range(4)]

    return Figure(ours=all(sound(t, w, p) for t in range(1, 31) for w in range(1, 6) for p in POLICIES))
