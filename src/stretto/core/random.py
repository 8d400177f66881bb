"""Counter-based random numbers: a draw is a function of (seed, stream, index), so it is the same for any
order or thread count.

Philox4x32-10 of Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011;
vectorised in numpy and checked against the known answers of its authors.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

_MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
_WEYL = (np.uint32(0x9E3779B9), np.uint32(0xBB67AE85))
_LOW = np.uint64(0xFFFFFFFF)
_HIGH_SHIFT = np.uint64(32)
_ROUNDS = 10

Words = NDArray[np.uint32]


def philox(counter: ArrayLike, key: ArrayLike) -> Words:
    """Ten rounds of Philox on counters of shape [..., 4] with keys of shape [..., 2] (32-bit words); returns
    [..., 4].
    """
    c = np.asarray(counter, dtype=np.uint32)
    k = np.asarray(key, dtype=np.uint32)
    c0, c1, c2, c3 = (c[..., i] for i in range(4))
    k0, k1 = k[..., 0], k[..., 1]
    with np.errstate(over="ignore"):
        for _ in range(_ROUNDS):
            low, high = c0.astype(np.uint64) * _MULTIPLIERS[0], c2.astype(np.uint64) * _MULTIPLIERS[1]
            c0, c1, c2, c3 = (
                (high >> _HIGH_SHIFT).astype(np.uint32) ^ c1 ^ k0,
                (high & _LOW).astype(np.uint32),
                (low >> _HIGH_SHIFT).astype(np.uint32) ^ c3 ^ k1,
                (low & _LOW).astype(np.uint32),
            )
            k0, k1 = k0 + _WEYL[0], k1 + _WEYL[1]
    return np.stack(np.broadcast_arrays(c0, c1, c2, c3), axis=-1)


def words(seed: int, stream: int, index: ArrayLike) -> Words:
    """Four random 32-bit words for each 64-bit `index` of one stream of one seed; shape [*index.shape, 4].

    `stream` is taken modulo 2**64 and `seed` modulo 2**64: both may come from hashes.
    """
    i = np.asarray(index, dtype=np.uint64)
    counter = np.empty((*i.shape, 4), dtype=np.uint32)
    counter[..., 0] = (i & _LOW).astype(np.uint32)
    counter[..., 1] = (i >> _HIGH_SHIFT).astype(np.uint32)
    counter[..., 2] = stream & 0xFFFFFFFF
    counter[..., 3] = (stream >> 32) & 0xFFFFFFFF
    key = np.array([seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF], dtype=np.uint32)
    return philox(counter, key)


def uniform(seed: int, stream: int, index: ArrayLike) -> NDArray[np.float64]:
    """A number in [0, 1) with 53 random bits for each index of one stream of one seed; shape of `index`.

    >>> bool(uniform(7, 0, 3) == uniform(7, 0, [1, 2, 3])[2])
    True
    """
    w = words(seed, stream, index).astype(np.uint64)
    bits = (w[..., 0] << np.uint64(21)) ^ (w[..., 1] >> np.uint64(11))
    result: NDArray[np.float64] = bits.astype(np.float64) * 2.0**-53
    return result


def integers(seed: int, stream: int, index: ArrayLike, below: int) -> NDArray[np.int64]:
    """An integer in [0, below) for each index of one stream of one seed.

    Raises:
        ValueError: if `below` is not in 1 .. 2**31.
    """
    if not 1 <= below <= 2**31:
        raise ValueError(f"below is {below}; it must be in 1 .. 2**31")
    return np.floor(uniform(seed, stream, index) * below).astype(np.int64)
