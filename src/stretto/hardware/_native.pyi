import numpy as np
from numpy.typing import NDArray

def best_level() -> str: ...
def read(level: str, words: NDArray[np.uint64], repeats: int, threads: int) -> tuple[float, int]: ...
def copy(level: str, source: NDArray[np.uint64], target: NDArray[np.uint64], repeats: int, threads: int) -> float: ...
def tile_fp32(
    level: str,
    a: NDArray[np.float32],
    b: NDArray[np.float32],
    c: NDArray[np.float32],
    repeats: int,
    threads: int,
) -> float: ...
def tile_bf16(
    level: str,
    a: NDArray[np.uint16],
    b: NDArray[np.uint16],
    c: NDArray[np.float32],
    repeats: int,
    threads: int,
) -> float: ...
def tile_int8(
    level: str,
    a: NDArray[np.uint8],
    b: NDArray[np.int8],
    c: NDArray[np.int32],
    repeats: int,
    threads: int,
) -> float: ...
def has_amx() -> bool: ...
def amx_bf16(
    a: NDArray[np.uint16],
    b: NDArray[np.uint16],
    c: NDArray[np.float32],
    repeats: int,
    threads: int,
) -> float: ...
def amx_int8(
    a: NDArray[np.uint8],
    b: NDArray[np.int8],
    c: NDArray[np.int32],
    repeats: int,
    threads: int,
) -> float: ...
def stolen_share(seconds: float) -> float: ...
def wake(rounds: int) -> float: ...
def shared_message(bytes: int, rounds: int, limit_s: float) -> float: ...  # noqa: A002
