import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]
Floats = NDArray[np.float64]
Flight = tuple[int, int, int, bool, float, list[float]]

class Rollouts:
    def __init__(
        self,
        parents: NDArray[np.uint64],
        law_ptr: NDArray[np.int64],
        latency: Floats,
        success: NDArray[np.uint64],
        cost: Floats,
        reserve: Floats,
        levels: Ints,
        realised: bool,
        first: bool,
        refund: float,
    ) -> None: ...
    def wins(
        self,
        done: int,
        time: float,
        money: float,
        flights: list[Flight],
        actions: Ints,
        action: Ints,
        continuation: Ints,
        seed: int,
        start: int,
        count: int,
        threads: int,
    ) -> Ints: ...
    def outcomes(
        self,
        done: int,
        time: float,
        money: float,
        flights: list[Flight],
        action: Ints,
        continuation: int,
        seed: int,
        start: int,
        count: int,
    ) -> tuple[NDArray[np.uint8], Floats, Floats]: ...
