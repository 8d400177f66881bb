import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]
Longs = NDArray[np.int64]
Floats = NDArray[np.float64]

def play_static(
    seconds: Floats, lane_ptr: Longs, lanes: Ints, after_ptr: Longs, after: Ints, widths: Ints
) -> tuple[Floats, Floats, Ints, Ints]: ...
def play_events(
    seconds: Floats,
    lane_ptr: Longs,
    lanes: Ints,
    after_ptr: Longs,
    after: Ints,
    widths: Ints,
    by_priority: NDArray[np.uint8],
    priority: Floats,
    use_ptr: Longs,
    use: Ints,
    amount: Floats,
    weight: Floats,
    kind: Ints,
    fluid: Fluid,
) -> tuple[Floats, Floats, Ints, Ints]: ...
def slots(start: Floats, finish: Floats) -> Ints: ...

class Fluid:
    def __init__(
        self, capacity: list[float], rows: list[tuple[list[int], list[float]]] | None, kinds: list[str]
    ) -> None: ...
    def start(self, work: float, use: list[tuple[int, float]], peak: float, weight: float, kind: int) -> int: ...
    def next_completion(self) -> tuple[float, int] | None: ...
    def advance(self, to: float) -> list[int]: ...
    def cancel(self, task: int) -> float: ...
    def rate(self, task: int) -> float: ...
    def in_use(self, resource: int) -> float: ...
    @property
    def now(self) -> float: ...
    def __len__(self) -> int: ...
