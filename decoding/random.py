"""Randomness as a function: one uniform per (seed, position, purpose), whatever a request is batched with.

Knows: Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011).
Refuses to know: who draws, and what from.
"""

from __future__ import annotations

import numpy as np
from numpy import ndarray

DRAFT, ACCEPT, NEXT = 0, 1, 2  # purposes: draw of a draft token, its judgement, the token after the last accepted one
PURPOSES = 3

_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)
_MULTIPLIERS = np.array([0xD2511F53, 0xCD9E8D57], np.uint64)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def philox4x32(counter: ndarray, key: tuple[int, int]) -> ndarray:
    """Ten rounds of Philox-4x32. counter [4, ...] of 32-bit words in uint64; key two 32-bit words. Returns [4, ...]."""
    even, odd = counter[0::2], counter[1::2]  # words 0 and 2, words 1 and 3
    column = (2,) + (1,) * (counter.ndim - 1)
    multipliers = _MULTIPLIERS.reshape(column)
    for i in range(10):
        keys = np.array([(k + i * w) & 0xFFFFFFFF for k, w in zip(key, _WEYL)], np.uint64).reshape(column)
        product = (even * multipliers)[::-1]
        even, odd = (product >> _SHIFT) ^ odd ^ keys, product & _LOW
    return np.stack([even[0], odd[0], even[1], odd[1]])


def uniforms(seed: int, position: ndarray | int, purpose: ndarray | int) -> ndarray:
    """float32 uniforms of the broadcast shape of `position` and `purpose`: k * 2^-23, so 0 <= u <= 1 - 2^-23.

    seed: 0 .. 2^64-1 (the key). position: absolute position of the token that is drawn or judged, 0 .. 2^64-1.
    The counter is (position low, position high, purpose, 0); the first output word's upper 23 bits are used.
    u <= 1 - 2^-23 makes u * total < total in float32: an inverse CDF never runs past its end.
    """
    if not 0 <= seed < 1 << 64:
        raise ValueError(f"seed is {seed}; it must lie in 0..2^64-1.")
    position, purpose = np.asarray(position, np.uint64), np.asarray(purpose, np.uint64)
    counter = np.zeros((4, *np.broadcast_shapes(position.shape, purpose.shape)), np.uint64)
    counter[0], counter[1], counter[2] = position & _LOW, position >> _SHIFT, purpose
    word = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))[0]
    return (word >> np.uint64(9)).astype(np.float32) * np.float32(2.0**-23)
